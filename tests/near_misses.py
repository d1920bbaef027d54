"""Near misses: any program of :mod:`programs` with exactly one obligation broken.

A breaking replaces one step of a program; ``applies`` says in which programs the result is not an indexer.  A
:class:`NearMiss` is a program with the name of its breaking, an :class:`Uneven` one whose chunks of queries are
indexers each, but can't be one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from programs import Program, programs
from torch import Tensor
from torch.nn import functional as F

_INF = float("inf")
_BY_HAND = ("loop", "stack", "halves", "addcmul")


def _anywhere(program: Program) -> bool:
    return True


def _sums_in_one_go(program: Program) -> bool:
    return program.head_sum not in _BY_HAND or program.layout == "two_heads"


def _by_hand(program: Program) -> bool:
    return not _sums_in_one_go(program)


def _one_chunk(program: Program) -> bool:
    return program.chunks == 1


def _per_head(program: Program) -> bool:
    """Where scores with a head axis get through to the selection; for a single query they are as good as queries."""
    plain = program.mask == "none" and program.scale != "key_after" and program.layout in ("bshd", "bhsd", "squeezed")
    return plain and _sums_in_one_go(program) and program.chunks == 1


def _has_values(program: Program) -> bool:
    return program.outputs != "indices" and "argsort" not in program.selection


def _token(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1])


class Breaking(NamedTuple):
    """step: the step that ``how`` takes the place of (see :class:`NearMiss`); applies: the programs it breaks."""

    step: str
    how: Callable[..., Any]
    applies: Callable[[Program], bool] = _anywhere


# In the place of the ReLU: a function of the product [..., T].
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "no ReLU": lambda x: x,
    "GELU": F.gelu,
    "tanh-GELU": lambda x: F.gelu(x, approximate="tanh"),
    "SiLU": F.silu,
    "softplus": F.softplus,
    "leaky ReLU": F.leaky_relu,
    "ELU": F.elu,
    "hardswish": F.hardswish,
    "squared ReLU": lambda x: x.relu().square(),
    "ReLU times its argument": lambda x: x.relu() * x,
    "product of two ReLUs": lambda x: x.relu() * (-x).relu(),
    "ReLU6": F.relu6,
    "clamp at 1": lambda x: x.clamp(min=1),
    "clamp at -1": lambda x: x.clamp(min=-1),
    "clamp from above": lambda x: x.clamp(max=0),
    "clamp on both sides": lambda x: x.clamp(0, 100),
    "maximum with a half": lambda x: torch.maximum(x, torch.full_like(x, 0.5)),
    "maximum with its mean": lambda x: torch.maximum(x, x.mean(-1, keepdim=True)),
    "threshold elsewhere": lambda x: F.threshold(x, 0.5, 0.0),
    "threshold to 1": lambda x: F.threshold(x, 0.0, 1.0),
    "gate elsewhere": lambda x: torch.where(x > 0.5, x, 0.0),
    "gate by other keys": lambda x: x * (x.flip(-1) > 0),
    "gate that keeps the other": lambda x: torch.where(x > 0, 1.0, x),
    "gate alone": lambda x: (x > 0).float(),
    "softmax over keys": lambda x: x.softmax(-1),
    "softmax over keys after the ReLU": lambda x: x.relu().softmax(-1),
    "softmax over heads": lambda x: x.relu().softmax(2),
    "sigmoid": torch.sigmoid,
    "tanh of the ReLU": lambda x: x.relu().tanh(),
    "absolute value": torch.abs,
    "bias before the ReLU": lambda x: (x + 1).relu(),
    "bias of the keys before the ReLU": lambda x: (x + _token(x)).relu(),
    "bias after the ReLU": lambda x: x.relu() + 1,
    "bias of the keys after the ReLU": lambda x: x.relu() + _token(x) / 4,
    "noise before the ReLU": lambda x: (x + torch.rand_like(x)).relu(),
    "dropout": lambda x: F.dropout(x.relu(), 0.5),
    "rounded product": lambda x: x.round().relu(),
    "integer product": lambda x: x.int().float().relu(),
    "mask before the ReLU": lambda x: x.masked_fill(_token(x) > 3, -_INF).relu(),
    "mask inside the sum": lambda x: x.relu().masked_fill(_token(x) > 3, -_INF),
    "mask of its own for each head": lambda x: x.relu().masked_fill(
        torch.arange(x.shape[-2])[:, None] * 2 > _token(x), -_INF
    ),
    "square root of the ReLU": lambda x: x.relu().double().sqrt().float(),
}

# In the place of the product of q [B, S, H, D] and k [B, T, D].
_PRODUCTS: dict[str, Breaking] = {
    "keys with a head axis": Breaking(
        "product",
        lambda q, k: torch.einsum("bshd,bthd->bsht", q, torch.stack([k.roll(h, 1) for h in range(q.shape[2])], 2)),
        _sums_in_one_go,
    ),
    "keys of each query's own": Breaking(
        "product",
        lambda q, k: torch.einsum("bshd,bstd->bsht", q, torch.stack([k.roll(s, 1) for s in range(q.shape[1])], 1)),
        # Without a batch the queries are one: a batch of single queries.
        lambda program: program.chunks == 1 and program.sizes[0] > 1,
    ),
    "two products in one ReLU": Breaking(
        "product",
        lambda q, k: torch.einsum("bshd,btd->bsht", q, k) + torch.einsum("bshd,btd->bsht", q, k.roll(1, 1)),
    ),
    "product of two products": Breaking(
        "product",
        lambda q, k: torch.einsum("bshd,btd->bsht", q, k) * torch.einsum("bshd,btd->bsht", q, k.roll(1, 1)),
    ),
    "a distance": Breaking("product", lambda q, k: (q.unsqueeze(3) - k[:, None, None]).square().sum(-1)),
    "ReLU of each feature": Breaking("product", lambda q, k: (q.unsqueeze(3) * k[:, None, None]).relu().sum(-1)),
    "maximum over the features": Breaking("product", lambda q, k: (q.unsqueeze(3) * k[:, None, None]).amax(-1)),
    "cosine": Breaking("product", lambda q, k: F.cosine_similarity(q.unsqueeze(3), k[:, None, None], dim=-1)),
}

# In the place of the sum over heads of [B, S, H, T] by weights [B, S, H].
_HEAD_SUMS: dict[str, Breaking] = {
    name: Breaking("head_sum", how, _sums_in_one_go)
    for name, how in {
        "maximum over heads": lambda x, w: (x * w[..., None]).amax(2),
        "logsumexp over heads": lambda x, w: (x * w[..., None]).logsumexp(2),
        "product over heads": lambda x, w: (x * w[..., None]).prod(2),
        "norm over heads": lambda x, w: (x * w[..., None]).square().sum(2).sqrt(),
        "median over heads": lambda x, w: (x * w[..., None]).median(2).values,
        "weights over keys and heads": lambda x, w: (
            x * (torch.arange(x.shape[2])[:, None] * _token(x)).remainder(5)
        ).sum(2),
        "weights over everything": lambda x, w: (x * x.sigmoid() * w[..., None]).sum(2),
        "weights over keys alone": lambda x, w: (x * _token(x).remainder(3)).sum(2),
        "the sum of squares as well": lambda x, w: (x * w[..., None]).sum(2) + x.square().sum(2),
        "ReLU of the sum as well": lambda x, w: (x * w[..., None]).sum(2).relu(),
        "a cumulative sum": lambda x, w: (x * w[..., None]).cumsum(2).sum(2),
    }.items()
} | {
    "a selection for each head": Breaking("head_sum", lambda x, w: x * w[..., None], _per_head),
    "a selection for each head, unweighted": Breaking("head_sum", lambda x, w: x, _per_head),
}

# In the place of a loop over heads: terms [B, S, T] of the heads.
_LOOPS: dict[str, Breaking] = {
    "maximum in a loop": Breaking("loop", lambda a, b: torch.maximum(a, b), _by_hand),
    "product in a loop": Breaking("loop", lambda a, b: a * b, _by_hand),
    "keys differ in a loop": Breaking("loop_keys", lambda k, head: k.roll(head, 1), _by_hand),
    "keys are scaled in a loop": Breaking(
        "loop_keys", lambda k, head: k * (torch.arange(k.shape[1])[:, None] % (head + 2) + 1), _by_hand
    ),
    "keys are shifted in a loop": Breaking("loop_keys", lambda k, head: k + head, _by_hand),
}

# What is done to the finished scores [..., T], before or after they are masked.
_AFTERWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "square": torch.square,
    "square by hand": lambda x: x * x,
    "sin": torch.sin,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "sigmoid of the sum": torch.sigmoid,
    "tanh of the sum": torch.tanh,
    "round": torch.round,
    "floor": torch.floor,
    "integer scores": lambda x: x.int().float(),
    "clamp of the sum": lambda x: x.clamp(-3, 3),
    "ReLU of the sum": torch.relu,
    "maximum with 1": lambda x: torch.maximum(x, torch.ones(())),
    "noise": lambda x: x + torch.rand_like(x),
    "Gumbel noise": lambda x: x - torch.rand_like(x).log().neg().log(),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "reciprocal": lambda x: 1 / (1 + x),
    "remainder": lambda x: x % 3,
    "cumulative": lambda x: x.cumsum(-1),
    "float64 scores": lambda x: x.double(),
    "recency bias": lambda x: x + _token(x) * 0.25,
    "bias of some keys": lambda x: x + torch.where(_token(x) % 3 == 0, 1.0, 0.0),
    "penalty of some keys": lambda x: x + (_token(x) % 3 == 0) * -1e4,
    "fill of -1": lambda x: x.masked_fill(_token(x) % 3 == 0, -1.0),
    "fill of 5": lambda x: torch.where(_token(x) > 3, x, 5.0),
    "fill of 0": lambda x: torch.where(_token(x) > 3, x, 0.0),
    "fill of -1e9": lambda x: x.masked_fill(_token(x) > 3, -1e9),
    "fill of -65504": lambda x: x.masked_fill(_token(x) > 3, -65504.0),
    "fill of +inf": lambda x: x.masked_fill(_token(x) > 3, _INF),
    "fill of NaN": lambda x: x.masked_fill(_token(x) > 3, float("nan")),
    "added +inf": lambda x: x + torch.where(_token(x) > 3, _INF, 0.0),
    "fill by the score": lambda x: torch.where(x > 1, x, 0.5),
    "lower triangle": lambda x: x.tril(2) if x.dim() > 2 else x.tril(1),
}

# Changed places: only after the mask, which knows every token.
_REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "keys in reverse": lambda x: x.flip(-1),
    "keys rolled": lambda x: x.roll(1, -1),
    "every other key": lambda x: x[..., ::2],
    "keys by a table": lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)],
    "keys twice": lambda x: torch.cat([x, x], -1),
    "one more column": lambda x: F.pad(x, (0, 1), value=-_INF),
}

# Added or filled, from the inputs key_scale [B, T], q_ids [B, S], k_ids, valid [B, T], free [B, S, T].
_DATA: dict[str, Callable[..., Tensor]] = {
    "bias of S x T": lambda x, scale, q_ids, k_ids, valid, free: x + free * 3.0,
    "bias of the keys": lambda x, scale, q_ids, k_ids, valid, free: x + scale[:, None],
    "segments that cost something": lambda x, scale, q_ids, k_ids, valid, free: (
        x - (q_ids[..., None] != k_ids[:, None]) * 100.0
    ),
    "an unknown number as mask": lambda x, scale, q_ids, k_ids, valid, free: x + k_ids[:, None].float() * -1e9,
    "one minus an unknown number": lambda x, scale, q_ids, k_ids, valid, free: (
        x + (1 - k_ids[:, None]).float() * torch.finfo(torch.float32).min
    ),
    "an unknown number times infinity": lambda x, scale, q_ids, k_ids, valid, free: (
        x + (1.0 - k_ids[:, None].float()) * -_INF
    ),
    "valid keys that cost something": lambda x, scale, q_ids, k_ids, valid, free: (
        x + torch.where(valid, 0.0, -1.0)[:, None]
    ),
    "fill by another tensor": lambda x, scale, q_ids, k_ids, valid, free: torch.where(free, x, scale[:, None]),
    "another score where invalid": lambda x, scale, q_ids, k_ids, valid, free: torch.where(
        valid[:, None], x, x.flip(-1)
    ),
    "weights of S x T": lambda x, scale, q_ids, k_ids, valid, free: x * (1.0 + free),
}

# In the place of the selection: (values, indices) of scores [..., T] and k.
_SELECTIONS: dict[str, Breaking] = {
    "smallest": Breaking("select", lambda x, k: x.topk(k, largest=False)),
    "largest of the negated": Breaking("select", lambda x, k: (-x).topk(k)),
    "head of an ascending sort": Breaking("select", lambda x, k: tuple(y[..., :k] for y in x.sort(-1))),
    "tail of a descending sort": Breaking(
        "select", lambda x, k: tuple(y[..., -k:] for y in x.sort(-1, descending=True))
    ),
    "flipped head of an ascending sort": Breaking(
        "select", lambda x, k: tuple(y[..., :k].flip(-1) for y in x.sort(-1))
    ),
    "middle of a sort": Breaking("select", lambda x, k: tuple(y[..., 1 : k + 1] for y in x.sort(-1, descending=True))),
    "every other of a sort": Breaking(
        "select", lambda x, k: tuple(y[..., : 2 * k : 2] for y in x.sort(-1, descending=True))
    ),
    "both ends of a sort": Breaking("select", lambda x, k: _both_ends(x, k)),
    "a full sort": Breaking("select", lambda x, k: x.sort(-1, descending=True)),
    "the wrong direction of the mask": Breaking(
        "select", lambda x, k: (-x).masked_fill(_token(x) > 3, -_INF).topk(k, largest=False)
    ),
    "along the queries": Breaking(
        "select_for", lambda program, x: x.topk(2, dim=0 if program.layout in ("packed", "sbhd") else 1), _one_chunk
    ),
    "along the heads": Breaking("select_heads", lambda x: x.topk(2, dim=2), _per_head),
    "values that take part in training": Breaking("training", lambda: None, _has_values),
    # A scaled or cast operand is another tensor: then what is written to is not read any more.
    "keys that are written to": Breaking(
        "written", lambda q, k, w: k.add_(1), lambda program: not program.upcast and program.scale != "key_before"
    ),
    "queries that are written to": Breaking(
        "written", lambda q, k, w: q.mul_(2), lambda program: not program.upcast and "query" not in program.scale
    ),
    "float64 operands": Breaking("operands", lambda x: x.double()),
}


def _both_ends(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = x.sort(-1, descending=True)
    return values[..., :k] + values[..., -k:], indices[..., :k] + indices[..., -k:]


BREAKINGS: dict[str, Breaking] = {
    **{name: Breaking("relu", how) for name, how in _ACTIVATIONS.items()},
    **_PRODUCTS,
    **_HEAD_SUMS,
    **_LOOPS,
    **{name: Breaking("afterwards", how) for name, how in _AFTERWARDS.items()},
    **{name: Breaking("rearranged", how) for name, how in _REARRANGED.items()},
    # With one query a factor of S x T is one of the keys.
    "dropout of the sum": Breaking("afterwards", lambda x: F.dropout(x, 0.25), _one_chunk),
    **{name: Breaking("data", how, _one_chunk) for name, how in _DATA.items()},
    **_SELECTIONS,
}


@dataclass(frozen=True)
class NearMiss(Program):
    """A program with the breaking ``break_``; ``late``: what is done to scores is done to the masked ones."""

    break_: str = "no ReLU"
    late: bool = False

    def _how(self, step: str) -> Callable[..., Any] | None:
        breaking = BREAKINGS[self.break_]
        return breaking.how if breaking.step == step else None

    @property
    def functional(self) -> bool:
        return BREAKINGS[self.break_].step != "written"

    @property
    def takes_symbols(self) -> bool:
        # torch's own dropout asks for a number of elements.
        return super().takes_symbols and "dropout" not in self.break_

    @property
    def under_autograd(self) -> bool:
        return BREAKINGS[self.break_].step == "training"

    def _scores(self, q: Tensor, k: Tensor, weights: Tensor, rows: slice, *data: Tensor) -> Tensor:
        if how := self._how("operands"):
            q, k, weights = how(q), how(k), how(weights)
        scores = super()._scores(q, k, weights, rows, *data)
        if write := self._how("written"):
            write(q, k, weights)
        if how := self._how("data"):
            key_scale, _, q_ids, k_ids, valid, _, free = data
            plain = self._laid_out(scores, back=True)
            scores = self._laid_out(how(plain, key_scale, q_ids, k_ids, valid, free))
        if how := self._how("rearranged") or (self._how("afterwards") if self.late else None):
            scores = how(scores)
        return scores

    def _laid_out(self, scores: Tensor, back: bool = False) -> Tensor:
        """[B, S, T] as the layout has it, or ``back`` from there."""
        if self.layout == "sbhd":
            return scores.transpose(0, 1)
        if self.layout == "packed":
            return scores.unsqueeze(0) if back else scores.squeeze(0)
        return scores

    def _early(self, scores: Tensor) -> Tensor:
        how = None if self.late else self._how("afterwards")
        return how(scores) if how else scores

    def _relu(self, x: Tensor) -> Tensor:
        how = self._how("relu")
        return how(x) if how else super()._relu(x)

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        how = self._how("product")
        if how is None:
            return super()._product(q, k)
        product = how(q, k)
        return product.unflatten(2, (q.shape[2] // 2, 2)) if self.layout == "two_heads" else product

    def _head_sum(self, per_head: Tensor, weights: Tensor) -> Tensor:
        how = self._how("head_sum")
        if self._how("select_heads"):
            return per_head * weights[..., None]
        if how is None:
            return self._early(super()._head_sum(per_head, weights))
        return how(per_head.flatten(2, 3) if per_head.dim() == 5 else per_head, weights)

    def _by_hand(self, q: Tensor, k: Tensor, weights: Tensor, key_scale: Tensor) -> Tensor:
        combine, keys = self._how("loop"), self._how("loop_keys")
        if combine is None and keys is None:
            return self._early(super()._by_hand(q, k, weights, key_scale))
        total: Tensor | None = None
        for head in range(self.heads):
            key = keys(k, head) if keys else k
            term = self._per_head(q[:, :, head : head + 1], key, key_scale)[:, :, 0] * weights[:, :, head, None]
            total = term if total is None else combine(total, term) if combine else total + term
        assert total is not None
        return total

    def _selected(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if how := self._how("select"):
            return how(scores, min(self.topk, scores.shape[-1] - 1))  # type: ignore[no-any-return]
        if how := self._how("select_for"):
            return how(self, scores)  # type: ignore[no-any-return]
        if how := self._how("select_heads"):
            return how(scores)  # type: ignore[no-any-return]
        return super()._selected(scores)


def near_misses(**fixed: Any) -> st.SearchStrategy[NearMiss]:
    """Any program with any breaking that breaks it."""
    # With one head or one query many a breaking is none.
    sizes = {
        "queries": st.integers(2, 6),
        "heads": st.integers(2, 4),
        "tokens": st.integers(8, 21),
        "topk": st.integers(1, 4),
        "break_": st.sampled_from(list(BREAKINGS)),
        "late": st.booleans(),
    }
    return programs(NearMiss, **{**sizes, **fixed}).filter(
        lambda program: program.rewritable and BREAKINGS[program.break_].applies(program)
    )


# Chunks that differ --------------------------------------------------------------------------------------------------

UNEVEN = (
    "other keys",
    "other order of keys",
    "other scale",
    "other mask",
    "no mask",
    "valid keys of its own",
    "more heads",
    "queries in reverse",
)


@dataclass(frozen=True)
class Uneven(Program):
    """Chunks of queries, the last of which differs: indexers all, but hardly one call."""

    odd: str = "other keys"

    def _scores(
        self, q: Tensor, k: Tensor, weights: Tensor, rows: slice, key_scale: Tensor, row_scale: Tensor, *data: Tensor
    ) -> Tensor:
        if rows.stop < self.queries:
            return super()._scores(q, k, weights, rows, key_scale, row_scale, *data)
        program: Program = self
        match self.odd:
            case "other keys":
                k = k + 12
            case "other order of keys":
                k = k.flip(1)
            case "other scale":
                weights = weights * 2
            case "other mask":
                program = dataclasses.replace(self, mask="hidden" if self.mask == "sliding" else "sliding")
            case "no mask":
                program = dataclasses.replace(self, mask="none")
            case "more heads" if self.layout != "two_heads":
                program = dataclasses.replace(self, heads=self.heads * 2)
                q, weights = torch.cat([q, q], 2), torch.cat([weights, weights], 2)
            case "queries in reverse":
                q = q.flip(1)
        scores = Program._scores(program, q, k, weights, rows, key_scale, row_scale, *data)
        if self.odd == "valid keys of its own":
            scores = scores.masked_fill(torch.arange(self.tokens) % 4 == 1, -_INF)
        return scores


def uneven_programs(**fixed: Any) -> st.SearchStrategy[Uneven]:
    """Programs in chunks of which the last one differs, with values and indices."""
    choices = {"odd": st.sampled_from(UNEVEN), "chunks": st.integers(2, 3), "queries": st.integers(3, 7)}
    return programs(Uneven, outputs="both", **{**choices, **fixed}).filter(
        lambda program: program.rewritable and program.chunks > 1
    )
