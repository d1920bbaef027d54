"""What transformers' own DSA models hide from their indexers reaches the operator as vectors, never as S x T elements.

Each case is one model in one situation (a padded batch, packed sequences, a cache, ...), compiled once.  The graph is
read right after the pass, the operator's arguments are read at its call.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from model_cases import recorded_calls
from models import MODELS, build
from test_models import TOLERANCE
from torch import Tensor, fx, nn
from transformers.masking_utils import create_causal_mask

import hisa_compile
from hisa_compile.ops import reference
from hisa_compile.passes import rewrite

# Sizes for which a tensor of S x T elements or more must have both axes.  What an indexer makes for its queries is at
# most q, S elements times B x H x D = 2 * 14 * 10 = 280 (the hidden size is 48): fewer than S x T for T > 280.  What it
# makes for its keys is T elements times 2 * B x D = 40 at most: fewer for S > 40.
# (14 heads: with few of them eager mode has to choose among scores that are equal because all ReLUs are 0.)
SIZES = {"index_head_dim": 10}
TOKENS, CHUNK = 283, 41
# DeepSeek-V4 has a key for every 4 tokens: 281 of them, and 3 tokens that are in none.
COMPRESSED = 4
COMPRESSED_TOKENS, COMPRESSED_CHUNK = 1127, 87
# All of the context: what is selected is what eager mode selects.
FITS = {"hisa.block_size": 32, "hisa.block_topk": 10}
# What a model of a single layer, which compiles faster, needs to be told.
ONE_LAYER = {
    "mlp_layer_types": ["dense"],
    "indexer_types": ["full"],
    "layer_types": ["compressed_sparse_attention"],
}
# More than the prompt in a static cache, so that T is not S.
SPARE = 6

WINDOW = {"window_end"}
SEGMENTS = {"window_end", "q_segment", "k_segment"}
PADDING = {"window_end", "key_valid"}


@dataclass(frozen=True)
class Situation:
    """What the model is called with.

    vectors: the operator's arguments that say what is hidden.  cache: none, dynamic or static.  new: tokens of the call
    after those that the cache holds already; None: all.  padding: side of the attention mask's zeros.  positions: none
    are given; packed, they start over; or generated, as ``generate`` counts them past padding.
    """

    vectors: frozenset[str]
    cache: str = "none"
    new: int | None = None
    padding: str = ""
    positions: str = ""


SITUATIONS = {
    # transformers looks for packed sequences wherever it gets neither cache nor attention mask.
    "causal": Situation(frozenset(SEGMENTS)),
    "left": Situation(frozenset(PADDING), padding="left"),
    "right": Situation(frozenset(PADDING), padding="right"),
    "packed": Situation(frozenset(SEGMENTS), positions="packed"),
    "dynamic_prefill": Situation(frozenset(WINDOW), cache="dynamic"),
    "dynamic_decode": Situation(frozenset(WINDOW), cache="dynamic", new=1),
    "dynamic_chunk": Situation(frozenset(WINDOW), cache="dynamic", new=CHUNK),
    "static_prefill": Situation(frozenset(WINDOW), cache="static"),
    "static_decode": Situation(frozenset(WINDOW), cache="static", new=1),
    "static_chunk": Situation(frozenset(WINDOW), cache="static", new=CHUNK),
    # As model.generate() calls a model with a padded batch of prompts.
    "left_dynamic_prefill": Situation(frozenset(PADDING), cache="dynamic", padding="left", positions="generated"),
    "left_dynamic_decode": Situation(frozenset(PADDING), cache="dynamic", new=1, padding="left", positions="generated"),
    "left_dynamic_chunk": Situation(
        frozenset(PADDING), cache="dynamic", new=CHUNK, padding="left", positions="generated"
    ),
    "left_static_prefill": Situation(frozenset(PADDING), cache="static", padding="left", positions="generated"),
    "left_static_decode": Situation(frozenset(PADDING), cache="static", new=1, padding="left", positions="generated"),
}


@dataclass(frozen=True)
class Case:
    model: str
    attention: str
    situation: str
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    batch: int = 2
    whole: bool = True
    length: int = 0

    def __str__(self) -> str:
        shapes = "dynamic" if self.dynamic else "static"
        layers = "" if self.whole else "-layer"
        return f"{self.model}-{self.attention}-{self.situation}-{str(self.dtype)[6:]}-{shapes}{layers}"

    @property
    def called(self) -> Situation:
        return SITUATIONS[self.situation]

    @property
    def compressed(self) -> bool:
        return self.model == "deepseek_v4"

    @property
    def layers(self) -> int:
        """How many run an indexer."""
        return MODELS[self.model][3] if self.whole else 1

    def make_model(self) -> Any:
        one: dict[str, Any] = (
            {} if self.whole else {name: value for name, value in ONE_LAYER.items() if name in MODELS[self.model][2]}
        )
        if not self.whole:
            one["num_hidden_layers"] = 1
            if self.compressed:
                one["mlp_layer_types"] = ["moe"]
        return build(self.model, self.dtype, self.attention, **SIZES, **one)

    @property
    def possible(self) -> bool:
        """DeepSeek-V4 with a static cache is a KeyError of transformers' own."""
        return not (self.compressed and self.called.cache == "static")

    @property
    def tokens(self) -> int:
        """Of the whole context."""
        if self.length:
            return self.length
        if self.called.new == 1:
            return 72 if self.compressed else 30
        return COMPRESSED_TOKENS if self.compressed else TOKENS

    @property
    def history(self) -> int:
        """Tokens that the cache holds before the call."""
        match self.called.new:
            case None:
                return 0
            case int(new) if new == CHUNK and self.compressed:
                return self.tokens - COMPRESSED_CHUNK
            case int(new):
                return self.tokens - new

    @property
    def vectors(self) -> frozenset[str]:
        """DeepSeek-V4's indexer looks at positions alone."""
        return frozenset(WINDOW) if self.compressed else self.called.vectors

    def attention_mask(self) -> Tensor | None:
        """int64 [B, tokens], another padding for each entry of the batch."""
        if not self.called.padding:
            return None
        mask = torch.ones(self.batch, self.tokens, dtype=torch.int64)
        for row, padding in zip(mask, (self.tokens // 5, 3, 0), strict=False):
            if self.called.padding == "left":
                row[:padding] = 0
            else:
                row[self.tokens - padding :] = 0
        return mask

    def position_ids(self) -> Tensor | None:
        """int64 [B, tokens]; sequences start at other places in each entry of the batch."""
        if self.called.positions == "generated":
            attention_mask = self.attention_mask()
            assert attention_mask is not None
            return (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        if not self.called.positions:
            return None
        first = torch.zeros(self.batch, self.tokens, dtype=torch.int64)
        for row, starts in zip(first, ((50, 51, 190), (101,), ()), strict=False):
            for start in starts:
                row[start:] = start
        return torch.arange(self.tokens) - first

    def inputs(self, start: int, end: int) -> dict[str, Tensor]:
        """What a call with the tokens from ``start`` to ``end`` gets besides them and a cache."""
        attention_mask, position_ids = self.attention_mask(), self.position_ids()
        found = {} if attention_mask is None else {"attention_mask": attention_mask[:, :end]}
        return found if position_ids is None else {**found, "position_ids": position_ids[:, start:end]}

    def make_cache(self, model: Any) -> Any:
        if self.called.cache == "static":
            return transformers.StaticCache(config=model.config, max_cache_len=self.tokens + SPARE)
        return transformers.DynamicCache(config=model.config) if self.called.cache == "dynamic" else None

    def visible(self, keys: int) -> Tensor:
        """bool [B, S, keys], from the definition: causal AND not padding AND of the same sequence."""
        position = torch.arange(self.history, self.tokens)
        token = torch.arange(keys)
        attention_mask, position_ids = self.attention_mask(), self.position_ids()
        if self.compressed:
            ids = position[None] if position_ids is None else position_ids[:, self.history :]
            return (token < ((ids + 1) // COMPRESSED)[..., None]).expand(self.batch, -1, -1)
        visible = (token <= position[:, None]).repeat(self.batch, 1, 1)
        if attention_mask is not None:
            visible &= nn.functional.pad(attention_mask, (0, keys - self.tokens)).bool()[:, None, :]
        if self.called.positions == "packed":
            assert position_ids is not None
            sequence = (position_ids == 0).cumsum(-1)
            visible &= sequence[:, :, None] == sequence[:, None, :]
        return visible

    def real_queries(self) -> Tensor:
        """bool [B, S]: those that are not padding."""
        attention_mask = self.attention_mask()
        if attention_mask is None:
            return torch.ones(self.batch, self.tokens - self.history, dtype=torch.bool)
        return attention_mask[:, self.history :].bool()


def every_case() -> list[Case]:
    """Model x attention x situation x dtype x shapes, what transformers can run of it."""
    cases = [
        Case(name, attention, situation, dtype, dynamic)
        for name, (_, _, _, _, implementations) in MODELS.items()
        for attention, situation, dtype, dynamic in itertools.product(
            implementations, SITUATIONS, (torch.float32, torch.bfloat16), (False, True)
        )
    ]
    return [case for case in cases if case.possible]


def in_turn(calls: Iterable[tuple[str, bool]], whole: bool) -> list[Case]:
    """A case for each situation and kind of shapes; models with each attention, and dtypes, take turns."""
    names = [(name, attention) for name, (*_, implementations) in MODELS.items() for attention in implementations]
    turns = zip(itertools.cycle(names), itertools.cycle((torch.float32, torch.float32, torch.bfloat16)), strict=False)
    cases = []
    for situation, dynamic in calls:
        turned = (Case(*name, situation, dtype, dynamic, whole=whole) for name, dtype in turns)
        cases.append(next(case for case in turned if case.possible))
    return cases


def spread() -> list[Case]:
    """Dynamic shapes are slow to trace: two models of one layer here, and the indexers alone below."""
    return [
        *in_turn([(situation, False) for situation in SITUATIONS], whole=True),
        Case("deepseek_v4", "eager", "left"),
        Case("deepseek_v4", "eager", "left_dynamic_chunk"),
        Case("axk2", "sdpa", "packed", dynamic=True, whole=False),
        Case("glm_moe_dsa", "eager", "left_dynamic_decode", dynamic=True, whole=False),
    ]


# Reading a graph ------------------------------------------------------------------------------------------------------


def hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(hint(size) for size in value.shape) if isinstance(value, Tensor) else None


def elements(node: fx.Node) -> int:
    """Elements of the tensor that the node makes; 0 if it makes none."""
    sizes = shape(node)
    return 0 if sizes is None else int(torch.Size(sizes).numel())


def arguments_of(call: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in call.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def chain(node: fx.Node, limit: int = 60) -> str:
    """What ``node`` is computed from, with shapes, for the message of a failure."""
    lines: dict[fx.Node, str] = {}
    todo = [node]
    while todo and len(lines) < limit:
        each = todo.pop()
        if each in lines:
            continue
        value = each.meta.get("val")
        what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(value)
        lines[each] = f"{each.name} = {each.target}({each.args}, {each.kwargs}): {what}"
        # Operands of that many elements are data.
        todo.extend(each.all_input_nodes)
    return "\n".join(lines[each] for each in sorted(lines))


@dataclass
class Graph:
    """A graph right after the pass."""

    nodes: list[fx.Node]

    @property
    def calls(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.target is torch.ops.hisa.indexer_topk.default]

    @property
    def pairs(self) -> int:
        """S x T of its smallest indexer."""
        found = []
        for call in self.calls:
            q, k = (shape(arguments_of(call)[name]) for name in ("q", "k"))
            assert q is not None
            assert k is not None
            found.append(q[1] * k[1])
            operands = [x for x in arguments_of(call).values() if isinstance(x, fx.Node)]
            # The sizes discriminate: no operand comes near S x T elements.
            assert all(elements(x) < found[-1] for x in operands) or q[1] == 1
        return min(found)

    def for_indexers_alone(self) -> list[fx.Node]:
        """The nodes that nothing but an indexer needs."""
        calls = self.calls
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op != "output" and node.users and found.issuperset(set(node.users).difference(calls)):
                found.add(node)
        return [node for node in self.nodes if node in found]


@contextmanager
def graphs_after_the_pass() -> Iterator[list[Graph]]:
    """Every graph that has an indexer call when the pass is done with it."""
    graphs: list[Graph] = []
    original = rewrite.rewrite_indexers

    def hook(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        sites = original(graph, *args, **kwargs)
        seen = Graph(list(graph.nodes))
        if seen.calls:
            graphs.append(seen)
        return sites

    with mock.patch.object(rewrite, "rewrite_indexers", hook):
        yield graphs


def assert_no_pairs(nodes: Sequence[fx.Node], pairs: int) -> None:
    """No node makes as many elements as there are pairs of a query and a key."""
    large = [node for node in nodes if elements(node) >= pairs]
    assert not large, "\n".join(f"{node.format_node()}: {shape(node)}" for node in large)


def assert_vectors(case: Case, graph: Graph) -> None:
    """The calls take the situation's vectors and no mask."""
    for call in graph.calls:
        given = {name: value for name, value in arguments_of(call).items() if isinstance(value, fx.Node)}
        assert "mask" not in given, f"left as a mask:\n{chain(given['mask'])}"
        names = set(given) - {"q", "k", "weights", "topk", "k_scale", "k_weight"}
        assert names == case.vectors


def assert_calls_see(case: Case, calls: list[tuple[dict[str, Any], Any]]) -> None:
    """The operator's arguments mean what the definition says, for all queries that are not padding."""
    names = ("q", "k", "window_start", "window_end", "key_valid", "mask", "q_segment", "k_segment")
    real = case.real_queries()
    for arguments, _ in calls:
        given = {name for name in names[2:] if arguments[name] is not None}
        assert given == case.vectors
        seen = reference.visible_tokens(**{name: arguments[name] for name in names})
        assert torch.equal(seen[real], case.visible(arguments["k"].shape[1])[real])


# Whole models ---------------------------------------------------------------------------------------------------------


def compiled(module: nn.Module, dynamic: bool, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        module,
        backend=hisa_compile.hisa_backend,
        fullgraph=True,
        dynamic=dynamic or None,
        options={"hisa.base": "aot_eager", **FITS, **{f"hisa.{name}": value for name, value in options.items()}},
    )


def flat(module: nn.Module, case: Case) -> Any:
    """The program before it is rewritten.

    Eager mode; in bfloat16 compiled with the same decompositions, which round otherwise and so select others among
    tokens of nearly the same score.
    """
    return module if case.dtype == torch.float32 else compiled(module, case.dynamic, scope="marked")


def runs(module: nn.Module, case: Case) -> Iterator[Any]:
    """The module flat, then rewritten."""
    yield flat(module, case)
    yield compiled(module, case.dynamic)


def random_ids(case: Case) -> Tensor:
    return torch.randint(2, 97, (case.batch, case.tokens), generator=torch.Generator().manual_seed(1))


def filled_cache(case: Case, model: Any) -> Any:
    """A cache of the case's kind that holds its history."""
    cache = case.make_cache(model)
    if case.history:
        ids = random_ids(case)[:, : case.history]
        model(ids, past_key_values=cache, use_cache=True, **case.inputs(0, case.history))
    return cache


def check_model(case: Case) -> None:
    model = case.make_model()
    logits = []
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        recorded_calls() as calls,
        graphs_after_the_pass() as graphs,
    ):
        warnings.simplefilter("ignore")
        for run in runs(model, case):
            cache = filled_cache(case, model)
            tokens = random_ids(case)[:, case.history :]
            logits.append(
                run(
                    tokens, past_key_values=cache, use_cache=cache is not None, **case.inputs(case.history, case.tokens)
                ).logits
            )
    assert len(calls) == case.layers, hisa_compile.reports()[-1]
    assert graphs
    for graph in graphs:
        assert len(graph.calls) == case.layers
        assert_vectors(case, graph)
        if case.tokens - case.history > 1:
            assert_no_pairs(graph.for_indexers_alone(), graph.pairs)
    assert_calls_see(case, calls)
    real = case.real_queries()
    expected, ours = (each[real].float() for each in logits)
    assert float((ours - expected).abs().max() / expected.abs().max()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", spread(), ids=str)
def test_a_model_hands_its_indexers_vectors(case: Case) -> None:
    """No mask at the call, nothing of S x T for the indexer alone, the visibility and the logits are the model's."""
    check_model(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_model_situation_dtype_and_shape(case: Case) -> None:
    """The whole matrix."""
    check_model(case)


# Indexers alone: nothing else needs their masks -----------------------------------------------------------------------


class IndexerAlone(nn.Module):
    """A model's first indexer with the mask that the model makes for it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.rotary = model.model.rotary_emb
        self.layer = next(number for number, layer in enumerate(model.model.layers) if find_indexer(layer) is not None)
        self.indexer = find_indexer(model.model.layers[self.layer])

    def forward(
        self,
        x: Tensor,
        q_residual: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """The positions that it selects.  Masks and positions as in the ``forward`` of transformers' models."""
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        if self.config.model_type == "deepseek_v4":
            return self.indexer(x, q_residual, position_ids, past_key_values, self.layer)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        rotary = self.rotary(x, position_ids=position_ids)
        return self.indexer(x, q_residual, rotary, mask[:, 0], position_ids, past_key_values=past_key_values)


def find_indexer(layer: nn.Module) -> nn.Module | None:
    return next((module for module in layer.modules() if type(module).__name__.endswith("Indexer")), None)


def indexer_inputs(config: Any, batch: int, queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = config.hidden_size, config.q_lora_rank
    return tuple(torch.randn(batch, queries, size, generator=generator).to(dtype) for size in sizes)  # type: ignore[return-value]


def selected_and_visible(case: Case, indices: Tensor, visible: Tensor) -> Tensor:
    """bool [B, S, T]; hidden tokens fill a selection up, in any order, or are -1."""
    chosen = torch.zeros(*visible.shape[:2], visible.shape[2] + 1, dtype=torch.bool)
    chosen.scatter_(-1, indices.long() % (visible.shape[2] + 1), True)
    return (chosen[..., :-1] & visible)[case.real_queries()]


def check_indexer(case: Case) -> None:
    model = case.make_model()
    alone = IndexerAlone(model).eval()
    inputs = indexer_inputs(model.config, case.batch, case.tokens - case.history, case.dtype)
    selections = []
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        recorded_calls() as calls,
        graphs_after_the_pass() as graphs,
    ):
        warnings.simplefilter("ignore")
        for run in runs(alone, case):
            selections.append(
                run(*inputs, past_key_values=filled_cache(case, model), **case.inputs(case.history, case.tokens))
            )
    assert len(calls) == 1, hisa_compile.reports()[-1]
    assert graphs
    for graph in graphs:
        assert len(graph.calls) == 1
        assert_vectors(case, graph)
        if case.tokens - case.history > 1:
            # Not only what the indexer alone needs: there is nothing else.  (The caches bring the attention's keys.)
            nodes = [node for node in graph.nodes if node.users or node.op != "placeholder"]
            assert_no_pairs(nodes, graph.pairs)
    assert_calls_see(case, calls)
    visible = case.visible(calls[0][0]["k"].shape[1])
    expected, ours = (selected_and_visible(case, each, visible) for each in selections)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", in_turn(itertools.product(SITUATIONS, (False, True)), whole=False), ids=str)
def test_a_mask_that_only_the_indexer_needs_is_gone(case: Case) -> None:
    """No node of the whole graph has S x T elements, and the selection is the flat program's."""
    check_indexer(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [replace(case, whole=False) for case in every_case()], ids=str)
def test_every_indexer_alone_situation_dtype_and_shape(case: Case) -> None:
    """The whole matrix."""
    check_indexer(case)


# Memory ---------------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Bytes that a call allocated: the most at a time, and the largest single allocation."""

    peak: int
    largest: int


def memory_of(call: Callable[[], Tensor]) -> Memory:
    """From the profiler's events of the CPU's allocator, which sees what operators allocate inside, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    assert result is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return Memory(max(held), max(event.nbytes() for event in events))


@pytest.mark.parametrize("situation", ["causal", "left", "packed"])
def test_the_memory_does_not_grow_with_queries_times_keys(situation: str) -> None:
    """Flat, an indexer allocates S x T x H scores; rewritten, nothing as large as S x T booleans."""
    tokens, heads = 2048, 4
    case = Case("deepseek_v32", "sdpa", situation, batch=1, whole=False, length=tokens)
    model = build(case.model, case.dtype, case.attention, index_n_heads=heads)
    alone = IndexerAlone(model).eval()
    inputs = indexer_inputs(model.config, 1, tokens, case.dtype)
    # A context beyond the budget: pruning is on.
    rewritten = compiled(alone, False, block_size=32, block_topk=8)
    with torch.no_grad(), recorded_calls() as calls:
        rewritten(*inputs, **case.inputs(0, tokens))
        assert len(calls) == 1
    with torch.no_grad():
        before, after = (memory_of(partial(run, *inputs, **case.inputs(0, tokens))) for run in (alone, rewritten))
    pairs = tokens * tokens
    assert before.largest >= 4 * pairs * heads, "the measurement misses the scores of the flat program"
    assert after.largest < pairs
    assert after.peak < before.peak / 4
