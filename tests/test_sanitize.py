"""What tests/sanitize.py makes of the sanitizer's output and exit code; the tool itself needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from sanitize import CASES, ERRORS_FOUND, read, report, sanitize

MEMCHECK = """\
========= COMPUTE-SANITIZER
case: first
========= Invalid __global__ read of size 4 bytes
=========     at select_tokens_kernel+0x3a0 in select.py:291
=========     by thread (3,0,0) in block (1,0,0)
=========     Access at 0x7f0000000200 is out of bounds
case: second
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x2570 in select.py:116:select_tokens_kernel
========= Program hit CUDA_ERROR_NOT_FOUND (error 500) on CUDA API call to cuGetProcAddress.
driver: 2 kernels, all results as they should be
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """\
case: first
========= Warning: Race reported between Write access at sort_kernel+0x1a0 in finish.py:149
driver: 1 kernels, all results as they should be
========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)
"""
CLEAN = "case: first\ndriver: 1 kernels, all results as they should be\n========= ERROR SUMMARY: 0 errors\n"


def test_messages_are_counted_by_place_and_call() -> None:
    """The summary's numbers, which count what is not printed too, and where messages point."""
    found = read("memcheck", MEMCHECK, 1.0)
    assert (found.errors, found.warnings, found.driver_ok, found.clean) == (3, 0, True, False)
    assert sum(found.where.values()) == 3
    assert any("select_tokens_kernel in select.py:291 [first]" in text for text in found.where)
    assert any("select_tokens_kernel [second]" in text for text in found.where)
    raced = read("racecheck", RACECHECK, 1.0)
    assert (raced.errors, raced.warnings, raced.clean) == (0, 2, False)
    assert read("memcheck", CLEAN, 1.0).clean
    text = report("true", [found, raced])
    assert "| memcheck | 3 | 0 | passed | 1 |" in text
    assert "sort_kernel" in text


@pytest.mark.parametrize(
    ("output", "code", "clean"),
    [
        (CLEAN, 0, True),
        (CLEAN, ERRORS_FOUND, False),
        (CLEAN, 1, False),
        (CLEAN.replace("driver", "died"), 0, False),
        (CLEAN.replace("SUMMARY", ""), 0, False),
        (MEMCHECK, ERRORS_FOUND, False),
    ],
)
def test_only_a_summary_without_errors_and_a_driver_that_ended_are_clean(
    tmp_path: Path, output: str, code: int, clean: bool
) -> None:
    """A tool that says nothing, or whose exit code says otherwise, has not found the kernels clean."""
    (tmp_path / "output").write_text(output)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --help ] && echo "--padding arg" && exit 0\n'
        f'echo "$@" > {tmp_path}/arguments\ncat {tmp_path}/output\nexit {code}\n'
    )
    tool.chmod(0o755)
    found, _ = sanitize(str(tool), "memcheck", ["python", "driver.py"], {}, 60.0)
    assert found.clean == clean
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:4] == ["--padding", "32", "--tool", "memcheck"]
    assert arguments[-2:] == ["python", "driver.py"]


def test_calls_are_small() -> None:
    """The tools slow a kernel down a hundred times and more."""
    for sizes, _, _ in CASES.values():
        assert sizes.batch * sizes.queries <= 66
        assert sizes.batch * sizes.tokens <= 9000
