"""benchmarks/fidelity without its model: selections against the operator, measures with known values, and what reads a
model with one of two layers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hisa_compile
from benchmarks.fidelity import capture, distil, language, measures, model, needles, sources
from benchmarks.fidelity.indexers import Distilled, rotate, train_step
from benchmarks.fidelity.overlap import Setting, gaussian, methods
from benchmarks.fidelity.selections import (
    OPTIONS,
    PAPER,
    Scored,
    flat,
    kept_blocks,
    pooled,
    probe,
    sampled,
    scored,
    seen,
    threshold,
)
from benchmarks.fidelity.tail import Prefix


def drawn(seed: int, queries: int = 7, tokens: int = 256, heads: int = 3, dim: int = 8) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, dim, generator=generator)
    k = torch.randn(tokens, dim, generator=generator)
    w = torch.randn(queries, heads, generator=generator)
    return scored(q, k, w, torch.randint(0, tokens, (queries,), generator=generator))


def chosen(of: Scored, topk: int, **budget: Any) -> torch.Tensor:
    """The operator's selection as bool [N, T]."""
    ends = of.positions[None].int() + 1
    index, scores = hisa_compile.indexer_topk(of.q[None], of.k[None], of.w[None], topk, window_end=ends, **budget)
    taken = torch.zeros(of.scores.shape, dtype=torch.bool)
    return taken.scatter_(1, index[0].long(), scores[0] > -torch.inf)


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_option_and_flat_are_the_operators(seed: int) -> None:
    # So many heads that no score is 0: the order of equal ones is the operator's affair.
    of = drawn(seed, heads=16)
    of = scored(of.q, of.k, of.w, 128 + of.positions // 2)
    assert torch.equal(PAPER.select(of, 16, 64, 24), chosen(of, 24, block_size=16, block_topk=4, coarse="paper"))
    assert torch.equal(flat(of, 24), chosen(of, 24, block_size=16, block_topk=16))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
@pytest.mark.parametrize("seed", range(2))
def test_every_option_keeps_to_its_budget_and_the_ends(option: object, seed: int) -> None:
    assert isinstance(option, type(PAPER))
    of = drawn(seed)
    kept = option.candidates(of, 16, 64, 24)
    assert (kept.sum(1) <= 64).all()
    fine = 16 // option.finer
    last = of.positions // fine * fine
    assert kept[:, :fine].all(), "the first block"
    assert kept.gather(1, last[:, None]).all(), "the block of the query"
    selected = option.select(of, 16, 64, 24)
    assert not (selected & (of.scores == -torch.inf)).any()
    # Where all blocks fit nothing is lost.
    few = of._replace(positions=of.positions.clamp_max(63))
    few = scored(few.q, few.k, few.w, few.positions)
    assert torch.equal(option.select(few, 16, 64, 24), flat(few, 24))


def test_a_probe_of_one_head_is_its_score() -> None:
    of = drawn(0, heads=1)
    positive = of._replace(w=of.w.abs())
    found, real = probe(positive), scored(positive.q, positive.k, positive.w, positive.positions).scores
    assert torch.allclose(found[real > 0], real[real > 0])
    assert (found[real == 0] == 0).all()
    negative = of._replace(w=-of.w.abs())
    below = scored(negative.q, negative.k, negative.w, negative.positions).scores
    assert torch.allclose(probe(negative)[(below < 0) & below.isfinite()], below[(below < 0) & below.isfinite()])


def test_pools_of_known_scores() -> None:
    """Two tokens are to be selected: the second greatest, 3, is the threshold."""
    tokens = torch.tensor([[1.0, 12.0, 3.0, 2.0, 2.5, 0.0, -1.0, -2.0]])
    assert threshold(tokens, 2).tolist() == [[3.0]]
    assert pooled(tokens, 2, 2, "max").tolist() == [[12.0, 3.0, 2.5, -1.0]]
    assert pooled(tokens, 2, 2, "sum").tolist() == [[9.0, 0.0, -0.5, -4.0]]
    assert pooled(tokens, 2, 2, "root").tolist() == [[3.0, 0.0, -0.5, -4.0]]
    # The operator's, for four: the sixth, 0, is the threshold, the third, 2.5, cut to 2, the cap.
    assert pooled(tokens, 2, 4, "capped").tolist() == [[3.0 + 12 / 2, 4.0 + 3 / 2, 2.0 + 2.5 / 2, -1.0]]


@pytest.mark.parametrize(("tokens", "topk"), [(8192, 512), (8192, 128), (4096, 2048), (100, 3), (1000, 40)])
def test_a_sample_is_spread_and_finds_about_the_right_token(tokens: int, topk: int) -> None:
    at = sampled(tokens, topk)
    stride = max(1, topk // 16)
    assert torch.equal(at[:-1] // stride, torch.arange(len(at) - 1))
    assert at.max() < tokens
    scores = torch.randn(64, tokens, generator=torch.Generator().manual_seed(0))
    low = threshold(scores, topk)
    reached = (scores >= low).sum(1).double().mean().item()
    assert topk * 0.8 <= reached <= topk * 1.2


@pytest.mark.parametrize("name", [name for name in methods() if name != "random tokens"])
def test_indexers_asked_at_once_choose_what_each_chooses(name: str) -> None:
    """Random tokens are others then."""
    alone = [drawn(seed, tokens=512)._replace(positions=torch.arange(505, 512)) for seed in range(4)]
    alone = [scored(*of[:4]) for of in alone]
    q, k, w = (torch.stack([of[part] for of in alone]).unflatten(0, (2, 2)) for part in range(3))
    at_once = scored(q, k, w, alone[0].positions)
    found = methods()[name](at_once, 256, 64).expand(at_once.scores.shape).flatten(0, 1)
    for one, of in zip(found, alone, strict=True):
        # Sums of other shapes can differ in the last bit, and a token in the last place with them.
        assert (one ^ methods()[name](of, 256, 64)).sum() <= 4


def test_the_first_and_last_block_are_kept_and_none_behind() -> None:
    scores = torch.tensor([[0.0, 5.0, 9.0, 1.0, 7.0]])
    assert kept_blocks(scores, torch.tensor([13]), 4, 3).tolist() == [[True, False, True, True, False]]


def test_measures_of_known_selections() -> None:
    reference = torch.tensor([[True, True, False, False], [True, False, False, True]])
    selected = torch.tensor([[True, False, True, False], [True, False, False, True]])
    attended = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]])
    lost = measures.loss(selected, reference, attended)
    assert lost.iou.tolist() == pytest.approx([1 / 3, 1.0])
    assert lost.found.tolist() == [0.5, 1.0]
    assert lost.mass.tolist() == pytest.approx([0.6, 0.5])
    assert lost.flat_mass.tolist() == pytest.approx([0.8, 0.5])
    whole = measures.summary([lost])
    assert whole.iou == pytest.approx(2 / 3)
    assert whole.worst_iou == pytest.approx(1 / 3)
    assert whole.lost == pytest.approx(0.1)


