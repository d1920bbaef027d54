"""Coarse stages side by side: what each finds, and what a call with it takes, from the results of other benchmarks.

    python -m benchmarks.fidelity.options [--results benchmarks/results] [--out options.md]

Quality is that of ``fidelity/overlap.json`` at 8192 tokens with B = 64, time and memory those of ``coarse.json``: 1024
queries at 64K tokens, 4:1, with B = 128, which is the same share of the context.  ``fidelity/language.json`` and
``fidelity/needles.json`` add their columns where they are there.  Beside the table a picture: the attention and the
tokens that are lost, over time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ..harness import command, machine, parser, table, write
from .overlap import BLOCK

# What a block of the harness is at the length that is timed.
TIMED_BLOCK, TIMED_POINT = 128, "64Kx4096"
BASE = ("paper", 1)


class Row(NamedTuple):
    """An option: the operator's stage, how many times smaller blocks are than the paper's, its name in the harness."""

    stage: str
    finer: int
    name: str

    @property
    def label(self) -> str:
        return f'"{self.stage}"' + ("" if self.finer == 1 else f", B/{self.finer}")

    @property
    def timed(self) -> str:
        """Its key in coarse.json."""
        return f"{self.stage}, B = {TIMED_BLOCK // self.finer}"


ROWS = (
    Row("paper", 1, "paper: one mean"),
    Row("paper", 2, "mean, blocks of B/2"),
    Row("paper", 4, "mean, blocks of B/4"),
    Row("spread", 1, "spread"),
    Row("spread", 2, "spread, B/2"),
    Row("spread", 4, "spread, B/4"),
    Row("probe", 1, "probe"),
    Row("probe", 2, "probe, B/2"),
    Row("probe", 4, "probe, B/4"),
    Row("two-level", 4, "two levels, 4m then probe, B/4"),
)
# Quality at these compressions; the second is the one of the picture.
QUALITY = (("centred", 4), ("centred", 16), ("distilled", 4))
Figures = dict[Row, dict[str, float]]


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def quality(overlap: Any) -> Figures:
    """ "<indexer> <ratio>:1 IoU" and "... lost" of each option that was measured."""
    found: Figures = {row: {} for row in ROWS}
    rows = {(each["indexer"], each["ratio"], each["method"]): each for each in overlap["rows"]}
    for row in ROWS:
        for kind, ratio in QUALITY:
            if (each := rows.get((kind, ratio, row.name))) is not None:
                found[row][f"{kind} {ratio}:1 IoU"] = each["iou"]
                found[row][f"{kind} {ratio}:1 lost"] = each["flat_mass"] - each["mass"]
    return found


def times(coarse: Any) -> Figures:
    """Milliseconds and MiB by dtype at TIMED_POINT."""
    found: Figures = {row: {} for row in ROWS}
    for dtype, by_point in coarse["rows"].items():
        for row in ROWS:
            one = by_point.get(TIMED_POINT, {}).get(row.timed, {})
            if "ms" in one:
                found[row] |= {f"{dtype} ms": one["ms"], f"{dtype} MiB": one["mib"]}
    return found


def more_perplexity(language: Any) -> Figures:
    """Perplexity over flat's, in per cent, the mean over kinds of text, by kind of indexer."""
    found: Figures = {row: {} for row in ROWS}
    for row in ROWS:
        for kind in ("centred", "distilled"):
            over = [one["over"] for one in language["rows"] if (one["kind"], one["method"]) == (kind, row.name)]
            if over:
                found[row][f"{kind} perplexity"] = statistics.fmean(over)
    return found


def found_needles(needles: Any) -> Figures:
    """Share of right answers in the middle half of the longest texts."""
    found: Figures = {row: {} for row in ROWS}
    longest = max(one["length"] for one in needles["rows"])
    middle = [one for one in needles["rows"] if one["length"] == longest and 0.25 <= one["depth"] <= 0.75]
    for row in ROWS:
        for kind in ("centred", "distilled"):
            right = [one["right"] for one in middle if (one["kind"], one["method"]) == (kind, row.name)]
            if right:
                found[row][f"{kind} needles"] = statistics.fmean(right)
    return found


def merged(parts: Iterable[Figures]) -> Figures:
    found: Figures = {row: {} for row in ROWS}
    for part in parts:
        for row in ROWS:
            found[row] |= part[row]
    return {row: figures for row, figures in found.items() if figures}


def behind(one: dict[str, float], others: Iterable[dict[str, float]], time: str, lost: str) -> bool:
    """Whether another option takes no longer and loses no more, and is better in one of the two."""
    return any(
        other[time] <= one[time] and other[lost] <= one[lost] and (other[time], other[lost]) != (one[time], one[lost])
        for other in others
        if time in other and lost in other
    )


