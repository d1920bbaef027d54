"""The table of launch configurations: by architecture and shape class, looked up at each call, never searched for.

Only what changes a kernel's speed is here.  Tiles of products, and the warps that share one, decide in which order a
score is added up, so its bits: they come from :func:`.config.score_tiles`.  Warps are here for kernels that add up
nothing, those that select and sort.

``python -m benchmarks.tune --out tuned.json`` times other rows on the GPU at hand.  A process whose environment has
``HISA_COMPILE_TUNED=tuned.json`` lays that file's rows over the table when this module is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "HISA_COMPILE_TUNED"
# sm_90 is 90; AMD's have names, such as "gfx942".
Architecture = int | str
# What the interpreter has, and whoever has no rows of its own.
DEFAULT = "default"
# Minor revisions with the same multiprocessors take each other's rows.
SAME_AS: dict[Architecture, Architecture] = {103: 100, 121: 120}

# What a row says, by what it is for.  by_block_groups: how far rows are cut for the refinement by block where every
# block is kept, which is settled before it is known whether refine_by_block or its version for sm_90 runs.  The others
# are kernels.  select_few_tokens is select_tokens for no more than :data:`.config.FEW_SELECTIONS` rows, and for rows so
# long that a chunk has few, see :mod:`.long_rows`, whose list_candidates is select_tokens' widest class; sort is all
# three of :mod:`.finish`.
FIELDS: dict[str, tuple[str, ...]] = {
    "coarse": ("stages", "maxnreg", "most_rows", "programs"),
    "coarse_hopper": ("stages", "maxnreg", "most_rows", "programs"),
    "probe_blocks": ("stages", "maxnreg", "programs"),
    "probe_blocks_hopper": ("stages", "maxnreg", "programs"),
    "refine_by_block": ("stages", "maxnreg", "programs"),
    "refine_by_block_hopper": ("stages", "maxnreg", "programs"),
    "by_block_groups": ("most_rows", "programs"),
    "refine_by_row": ("stages", "maxnreg", "programs"),
    "refine_by_row_hopper": ("stages", "maxnreg", "programs"),
    "select_blocks": ("num_warps", "maxnreg"),
    "select_tokens": ("num_warps", "maxnreg"),
    "select_shared_hopper": ("num_warps", "maxnreg"),
    "select_few_tokens": ("num_warps", "maxnreg"),
    "sort": ("num_warps",),
}
# Those that know no heads: their classes are widths.
WIDE = ("select_blocks", "select_tokens", "select_shared_hopper", "select_few_tokens", "sort")
# Those whose registers go by the tokens of a tile: a product of 64 takes half of what one of 128 does.
TILED = ("refine_by_block_hopper",)
# Entries of a row, or of a tile of one, at most; the last class has all that are longer, too.
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
ITEM_SIZES, DIMS = (1, 2, 4), (16, 32, 64, 128, 256)


class Shape(NamedTuple):
    """A shape class.  In a row of the table None stands for any, in a lookup for what the kernel does not know.

    kernel: one of FIELDS.
    itemsize: bytes of an element of q.
    padded_heads: heads, padded to a power of 2 from 16 on.
    dim: the same of D; 256 is all that is above 128.
    width: one of WIDTHS, see :func:`width_class`.
    tile: tokens of a product, of a kernel in TILED.
    """

    kernel: str
    itemsize: int | None = None
    padded_heads: int | None = None
    dim: int | None = None
    width: int | None = None
    tile: int | None = None


class Configuration(NamedTuple):
    """A row of the table; FIELDS says which of these a kernel has.

    stages: tiles in flight in the kernel's loop, the one that is worked on included.
    maxnreg: registers of a thread at most; None leaves it to the compiler.  AMD's has no such limit.
    num_warps: warps of a program.
    most_rows: rows that go past one tile at most, a power of 2; None is :data:`.config.MOST_ROWS`.
    programs: work is cut into no larger parts than leave so many programs, that of refine_by_row into about so many at
        most, of sm_90's into half as many where these would be small; None is :data:`.config.MANY_PROGRAMS`, for the
        coarse stage :data:`.config.MANY_COARSE_PROGRAMS` or
        :data:`.config.MANY_COARSE_HOPPER_PROGRAMS`, by row :data:`.config.MANY_ROW_PROGRAMS`.  Of the
        refinement by block it is how many of its equal shares of lists of pairs each multiprocessor gets: best as many
        as run there at once.
    """

    stages: int = 1
    maxnreg: int | None = None
    num_warps: int | None = None
    most_rows: int | None = None
    programs: int | None = None


Rows = dict[Shape, Configuration]

_ANYWHERE: Rows = {
    Shape("coarse"): Configuration(stages=2),
    Shape("coarse", 4): Configuration(stages=1),
    Shape("coarse_hopper"): Configuration(stages=2, maxnreg=168),
    # 64 KiB of shared memory have to do on some GPUs.
    Shape("probe_blocks", 1): Configuration(stages=3),
    Shape("probe_blocks", 2): Configuration(stages=2),
    Shape("probe_blocks", 4): Configuration(stages=1),
    # Three programs share a multiprocessor.
    Shape("probe_blocks_hopper"): Configuration(stages=3, maxnreg=168),
    Shape("refine_by_block", 1): Configuration(stages=3, maxnreg=128),
    Shape("refine_by_block", 2): Configuration(stages=2),
    Shape("refine_by_block", 4): Configuration(stages=1),
    # Four programs on a multiprocessor in float8; twice the bytes of keys leave room for three, more heads for fewer.
    Shape("refine_by_block_hopper", 1): Configuration(stages=2, maxnreg=128, programs=4),
    Shape("refine_by_block_hopper", 1, 256): Configuration(stages=2, maxnreg=168, programs=3),
    Shape("refine_by_block_hopper", 2): Configuration(stages=2, maxnreg=168, programs=3),
    # Half the registers, and half the time in which the next query arrives.
    Shape("refine_by_block_hopper", 1, tile=64): Configuration(stages=2, maxnreg=96, programs=5),
    Shape("refine_by_block_hopper", 2, tile=64): Configuration(stages=2, maxnreg=96, programs=5),
    Shape("by_block_groups"): Configuration(),
    Shape("refine_by_row", 1): Configuration(stages=3),
    Shape("refine_by_row", 2): Configuration(stages=2),
    Shape("refine_by_row", 4): Configuration(stages=1),
    # Four programs share a multiprocessor.
    Shape("refine_by_row_hopper"): Configuration(stages=2, maxnreg=128),
    Shape("refine_by_row_hopper", 1, 256): Configuration(stages=2, maxnreg=232),
    Shape("refine_by_row_hopper", 2, 256): Configuration(stages=2, maxnreg=232),
    # One warp counts short rows without waiting for others.
    Shape("select_blocks"): Configuration(num_warps=8, maxnreg=128),
    Shape("select_blocks", width=512): Configuration(num_warps=1),
    Shape("select_blocks", width=1024): Configuration(num_warps=4),
    Shape("select_blocks", width=2048): Configuration(num_warps=4),
    Shape("select_tokens"): Configuration(num_warps=8, maxnreg=128),
    Shape("select_tokens", width=512): Configuration(num_warps=1),
    Shape("select_tokens", width=1024): Configuration(num_warps=4),
    Shape("select_tokens", width=2048): Configuration(num_warps=4),
    # Reading rows for many programs, which wants many threads at once.
    Shape("select_tokens", width=32768): Configuration(num_warps=8, maxnreg=80),
    # Six rows share a multiprocessor, of 16384 three.
    Shape("select_shared_hopper"): Configuration(num_warps=8, maxnreg=80),
    Shape("select_shared_hopper", width=8192): Configuration(num_warps=4, maxnreg=80),
    Shape("select_few_tokens"): Configuration(num_warps=8, maxnreg=128),
    Shape("select_few_tokens", width=512): Configuration(num_warps=1),
    Shape("select_few_tokens", width=1024): Configuration(num_warps=4),
    Shape("select_few_tokens", width=2048): Configuration(num_warps=4),
    Shape("sort"): Configuration(num_warps=8),
}

TABLE: dict[Architecture, Rows] = {
    # Must have a row for every lookup.
    DEFAULT: _ANYWHERE,
    # NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-22 (select_tokens and select_shared_hopper
    # 2026-11-24): by hand, at the sizes of docs/kernels.md; no other architecture has been measured, so they are the
    # default as well.
    90: _ANYWHERE,
}


def width_class(entries: int) -> int:
    """The least of WIDTHS that is not below ``entries``, or the last of them."""
    return next((width for width in WIDTHS if entries <= width), WIDTHS[-1])


def broader(shape: Shape) -> tuple[Shape, ...]:
    """The classes that ``shape`` is in, narrowest first: without its last parts, one after another; each of any tile
    after the one of its own."""
    kernel, itemsize, heads, dim, _, tile = shape
    of_tile = (
        shape,
        Shape(kernel, itemsize, heads, dim, tile=tile),
        Shape(kernel, itemsize, heads, tile=tile),
        Shape(kernel, itemsize, tile=tile),
        Shape(kernel, tile=tile),
    )
    return tuple(each for own in of_tile for each in (own, own._replace(tile=None)))


def lookup(shape: Shape, architecture: Architecture) -> Configuration:
    """The architecture's row for the narrowest class that has one, else the default's."""
    for name in (architecture, SAME_AS.get(architecture, DEFAULT), DEFAULT):
        rows = TABLE.get(name, {})
        for each in broader(shape) if rows else ():
            if each in rows:
                return rows[each]
    raise KeyError(f"no launch configuration for {shape}")


# ---- rows from a file ------------------------------------------------------------------------------------------


def _powers_of_two(least: int, most: int) -> tuple[int, ...]:
    return tuple(2**n for n in range(32) if least <= 2**n <= most)


# What a value may be.
_ALLOWED: dict[str, Sequence[int]] = {
    "itemsize": ITEM_SIZES,
    "padded_heads": _powers_of_two(16, 2**16),
    "dim": DIMS,
    "width": WIDTHS,
    "tile": (64, 128),
    "stages": range(1, 9),
    "maxnreg": range(24, 256),
    "num_warps": _powers_of_two(1, 16),
    "most_rows": _powers_of_two(2, 1024),
    "programs": range(1, 2**20),
}
# These are never null; in a class null is any.
_ALWAYS = ("stages", "num_warps")
# Keys of a file; all but the first two are notes.
_KEYS = ("architecture", "rows", "device", "found", "command", "measured")


def classes_of(kernel: str) -> tuple[str, ...]:
    """The fields of Shape that a kernel's classes have."""
    if kernel in WIDE:
        return ("width",)
    return ("itemsize", "padded_heads", "dim") + ("tile",) * (kernel in TILED)


