"""What shadow mode has found so far: sums a call site, kept on the device where the site runs.

A tally is made once and only ever written in place, so that a CUDA graph that adds to it goes on doing so.  The sums
are those of an estimate from a sample.  A query that is drawn with probability p stands for w = 1 / p of them; the mean
of x over all pruned queries is estimated by sum(w x) / sum(w), and the variance of that by sum(a (x - mean)^2) /
sum(w)^2 with a = w (w - 1), which is 0 where every query is drawn.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .budget import Budget

# The first entries of a tally; then come, for w, a and a as weights, the sums of 1, x_1, ..., of the same, and of
# 1, x_1^2, ..., where x_1, ... are the figures.
CALLS, QUERIES, PRUNED, SAMPLED, WORST = range(5)
FIGURES = ("recall", "iou", "score_share", "exact_share")
SUMS = (3, 1 + len(FIGURES))
# The fractional parts of its multiples are spread evenly, whatever period the calls themselves have.
GOLDEN = (math.sqrt(5) - 1) / 2


class SiteKey(NamedTuple):
    """A call site: its name, and what decides its selection there."""

    site: str
    topk: int
    budget: Budget
    coarse: str | None


_lock = threading.Lock()
_tallies: dict[tuple[SiteKey, torch.device], Tensor] = {}
_turns: dict[SiteKey, Iterator[int]] = {}


def tally_of(key: SiteKey, device: torch.device) -> Tensor:
    """The tally of a site on a device, float64; made where there is none.

    Raises:
        RuntimeError: there is none while a CUDA graph is captured, whose memory is not its own afterwards.
    """
    found = _tallies.get((key, device))
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{key.site}: captured in a CUDA graph before its first call: call it once, then capture it")
    with _lock, torch.inference_mode(False):
        if (key, device) not in _tallies:
            _tallies[key, device] = _cleared(torch.empty(5 + math.prod(SUMS), dtype=torch.float64, device=device))
            if device.type == "cuda":
                # Whichever stream adds to it first.
                torch.cuda.synchronize(device)
        return _tallies[key, device]


@contextlib.contextmanager
def adding(device: torch.device) -> Iterator[None]:
    """Inside it a call adds to tallies: on a CPU one thread at a time, on a GPU in the order of the stream."""
    if device.type == "cpu":
        with _lock:
            yield
    else:
        yield


def takes_turn(key: SiteKey, every: int) -> bool:
    """Whether this call, by the host's count, is one of the one in ``every`` that are compared; the first is."""
    if every == 1:
        return True
    with _lock:
        turn = next(_turns.setdefault(key, itertools.count()))
    return turn * GOLDEN % 1 < 1 / every


def add(tally: Tensor, pruned: Tensor, weight: Tensor, figures: Tensor) -> None:
    """Add a call: how many queries were pruned [], and the weights [R] (0: not drawn) and figures [F, R] of some."""
    drawn = weight > 0
    x = torch.cat((torch.ones_like(figures[:1]), figures))
    surplus = weight * (weight - 1)
    sums = torch.stack(((weight * x).sum(1), (surplus * x).sum(1), (surplus * x.square()).sum(1)))
    tally[PRUNED].add_(pruned)
    tally[SAMPLED].add_(drawn.sum())
    tally[WORST].copy_(torch.where(drawn, figures[0], 1.0).amin().minimum(tally[WORST]))
    tally[WORST + 1 :].add_(sums.flatten())


def read() -> dict[SiteKey, tuple[list[float], list[list[float]]]]:
    """By site, in the order in which they were made: the counts and the worst recall, and the sums.  Waits for them."""
    with _lock:
        tallies = list(_tallies.items())
    found: dict[SiteKey, Tensor] = {}
    for (key, device), tally in tallies:
        if device.type == "cuda":
            # The current stream need not be the one that adds to it.
            torch.cuda.synchronize(device)
        with adding(device):
            here = tally.to("cpu", copy=True)
        if key in found:
            both = found[key] + here
            both[WORST] = found[key][WORST].minimum(here[WORST])
            here = both
        found[key] = here
    return {key: (x[: WORST + 1].tolist(), x[WORST + 1 :].view(SUMS).tolist()) for key, x in found.items()}


def reset() -> None:
    """Begin anew, in the same memory."""
    with _lock:
        for tally in _tallies.values():
            _cleared(tally)


def _cleared(tally: Tensor) -> Tensor:
    tally.zero_()
    tally[WORST].fill_(1.0)
    return tally
