"""The ``options`` of ``torch.compile``: which of them are HISA's, and what they may be.

Keys that start with ``hisa.`` are ours; every other key is Inductor's and goes to it unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .ops import resolve_budget
from .ops.coarse import COARSE_STAGES, check_coarse
from .passes.settings import PassSettings

PREFIX = "hisa."
BASES = ("inductor", "aot_eager", "eager")
SCOPES = ("all", "marked")
KEYS = tuple(
    PREFIX + name for name in ("block_size", "block_topk", "coarse", "scope", "base", "shadow", "shadow_every")
)


@dataclass(frozen=True)
class Options:
    """Parsed options.

    settings: what the rewriting pass is told.
    base: the backend underneath: "inductor", or for debugging "aot_eager" or "eager".
    inductor: Inductor's own options, as given.
    """

    settings: PassSettings = field(default_factory=PassSettings)
    base: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)


def parse_options(options: Mapping[str, Any] | None) -> Options:
    """Split and check the ``options`` of ``torch.compile``.

    ``hisa.block_size`` (B, at least 1), ``hisa.block_topk`` (m, at least 2): the budget; None or absent =
    derived from the indexer's topk.  ``hisa.coarse``: what blocks are ranked by, "paper", "spread", "probe" or
    "two-level"; None or absent = chosen by what the probe would cost.  ``hisa.scope``: "all" or "marked".
    ``hisa.base``: "inductor", "aot_eager" or "eager".  ``hisa.shadow``: how many queries a call of each site are
    compared with the flat selection (see :func:`hisa_compile.shadow_report`), at least 1; None or absent = none.
    ``hisa.shadow_every``: only one in so many calls that the host makes does so; 1 if absent.

    Raises:
        ValueError: an unknown ``hisa.`` key, a value out of range, or Inductor options with another base.
        TypeError: a value of the wrong type.
    """
    given = dict(options or {})
    ours = {key: given.pop(key) for key in list(given) if isinstance(key, str) and key.startswith(PREFIX)}
    for key in ours:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown option {key!r}, valid ones are {', '.join(KEYS)}{hint}")
    base = _choice(ours, "hisa.base", BASES)
    if given and base != "inductor":
        raise ValueError(
            f"options {', '.join(map(repr, given))} are Inductor's and have no effect with hisa.base={base!r}: "
            "remove them, or set hisa.base='inductor'"
        )
    block_size, block_topk, coarse = (ours.get(f"hisa.{name}") for name in ("block_size", "block_topk", "coarse"))
    check_budget(block_size, block_topk, coarse, prefix=PREFIX)
    shadow, every = ours.get("hisa.shadow"), ours.get("hisa.shadow_every", 1)
    check_count("hisa.shadow", shadow)
    check_count("hisa.shadow_every", every, optional=False)
    settings = PassSettings(block_size, block_topk, _choice(ours, "hisa.scope", SCOPES), coarse, shadow, every)
    return Options(settings, base, given)


def check_budget(block_size: object, block_topk: object, coarse: object = None, *, prefix: str = "") -> None:
    """Raise TypeError or ValueError, naming the parameter, unless each is None or valid by itself.

    That ``block_size * block_topk`` suffices for an indexer's topk is known only where the indexer is.
    """
    for name, value in (("block_size", block_size), ("block_topk", block_topk)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{prefix}{name}: got {value!r} ({type(value).__name__}), expected a positive int or None")
    if coarse is not None and not isinstance(coarse, str):
        stages = ", ".join(map(repr, COARSE_STAGES))
        raise TypeError(f"{prefix}coarse: got {coarse!r} ({type(coarse).__name__}), expected None or one of {stages}")
    check_coarse(coarse, prefix)
    assert block_size is None or isinstance(block_size, int)
    assert block_topk is None or isinstance(block_topk, int)
    try:
        resolve_budget(0, block_size, block_topk)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def check_count(name: str, value: object, *, optional: bool = True) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless it is an integer of at least 1, or None."""
    if value is None and optional:
        return
    expected = f"expected an integer >= 1{' or None' if optional else ''}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), {expected}")
    if value < 1:
        raise ValueError(f"{name}: got {value}, {expected}")


def _choice(options: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = options.get(key, choices[0])
    if not isinstance(value, str):
        raise TypeError(f"{key}: got {value!r} ({type(value).__name__}), expected one of {choices}")
    if value not in choices:
        raise ValueError(f"{key}: got {value!r}, expected one of {choices}")
    return value