def _value(name: str, value: Any) -> int | None:
    if value is None and name not in _ALWAYS:
        return None
    allowed = _ALLOWED[name]
    # A bool is an int to Python, and 2.0 is 2.
    if type(value) is not int or value not in allowed:
        each = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
        raise ValueError(f"{name} is one of {each}{'' if name in _ALWAYS else ' or null'}, not {value!r}")
    return value


def parse_row(given: Any) -> tuple[Shape, Configuration]:
    """A row of a file: the kernel, its class, of which what is absent is any, and what FIELDS has for the kernel, of
    which what is absent is null.

    Raises:
        ValueError: an unknown kernel or field, a field that is absent and can't be null, a value that is not allowed.
    """
    if not isinstance(given, dict):
        raise ValueError(f"a row is an object, not {given!r}")
    kernel = given.get("kernel")
    if not isinstance(kernel, str) or kernel not in FIELDS:
        raise ValueError(f"unknown kernel {kernel!r}; there are {', '.join(FIELDS)}")
    classes, fields = classes_of(kernel), FIELDS[kernel]
    for name in given:
        if name not in ("kernel", *classes, *fields):
            raise ValueError(f"{kernel} has no field {name!r}; it has {', '.join((*classes, *fields))}")
    if absent := [name for name in fields if name in _ALWAYS and name not in given]:
        raise ValueError(f"a row for {kernel} also has {', '.join(absent)}")
    shape = Shape(kernel, **{name: _value(name, given[name]) for name in classes if name in given})
    values: dict[str, Any] = {name: _value(name, given.get(name)) for name in fields}
    if kernel.endswith("_hopper") and values.get("stages", 2) < 2:
        raise ValueError(f"stages of {kernel} are 2 to 8: it copies a query while it scores another")
    return shape, Configuration(**values)


