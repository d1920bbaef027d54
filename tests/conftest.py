"""What every test begins with."""

from __future__ import annotations

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


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled before, and nothing stays behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
