"""The page of what is supported, made from the tables of the tests: every row is run through the pass.

``python tests/support_page.py`` writes docs/support.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clients import CLIENTS, Client
from model_cases import FITS, recorded_calls
from programs import HEAD_SUMS, LAYOUTS, MASKS, OUTPUTS, PRODUCTS, RELUS, SCALES, SELECTIONS, Program, aten_graph
from test_pass_near_misses import INPUTS, NEAR_MISSES
from torch import Tensor, nn
from torch.func import functional_call

from hisa_compile import hisa_backend
from hisa_compile.passes import PassSettings, Site, rewrite_indexers

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
COMMAND = "python tests/support_page.py"
SMALL = PassSettings(block_size=4, block_topk=3)

# The operator's arguments besides q, k, weights and topk.
EXTRAS = ("window_start", "window_end", "q_segment", "k_segment", "key_valid", "mask", "k_scale", "k_weight")

# How each entry of the tables is spelled, for a reader.
WRITTEN: dict[str, dict[Any, str]] = {
    "product": {
        "einsum": '`torch.einsum("bshd,btd->bsht", q, k)`',
        "matmul": "`torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))`",
        "bmm": "`torch.bmm(q, k.transpose(1, 2))`, queries and heads in one dimension",
        "mul_sum": "`(q.unsqueeze(3) * k[:, None, None]).sum(-1)`",
        "baddbmm": "`torch.baddbmm(zero, q, k.transpose(1, 2), beta=0)`",
        "mm": "`torch.mm(q, k.t())`, one sequence",
        "linear": "`F.linear(q, k)`, one sequence",
        "key_first": "`torch.matmul(k, q.transpose(-1, -2)).transpose(-1, -2)`",
    },
    "relu": {
        "relu": "`torch.relu(x)`",
        "clamp": "`x.clamp(min=0)`",
        "clamp_min": "`torch.clamp_min(x, 0.0)`",
        "maximum": "`torch.maximum(x, torch.zeros_like(x))`",
        "threshold": "`F.threshold(x, 0.0, 0.0)`",
        "where": "`torch.where(x > 0, x, 0.0)`",
        "gate": "`x * (x > 0)`",
        "masked_fill": "`x.masked_fill(x < 0, 0.0)`",
        "hardtanh": "`F.hardtanh(x, 0.0, inf)`",
        "where_not": "`torch.where(~(x >= 0), zero, x)`",
        "in_place": "`x.relu_()`",
    },
    "head_sum": {
        "mul_sum": "`(x * w.unsqueeze(-1)).sum(2)`",
        "einsum": '`torch.einsum("bsht,bsh->bst", x, w)`',
        "weights_left": "`torch.matmul(w.unsqueeze(-2), x)`",
        "weights_right": "`torch.matmul(x.transpose(-1, -2), w.unsqueeze(-1))`",
        "none": "`x.sum(2)`, heads of equal weight",
        "loop": "a Python loop over the heads that adds up",
        "stack": "`torch.stack(heads).sum(0)`",
        "halves": "two groups of heads, summed each and added",
        "addcmul": "`torch.addcmul(total, w, x)`, head by head",
        "mean": "`x.sum(2) / H`",
    },
    "scale": {
        "none": "no scale",
        "product": "a number on the product",
        "query": "a number on the queries",
        "weights": "a number on the weights",
        "after_relu": "a number after the ReLU",
        "after_sum": "a number on the sum over the heads",
        "tensor": "a tensor of one number",
        "negative": "a negative number before the ReLU",
        "negative_tensor": "a tensor of one negative number",
        "negative_after_relu": "a negative number after the ReLU",
        "divided": "divided by a number",
        "divided_tensor": "divided by a tensor of one number",
        "key_before": "a scale a key, on the keys",
        "key_on_product": "a scale a key, on the product (float8 keys)",
        "key_after": "a scale a key, on the sum over the heads",
        "query_factor": "a scale a query, on the queries",
    },
    "mask": {
        "none": "no mask",
        "hidden": "causal, `masked_fill(token > query, -inf)`",
        "visible": "causal, `torch.where(token <= query, scores, -inf)`",
        "fill_min": "causal, filled with `torch.finfo(dtype).min`",
        "add_inf": "causal, `-inf` added",
        "add_min_bf16": "causal, bfloat16's lowest number added",
        "padding": "the first tokens hidden (left padding of one length)",
        "stacked": "two masks one after the other: causal, then some keys",
        "sliding": "causal and a sliding window",
        "distance": "`(query - token).abs() < window`",
        "chunked": "tokens of the query's own chunk, `query // c == token // c`",
        "segments": "equal ids of query and key",
        "packed": "causal and equal ids (packed sequences)",
        "tril": "`torch.ones(S, T).tril(...)` as bool",
        "triu_added": "`torch.full((S, T), -inf).triu(...)` added",
        "float_triangle": "`torch.tril(torch.ones(S, T)) == 0`",
        "valid_keys": "valid keys by row (padding)",
        "tensor_offset": "causal from an offset in a tensor (a cache)",
        "compressed": "compressed keys, `token >= (query + 1) // r` hidden",
        "compressed_key": "compressed keys, `(token + 1) * r - 1 <= query`",
        "rows": "causal, some queries see nothing",
        "everything": "causal, sliding window, packed and padded at once",
        "four_dimensional": "a [B, 1, S, T] float mask of causal and padding, added",
        "free": "any bool [B, S, T]",
        "free_or_causal": "causal or any bool [B, S, T]",
    },
    "layout": {
        "bshd": "q [B,S,H,D], k [B,T,D]",
        "bhsd": "q [B,H,S,D], k [B,T,D]",
        "sbhd": "q [S,B,H,D], k [T,B,D], scores transposed",
        "packed": "q [S,H,D], k [T,D], scores [S,T]",
        "squeezed": "q [S,H,D], k [T,D], batch dimension added",
        "two_heads": "q [B,S,G,R,D]: heads in two dimensions",
    },
    "selection": {
        "topk": "`scores.topk(k)`",
        "sort": "`scores.sort(descending=True, stable=True)`, the first k",
        "argsort": "`scores.argsort(descending=True)[..., :k]`",
        "negated_topk": "`(-scores).topk(k, largest=False)`",
        "negated_argsort": "`(-scores).sort()`, the first k",
        "tail": "`scores.sort()`, the last k",
        "flipped": "`scores.sort()`, flipped, the first k",
        "msort": "`torch.sort(scores, -1, True)`, the first k",
    },
    "outputs": {"indices": "indices used", "values": "values used", "both": "values and indices used"},
    "chunks": {
        1: "all queries at once",
        2: "2 chunks of queries, results in `cat`",
        5: "one query at a time, in `cat`",
    },
    "upcast": {False: "float32", True: "bfloat16, `.float()` before the product"},
}
TABLES: dict[str, tuple[str, Iterable[Any]]] = {
    "product": ("Product of queries and keys", PRODUCTS),
    "relu": ("ReLU", RELUS),
    "head_sum": ("Sum over the heads", HEAD_SUMS),
    "scale": ("Scales", SCALES),
    "mask": ("Masks", MASKS),
    "layout": ("Layouts", LAYOUTS),
    "selection": ("Selection", SELECTIONS),
    "outputs": ("What is used of it", OUTPUTS),
    "chunks": ("Queries in chunks", (1, 2, 5)),
    "upcast": ("Precision", (False, True)),
}
NOTES = {
    "scale": "A number is folded into q or the weights; its sign stays right.",
    "mask": "What can be had from vectors is passed as vectors, so that no S x T mask is made; `mask` is what is left.",
    "chunks": "A loop over chunks asks for the number of queries, so it was traced with static shapes alone.",
}

SHAPES: dict[str, dict[str, int]] = {
    "one sequence, B = 1": {"batch": 1},
    "one query, S = 1 (decode)": {"queries": 1},
    "one sequence and one query": {"batch": 1, "queries": 1},
    "one head, H = 1": {"heads": 1},
    "fewer tokens than are selected, T < k": {"tokens": 4},
}
# Near misses that are points of the same space.
BARRED: dict[str, Program] = {
    "values used, and a finite number added as mask": Program(mask="add_min_bf16", outputs="values"),
    "equal weights of the heads, and a factor of the keys": Program(head_sum="none", scale="key_after"),
}

INTRO = f"""# What is supported

