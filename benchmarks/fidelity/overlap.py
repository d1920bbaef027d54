"""Overlap with the flat selection, and the attention that is lost: every option, by compression, layer and head.

    python -m benchmarks.fidelity.overlap [--documents 6] [--queries 48] [--ratios 2 4 8 16] [--out overlap.md]

Contexts of 8192 tokens, queries drawn from the second half; the paper's blocks of 128 at 64K are scaled to 64 here.  At
a compression M:m a query's candidates are a share m/M of the context, and k is a fourth of them, as the paper has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..harness import Goal, command, goals_table, machine, parser, raw_goals, write
from . import capture, distil, model
from .indexers import Distilled, load_distilled
from .measures import Loss, Summary, attention, loss, summary
from .selections import OPTIONS, PAPER, Scored, block_sparse, flat, random, recent, scored

BLOCK = 64
KEEP_OF_CANDIDATES = 4
# Of the model's own keys, against the paper's stage: at 4:1 the attention that is still lost and the IoU that is
# gained, at 16:1 the IoU itself; and the options that are to reach it.
MOST_LOST, MORE_IOU, LEAST_IOU = 0.5, 0.05, 0.70
AIMED = ("probe", "probe, B/2", "probe, B/4", "two levels, 4m then probe, B/4")
# Of an indexer whose cost the tables tell, DeepSeek-V3.2's: a product here is one vector with all of them.
HEADS = 64

Method = Callable[[Scored, int, int], Tensor]


class Indexed(NamedTuple):
    """One indexer over one document."""

    kind: str  # "centred", "distilled" or "gaussian"
    layer: int
    head: int
    scored: Scored
    attended: Tensor


def budget(tokens: int, ratio: int) -> tuple[int, int]:
    """Candidates and selected tokens at a compression of ``ratio``:1; two blocks of candidates at least."""
    candidates = tokens // ratio
    if candidates < 2 * BLOCK:
        raise ValueError(f"ratio: got {ratio} for {tokens} tokens, expected at most {tokens // (2 * BLOCK)}")
    return candidates, candidates // KEEP_OF_CANDIDATES


def methods() -> dict[str, Method]:
    """By name: (scored, candidates, topk) -> bool [N, T]."""
    made: dict[str, Method] = {
        option.name: lambda of, candidates, topk, by=option: by.select(of, BLOCK, candidates, topk)
        for option in OPTIONS
    }
    made["block-sparse"] = lambda of, candidates, topk: block_sparse(of, BLOCK, topk)
    made["recent tokens"] = lambda of, candidates, topk: recent(of, topk)
    made["random tokens"] = lambda of, candidates, topk: random(of, topk)
    return made


def of_layer(
    layer: capture.Layer, positions: Tensor, means: Tensor, indexers: list[Distilled] | None
) -> Iterator[Indexed]:
    q = layer.q[:, positions]
    attended = capture.group_attention(q, layer.k, positions)
    of = capture.centred(q, layer.k, positions, means[layer.number])
    for head, (queries, keys, weights, scores) in enumerate(zip(of.q, of.k, of.w, of.scores, strict=True)):
        one = Scored(queries, keys, weights, positions, scores)
        yield Indexed("centred", layer.number, head, one, attended[head])
    if indexers is not None:
        indexer = indexers[layer.number]
        of = capture.distilled(indexer, layer.hidden[positions], indexer.of_keys(layer.hidden), positions)
        yield Indexed("distilled", layer.number, 0, of, attended.mean(0))


def gaussian(tokens: int, queries: int) -> Indexed:
    """Keys and queries without structure: what says nothing about a model."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, 8, model.DIM, generator=generator)
    k = torch.randn(tokens, model.DIM, generator=generator)
    w = torch.randn(queries, 8, generator=generator)
    positions = torch.linspace(tokens // 2, tokens - 1, queries).long()
    return Indexed("gaussian", 0, 0, scored(q, k, w, positions), attention(q, k, positions))


Found = dict[tuple[str, int, str], list[tuple[int, int, Loss]]]


def compare(found: Found, indexed: Indexed, ratios: list[int]) -> None:
    """Add every method's losses, by kind of indexer, compression and method."""
    tokens, every = len(indexed.scored.k), methods()
    for ratio in ratios:
        candidates, topk = budget(tokens, ratio)
        reference = flat(indexed.scored, topk)
        for name, method in every.items():
            lost = loss(method(indexed.scored, candidates, topk), reference, indexed.attended)
            found[indexed.kind, ratio, name].append((indexed.layer, indexed.head, lost))


class Setting(NamedTuple):
    """The model, and what indexers are made of; indexers: None where none have been trained."""

    lm: Any
    tokenizer: Any
    means: Tensor
    indexers: list[Distilled] | None
    device: str

    def read(self, which: Sequence[tuple[str, int, int]], length: int) -> list[Tensor]:
        return [capture.document(self.tokenizer, *each, length).to(self.device) for each in which]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def setting(device: str, stretch: float = 1) -> Setting:
    """Distilled indexers have only seen positions as they were trained on: there are none for a ``stretch``."""
    lm, tokenizer = model.load(device, stretch), model.tokenizer()
    trained = distil.default_path()
    indexers = load_distilled(trained, device) if trained.exists() and stretch == 1 else None
    if indexers is None and stretch == 1:
        print(f"no distilled indexers: {trained} is missing, python -m benchmarks.fidelity.distil makes it", flush=True)
    at = Setting(lm, tokenizer, torch.empty(0), indexers, device)
    # One document of prose and one of code.
    others = at.read(capture.OTHERS[:1] + capture.OTHERS[3:4], round(stretch * model.NATIVE_LENGTH))
    return at._replace(means=capture.mean_keys(lm, others).to(device))


def measure(at: Setting, documents: list[Tensor], queries: int, ratios: list[int]) -> Found:
    found: Found = defaultdict(list)
    for number, ids in enumerate(documents):
        tokens = ids.shape[1]
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randperm(tokens // 2, generator=generator)[:queries] + tokens // 2
        positions = drawn.sort().values.to(ids.device)

        def visit(layer: capture.Layer, positions: Tensor = positions) -> None:
            for indexed in of_layer(layer, positions, at.means, at.indexers):
                compare(found, indexed, ratios)

        capture.look(at.lm, ids, visit)
        print(f"document {number + 1} of {len(documents)}", flush=True)
    compare(found, gaussian(documents[0].shape[1], queries), ratios)
    return found


def summaries(found: Found) -> dict[tuple[str, int, str], Summary]:
    return {at: summary([lost for *_, lost in losses]) for at, losses in found.items()}


def by_layer(losses: list[tuple[int, int, Loss]]) -> list[float]:
    """Mean IoU of each layer's queries."""
    layers = sorted({layer for layer, *_ in losses})
    return [round(summary([lost for at, _, lost in losses if at == layer]).iou, 4) for layer in layers]


def by_head(losses: list[tuple[int, int, Loss]]) -> list[list[float]]:
    """Mean IoU of the queries of each layer's heads."""
    found: dict[int, dict[int, list[Loss]]] = defaultdict(lambda: defaultdict(list))
    for layer, head, lost in losses:
        found[layer][head].append(lost)
    return [[round(summary(heads[head]).iou, 4) for head in sorted(heads)] for _, heads in sorted(found.items())]


def goals(found: dict[tuple[str, int, str], Summary]) -> list[Goal]:
    """What is wanted with the model's own keys, as far as it was measured."""
    made = []
    for name in AIMED:
        of, paper = found.get(("centred", 4, name)), found.get(("centred", 4, PAPER.name))
        if of and paper:
            lost = of.lost / paper.lost
            made.append(Goal(f"attention lost over the paper's, 4:1, {name}", MOST_LOST, lost, at_most=True))
            made.append(Goal(f"IoU more than the paper's, 4:1, {name}", MORE_IOU, of.iou - paper.iou, unit=""))
        if of := found.get(("centred", 16, name)):
            made.append(Goal(f"IoU, 16:1, {name}", LEAST_IOU, of.iou, unit=""))
    return made


def tables(found: dict[tuple[str, int, str], Summary], tokens: int) -> str:
    """Markdown, a table a kind of indexer and compression."""
    dots = {option.name: option.dots for option in OPTIONS}
    lines = []
    for kind in dict.fromkeys(at[0] for at in found):
        for ratio in dict.fromkeys(at[1] for at in found if at[0] == kind):
            lines += [f"### {kind}, {ratio}:1", ""]
            lines += ["| coarse stage | its products | IoU | worst 5 % | found | mass | lost |", "|" + " --- |" * 7]
            for name in [at[2] for at in found if at[:2] == (kind, ratio)]:
                of = found[kind, ratio, name]
                cost = f"{dots[name](tokens, HEADS, BLOCK, tokens // ratio):.0f}" if name in dots else ""
                numbers = (of.iou, of.worst_iou, of.found, of.mass, of.lost)
                lines.append(f"| {name} | {cost} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")
            flat_mass = next(of.flat_mass for at, of in found.items() if at[:2] == (kind, ratio))
            lines += ["", f"The flat selection holds {flat_mass:.3f} of the attention.", ""]
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--documents", type=int, default=len(capture.MEASURED))
    made.add_argument("--length", type=int, default=model.NATIVE_LENGTH)
    made.add_argument("--queries", type=int, default=48)
    made.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8, 16])
    made.add_argument("--device", default=default_device())
    options = made.parse_args()
    at = setting(options.device)
    chosen = capture.in_turns(options.documents)
    found = measure(at, at.read(chosen, options.length), options.queries, options.ratios)
    summed = summaries(found)
    asked = command("fidelity.overlap", made, options)
    rows = [
        {"indexer": at[0], "ratio": at[1], "method": at[2], **of._asdict()}
        | {"by_layer": by_layer(found[at]), "by_head": by_head(found[at])}
        for at, of in summed.items()
    ]
    wanted = goals(summed)
    parts = ["# Overlap with the flat selection", f"`{asked}`, {machine()}", tables(summed, options.length)]
    parts += [goals_table(wanted)] if wanted else []
    write(options.out, parts, {"command": asked, "rows": rows, "goals": raw_goals(wanted)})


if __name__ == "__main__":
    main()
