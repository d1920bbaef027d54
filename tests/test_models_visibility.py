"""What transformers' own DSA models hide from their indexers reaches the operator as vectors, never as S x T elements.

Each case is one model in one situation (a padded batch, packed sequences, a cache, ...), compiled once.  The graph is
read right after the pass, the operator's arguments are read at its call.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

# A query's row of S x T elements must be larger than what an indexer makes for a query: B x H x D = 2 * 14 * 10 = 280
# elements of q, twice the hidden size, ...  Then a tensor of S x T elements or more is one that has both axes.  Likewise
# for a key: S > B x D = 20.  (14 heads: fewer, and eager mode has scores that are equal because all ReLUs are 0.)
SIZES = {"index_head_dim": 10}
TOKENS = 283
# DeepSeek-V4 has a key for every 4 tokens, 281 of them; its last 3 tokens are in none.
COMPRESSED = 4
COMPRESSED_TOKENS = 1127
# All of the context: what is selected is what eager mode selects.
FITS = {"hisa.block_size": 32, "hisa.block_topk": 10}
# What a model of a single layer, which compiles faster, needs to be told; of the last layer of each model.
ONE_LAYER = {
    "mlp_layer_types": ["sparse"],
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

    cache: none, dynamic or static.  history: tokens that the cache holds already, of ``tokens`` in all (counted from
    the end where negative).  padding: side of the attention mask's zeros.  packed: position ids that start over.
    vectors: the operator's arguments that say all of it.
    """

    vectors: frozenset[str]
    cache: str = "none"
    history: int = 0
    padding: str = ""
    packed: bool = False
    short: bool = False