Written by `{COMMAND}` from the tables of the tests; a test fails where this is not what comes out today.

The score that is found is `sum_h w[s,h] * relu(sum_d q[s,h,d] * k[t,d])`, ranked along t. Each row below is one way
to write a part of it, the rest being the plainest way. It was traced to ATen operations with static shapes, before and
after Inductor's decompositions, and with dynamic shapes, and the pass was run on each graph. *Rewritten*: in all three,
to one call of the operator, unless it says otherwise. *Passed*: what the operator gets besides q, k, weights and topk
([its arguments](operator.md)).

Rows combine freely: the tests draw combinations and compare results bit for bit. Whole models: [models.md](models.md).
How it works: [pass.md](pass.md). What becomes of your own model: `hisa_compile.explain(model, *inputs)`.
"""


def page() -> str:
    """The text of docs/support.md."""
    parts = [INTRO]
    for name, (title, choices) in TABLES.items():
        assert set(WRITTEN[name]) == set(choices), f"WRITTEN[{name!r}] must say how each entry is written"
        rows = [_program_row(name, choice) for choice in choices]
        head = "| written as | rewritten | passed |"
        parts.append(_section(title, [head, "| --- | --- | --- |", *rows], NOTES.get(name, "")))
    rows = [_row(name, Program(**sizes)) for name, sizes in SHAPES.items()]
    parts.append(_section("Shapes", ["| shape | rewritten | passed |", "| --- | --- | --- |", *rows]))
    head = "| project | selections | rewritten | passed |"
    parts.append(
        _section(
            "Indexers of public projects",
            [head, "| --- | --- | --- | --- |", *(_client_row(name, client) for name, client in CLIENTS.items())],
            "Their operations in their order, without what is around them ([tests/clients.py](../tests/clients.py)).",
        )
    )
    head = "| an indexer but for | why it stays as it is | what would help |"
    parts.append(
        _section(
            "Near misses",
            [head, "| --- | --- | --- |", *_near_miss_rows()],
            "Left alone, node for node ([tests/test_pass_near_misses.py](../tests/test_pass_near_misses.py)).",
        )
    )
    return "\n".join(parts)


def _section(title: str, table: list[str], note: str = "") -> str:
    return "\n".join([f"## {title}", "", *([note, ""] if note else []), *table, ""])


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What the pass did with one graph."""

    sites: tuple[Site, ...]
    calls: int
    passed: frozenset[str]

    @property
    def outcome(self) -> str:
        reasons = {plain(site.reason) for site in self.sites if not site.rewritten}
        if reasons:
            return "no: " + "; ".join(sorted(reasons))
        return "yes" if self.calls == 1 else f"yes, in {self.calls} calls"


