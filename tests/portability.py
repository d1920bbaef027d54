"""Every Triton kernel compiled for every architecture, on a machine without a GPU: a table of what each one uses.

    python tests/portability.py [--out FILE]

Calls of the sizes of docs/kernels.md that reach every kernel are recorded and compiled as they would be launched
(ahead_of_time.py).  tests/test_triton_compile.py compiles many more calls, and fails where one does not compile or
needs more shared memory than there is; here a kernel that does not compile ends the script.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from ahead_of_time import TARGETS, Resources, compile_launch, record, resources
from sanitize import ON_HOPPER, kernels_of_package

from hisa_compile.ops import Budget

DTYPES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
MANY: dict[str, Any] = {"queries": 1024}
# Each launches kernels that those before it do not; what is usual comes first.
CALLS: dict[str, dict[str, Any]] = {
    "a query": {},
    "entries that one tile sorts": {"topk": 512},
    "many queries": MANY,
    "rows that have to be filled up": {"topk": 8000},
    "the probe": MANY | {"coarse": "probe"},
    "two levels": MANY | {"coarse": "two-level", "tokens": 65536},
    "small blocks": MANY | {"budget": Budget(32, 256)},
    "more blocks than have lists of their own": MANY | {"tokens": 2**18},
    "long rows, and more entries than one program sorts": {"topk": 5000, "tokens": 32768, "budget": Budget(128, 256)},
    "keys that the accelerator does not copy": MANY | {"dim": 100},
    "all that hides tokens, many queries": MANY | {"everything": True},
    "all that hides tokens, the probe": MANY | {"everything": True, "coarse": "probe"},
}


def used(dtype: torch.dtype, arch: str) -> dict[str, Resources]:
    """What each kernel uses in the first of the calls that launches it."""
    found: dict[str, Resources] = {}
    for sizes in CALLS.values():
        with pytest.MonkeyPatch.context() as patches:
            launches = record(patches, dtype, arch, **sizes)
        for recorded in launches:
            name = recorded[0].__name__
            if name not in found:
                found[name] = resources(compile_launch(recorded, arch))
    return found


def cell(uses: Resources | None) -> str:
    if uses is None:
        return ""
    stack = f" + {uses.stack} B" if uses.stack else ""
    return f"{uses.registers}{stack}, {uses.shared / 1024:.0f}"


def table(found: dict[str, dict[str, Resources]]) -> str:
    names = sorted({name for of_arch in found.values() for name in of_arch})
    rows = [[name, *(cell(of_arch.get(name)) for of_arch in found.values())] for name in names]
    lines = [["kernel", *found], ["---"] * (len(found) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_complete(found: dict[str, dict[str, dict[str, Resources]]]) -> None:
    """Raise where the calls miss a kernel, or one needs more shared memory than a program may have."""
    for arch, (_, most) in TARGETS.items():
        of_arch = [(name, uses) for of_dtype in found.values() for name, uses in of_dtype[arch].items()]
        missing = kernels_of_package() - {name for name, _ in of_arch} - (set() if arch == "sm_90" else ON_HOPPER)
        if missing:
            raise RuntimeError(f"no call for {arch} launches {', '.join(sorted(missing))}")
        for name, uses in of_arch:
            if uses.shared > most:
                raise RuntimeError(f"{name} for {arch}: {uses.shared} bytes of shared memory, there are {most}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    parts = [
        "# Kernels for every architecture",
        f"`python tests/portability.py`, Triton {triton.__version__}, ahead of time, without a GPU; H = 64, D = 128.  "
        "Registers of a thread, its stack where it has one (bytes), and shared memory of a program, KiB, in the first "
        "of these calls that launches the kernel; empty where none does.",
        f"Calls: {'; '.join(CALLS)}.",
    ]
    found = {label: {arch: used(dtype, arch) for arch in TARGETS} for label, dtype in DTYPES.items()}
    check_complete(found)
    for label, of_dtype in found.items():
        parts += [f"## {label}", table(of_dtype)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
