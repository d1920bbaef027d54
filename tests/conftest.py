"""What every test begins with."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from hisa_compile import history
from hisa_compile.ops import tally


@pytest.fixture(autouse=True)
def no_reports() -> None:
    """A process keeps its latest 256 reports: a test that counts its own from those there were would find none."""
    history._reports.clear()


@pytest.fixture(autouse=True)
def no_shadow_sites() -> None:
    """Sites of shadow mode stay as long as the process does."""
    tally._tallies.clear()
    tally._turns.clear()


@pytest.fixture(autouse=True)
def no_records() -> None:
    """What a GPU's calls launched before, under another test's settings say, is not repeated."""
    again = sys.modules.get("hisa_compile.ops.triton.again")
    if again is not None:
        again.forget()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled before, and nothing stays behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
