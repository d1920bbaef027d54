"""Kernels compiled ahead of time, for architectures that are not at hand: what tests and portability.py share.

The launches of a real call are recorded and compiled as they would be launched.  Needs Triton without its interpreter,
under which kernels are plain Python functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hisa_compile.ops import Budget, Visibility
from hisa_compile.ops.triton import config, gpu, launch
from hisa_compile.ops.triton.operands import FP8_BITS, FP8_NATIVE

# Architecture -> shared memory of one program, bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
Recorded = tuple[Any, config.Launch, dict[str, Any]]


def record(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    arch: str,
    *,
    queries: int = 1,
    heads: int = 64,
    dim: int = 128,
    topk: int = 2048,
    tokens: int = 16384,
    budget: Budget = Budget(128, 64),  # noqa: B008
    everything: bool = False,
    optional: dict[str, Tensor] | None = None,
    coarse: str = "paper",
    k_pooled: Tensor | None = None,
    **options: bool,
) -> list[Recorded]:
    """The launches of one call with a window's end and the ``optional`` tensors, or with ``everything``."""
    launches: list[Recorded] = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, n, how, **args: launches.append((kernel, how, args)))
    if dtype == torch.float8_e4m3fn:
        bits = arch in ("sm_80", "gfx942")
        monkeypatch.setattr(gpu, "fp8_mode", lambda q: int(FP8_BITS if bits else FP8_NATIVE))
    monkeypatch.setattr(gpu, "is_hopper", lambda q: arch == "sm_90")
    monkeypatch.setattr(gpu, "architecture", lambda q: TARGETS[arch][0].arch)
    q = torch.zeros(1, queries, heads, dim).to(dtype)
    k = torch.zeros(1, tokens, dim).to(dtype)
    window = torch.zeros(1, 1, dtype=torch.int32)
    visible = torch.ones(1, 1, tokens, dtype=torch.bool)
    segment = torch.zeros(1, tokens, dtype=torch.int64)
    if everything:
        optional = {"window_start": window, "key_valid": visible[0], "mask": visible}
        optional |= {"q_segment": segment[:, :1], "k_segment": segment}
        optional |= {"k_scale": torch.ones(1, tokens), "k_weight": torch.ones(1, tokens)}
    factors = {"k_scale": None, "k_weight": None} | (optional or {})
    visibility = Visibility(window_end=window, **{n: x for n, x in factors.items() if n in Visibility._fields})
    scale, weight = factors["k_scale"], factors["k_weight"]
    arguments = {"sorted": True, "mark_hidden": False} | options
    launch.indexer_topk_triton(
        q, k, torch.zeros(1, queries, heads), topk, budget, visibility, scale, weight, **arguments, k_pooled=k_pooled,
        coarse=coarse,
    )  # fmt: skip
    return launches


def compile_launch(recorded: Recorded, arch: str) -> Any:
    """Compile one recorded launch with the types and divisibility hints the run-time launcher would find."""
    kernel, how, arguments = recorded
    assert set(arguments) == {parameter.name for parameter in kernel.params}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, TensorDescriptor):
            element = POINTERS[value.base.dtype][1:]
            signature[parameter.name] = f"tensordesc<{element}{value.block_shape},{value.layout!r}>"
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            divisible = True
        else:
            signature[parameter.name] = "i32"
            divisible = value % 16 == 0
        if specialised and divisible and not parameter.do_not_specialize_on_alignment:
            hints[(position,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    options = gpu.launch_options(how, hip=arch.startswith("gfx"))
    return triton.compile(source, target=TARGETS[arch][0], options=options)


class Resources(NamedTuple):
    """What a program of a compiled kernel uses: registers of a thread, its stack in bytes, shared memory in bytes."""

    registers: int
    stack: int
    shared: int


def resources(compiled: Any) -> Resources:
    """From the code object itself: registers that found no room are on the stack."""
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", used.stdout + used.stderr)
    else:
        code = compiled.asm["amdgcn"]
        names = (r"\.vgpr_count", r"\.private_segment_fixed_size")
        found = [re.search(rf"{name}: +(\d+)", code)[1] for name in names]
    return Resources(int(found[0]), int(found[1]), compiled.metadata.shared)
