"""What the GPU at hand takes, and how a kernel is launched on it, anew or again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .config import Launch
from .configurations import DEFAULT, Architecture
from .operands import FP8_BITS, FP8_NATIVE, FP8_NONE
from .overlap import AFTER, APART


def fp8_mode(q: Tensor) -> int:
    """How kernels take float8: as it is from sm_89 on, else bit by bit.

    Else is older NVIDIA, AMD, and the interpreter, which reads a float8 NaN as 480.
    """
    if q.dtype != torch.float8_e4m3fn:
        return int(FP8_NONE)
    native = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 9)
    return int(FP8_NATIVE if native else FP8_BITS)


@functools.cache
def _architecture_of(device: torch.device) -> Architecture:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(q: Tensor) -> Architecture:
    """The row of the table of configurations: 90 for sm_90, "gfx942", or the default's for the interpreter."""
    return _architecture_of(q.device) if q.is_cuda else DEFAULT


def is_hopper(q: Tensor) -> bool:
    """Whether q is on a GPU with sm_90's instructions, which newer ones do not have."""
    return architecture(q) == 90


def overlap(here: Architecture) -> int:
    """How most kernels stand to those before and after them, see :mod:`.overlap`."""
    return int(AFTER if isinstance(here, int) and here >= 90 else APART)


def launch_options(how: Launch, hip: bool) -> dict[str, int]:
    """``how`` as Triton's options; AMD's compiler takes no limit on registers."""
    options = {"num_warps": how.num_warps, "num_stages": how.stages}
    return options if hip or how.maxnreg is None else options | {"maxnreg": how.maxnreg}


def launch(kernel: Any, programs: int, how: Launch, **arguments: Any) -> Any:
    """Every kernel launch of the operator but repeated ones goes through here (tests record and compile them).

    Returns the compiled kernel, None under the interpreter.
    """
    options = launch_options(how, torch.version.hip is not None)
    if arguments["OVERLAP"] != int(APART):
        options |= {"launch_pdl": True}
    return kernel[(programs,)](**arguments, **options)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds ``x``; 1 of the interpreter."""
    return _multiprocessors(x.device) if x.is_cuda else 1


class Repeatable:
    """A launch that can be done again with other values of some arguments, in a fraction of the time on the host.

    The values must be such that Triton would take the same compiled kernel: of the same types, aligned alike, and
    integers only of parameters that are not specialised.
    """

    def __init__(self, compiled: Any, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        self.run = compiled[(programs, 1, 1)]
        self.arguments = [arguments[name] for name in kernel.arg_names]
        self.place = {name: place for place, name in enumerate(kernel.arg_names)}

    def again(self, changed: dict[str, Any]) -> None:
        for name, value in changed.items():
            if name in self.place:
                self.arguments[self.place[name]] = value
        self.run(*self.arguments)


def strided(name: str, x: Tensor | None, dims: str, fp8: int = FP8_BITS) -> dict[str, Any]:
    """Kernel arguments ``name``_ptr and ``name``_s<dim>; None and zeros for a tensor that is not given."""
    if x is None:
        return {f"{name}_ptr": None} | {f"{name}_s{dim}": 0 for dim in dims}
    # bool travels as bytes, and so does float8 where it is taken apart: every backend loads those.
    if x.dtype == torch.bool or (x.dtype == torch.float8_e4m3fn and fp8 == FP8_BITS):
        x = x.view(torch.uint8)
    return {f"{name}_ptr": x} | {f"{name}_s{dim}": stride for dim, stride in zip(dims, x.stride(), strict=True)}


def only(arguments: dict[str, Any], kernel: Any) -> dict[str, Any]:
    """Those of ``arguments`` that the kernel has."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}
