"""Indexer programs for the tests of the pass: one score, spelled in many ways, with what it must mean.

A :class:`Program` is a point in the space product x relu x head sum x scale x mask x layout x selection; its
``run`` is ordinary torch code, its ``meaning`` the operands of the operator call that it must be rewritten to.
Inputs are small integers, and scales powers of two, so that every sum is exact in float32 in any order: results
can be compared bit for bit, ties included.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

PRODUCTS = ("einsum", "matmul", "bmm", "mul_sum")
RELUS = ("relu", "clamp", "clamp_min", "maximum", "threshold", "where", "gate")
HEAD_SUMS = ("mul_sum", "einsum", "weights_left", "weights_right", "none")
SCALES = ("none", "product", "query", "weights", "after_relu", "tensor", "negative", "negative_tensor", "divided")
MASKS = ("none", "hidden", "visible", "fill_min", "add_inf", "add_min_bf16", "padding", "stacked")
LAYOUTS = ("bshd", "bhsd", "sbhd", "packed")
OUTPUTS = ("indices", "values", "both")


@dataclass(frozen=True)
class Program:
    product: str = "einsum"
    relu: str = "relu"
    head_sum: str = "mul_sum"
    scale: str = "none"
    mask: str = "none"
    layout: str = "bshd"
    outputs: str = "indices"
    upcast: bool = False
    batch: int = 2
    queries: int = 5
    tokens: int = 19
    heads: int = 3
    dim: int = 4
    topk: int = 6
    seed: int = 0

    # Inputs -------------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, weights as the program takes them: in its layout and dtype."""
        generator = torch.Generator().manual_seed(self.seed)

        def integers(*shape: int, bound: int = 2) -> Tensor:
            return torch.randint(-bound, bound + 1, shape, generator=generator).float()

        q = integers(self.batch, self.queries, self.heads, self.dim)
        # Multiples of 12: the mean of 1, 2, 3 or 4 keys is an integer again.
        k = integers(self.batch, self.tokens, self.dim) * 12
        weights = integers(self.batch, self.queries, self.heads, bound=3)
        if self.layout == "bhsd":
            q = q.transpose(1, 2).contiguous()
        elif self.layout == "sbhd":
            q, k, weights = q.transpose(0, 1), k.transpose(0, 1).contiguous(), weights.transpose(0, 1)
        elif self.layout == "packed":
            q, k, weights = q[0], k[0], weights[0]
        return (q.bfloat16(), k.bfloat16(), weights) if self.upcast else (q, k, weights)

    @property
    def rewritable(self) -> bool:
        """Whether the pass must rewrite it: with one key there is nothing to select, and a finite number that is
        added to hidden scores leaves a trace in their values."""
        return self.tokens > 1 and not (self.mask == "add_min_bf16" and self.outputs != "indices")

    @property
    def inner_scale(self) -> float:
        return {
            "product": 0.25,
            "query": 0.5,
            "tensor": 0.25,
            "negative": -0.5,
            "negative_tensor": -2.0,
            "divided": 0.25,
        }.get(self.scale, 1.0)

    # The program ----------------------------------------------------------------------------------------------------

    def run(self, q: Tensor, k: Tensor, weights: Tensor) -> Any:
        if self.layout == "packed":
            q, k, weights = q.unsqueeze(0), k.unsqueeze(0), weights.unsqueeze(0)
        elif self.layout == "bhsd":
            q = q.transpose(1, 2)
        elif self.layout == "sbhd":
            q, k, weights = q.transpose(0, 1), k.transpose(0, 1), weights.transpose(0, 1)
        if self.upcast:
            q, k = q.float(), k.float()
        if self.scale == "query":
            q = q * 0.5
        per_head = self._relu(self._scaled(self._product(q, k)))
        if self.scale == "after_relu":
            per_head = per_head * 0.5
        if self.scale == "weights":
            weights = weights * 0.5
        scores = self._masked(self._head_sum(per_head, weights))
        if self.layout == "sbhd":
            scores = scores.transpose(0, 1)
        elif self.layout == "packed":
            scores = scores.squeeze(0)
        values, indices = scores.topk(min(self.topk, scores.shape[-1]), dim=-1)
        return {"indices": indices, "values": values, "both": (values, indices)}[self.outputs]

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        batch, queries, heads, dim = q.shape
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
        raise AssertionError(self.product)

    def _scaled(self, x: Tensor) -> Tensor:
        match self.scale:
            case "product":
                return x * 0.25
            case "negative":
                return -0.5 * x
            case "divided":
                return x / 4
            case "tensor" | "negative_tensor":
                return (
                    x * torch.full((), self.inner_scale).sqrt().square()
                    if self.scale == "tensor"
                    else x * (-torch.full((), -self.inner_scale).abs())
                )
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
        raise AssertionError(self.relu)

    def _head_sum(self, per_head: Tensor, weights: Tensor) -> Tensor:
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
        raise AssertionError(self.head_sum)

    @staticmethod
    def _positions(queries: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Where each query stands and each token stands; the last query sees every token."""
        token = torch.arange(tokens)
        query = torch.arange(queries) + tokens - queries
        return query.clamp_min(0)[:, None], token[None]

    def _masked(self, scores: Tensor) -> Tensor:
        query, token = self._positions(*scores.shape[1:])
        match self.mask:
            case "none":
                return scores
            case "hidden":
                return scores.masked_fill(token > query, float("-inf"))
            case "visible":
                return torch.where(token <= query, scores, float("-inf"))
            case "fill_min":
                return scores.masked_fill(token > query, torch.finfo(scores.dtype).min)
            case "add_inf":
                return scores + torch.where(token > query, float("-inf"), 0.0)
            case "add_min_bf16":
                lowest = torch.finfo(torch.bfloat16).min
                return scores + torch.where(token > query, lowest, 0.0).to(torch.bfloat16)
            case "padding":
                return scores.masked_fill((token < 3)[None], float("-inf"))
            case "stacked":
                scores = scores.masked_fill((token > query)[None], float("-inf"))
                return torch.where((token % 5 != 1)[None], scores, float("-inf"))
        raise AssertionError(self.mask)

    # What it means ------------------------------------------------------------------------------------------------

    def visible(self) -> Tensor | None:
        query, token = self._positions(self.queries, self.tokens)
        match self.mask:
            case "none":
                return None
            case "padding":
                return (token >= 3).expand(self.queries, -1)
            case "stacked":
                return (token <= query) & (token % 5 != 1)
        return token <= query

    def meaning(self) -> dict[str, Any]:
        """q, k, weights, topk and mask of the operator call that the program is."""
        plain = dataclasses.replace(self, layout="bshd", upcast=False)
        q, k, weights = plain.inputs()
        if self.layout == "packed":
            q, k, weights = q[:1], k[:1], weights[:1]
        if self.head_sum == "none":
            weights = torch.ones_like(weights)
        outer = 0.5 if self.scale in ("after_relu",) or (self.scale == "weights" and self.head_sum != "none") else 1.0
        return {
            "q": q * self.inner_scale,
            "k": k,
            "weights": weights * outer,
            "topk": self.topk,
            "mask": self.visible(),
        }

    def in_layout(self, result: Tensor) -> Tensor:
        """An output of the operator, [B, S, k'], as the program returns it."""
        return {"sbhd": result.transpose(0, 1), "packed": result[0] if result.shape[0] == 1 else result}.get(
            self.layout, result
        )


def programs(**fixed: Any) -> st.SearchStrategy[Program]:
    """Any program, with the given fields fixed."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "product": st.sampled_from(PRODUCTS),
        "relu": st.sampled_from(RELUS),
        "head_sum": st.sampled_from(HEAD_SUMS),
        "scale": st.sampled_from(SCALES),
        "mask": st.sampled_from(MASKS),
        "layout": st.sampled_from(LAYOUTS),
        "outputs": st.sampled_from(OUTPUTS),
        "upcast": st.booleans(),
        "batch": st.integers(1, 3),
        "queries": st.integers(1, 7),
        "tokens": st.integers(2, 41),
        "heads": st.integers(1, 4),
        "dim": st.integers(2, 6),
        "topk": st.integers(1, 9),
        "seed": st.integers(0, 2**31),
    }
    choices.update({name: st.just(value) for name, value in fixed.items()})
    return st.builds(Program, **choices)


def aten_graph(run: Any, inputs: tuple[Tensor, ...], symbolic: bool = False, decompose: bool = True) -> GraphModule:
    """The functional ATen graph of a function, after Inductor's decompositions if asked for."""
    return make_fx(
        lambda *args: run(*args),  # make_fx miscounts the arguments of a bound method
        tracing_mode="symbolic" if symbolic else "fake",
        decomposition_table=select_decomp_table() if decompose else None,
    )(*inputs)
