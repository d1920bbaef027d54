"""Pictures of the results: what each coarse stage loses against what it costs, needles, loss by layer and head.

    python -m benchmarks.fidelity.plots [--results benchmarks/results/fidelity]

Reads overlap.json and needles.json in the folder, those that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from .overlap import BLOCK, HEADS
from .selections import OPTIONS, PAPER

# By the beginning of an option's name, in this order; colours that stay apart for the colour-blind.
FAMILIES = {
    "paper": ("#000000", "s"),
    "mean, ": ("#56B4E9", "^"),
    "mean + spread": ("#009E73", "D"),
    "two levels, 2m then probe": ("#CC79A7", "v"),
    "two levels, 4m then probe": ("#CC79A7", "v"),
    "two levels": ("#E69F00", "P"),
    "probe": ("#D55E00", "o"),
    "bound": ("#999999", "*"),
}
# Those whose labels have room beside each other; the tables have all.
PICTURED = (
    PAPER.name,
    "mean, blocks of B/2",
    "mean, blocks of B/4",
    "mean + spread, B/4",
    "two levels, mean, 2m then B/4",
)
PICTURED += ("probe", "probe, B/2", "probe, B/4", "two levels, 4m then probe, B/4")
TOKENS = 8192
WHAT = {"centred": "the model's own attention keys", "distilled": "distilled indexers", "gaussian": "random keys"}


def family(name: str) -> tuple[str, str]:
    return next(style for beginning, style in FAMILIES.items() if name.startswith(beginning))


def lost_against_cost(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """One panel an indexer and compression: attention lost, over products of the coarse stage."""
    kinds = [kind for kind in ("centred", "distilled") if any(row["indexer"] == kind for row in rows)]
    ratios = sorted({row["ratio"] for row in rows} & {4, 16})
    figure, axes = pyplot.subplots(
        len(kinds), len(ratios), figsize=(4.2 * len(ratios), 3.8 * len(kinds)), squeeze=False, sharex=True
    )
    dots = {option.name: option.dots for option in OPTIONS}
    for panels, kind in zip(axes, kinds, strict=True):
        for panel, ratio in zip(panels, ratios, strict=True):
            here = [row for row in rows if row["indexer"] == kind and row["ratio"] == ratio]
            for row in here:
                name = row["method"]
                if name not in PICTURED:
                    continue
                colour, mark = family(name)
                cost = dots[name](TOKENS, HEADS, BLOCK, TOKENS // ratio)
                lost = 100 * (row["flat_mass"] - row["mass"])
                panel.plot(cost, lost, mark, color=colour, markersize=7)
                panel.annotate(name.replace("two levels, ", ""), (cost, lost), fontsize=7, xytext=(6, 3),
                               textcoords="offset points")  # fmt: skip
            panel.axvline(TOKENS / ratio, color="#999999", linewidth=0.8, linestyle=":")
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.set_title(f"{WHAT[kind]}, {ratio}:1", fontsize=9)
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel(f"coarse products a query, {HEADS} heads\n(dotted: the candidates' own)", fontsize=8)
    for panels in axes:
        panels[0].set_ylabel("attention lost against flat, %", fontsize=8)
    figure.suptitle(f"What a coarse stage loses, and what it costs ({TOKENS} tokens, same candidates)", fontsize=11)
    figure.tight_layout()
    figure.savefig(out / "lost_against_cost.png", dpi=130)


def needle_maps(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """A map of length and depth for each method; green is found."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        here = [row for row in rows if row["kind"] == kind]
        names = list(dict.fromkeys(row["method"] for row in here))
        lengths = sorted({row["length"] for row in here})
        depths = sorted({row["depth"] for row in here})
        columns = min(4, len(names))
        lines = -(-len(names) // columns)
        figure, axes = pyplot.subplots(lines, columns, figsize=(3 * columns, 2.9 * lines), squeeze=False)
        for panel in axes.flat[len(names) :]:
            panel.axis("off")
        for panel, name in zip(axes.flat, names, strict=False):
            shares = np.full((len(depths), len(lengths)), np.nan)
            for row in here:
                if row["method"] == name:
                    shares[depths.index(row["depth"]), lengths.index(row["length"])] = row["right"]
            panel.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            panel.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths], fontsize=7)
            panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=6)
            panel.set_title(f"{name}: {np.nanmean(shares):.2f}", fontsize=8)
        for panels in axes:
            panels[0].set_ylabel("depth of the needle", fontsize=8)
        figure.suptitle(f"Needles found, {WHAT[kind]}: by length of the text and depth in it", fontsize=11)
        figure.tight_layout()
        figure.savefig(out / f"needles_{kind}.png", dpi=130)


def loss_by_layer(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """IoU by layer, of the paper's coarse stage and of the others that say it by layer."""
    here = [row for row in rows if row["ratio"] == 4 and row["indexer"] != "gaussian" and "by_layer" in row]
    kinds = list(dict.fromkeys(row["indexer"] for row in here))
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(8, 3 * len(kinds)), squeeze=False)
    for panel, kind in zip(axes.flat, kinds, strict=True):
        for name in (PAPER.name, "mean + spread, B/4", "probe", "probe, B/4"):
            for row in here:
                if row["indexer"] == kind and row["method"] == name:
                    panel.plot(row["by_layer"], label=name)
        panel.set_title(f"{WHAT[kind]}, 4:1", fontsize=9)
        panel.set_xlabel("layer", fontsize=8)
        panel.set_ylabel("IoU with flat", fontsize=8)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(out / "overlap_by_layer.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/fidelity"))
    results = parser.parse_args().results
    if (results / "overlap.json").exists():
        rows = json.loads((results / "overlap.json").read_text())["rows"]
        lost_against_cost(rows, results)
        loss_by_layer(rows, results)
    if (results / "needles.json").exists():
        needle_maps(json.loads((results / "needles.json").read_text())["rows"], results)


if __name__ == "__main__":
    main()
