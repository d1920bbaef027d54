"""Models and what their queries see, for tests of the vectors that masks become; and reading the graphs of these."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from models import MODELS, build
from torch import Tensor, fx, nn

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
