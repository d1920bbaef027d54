"""Hypothesis strategies for the arguments of ``hisa::indexer_topk``.

Only sizes, choices and a seed are drawn; tensors are built from them with a ``torch.Generator``, which is
fast and shrinks well.

Integer values (``values="integers"``) are chosen so that every product, sum, block mean and probe is exact in
float32 in any order of summation: two right implementations agree bit for bit, and ties are frequent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch import Tensor

from hisa_compile.ops.coarse import COARSE_STAGES, PROBE, size_of_means, vectors_of_block
from hisa_compile.ops.reference import pooled_dtype

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FLOAT8)
LAYOUTS = ("contiguous", "transposed", "strided", "unaligned")
# A multiple of 1 to 8, so the mean of up to 8 valid keys is an integer.  bfloat16 and float8 have too few
# digits for it, and need it less: their means are rounded to 8 bits.
KEY_UNIT = {torch.float32: 840, torch.float16: 840, torch.bfloat16: 1, FLOAT8: 1}
LARGEST_EXACT_BLOCK = 8
# With so many heads the probe is cheap enough to be the default stage, up to a little more than 2 m B tokens.
MANY_HEADS = 17


def assert_equal(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Same indices, same scores; NaN equals NaN and 0.0 equals -0.0."""
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0, equal_nan=True)


class Call(NamedTuple):
    """Arguments of one call; ``options`` are the keyword arguments."""

    q: Tensor
    k: Tensor
    weights: Tensor
    topk: int
    options: dict[str, Any]

    def run(self, function: Any) -> tuple[Tensor, Tensor]:
        return function(self.q, self.k, self.weights, self.topk, **self.options)

    def with_options(self, **options: Any) -> Call:
        return self._replace(options=self.options | options)

    @property
    def visibility(self) -> dict[str, Tensor]:
        names = ("window_start", "window_end", "key_valid", "mask", "q_segment", "k_segment")
        return {name: self.options[name] for name in names if name in self.options}

    def __repr__(self) -> str:
        def show(x: Any) -> str:
            return f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)

        options = ", ".join(f"{name}={show(x)}" for name, x in self.options.items())
        return f"Call({show(self.q)}, {show(self.k)}, {show(self.weights)}, topk={self.topk}, {options})"


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; what lies between them is NaN."""
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout in ("strided", "unaligned"):
        spare = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan")).to(x.dtype)
        out = spare[..., 1::2] if layout == "strided" else spare[..., 1 : x.shape[-1] + 1]
        return out.copy_(x)
    return x.contiguous()


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x of [B, T] in another layout: the same values, or where ``expanded`` those of its first row."""
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x.repeat_interleave(2, 1)[:, ::2] if layout == "strided" else x


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Uniform in [low, high], int64."""
    return torch.randint(low, high + 1, shape, generator=generator)


def make_values(
    generator: torch.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype, values: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and weights of ``shape`` (B, S, T, H, D); weights are float32 for float8 keys, else of ``dtype``."""
    batch, queries, tokens, heads, dim = shape
    sizes = ((batch, queries, heads, dim), (batch, tokens, dim), (batch, queries, heads))
    weight_dtype = torch.float32 if dtype == FLOAT8 else dtype
    if values == "gaussian":
        q, k, weights = (torch.randn(size, generator=generator) for size in sizes)
    else:
        q, k, weights = (integers(generator, -3, 3, *size).float() for size in sizes)
        k *= KEY_UNIT[dtype]
    return q.to(dtype), k.to(dtype), weights.to(weight_dtype)


