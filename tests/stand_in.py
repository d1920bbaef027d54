"""A stand-in for a GPU of sm_90 on a machine with none: kernels are compiled, and launches noted."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hisa_compile.ops.triton import gpu
from hisa_compile.ops.triton.operands import FP8_NATIVE, FP8_NONE


class Noted(NamedTuple):
    """A launch; ``weights``: the first two of a row's head weights as they were then, if the kernel reads any."""

    kernel: str
    programs: int
    arguments: list[Any]
    names: list[str]
    weights: list[float] | None


# A compiled kernel keeps its launcher, so all tests of this process share what launchers note.
NOTED: list[Noted] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.names = source.fn.__name__, list(source.fn.arg_names)

    def __call__(self, programs: int, _y: int, _z: int, *rest: Any) -> None:
        # Stream, function, metadata twice, two hooks, then the arguments.
        arguments = list(rest[6:])
        weights = None
        if "w_ptr" in self.names:
            at = arguments[self.names.index("w_ptr")]
            address = at.data_ptr() if isinstance(at, Tensor) else at
            weights = list((ctypes.c_float * 2).from_address(address))
        NOTED.append(Noted(self.name, programs, arguments, self.names, weights))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver, and what the package asks of a GPU."""
    device = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    active = SimpleNamespace(
        launcher_cls=Launcher,
        utils=SimpleNamespace(load_binary=lambda *_: (0, 1, 32, 0, 1024), get_device_properties=lambda _: device),
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(gpu, "is_hopper", lambda q: True)
    monkeypatch.setattr(gpu, "architecture", lambda q: 90)
    monkeypatch.setattr(gpu, "fp8_mode", lambda q: int(FP8_NATIVE if q.itemsize == 1 else FP8_NONE))
