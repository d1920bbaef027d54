"""What tests/portability.py says of compiled kernels."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS, Resources, compile_launch, record, resources  # noqa: E402
from portability import cell, check_complete  # noqa: E402
from sanitize import ON_HOPPER, kernels_of_package  # noqa: E402

KERNELS = kernels_of_package()
USES = Resources(40, 0, 2048)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles: needs TRITON_INTERPRET unset")
def test_registers_that_find_no_room_are_on_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(monkeypatch, torch.bfloat16, "sm_80")
    (recorded,) = (found for found in launches if found[0].__name__ == "select_tokens_kernel")
    kernel, how, given = recorded
    wide, narrow = (resources(compile_launch((kernel, how._replace(maxnreg=n), given), "sm_80")) for n in (255, 48))
    assert 48 < wide.registers <= 255
    assert wide.stack == 0
    assert narrow.registers <= 48
    assert narrow.stack > 0


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles: needs TRITON_INTERPRET unset")
def test_resources_of_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (sort,) = (
        found for found in record(monkeypatch, torch.bfloat16, "gfx942", topk=512) if "sort" in found[0].__name__
    )
    found = resources(compile_launch(sort, "gfx942"))
    assert 0 < found.registers <= 512
    assert found.stack == 0
    assert 0 < found.shared <= TARGETS["gfx942"][1]


def complete() -> dict[str, dict[str, dict[str, Resources]]]:
    """One dtype has what only float8 has, the other the rest."""
    of_all = {arch: KERNELS if arch == "sm_90" else KERNELS - ON_HOPPER for arch in TARGETS}
    return {
        "bfloat16": {arch: dict.fromkeys(names - {"sort_kernel"}, USES) for arch, names in of_all.items()},
        "float8": {arch: {"sort_kernel": USES} for arch in of_all},
    }


def test_a_kernel_that_no_call_launches_is_an_error() -> None:
    check_complete(complete())
    for arch, kernel in (("sm_120", "sort_kernel"), ("sm_90", "coarse_hopper_kernel")):
        found = complete()
        for of_dtype in found.values():
            of_dtype[arch].pop(kernel, None)
        with pytest.raises(RuntimeError, match=f"no call for {arch} launches {kernel}"):
            check_complete(found)


def test_too_much_shared_memory_is_an_error() -> None:
    found = complete()
    found["float8"]["gfx942"]["sort_kernel"] = USES._replace(shared=65537)
    with pytest.raises(RuntimeError, match="sort_kernel for gfx942: 65537 bytes of shared memory, there are 65536"):
        check_complete(found)


def test_cells() -> None:
    assert cell(None) == ""
    assert cell(USES) == "40, 2"
    assert cell(Resources(255, 96, 50 * 1024)) == "255 + 96 B, 50"