def _run(graph: torch.fx.GraphModule, settings: PassSettings = SMALL) -> Seen:
    sites = rewrite_indexers(graph.graph, settings)
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.hisa.indexer_topk.default]
    passed = frozenset(name for call in calls for name in EXTRAS if call.kwargs.get(name) is not None)
    return Seen(tuple(sites), len(calls), passed)


def _program_row(name: str, choice: Any) -> str:
    # These two take matrices.
    return _row(
        WRITTEN[name][choice], Program(**{name: choice}, **({"batch": 1} if choice in ("mm", "linear") else {}))
    )


@functools.cache
def _program_seen(program: Program) -> dict[str, Seen]:
    """By how it was traced.  Dynamic shapes take long to trace: before decompositions they are left to the tests."""
    ways = {
        "before decompositions": (False, False),
        "after decompositions": (False, True),
        "dynamic shapes": (True, True),
    }
    return {
        way: _run(aten_graph(program.run, program.inputs(), symbolic, decompose))
        for way, (symbolic, decompose) in ways.items()
        if not (symbolic and program.chunks > 1)
    }


def _row(written: str, program: Program) -> str:
    seen = _program_seen(program)
    outcome = _agreed({way: each.outcome for way, each in seen.items()})
    passed = _agreed({way: _names(each.passed) for way, each in seen.items()})
    return f"| {written} | {outcome} | {passed} |"