def with_means(call: Call, seed: int, layout: str = "contiguous") -> Call:
    """The call with block means that are not its keys': small integers, some NaN; every dtype holds them.

    The probe does not take means, so that a call for it leaves the stage open.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, dim = call.k.shape
    stage = call.options.get("coarse")
    blocks = -(-tokens // size_of_means(stage, call.options["block_size"]))
    means = integers(generator, -3, 3, batch, blocks, dim * vectors_of_block(stage)).float()
    means[integers(generator, 0, 15, batch, blocks) == 0] = float("nan")
    if stage == PROBE:
        call = call.with_options(coarse=None)
    return call.with_options(k_pooled=relayout(means.to(pooled_dtype(call.k.dtype)), layout))


SEGMENTS = ("packed", "unsorted", "wide", "one", "unmatched")


def make_segments(
    generator: torch.Generator, kind: str, dtype: torch.dtype, q_shape: tuple[int, ...], batch: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """q_segment of ``q_shape`` and k_segment [B, T].

    packed: runs of equal ids, ascending; unsorted: few ids, some negative, in any order; wide: in int64 ids that
    are equal in their low 32 bits, in int32 both ends of the range; one: the same for all; unmatched: queries may
    have ids that no token has, inside and outside the range.
    """
    if kind == "packed":
        starts = (integers(generator, 0, 5, batch, tokens) == 0).long()
        k_segment = starts.cumsum(1)
        q_segment = integers(generator, 0, int(k_segment.max()), *q_shape)
        return q_segment.to(dtype), k_segment.to(dtype)
    ids = {"unsorted": [-7, 0, 2, 9], "one": [3], "unmatched": [-4, 4]}.get(kind)
    if ids is None:
        limits = torch.iinfo(dtype)
        ids = [limits.min, limits.max, 5, -1]
        if dtype == torch.int64:
            ids += [5 + 2**32, 5 - 2**32, 5 + 2**40]
    asked = torch.tensor(ids + [-9, 0, 9] * (kind == "unmatched"))
    k_segment = torch.tensor(ids)[integers(generator, 0, len(ids) - 1, batch, tokens)]
    # Some runs, so that there are blocks of one segment, of two and of many.
    runs = integers(generator, 1, 6, 1).item()
    k_segment = k_segment[:, torch.arange(tokens) // runs]
    return asked[integers(generator, 0, len(asked) - 1, *q_shape)].to(dtype), k_segment.to(dtype)


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    values: str = "integers",
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    layouts: tuple[str, ...] = ("contiguous",),
    min_tokens: int = 1,
    max_tokens: int = 80,
    max_queries: int = 5,
    max_dim: int = 8,
    special: bool = True,
    masks: bool = True,
    segments: bool | None = None,
    coarse: tuple[str | None, ...] = (None, *COARSE_STAGES),
) -> Call:
    """A whole call: budget, visibility in any combination and broadcast shape, fills, NaN and inf keys, any stage.

    Args:
        values: "integers" (exact in float32) or "gaussian".
        special: NaN and, where the dtype has it, inf in some keys.
        masks: draw free-form masks too.
        segments: with segments or without; both unless given.
        coarse: the coarse stages to draw from, None is that of the operator's choice: "paper" unless "probe" is among
            them too, as there are too few heads for it.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    dtype = draw(st.sampled_from(dtypes))
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, max_queries))
    many_heads = st.just(MANY_HEADS) if {None, PROBE} <= {*coarse} else st.nothing()
    tokens, dim = draw(st.integers(min_tokens, max_tokens)), draw(st.integers(1, max_dim))
    heads = draw(st.integers(1, 4) | many_heads)
    block_size, block_topk = draw(st.integers(1, LARGEST_EXACT_BLOCK)), draw(st.integers(2, 6))
    topk = draw(st.integers(0, block_size * block_topk))
    options: dict[str, Any] = {"block_size": block_size, "block_topk": block_topk}
    stage = draw(st.sampled_from(coarse), label="coarse")
    if stage is not None:
        options["coarse"] = stage
    q, k, weights = make_values(generator, (batch, queries, tokens, heads, dim), dtype, values)
    if special and draw(st.booleans(), label="special values"):
        for value in (float("nan"),) if dtype == FLOAT8 else (float("nan"), float("inf"), float("-inf")):
            # Not by masked_fill, which float8 lacks.
            k = torch.where(integers(generator, 0, 15, batch, tokens, 1) == 0, value, k.float()).to(dtype)
    window_shapes = ((batch, queries), (1, queries), (batch, 1), (queries,), ())
    for name in ("window_start", "window_end"):
        shape = draw(st.sampled_from((None, *window_shapes)), label=name)
        if shape is not None:
            options[name] = integers(generator, -tokens // 4 - 2, tokens + tokens // 4 + 2, *shape).int()
    if draw(st.booleans(), label="key_valid"):
        options["key_valid"] = integers(generator, 0, 2, batch, tokens) > 0
    if masks:
        mask_shapes = ((batch, queries, tokens), (queries, tokens), (batch, 1, tokens), (tokens,), (1, queries, 1))
        shape = draw(st.sampled_from((None, *mask_shapes)), label="mask")
        if shape is not None:
            options["mask"] = integers(generator, 0, 3, *shape) > 0
    if draw(st.booleans(), label="segments") if segments is None else segments:
        shape = draw(st.sampled_from(window_shapes), label="q_segment")
        kind, ids = draw(st.sampled_from(SEGMENTS)), draw(st.sampled_from((torch.int32, torch.int64)))
        options["q_segment"], options["k_segment"] = make_segments(generator, kind, ids, shape, batch, tokens)
    for name in ("k_scale", "k_weight"):
        if draw(st.booleans(), label=name):
            # Powers of two of any sign, and 0, so that integers stay exact.
            options[name] = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])[
                integers(generator, 0, 6, batch, tokens)
            ]
    options["sorted"] = draw(st.booleans(), label="sorted")
    options["mark_hidden"] = draw(st.booleans(), label="mark_hidden")
    q, k, weights = (relayout(x, draw(st.sampled_from(layouts))) for x in (q, k, weights))
    for name in ("k_segment", "k_weight"):
        if name in options and len(layouts) > 1:
            options[name] = in_layout(options[name], draw(st.sampled_from(("contiguous", "strided", "expanded"))))
    return Call(q, k, weights, topk, options)