def test_attention_is_the_models() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(3, 2, 8, generator=generator), torch.randn(5, 8, generator=generator)
    positions = torch.tensor([0, 2, 4])
    found = measures.attention(q, k, positions)
    for row, position in enumerate(positions.tolist()):
        weights = ((q[row] @ k[: position + 1].T) / 8**0.5).softmax(-1).mean(0)
        assert torch.allclose(found[row, : position + 1], weights, atol=1e-6)
        assert (found[row, position + 1 :] == 0).all()


def test_rotation_keeps_products_of_equal_distance() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 64, generator=generator)
    turned = [rotate(torch.stack([a, b]), torch.tensor([at, at + 9])) for at in (0, 500)]
    assert (turned[0][0] @ turned[0][1]).item() == pytest.approx((turned[1][0] @ turned[1][1]).item(), rel=1e-4)
    assert not torch.allclose(turned[0][1], torch.stack([a, b])[1])


def test_training_brings_an_indexer_nearer_to_the_attention() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(96, 576)
    positions = torch.arange(32, 96)
    attended = torch.zeros(64, 96)
    attended[torch.arange(64), torch.arange(64) // 4] = 1.0
    indexer = Distilled()
    optimizer = torch.optim.AdamW(indexer.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = train_step(indexer, hidden, positions, attended)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_keys_of_a_later_part_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    indexer, hidden = Distilled(), torch.randn(20, 576)
    whole = indexer.of_keys(hidden)
    assert torch.allclose(whole, torch.cat([indexer.of_keys(hidden[:13]), indexer.of_keys(hidden[13:], 13)]), atol=1e-6)


def test_facts_are_hidden_and_asked_for_in_other_words_than_needles() -> None:
    ids, asked_for = distil.asking(Letters(), torch.full((1, 4000), ord("#")), 3)
    assert ids.shape == (1, 4000)
    text = "".join(map(chr, ids[0].tolist()))
    body, end = text[:-asked_for], text[-asked_for:]
    facts = end.strip("\n").split("\n\n")
    assert len(facts) == distil.FACTS
    assert all(body.count(f"\n\n{fact}.\n\n") == 1 for fact in facts)
    assert "#" not in end
    assert "number" not in text
    assert not any(city in text for city in needles.CITIES)
    one, again, other = (distil.asking(Letters(), torch.zeros(1, 4000), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_training_has_a_finite_loss() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, q, k = (torch.randn(*shape, 64, generator=generator) for shape in ((300, 9), (9, 300), (3, 300)))
    document = distil.Document(hidden.flatten(1).half(), q.half(), k.half(), 50)
    _, loss = distil.train([document], 3, "cpu")
    assert 0 < loss < 100


# ---- with a model of two layers and random weights ---------------------------------------------------------------

IDS = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(3))
LAST = 24
END = IDS[:, -LAST:]


@pytest.fixture(scope="module")
def lm() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(model.architecture(layers=2, vocabulary=97)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prefix(lm: transformers.LlamaForCausalLM) -> Prefix:
    torch.manual_seed(1)
    indexers = [Distilled().requires_grad_(False) for _ in range(2)]
    return Prefix(lm, IDS[:, :-LAST], torch.randn(2, model.GROUPS, model.DIM), indexers)


def everything(of: Scored) -> torch.Tensor:
    return seen(of.positions, of.tokens)


def itself(of: Scored) -> torch.Tensor:
    return torch.arange(of.tokens) == of.positions[:, None]


def test_the_end_behind_a_prefix_is_the_end_of_the_whole(lm: transformers.LlamaForCausalLM, prefix: Prefix) -> None:
    whole = lm(IDS, use_cache=False).logits[:, -LAST:]
    # Twice: what was read of the end is forgotten.
    for _ in range(2):
        assert torch.allclose(prefix.logits(END, "centred", None), whole, atol=1e-4)


@pytest.mark.parametrize("kind", ["centred", "distilled"])
def test_what_is_chosen_alone_is_attended_to(lm: transformers.LlamaForCausalLM, prefix: Prefix, kind: str) -> None:
    dense, own = (prefix.logits(END, kind, choose) for choose in (None, itself))
    assert torch.allclose(prefix.logits(END, kind, everything), dense, atol=1e-4)
    assert not torch.allclose(own, dense, atol=1e-2)
    # Of itself alone a token knows nothing of what was before.
    other = Prefix(lm, IDS[:, 7 : -LAST - 5], prefix.means, prefix.indexers)
    assert torch.allclose(own, other.logits(END, kind, itself), atol=1e-4)


@pytest.mark.parametrize("kind", ["centred", "distilled"])
@pytest.mark.parametrize("name", [language.DENSE, "flat", PAPER.name, "probe, B/4", "recent tokens"])
def test_texts_read_together_are_as_if_read_alone(
    lm: transformers.LlamaForCausalLM, prefix: Prefix, kind: str, name: str
) -> None:
    ids = torch.randint(0, 97, (3, 256), generator=torch.Generator().manual_seed(5))
    choose = language.choosers(256, 2)[name]
    together = Prefix(lm, ids[:, :-LAST], prefix.means, prefix.indexers).logits(ids[:, -LAST:], kind, choose)
    for row, one in zip(ids, together, strict=True):
        alone = Prefix(lm, row[None, :-LAST], prefix.means, prefix.indexers)
        assert torch.allclose(alone.logits(row[None, -LAST:], kind, choose)[0], one, atol=1e-4)


def test_interpolation_changes_positions_and_can_be_taken_back(lm: transformers.LlamaForCausalLM) -> None:
    before = lm(IDS, use_cache=False).logits
    model.interpolate(lm, 2)
    stretched = lm(IDS, use_cache=False).logits
    made = transformers.LlamaForCausalLM(model.architecture(layers=2, vocabulary=97, stretch=2)).eval()
    made.load_state_dict(lm.state_dict())
    model.interpolate(lm, 1)
    assert torch.allclose(made(IDS, use_cache=False).logits, stretched, atol=1e-5)
    assert torch.equal(lm(IDS, use_cache=False).logits, before)
    assert not torch.allclose(stretched, before, atol=1e-3)


def test_indexers_behind_a_prefix_are_those_of_the_whole(lm: transformers.LlamaForCausalLM, prefix: Prefix) -> None:
    """In the first layer, which does not know how attention was done."""
    assert prefix.indexers is not None
    indexer, positions = prefix.indexers[0], torch.arange(200 - LAST, 200)
    whole: dict[str, Scored] = {}

    def visit(layer: capture.Layer) -> None:
        if layer.number == 0:
            keys = indexer.of_keys(layer.hidden)
            whole["distilled"] = capture.distilled(indexer, layer.hidden[positions], keys, positions)
            whole["centred"] = capture.centred(layer.q[:, positions], layer.k, positions, prefix.means[0])

    capture.look(lm, IDS, visit)
    for kind, expected in whole.items():
        asked: list[Scored] = []

        def choose(of: Scored, to: list[Scored] = asked) -> torch.Tensor:
            to.append(of)
            return everything(of)

        prefix.logits(END, kind, choose)
        assert len(asked) == 2
        for a, b in zip(expected, asked[0], strict=True):
            assert torch.allclose(a if a is expected.positions else a.view_as(b), b, atol=1e-4), kind


def test_groups_are_the_heads_that_share_keys(lm: transformers.LlamaForCausalLM) -> None:
    positions, layers = torch.tensor([150, 199]), []

    def visit(layer: capture.Layer) -> None:
        layers.append(layer.number)
        found = capture.centred(layer.q[:, positions], layer.k, positions, torch.zeros(model.GROUPS, model.DIM))
        attended = capture.group_attention(layer.q[:, positions], layer.k, positions)
        for group, scores in enumerate(found.scores):
            products = layer.q[3 * group : 3 * group + 3, 199] @ layer.k[group].T
            assert torch.allclose(scores[1], products.relu().sum(0), atol=1e-4)
            assert torch.allclose(attended[group, 1], (products / 8).softmax(-1).mean(0), atol=1e-5)

    capture.look(lm, IDS, visit)
    assert layers == [0, 1]


def test_reading_tells_dense_from_sparse(prefix: Prefix) -> None:
    found = language.read(prefix, END, "centred", {"dense": None, "all": everything, "few": itself})
    logs = prefix.logits(END, "centred", None)[0, :-1].log_softmax(-1)
    assert found["dense"].loss == pytest.approx(-logs.gather(1, END[0, 1:, None]).mean().item(), rel=1e-4)
    assert found["dense"].divergence == 0
    assert abs(found["all"].divergence) < 1e-5 < found["few"].divergence


def asked(**options: Any) -> argparse.Namespace:
    given = {"last": LAST, "length": 192, "ratio": 1, "stretch": 1.0, "methods": [PAPER.name, "probe"]}
    return argparse.Namespace(**given | options)


def setting(lm: transformers.LlamaForCausalLM, prefix: Prefix) -> Setting:
    return Setting(lm, Letters(), prefix.means, prefix.indexers, "cpu")


def test_a_report_of_language_tells_the_goals(lm: transformers.LlamaForCausalLM, prefix: Prefix) -> None:
    found: language.Found = {}
    for ids in (IDS[:, :192], IDS[:, 8:]):
        language.add(found, setting(lm, prefix), "prose", ids, asked())
    parts, raw = language.report(found, "command", asked())
    assert list(found) == [("prose", "distilled"), ("prose", "centred")]
    assert "Documents: 2." in parts
    assert [row["method"] for row in raw["rows"]] == ["dense", "flat", PAPER.name, "probe"] * 2
    # With every token among the candidates HISA is flat.
    assert [row["over"] for row in raw["rows"] if row["method"] == PAPER.name] == pytest.approx([0, 0], abs=1e-3)
    assert [goal["name"] for goal in raw["goals"]] == ["perplexity over flat's, prose, distilled, probe"]
    assert raw["goals"][0]["reached"]
    json.dumps(raw)


def test_a_stretched_report_has_the_native_perplexity(
    lm: transformers.LlamaForCausalLM, prefix: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "NATIVE_LENGTH", 96)
    at, ids = setting(lm, prefix)._replace(indexers=None), IDS[:, :192]
    model.interpolate(lm, 2)
    found: language.Found = {}
    language.add(found, at, "prose", ids, asked(stretch=2.0))
    model.interpolate(lm, 1)
    parts, raw = language.report(found, "command", asked(stretch=2.0))
    assert list(found) == [("prose", "centred")]
    first = raw["rows"][0]
    assert first["method"] == language.NATIVE
    assert first["divergence"] is None
    own = Prefix(lm, ids[:, -96:-LAST], at.means, None)
    (expected,) = language.read(own, ids[:, -LAST:], "centred", {language.DENSE: None}).values()
    assert first["losses"] == pytest.approx([expected.loss])
    assert "positions interpolated by 2" in parts[2]
    assert not raw["goals"]


@pytest.mark.parametrize("name", language.COMPARED)
def test_tokens_of_no_whole_block_are_chosen_from(prefix: Prefix, name: str) -> None:
    """200 tokens are no multiple of a block: what fills the last one is neither seen nor chosen."""
    chosen_of = language.choosers(200, 1)[name]
    assert chosen_of is not None
    counts = []

    def choose(of: Scored) -> torch.Tensor:
        mask = chosen_of(of)
        assert mask.shape[-2:] == (LAST, 200)
        assert not (mask & ~everything(of)).any()
        counts.append(mask.sum(-1))
        return mask

    prefix.logits(END, "distilled", choose)
    with pytest.raises(ValueError, match="ratio: got 2 for 200 tokens, expected at most 1"):
        language.choosers(200, 2)
    assert torch.stack(counts).min() >= 4


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, **_: object) -> object:
        ids = torch.tensor([[ord(letter) for letter in text]])
        return type("Encoding", (), {"input_ids": ids})()


@pytest.mark.parametrize("depth", [0.05, 0.5, 0.95])
def test_a_needle_is_where_it_should_be(depth: float) -> None:
    filler = torch.full((1, 400), ord("x"))
    needle = needles.hide(Letters(), filler, depth, 2)
    text = "".join(map(chr, needle[0].tolist()))
    assert len(text) == 400
    digits = text[-needles.DIGITS :]
    assert digits.isdigit()
    assert text.count(f"The secret number of Cairo is {digits}.") == 1
    assert text.endswith(f"x\n\nThe secret number of Cairo is {digits}")
    assert abs(text.index("The secret") / text.count("x") - depth) < 0.1


def test_an_answer_is_right_if_every_digit_is() -> None:
    ends = torch.randint(0, 10, (3, needles.LAST), generator=torch.Generator().manual_seed(4))
    logits = torch.nn.functional.one_hot(ends, 12).float().roll(-1, 1)
    assert needles.answered(logits, ends) == [True] * 3
    logits[1, -2], logits[2, -needles.DIGITS - 1] = 0, 0
    # Whatever comes before the digits and after the last one.
    logits[:, : -needles.DIGITS - 1], logits[:, -1] = 0, 0
    ends[1:, -1], ends[1:, -needles.DIGITS] = 3, 3
    assert needles.answered(logits, ends) == [True, False, False]


def some_texts() -> list[needles.Text]:
    def text(length: int, number: int) -> needles.Text:
        return needles.Text(length, 0.5, number, torch.zeros(1, length))

    return [text(8, 0), text(8, 1), text(8, 2), text(4, 0), text(4, 1)]


def test_texts_of_one_length_are_read_together() -> None:
    for tokens, expected in ((16, [2, 1, 2]), (1, [1] * 5), (1000, [3, 2])):
        found = list(needles.batches(iter(some_texts()), tokens))
        assert [len(batch) for batch in found] == expected
        assert [(x.length, x.number) for batch in found for x in batch] == [(8, 0), (8, 1), (8, 2), (4, 0), (4, 1)]


def test_the_longest_texts_come_first_with_all_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "document", lambda _tokenizer, _kind, _book, _start, length: torch.zeros(1, length))
    at = Setting(None, Letters(), torch.empty(0), None, "cpu")
    found = [(text.length, text.depth, text.number) for text in needles.texts(at, [200, 400], 2, 2)]
    assert found[:5] == [(400, 0.25, 0), (400, 0.75, 0), (400, 0.25, 1), (400, 0.75, 1), (200, 0.25, 0)]
    assert all(text.ids.shape == (1, text.length) for text in needles.texts(at, [200], 2, 1))


def test_needles_of_a_model_are_counted(lm: transformers.LlamaForCausalLM, prefix: Prefix) -> None:
    ids = IDS.repeat(2, 1)[:, :192]
    batch = [needles.Text(192, depth, 0, row[None]) for depth, row in zip((0.25, 0.75), ids, strict=True)]
    found: needles.Found = {}
    for _ in range(2):
        needles.add(found, setting(lm, prefix), batch, asked())
    assert {cell.kind for cell in found} == {"centred", "distilled"}
    assert {cell.method for cell in found} == {"dense", "flat", PAPER.name, "probe"}
    assert all(len(rights) == 2 for rights in found.values())


def told(shares: dict[str, tuple[int, int]]) -> needles.Found:
    """Of four needles so many at the beginning and in the middle."""
    return {
        needles.Cell("distilled", name, 2048, depth): [True] * right + [False] * (4 - right)
        for name, rights in shares.items()
        for depth, right in zip((0.05, 0.5), rights, strict=True)
    }


def test_the_needles_goals_are_of_the_middle() -> None:
    found = told({"dense": (4, 4), "flat": (4, 4), PAPER.name: (4, 1), "probe": (0, 4), "probe, B/2": (4, 2)})
    assert needles.table(found, "distilled").splitlines()[-3:] == [
        f"| {PAPER.name} | 0.62 | 0.25 |",
        "| probe | 0.50 | 1.00 |",
        "| probe, B/2 | 0.75 | 0.50 |",
    ]
    goals = needles.goals(found)
    assert [(goal.measured, goal.reached) for goal in goals] == [(4.0, True), (2.0, False)]
    none = needles.goals(told({"flat": (4, 4), PAPER.name: (0, 0), "probe": (0, 1), "probe, B/2": (0, 0)}))
    assert [goal.reached for goal in none] == [True, False]
    assert "∞" in none[0].cells()[2]
    _, raw = needles.report(found, "command", asked())
    assert {(row["depth"], row["of"]) for row in raw["rows"]} == {(0.05, 4), (0.5, 4)}


def test_pictures_of_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.fidelity import plots

    _, raw = needles.report(told({"dense": (4, 4), "flat": (4, 3), PAPER.name: (1, 0)}), "command", asked())
    plots.needle_maps(raw, tmp_path)
    reads = {"dense": [language.Read(1.0, 0.0)], "flat": [language.Read(1.1, 0.0)], "probe": [language.Read(9.0, 1.0)]}
    _, raw = language.report({("code", "distilled"): reads}, "command", asked())
    plots.perplexities(raw, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"needles.png", "needles_all.png", "language.png"}


def test_kept_texts_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISA_FIDELITY_CACHE", str(tmp_path))
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(("one\r\n", "two é")):
        (tmp_path / "texts" / f"prose_{number}.txt").write_bytes(text.encode())
    sources.texts.cache_clear()
    try:
        assert sources.texts("prose") == ("one\r\n", "two é")
    finally:
        sources.texts.cache_clear()


def test_books_are_unpacked_into_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dpkg makes the last folder of the path that it is given, and no other."""
    monkeypatch.setenv("HISA_FIDELITY_CACHE", str(tmp_path / "new"))

    def packages(command: list[str], cwd: Path | None = None, **_: Any) -> None:
        if command[0] == "apt-get":
            assert cwd is not None
            (cwd / f"{command[-1]}_1.0_all.deb").touch()
        else:
            program, option, package, folder = command
            assert (program, option) == ("dpkg", "-x")
            assert Path(package).exists()
            Path(folder).mkdir()

    monkeypatch.setattr(sources.subprocess, "run", packages)
    folders = {path.name for path in sources._books().iterdir()}
    assert folders == set(sources.DEBS)


def test_gaussian_keys_are_no_model() -> None:
    """The contrast of the report: one mean of random keys says little of them."""
    of = gaussian(1024, 8).scored
    lost = measures.loss(methods()[PAPER.name](of, 256, 64), flat(of, 64), torch.ones(8, 1024) / 1024)
    assert 0 < lost.iou.mean() < 0.5


def test_documents_are_apart() -> None:
    """What indexers are trained on, and centred by, is not what is measured: 16384 tokens are below 160000 letters."""
    for kind, book, start in capture.MEASURED + needles.FILLERS:
        for other in capture.OTHERS:
            assert other[:2] != (kind, book) or abs(other[2] - start) > 160_000