# Column, key, how it is written.
COLUMNS = (
    ("own keys 4:1, IoU", "centred 4:1 IoU", "{:.3f}"),
    ("lost", "centred 4:1 lost", "{:.3f}"),
    ("16:1, IoU", "centred 16:1 IoU", "{:.3f}"),
    ("lost", "centred 16:1 lost", "{:.3f}"),
    ("distilled 4:1, IoU", "distilled 4:1 IoU", "{:.3f}"),
    ("lost", "distilled 4:1 lost", "{:.3f}"),
    ("own keys: perplexity over flat", "centred perplexity", "{:+.1f} %"),
    ("distilled", "distilled perplexity", "{:+.1f} %"),
    ("own keys: needles mid-depth", "centred needles", "{:.2f}"),
    ("distilled", "distilled needles", "{:.2f}"),
    ("float8, ms", "float8 ms", "{:.3f}"),
    ("bfloat16, ms", "bfloat16 ms", "{:.3f}"),
    ("MiB", "float8 MiB", "{:.0f}"),
)


def side_by_side(found: Figures) -> str:
    """Markdown; an option that another one beats in time and loss of attention has no star."""
    base = next(figures for row, figures in found.items() if (row.stage, row.finer) == BASE)
    columns = [column for column in COLUMNS if any(column[1] in figures for figures in found.values())]
    body = []
    for row, figures in found.items():
        cells = []
        for _, key, form in columns:
            cell = form.format(figures[key]) if key in figures else ""
            if key.endswith(" ms") and key in figures and key in base and figures is not base:
                cell += f" ({figures[key] / base[key]:.2f}x)"
            cells.append(cell)
        time, lost = "float8 ms", "centred 4:1 lost"
        front = time in figures and lost in figures and not behind(figures, found.values(), time, lost)
        body.append([row.label + (" *" if front else ""), *cells])
    return table(["coarse stage", *(column[0] for column in columns)], body)


def picture(found: Figures, path: Path) -> None:
    """What is lost over the time of a call: attention on the left, tokens of the flat selection on the right."""
    base = next(figures for row, figures in found.items() if (row.stage, row.finer) == BASE)
    colours = {"paper": "#000000", "spread": "#009E73", "probe": "#D55E00", "two-level": "#CC79A7"}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2))
    wanted = (
        (axes[0], "centred 4:1 lost", lambda x: 100 * x, "attention lost against the flat selection, %"),
        (axes[1], "centred 4:1 IoU", lambda x: 100 * (1 - x), "1 - IoU with the flat selection, %"),
    )
    for panel, key, as_drawn, what in wanted:
        for row, figures in found.items():
            if "float8 ms" not in figures or key not in figures:
                continue
            at = (figures["float8 ms"] / base["float8 ms"], as_drawn(figures[key]))
            panel.plot(*at, "o", color=colours[row.stage], markersize=8)
            # At 4:1 two levels are the probe, which lies under them.
            beside = (7, -12) if row.stage == "two-level" else (7, 4)
            panel.annotate(row.label, at, xytext=beside, textcoords="offset points", fontsize=8)
        panel.axvline(1.25, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_xlabel("time of a call, paper's setting = 1  (dotted: 1.25)", fontsize=9)
        panel.set_ylabel(what, fontsize=9)
        panel.grid(alpha=0.3)
        panel.margins(x=0.28, y=0.12)
    figure.suptitle("Coarse stages, same candidates, 4:1: less is better, in both directions", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = made.parse_args()
    coarse = read(options.results / "coarse.json")
    of = {name: read(options.results / "fidelity" / f"{name}.json") for name in ("overlap", "language", "needles")}
    if coarse is None or of["overlap"] is None:
        made.error(f"--results: {options.results} has no coarse.json or no fidelity/overlap.json")
    parts = [quality(of["overlap"]), times(coarse)]
    parts += [more_perplexity(of["language"])] if of["language"] else []
    parts += [found_needles(of["needles"])] if of["needles"] else []
    found = merged(parts)
    text = [
        f"# Coarse stages side by side\n\n`{command('fidelity.options', made, options)}`: quality at 8192 tokens, "
        f"B = {BLOCK} ({of['overlap']['command']}); times of {coarse['machine']}, 1024 queries at 64K tokens, "
        f'4:1, B = {TIMED_BLOCK}: there "two-level" keeps every outer block, and is the probe.  Stars: no other '
        "option takes no longer (float8) and loses no more attention (own keys, 4:1).",
        side_by_side(found),
    ]
    raw = {"rows": [{"stage": row.stage, "finer": row.finer} | figures for row, figures in found.items()]}
    write(options.out, text, raw | {"machine": machine()})
    if options.out:
        picture(found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