def _agreed(found: dict[str, str]) -> str:
    """What was found in all ways of tracing, or in which of them what."""
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    ways = {what: [way for way, each in found.items() if each == what] for what in found.values()}
    return "; ".join(f"{' and '.join(ways[what])}: {what}" for what in ways)


def _names(passed: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in EXTRAS if name in passed) or "-"


def _client_row(name: str, client: Client) -> str:
    # Lengths at which every sequence and every compressed cache has more keys than are selected.
    length = 128 if any(word in name for word in ("V4", "glm5")) else 32
    run, inputs = client.build(length), client.inputs(length)
    if "glm5" in name:
        # The number of its keys depends on data: Dynamo can trace that.
        options = {**FITS, "hisa.base": "aot_eager"}
        compiled = torch.compile(run, backend=hisa_backend, options=options)  # type: ignore[call-overload]
        with torch.no_grad(), recorded_calls() as calls:
            compiled(*inputs)
        torch._dynamo.reset()
        given = {key for arguments, _ in calls for key, value in arguments.items() if value is not None}
        return f"| {name} | {client.sites} | {len(calls)} | {_names(given)} |"
    buffers = dict(run.named_buffers()) if isinstance(run, nn.Module) else {}
    constants = tuple(x for x in inputs if not isinstance(x, Tensor))

    def functional(*tensors: Tensor) -> Any:
        given, state = tensors[len(buffers) :], dict(zip(buffers, tensors, strict=False))
        return functional_call(run, state, given + constants) if buffers else run(*given, *constants)

    tensors = (*buffers.values(), *(x for x in inputs if isinstance(x, Tensor)))
    with torch.no_grad():
        seen = _run(aten_graph(functional, tensors), PassSettings(block_size=4, block_topk=10))
    done = sum(site.rewritten for site in seen.sites)
    return f"| {name} | {len(seen.sites)} | {done} | {_names(seen.passed)} |"


def _near_miss_rows() -> Iterator[str]:
    for name, run in NEAR_MISSES.items():
        yield from _near_miss_row(name, run, INPUTS)
    for name, program in BARRED.items():
        yield from _near_miss_row(name, program.run, program.inputs())


def _near_miss_row(name: str, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Iterator[str]:
    left = [site for site in _run(aten_graph(run, inputs)).sites if not site.rewritten]
    if left:
        reasons = dict.fromkeys(plain(site.reason) for site in left)
        suggestions = dict.fromkeys(plain(site.suggestion) for site in left if site.suggestion)
        yield f"| {name} | {'; '.join(reasons)} | {'; '.join(suggestions) or '-'} |"


def plain(text: str) -> str:
    """A message without the names of nodes, which differ between versions of torch, fit for a table."""
    text = re.sub(r"<built-in function (\w+)>", r"\1", text)
    text = re.sub(r"\b(aten|prims)\.(\w+)\.\w+", r"\1.\2", text)
    text = re.sub(r" \(\w+\)", "", text)
    text = text.replace("placeholder", "an input")
    text = re.sub(r"\b([a-z]+(?:_[a-z]+)*)_\d+\b", r"\1", text)
    text = re.sub(r"\bs\d+\b", "T", text)  # the only size that reasons name
    return text.replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
