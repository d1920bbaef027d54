"""Indexer programs for the tests of the pass: one score, spelled in many ways, with what it must mean.

A :class:`Program` is a point in the space product x relu x head sum x scale x mask x layout x selection x chunks;
its ``run`` is ordinary torch code, its ``meaning`` the arguments of the operator call that it must be rewritten to.
Inputs are small integers, and scales powers of two, so that every sum is exact in float32 in any order: results
can be compared bit for bit, ties included.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from program_masks import FREE_FORM, MASKS, masked, vectors
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

PRODUCTS = ("einsum", "matmul", "bmm", "mul_sum", "baddbmm", "mm", "linear", "key_first")
RELUS = (
    "relu",
    "clamp",
    "clamp_min",
    "maximum",
    "threshold",
    "where",
    "gate",
    "masked_fill",
    "hardtanh",
    "where_not",
    "in_place",
)
HEAD_SUMS = ("mul_sum", "einsum", "weights_left", "weights_right", "none", "loop", "stack", "halves", "addcmul", "mean")
SCALES = (
    "none",
    "product",
    "query",
    "weights",
    "after_relu",
    "after_sum",
    "tensor",
    "negative",
    "negative_tensor",
    "negative_after_relu",
    "divided",
    "divided_tensor",
    "key_before",
    "key_on_product",
    "key_after",
    "query_factor",
)
LAYOUTS = ("bshd", "bhsd", "sbhd", "packed", "squeezed", "two_heads")
SELECTIONS = (
    "topk",
    "sort",
    "argsort",
    "negated_topk",
    "negated_argsort",
    "tail",
    "flipped",
    "msort",
)
OUTPUTS = ("indices", "values", "both")


@dataclass(frozen=True)
class Program:
    product: str = "einsum"
    relu: str = "relu"
    head_sum: str = "mul_sum"
    scale: str = "none"
    mask: str = "none"
    layout: str = "bshd"
    selection: str = "topk"
    outputs: str = "indices"
    chunks: int = 1
    upcast: bool = False
    batch: int = 2
    queries: int = 5
    tokens: int = 19
    heads: int = 3
    dim: int = 4
    topk: int = 6
    seed: int = 0

    # Inputs -------------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, weights as the program takes them, in its layout and dtype; then scales of keys and queries, ids of
        queries and keys, valid keys, an offset, and a mask."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, queries, tokens = self.sizes
        heads = self.heads * (2 if self.layout == "two_heads" else 1)

        def integers(*shape: int, bound: int = 2) -> Tensor:
            return torch.randint(-bound, bound + 1, shape, generator=generator).float()

        q = integers(batch, queries, heads, self.dim)
        # Multiples of 12: the mean of 1, 2, 3 or 4 keys is an integer again.
        k = integers(batch, tokens, self.dim) * 12
        weights = integers(batch, queries, heads, bound=3)
        signs = torch.tensor([-1.0, 1.0])
        key_scale = 2.0 ** integers(batch, tokens, bound=1) * signs[(integers(batch, tokens) > -2).long()]
        row_scale = 2.0 ** integers(batch, queries, bound=1) * signs[(integers(batch, queries) > 0).long()]
        q_ids = integers(batch, queries, bound=1).long()
        k_ids = integers(batch, tokens, bound=1).long()
        valid = integers(batch, tokens) > -2
        offset = torch.tensor(tokens - queries)
        free = integers(batch, queries, tokens) > -1
        if self.layout == "bhsd":
            q = q.transpose(1, 2).contiguous()
        elif self.layout == "sbhd":
            q, k, weights = q.transpose(0, 1), k.transpose(0, 1).contiguous(), weights.transpose(0, 1)
        elif self.layout in ("packed", "squeezed"):
            q, k, weights = q[0], k[0], weights[0]
        if self.upcast:
            q, k = q.bfloat16(), k.bfloat16()
        return q, k, weights, key_scale, row_scale, q_ids, k_ids, valid, offset, free

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, S, T."""
        return 1 if self.layout in ("packed", "squeezed") else self.batch, self.queries, self.tokens

    @property
    def rewritable(self) -> bool:
        """Whether the pass must rewrite it.

        With one key there is nothing to select, a finite number that is added to hidden scores leaves a trace in
        their values, and a factor of the key alone is a weight that varies over the keys.
        """
        weightless = self.head_sum in ("none", "mean") and self.scale == "key_after"
        return self.tokens > 1 and not (self.mask == "add_min_bf16" and self.outputs != "indices") and not weightless

    @property
    def takes_symbols(self) -> bool:
        """Whether its sizes may be symbols: not those of chunks, nor a group of heads that is 1 by a guard alone."""
        return self.chunks == 1 and not (self.layout == "two_heads" and self.heads == 1)

    # The program ----------------------------------------------------------------------------------------------------

    def run(self, q: Tensor, k: Tensor, weights: Tensor, *data: Tensor) -> Any:
        if self.layout in ("packed", "squeezed"):
            q, k, weights = q.unsqueeze(0), k.unsqueeze(0), weights.unsqueeze(0)
        elif self.layout == "bhsd":
            q = q.transpose(1, 2)
        elif self.layout == "sbhd":
            q, k, weights = q.transpose(0, 1), k.transpose(0, 1), weights.transpose(0, 1)
        if self.upcast:
            q, k = q.float(), k.float()
        found = []
        step = -(-self.queries // self.chunks)
        # Sizes of the whole are not asked for where there is one chunk: they may be symbols.
        for start in range(0, self.queries, step) if self.chunks > 1 else [None]:
            rows = slice(None) if start is None else slice(start, start + step)
            found.append(self._selected(self._scores(q[:, rows], k, weights[:, rows], rows, *data)))
        wanted = {"indices": (1,), "values": (0,), "both": (0, 1)}[self.outputs]
        dim = 0 if self.layout in ("packed", "sbhd") else 1
        parts = [[each[output] for each in found] for output in wanted]
        results = [part[0] if len(part) == 1 else torch.cat(part, dim) for part in parts]
        return results[0] if len(results) == 1 else tuple(results)

    def _scores(
        self, q: Tensor, k: Tensor, weights: Tensor, rows: slice, key_scale: Tensor, row_scale: Tensor, *data: Tensor
    ) -> Tensor:
        if self.scale == "query":
            q = q * 0.5
        if self.scale == "query_factor":
            q = q * row_scale[:, rows, None, None]
        if self.scale == "key_before":
            k = k * key_scale.unsqueeze(-1)
        if self.scale == "weights":
            weights = weights * 0.5
        if self.head_sum in ("loop", "stack", "halves", "addcmul") and self.layout != "two_heads":
            scores = self._by_hand(q, k, weights, key_scale)
        else:
            scores = self._head_sum(self._per_head(q, k, key_scale), weights)
        if self.scale == "key_after":
            scores = scores * key_scale[:, None]
        if self.scale == "after_sum":
            scores = scores * 0.5
        scores = masked(self.mask, scores, rows, self.queries, *data)
        if self.layout == "sbhd":
            return scores.transpose(0, 1)
        return scores.squeeze(0) if self.layout == "packed" else scores

    def _per_head(self, q: Tensor, k: Tensor, key_scale: Tensor) -> Tensor:
        x = self._scaled(self._product(q, k))
        if self.scale == "key_on_product":
            x = x * (key_scale[:, None, None] if x.dim() == 4 else key_scale[:, None, None, None])
        x = self._relu(x)
        if self.scale in ("after_relu", "negative_after_relu"):
            x = x * (0.5 if self.scale == "after_relu" else -0.5)
        return x

    def _by_hand(self, q: Tensor, k: Tensor, weights: Tensor, key_scale: Tensor) -> Tensor:
        """The sum over heads as additions of single heads or of groups of them."""
        heads = range(self.heads)
        if self.head_sum == "halves":
            half = max(1, self.heads // 2)
            groups = [slice(0, half), slice(half, self.heads)] if self.heads > 1 else [slice(0, 1)]
        else:
            groups = [slice(h, h + 1) for h in heads]
        total: Tensor | None = None
        terms = []
        for group in groups:
            per_head = self._per_head(q[:, :, group], k, key_scale)
            if self.head_sum == "halves":
                term = (per_head * weights[:, :, group].unsqueeze(-1)).sum(2)
            elif self.head_sum == "addcmul":
                weight = weights[:, :, group.start].unsqueeze(-1)
                relu = per_head.squeeze(2)
                total = relu * weight if total is None else torch.addcmul(total, weight, relu)
                continue
            else:
                term = per_head[:, :, 0] * weights[:, :, group.start, None]
            terms.append(term)
            total = term if total is None else total + term
        assert total is not None
        return torch.stack(terms).sum(0) if self.head_sum == "stack" else total

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        batch, queries, heads, dim = q.shape
        if self.layout == "two_heads":
            grouped = q.unflatten(2, (heads // 2, 2))
            return torch.einsum("bsgrd,btd->bsgrt", grouped, k)
        match self.product:
            case "einsum":
                return torch.einsum("bshd,btd->bsht", q, k)
            case "matmul":
                return torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))
            case "bmm":
                flat = torch.bmm(q.reshape(batch, queries * heads, dim), k.transpose(1, 2))
                return flat.view(batch, queries, heads, k.shape[1])
            case "mul_sum":
                return (q.unsqueeze(3) * k[:, None, None]).sum(-1)
            case "baddbmm":
                flat = q.reshape(batch, queries * heads, dim)
                product = torch.baddbmm(flat.new_zeros(1), flat, k.transpose(1, 2), beta=0)
                return product.view(batch, queries, heads, k.shape[1])
            case "mm" | "linear" if batch == 1:
                if self.product == "linear":
                    return torch.nn.functional.linear(q, k[0])
                return torch.mm(q.reshape(queries * heads, dim), k[0].t()).view(1, queries, heads, k.shape[1])
            case "mm" | "linear" | "key_first":
                return torch.matmul(k.unsqueeze(1), q.transpose(-1, -2)).transpose(-1, -2)
        raise AssertionError(self.product)

    def _scaled(self, x: Tensor) -> Tensor:
        match self.scale:
            case "product":
                return x * 0.25
            case "negative":
                return -0.5 * x
            case "divided":
                return x / 4
            case "tensor":
                return x * torch.full((), 0.25).sqrt().square()
            case "negative_tensor":
                return x * (-torch.full((), 2.0).abs())
            case "divided_tensor":
                return x / torch.full((), 4.0).sqrt().square()
        return x

    def _relu(self, x: Tensor) -> Tensor:
        match self.relu:
            case "relu":
                return torch.relu(x)
            case "clamp":
                return x.clamp(min=0)
            case "clamp_min":
                return torch.clamp_min(x, 0.0)
            case "maximum":
                return torch.maximum(x, torch.zeros_like(x))
            case "threshold":
                return torch.nn.functional.threshold(x, 0.0, 0.0)
            case "where":
                return torch.where(x > 0, x, 0.0)
            case "gate":
                return x * (x > 0)
            case "masked_fill":
                return x.masked_fill(x < 0, 0.0)
            case "hardtanh":
                return torch.nn.functional.hardtanh(x, 0.0, float("inf"))
            case "where_not":
                return torch.where(~(x >= 0), torch.zeros((), dtype=x.dtype), x)
            case "in_place":
                return x.clone().relu_()
        raise AssertionError(self.relu)

    def _head_sum(self, per_head: Tensor, weights: Tensor) -> Tensor:
        if self.layout == "two_heads":
            weights = weights.unflatten(2, (weights.shape[2] // 2, 2))
            if self.head_sum in ("none", "mean"):
                return per_head.sum((2, 3)) if self.head_sum == "none" else per_head.sum(3).sum(2) / 4
            if self.head_sum == "einsum":
                return torch.einsum("bsgrt,bsgr->bst", per_head, weights)
            return (per_head * weights.unsqueeze(-1)).sum((2, 3))
        match self.head_sum:
            case "mul_sum":
                return (per_head * weights.unsqueeze(-1)).sum(2)
            case "einsum":
                return torch.einsum("bsht,bsh->bst", per_head, weights)
            case "weights_left":
                return torch.matmul(weights.unsqueeze(-2), per_head).squeeze(-2)
            case "weights_right":
                return torch.matmul(per_head.transpose(-1, -2), weights.unsqueeze(-1)).squeeze(-1)
            case "none":
                return per_head.sum(2)
            case "mean":
                # Not of as many heads: a third is no power of two.
                return per_head.sum(2) / 4
        raise AssertionError(self.head_sum)

    def _selected(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(values, indices), whatever of them is used."""
        k = min(self.topk, scores.shape[-1])
        match self.selection:
            case "topk":
                values, indices = scores.topk(k, dim=-1)
            case "sort":
                values, indices = (x[..., :k] for x in scores.sort(dim=-1, descending=True, stable=True))
            case "argsort":
                indices = scores.argsort(dim=-1, descending=True)[..., :k]
                values = indices  # not there
            case "negated_topk":
                values, indices = (-scores).topk(k, dim=-1, largest=False)
            case "negated_argsort":
                values, indices = (x[..., :k] for x in (-scores).sort(dim=-1))
            case "tail":
                values, indices = (x[..., -k:] for x in scores.sort(dim=-1))
            case "flipped":
                values, indices = (x.flip(-1)[..., :k] for x in scores.sort(dim=-1))
            case "msort":
                values, indices = (x[..., :k].to(x.dtype) for x in torch.sort(scores, -1, True))
            case _:
                raise AssertionError(self.selection)
        return values, indices

    # What it means ------------------------------------------------------------------------------------------------

    def meaning(self) -> dict[str, Any]:
        """The arguments of the operator call that the program is."""
        layout = "two_heads" if self.layout == "two_heads" else "bshd"
        plain = dataclasses.replace(self, layout=layout, upcast=False, batch=self.sizes[0])
        q, k, weights, key_scale, row_scale, *data = plain.inputs()
        if self.head_sum in ("none", "mean"):
            weights = torch.ones_like(weights) / (4 if self.head_sum == "mean" else 1)
        inner = {
            "product": 0.25,
            "query": 0.5,
            "tensor": 0.25,
            "negative": -0.5,
            "negative_tensor": -2.0,
            "divided": 0.25,
            "divided_tensor": 0.25,
        }.get(self.scale, 1.0)
        outer = {"after_relu": 0.5, "after_sum": 0.5, "negative_after_relu": -0.5}.get(self.scale, 1.0)
        if self.scale == "weights" and self.head_sum not in ("none", "mean"):
            outer = 0.5
        meaning: dict[str, Any] = {"q": q * inner, "k": k, "weights": weights * outer, "topk": self.topk}
        if self.scale == "query_factor":
            meaning["q"] = q * row_scale[..., None, None]
        if self.scale in ("key_before", "key_on_product"):
            # The scaled key is what the pass meets before the product; after it the scale is an argument.
            if self.scale == "key_before":
                meaning["k"] = k * key_scale[..., None]
            else:
                meaning["k_scale"] = key_scale
        if self.scale == "key_after":
            meaning["k_weight"] = key_scale
        return meaning | vectors(self.mask, self.sizes, *data)

    @property
    def hidden_value(self) -> float:
        """What the values of hidden tokens are."""
        lowest = torch.finfo(torch.float32).min if self.mask == "fill_min" else float("-inf")
        return -lowest if "negated" in self.selection else lowest

    def as_returned(self, result: Tensor, is_values: bool) -> Tensor:
        """An output of the operator, [B, S, k'], as the program returns it."""
        if is_values:
            result = -result if "negated" in self.selection else result
            result = result.masked_fill(result.isinf(), self.hidden_value)
        if self.selection == "tail":
            result = result.flip(-1)
        return {"sbhd": result.transpose(0, 1), "packed": result[0]}.get(self.layout, result)


def programs(kind: type[Program] = Program, **fixed: Any) -> st.SearchStrategy[Any]:
    """Any program, with the given fields fixed, or drawn where a strategy is given."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "product": st.sampled_from(PRODUCTS),
        "relu": st.sampled_from(RELUS),
        "head_sum": st.sampled_from(HEAD_SUMS),
        "scale": st.sampled_from(SCALES),
        "mask": st.sampled_from(MASKS),
        "layout": st.sampled_from(LAYOUTS),
        # An argsort has no values.
        "selection": st.sampled_from([x for x in SELECTIONS if x != "argsort" or fixed.get("outputs") != "both"]),
        "outputs": st.sampled_from(OUTPUTS),
        "chunks": st.sampled_from((1, 1, 1, 2, 3)),
        "upcast": st.booleans(),
        "batch": st.integers(1, 3),
        "queries": st.integers(1, 7),
        "tokens": st.integers(2, 41),
        "heads": st.integers(1, 4),
        "dim": st.integers(2, 6),
        "topk": st.integers(1, 9),
        "seed": st.integers(0, 2**31),
    }
    for name, value in fixed.items():
        choices[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return st.builds(kind, **choices).map(_tidied)


def _tidied(program: Program) -> Program:
    """There are no more chunks than queries, an argsort has no values, and a sort that keeps every token is a sort."""
    if "topk" not in program.selection:
        program = dataclasses.replace(program, topk=min(program.topk, program.tokens - 1))
    outputs = "indices" if program.selection == "argsort" else program.outputs
    return dataclasses.replace(program, chunks=min(program.chunks, program.queries), outputs=outputs)


def aten_graph(
    run: Any, inputs: tuple[Tensor, ...], symbolic: bool = False, decompose: bool = True, functional: bool = True
) -> GraphModule:
    """The ATen graph of a function, after Inductor's decompositions if asked for."""

    def call(*args: Tensor) -> Any:  # make_fx miscounts the arguments of a bound method
        return run(*args)

    return make_fx(
        torch.func.functionalize(call) if functional else call,
        tracing_mode="symbolic" if symbolic else "fake",
        decomposition_table=select_decomp_table() if decompose else None,
    )(*inputs)


__all__ = [
    "FREE_FORM",
    "HEAD_SUMS",
    "LAYOUTS",
    "MASKS",
    "PRODUCTS",
    "RELUS",
    "SCALES",
    "SELECTIONS",
    "Program",
    "aten_graph",
    "programs",
]