SITUATIONS = {
    # transformers looks for packed sequences wherever it gets neither cache nor attention mask.
    "causal": Situation(frozenset(SEGMENTS)),
    "left": Situation(frozenset(PADDING), padding="left"),
    "right": Situation(frozenset(PADDING), padding="right"),
    "packed": Situation(frozenset(SEGMENTS), packed=True),
    "dynamic_prefill": Situation(frozenset(WINDOW), cache="dynamic"),
    "dynamic_decode": Situation(frozenset(WINDOW), cache="dynamic", history=-1, short=True),
    "dynamic_chunk": Situation(frozenset(WINDOW), cache="dynamic", history=-41),
    "static_prefill": Situation(frozenset(WINDOW), cache="static"),
    "static_decode": Situation(frozenset(WINDOW), cache="static", history=-1, short=True),
    "static_chunk": Situation(frozenset(WINDOW), cache="static", history=-41),
    # As model.generate() calls a model with a padded batch of prompts.
    "left_dynamic_prefill": Situation(frozenset(PADDING), cache="dynamic", padding="left"),
    "left_dynamic_decode": Situation(frozenset(PADDING), cache="dynamic", history=-1, padding="left", short=True),
    "left_dynamic_chunk": Situation(frozenset(PADDING), cache="dynamic", history=-41, padding="left"),
    "left_static_prefill": Situation(frozenset(PADDING), cache="static", padding="left"),
    "left_static_decode": Situation(frozenset(PADDING), cache="static", history=-1, padding="left", short=True),
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
        one = {} if self.whole else {name: value for name, value in ONE_LAYER.items() if name in MODELS[self.model][2]}
        layers = {} if self.whole else {"num_hidden_layers": 1}
        return build(self.model, self.dtype, self.attention, **SIZES, **layers, **one)

    @property
    def possible(self) -> bool:
        """DeepSeek-V4 with a static cache is a KeyError of transformers' own."""
        return not (self.compressed and self.called.cache == "static")

    @property
    def tokens(self) -> int:
        """Of the whole context."""
        if self.called.short:
            return 72 if self.compressed else 30
        return COMPRESSED_TOKENS if self.compressed else TOKENS

    @property
    def history(self) -> int:
        if self.called.history == -41 and self.compressed:
            return self.tokens - 87
        return self.called.history % self.tokens

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
        """int64 [B, tokens] that start over at other places in each entry of the batch."""
        if not self.called.packed:
            return None
        position = torch.arange(self.tokens)
        starts = ((0, 50, 51, 190), (0, 101), (0,))
        rows = []
        for entry in range(self.batch):
            first = torch.zeros(self.tokens, dtype=torch.int64)
            for start in starts[entry]:
                first[start:] = start
            rows.append(position - first)
        return torch.stack(rows)

    def inputs(self) -> dict[str, Tensor]:
        """What the call gets besides tokens and a cache."""
        found = {"attention_mask": self.attention_mask(), "position_ids": self.position_ids()}
        return {name: value for name, value in found.items() if value is not None}

    def make_cache(self, model: Any) -> Any:
        if self.called.cache == "static":
            return transformers.StaticCache(config=model.config, max_cache_len=self.tokens + SPARE)
        return transformers.DynamicCache(config=model.config) if self.called.cache == "dynamic" else None

    def visible(self, keys: int) -> Tensor:
        """bool [B, S, keys], from the definition: causal AND not padding AND of the same sequence."""
        position = torch.arange(self.history, self.tokens)[:, None]
        token = torch.arange(keys)
        if self.compressed:
            ids = self.position_ids()
            position = position.T if ids is None else ids
            return (token < ((position + 1) // COMPRESSED)[..., None]).expand(self.batch, -1, -1)
        visible = (token <= position).repeat(self.batch, 1, 1)
        attention_mask, position_ids = self.attention_mask(), self.position_ids()
        if attention_mask is not None:
            visible &= nn.functional.pad(attention_mask, (0, keys - self.tokens)).bool()[:, None, :]
        if position_ids is not None:
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


def spread() -> list[Case]:
    """Every situation with two models or more, every model with several situations; dtype and shapes take turns."""
    turns = itertools.cycle(itertools.product((torch.float32, torch.bfloat16), (False, True)))
    names = [(name, attention) for name, (*_, implementations) in MODELS.items() for attention in implementations]
    cases = []
    for number, situation in enumerate(SITUATIONS):
        # Steps that meet all pairs of a model and an attention in turn.
        for name, attention in (names[(2 * number) % len(names)], names[(2 * number + 3) % len(names)]):
            case = Case(name, attention, situation, *next(turns))
            if case.possible:
                cases.append(case)
    return cases


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


def compiled(module: nn.Module, dynamic: bool) -> Any:
    return torch.compile(
        module,
        backend=hisa_compile.hisa_backend,
        fullgraph=True,
        dynamic=dynamic or None,
        options={**FITS, "hisa.base": "aot_eager"},
    )


def random_ids(case: Case) -> Tensor:
    return torch.randint(2, 97, (case.batch, case.tokens), generator=torch.Generator().manual_seed(1))


def filled_cache(case: Case, model: Any) -> Any:
    """A cache of the case's kind that holds its history."""
    cache = case.make_cache(model)
    if case.history:
        padding = case.attention_mask()
        ids = random_ids(case)[:, : case.history]
        past = None if padding is None else padding[:, : case.history]
        model(ids, past_key_values=cache, use_cache=True, attention_mask=past)
    return cache


def check_model(case: Case) -> None:
    torch._dynamo.reset()
    model = case.make_model()
    logits = []
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        recorded_calls() as calls,
        graphs_after_the_pass() as graphs,
    ):
        warnings.simplefilter("ignore")
        for run in (model, compiled(model, case.dynamic)):
            cache = filled_cache(case, model)
            tokens = random_ids(case)[:, case.history :]
            logits.append(run(tokens, past_key_values=cache, use_cache=cache is not None, **case.inputs()).logits)
    assert len(calls) == case.layers, hisa_compile.reports()[-1]
    assert graphs
    for graph in graphs:
        assert len(graph.calls) == case.layers
        assert_vectors(case, graph)
        if case.tokens - case.history > 1:
            assert_no_pairs(graph.for_indexers_alone(), graph.pairs)
    assert_calls_see(case, calls)
    real = case.real_queries()
    eager, ours = (each[real].float() for each in logits)
    assert float((ours - eager).abs().max() / eager.abs().max()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", spread(), ids=str)
def test_a_model_hands_its_indexers_vectors(case: Case) -> None:
    """No mask at the call, nothing of S x T for the indexer alone, the visibility and the logits are the model's."""
    check_model(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_model_situation_dtype_and_shape(case: Case) -> None:
    """The whole matrix."""
    check_model(case)