def row_of(shape: Shape, configuration: Configuration) -> dict[str, Any]:
    """A row as a file has it; :func:`parse_row` is the inverse."""
    classes = {name: getattr(shape, name) for name in classes_of(shape.kernel)}
    fields = {name: getattr(configuration, name) for name in FIELDS[shape.kernel]}
    return {"kernel": shape.kernel} | {name: x for name, x in classes.items() if x is not None} | fields


def load(path: str | Path) -> None:
    """Lay the rows of a file of ``benchmarks/tune.py`` over the table's, for the architecture that it names.

    Raises:
        ValueError: the file cannot be read, or is not what it should be; nothing is taken from it then.
    """
    try:
        given = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(given, dict) or not {"architecture", "rows"} <= given.keys():
            raise ValueError("it is to be an object with architecture and rows")
        if unknown := [name for name in given if name not in _KEYS]:
            raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(_KEYS)}")
        architecture = given["architecture"]
        if type(architecture) not in (int, str):
            raise ValueError(f"architecture is a number such as 90 or a name such as 'gfx942', not {architecture!r}")
        if not isinstance(given["rows"], list):
            raise ValueError(f"rows are a list, not {given['rows']!r}")
        rows: Rows = {}
        for number, row in enumerate(given["rows"]):
            try:
                shape, configuration = parse_row(row)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            if shape in rows:
                raise ValueError(f"row {number}: a second one for {shape}")
            rows[shape] = configuration
        if not any(shape.kernel == "select_few_tokens" for shape in rows):
            # A file from before these had classes of their own: what it says of selection it says of few rows, too.
            selection = [shape for shape in rows if shape.kernel == "select_tokens"]
            rows |= {shape._replace(kernel="select_few_tokens"): rows[shape] for shape in selection}
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: {path}: {error}") from error
    TABLE[architecture] = TABLE.get(architecture, {}) | rows


if _path := os.environ.get(VARIABLE):
    load(_path)
