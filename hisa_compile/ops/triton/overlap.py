"""Kernels that are brought to the GPU before the one before them has ended, on NVIDIA's sm_90 and newer.

A call is a chain of five to sixteen kernels, some of them of a few microseconds.  A programmatic dependent launch lets
the next one's programs come as this one's leave; they wait, with code and arguments at hand, for the last of them.

Programs do not let the next kernel come earlier than that (griddepcontrol.launch_dependents): programs that wait would
hold the places of those that work, which costs more than it gains (docs/kernels.md, "Tried").
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def wait_for_kernel_before(OVERLAP: tl.constexpr):
    """What every program of every kernel does first: nothing is read, and nothing written, before it.

    Every one, since a kernel knows by it that the one before it has ended, not the one before that.
    """
    if OVERLAP:
        cuda.gdc_wait()
