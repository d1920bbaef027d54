"""Runs the tests of the Triton kernels under Triton's interpreter, on a machine without a GPU.

TRITON_INTERPRET is read when Triton is imported, and Inductor imports Triton; a process of its own keeps the
variable away from every other test and the other tests' imports away from the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run on this machine's GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's already")
@pytest.mark.parametrize(
    "module",
    [
        "test_triton_kernels",
        "test_triton_two_level",
        "test_triton_hostile",
        "test_triton_descriptor",
        "test_triton_select",
        "test_triton_group",
    ],
)
def test_kernels_agree_with_the_reference_under_the_interpreter(module: str) -> None:
    """Every CPU test of the kernels, in a subprocess; its report is the failure message."""
    tests = Path(__file__).with_name(f"{module}.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tests.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout
