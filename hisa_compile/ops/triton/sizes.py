"""Arithmetic of sizes on the host, where Triton's own functions cost microseconds each."""

from __future__ import annotations


def cdiv(size: int, part: int) -> int:
    """How many parts cover ``size``."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below ``size`` >= 1."""
    return 1 << (size - 1).bit_length()
