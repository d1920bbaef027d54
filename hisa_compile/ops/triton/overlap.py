"""Kernels that are brought to the GPU before the one before them has ended, on NVIDIA's sm_90 and newer.

A call is a chain of three to sixteen kernels, some of them of a few microseconds.  A programmatic dependent launch lets
the next one's programs come as this one's leave; they wait, with code and arguments at hand, for the last of them.

Programs of a kernel that all find a place at once, as in decoding, let the next one come while they run
(griddepcontrol.launch_dependents): its launch is over when they are.  Those of larger kernels do not: programs that
wait would hold the places of those that work, which costs more than it gains (docs/kernels.md, "Tried").  The one that
a kernel follows which needs nothing of it does: there the next programs work.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

# How a kernel is launched: when the one before it has ended; needing nothing of the one before it, and so with it; when
# the programs of the one before it leave; and so besides that the next one may be brought while it runs, however many
# its programs are.
APART = tl.constexpr(0)
AHEAD = tl.constexpr(1)
AFTER = tl.constexpr(2)
BESIDE = tl.constexpr(3)
# Of most kernels two on each of the 132 multiprocessors of an H100.
_AT_ONCE = tl.constexpr(264)


@triton.jit
def wait_for_kernel_before(OVERLAP: tl.constexpr):
    """What every program of every kernel that is not AHEAD does first: nothing is read, nothing written, before it.

    Every one, since a kernel knows by it that the one before it has ended, not the one before that.  Only then is the
    next one let in, so that all before this one have ended when its programs begin.
    """
    if OVERLAP >= AFTER:
        cuda.gdc_wait()
    # Their number is asked here, not by who launches: it is no reason to compile a kernel twice.
    if OVERLAP == BESIDE:
        cuda.gdc_launch_dependents()
    elif OVERLAP == AFTER:  # noqa: SIM102 -- known when it is compiled, unlike the other
        if tl.num_programs(0) <= _AT_ONCE:
            cuda.gdc_launch_dependents()


@triton.jit
def wait_at_the_end(OVERLAP: tl.constexpr):
    """What a kernel that may be AHEAD does last, so that the next one still knows what has ended.

    The one before it must be of the same call: each program of that waits before it leaves or lets others in, so what
    is before it has ended when this one begins.  That this was made visible to it is promised of the wait alone: what
    is read before is read past the L1 cache, which might hold what was there before.
    """
    if OVERLAP == AHEAD:
        cuda.gdc_wait()
