"""Pictures of the results: what each coarse stage loses against what it costs, loss by layer, perplexity, needles.

    python -m benchmarks.fidelity.plots [--results benchmarks/results/fidelity]

Reads overlap.json, language.json, needles.json and, for a further length of the same maps, needles_16384.json in the
folder, those that are there.
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

from . import model
from .language import MOST_OVER
from .overlap import BLOCK, HEADS
from .selections import OPTIONS, PAPER

# By the beginning of an option's name, in this order; colours that stay apart for the colour-blind.
FAMILIES = {
    "paper": ("#000000", "s"),
    "mean, ": ("#56B4E9", "^"),
    "spread": ("#009E73", "D"),
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
    "spread, B/4",
)
PICTURED += ("probe", "probe, B/2", "probe, B/4", "two levels, 4m then probe, B/4")
TOKENS = 8192
# The needles of the page: as many as can be read beside each other.
NEEDLES = ("dense", "flat", PAPER.name, "mean, blocks of B/4", "probe", "probe, B/2", "probe, B/4")
NEEDLES += ("block-sparse", "recent tokens")
TITLES = {
    "dense": "dense\n(the model as it is)",
    "flat": "flat indexer\n(no blocks)",
    PAPER.name: "HISA, the paper's\n(one mean)",
    "mean, blocks of B/2": "HISA,\nmeans, B/2",
    "mean, blocks of B/4": "HISA,\nmeans, B/4",
    "spread": "HISA,\nspread",
    "spread, B/2": "HISA,\nspread, B/2",
    "spread, B/4": "HISA,\nspread, B/4",
    "probe": "HISA,\nprobe",
    "probe, B/2": "HISA,\nprobe, B/2",
    "probe, B/4": "HISA,\nprobe, B/4",
    "two levels, 4m then probe, B/4": "HISA, two levels\n4m, probe, B/4",
    "block-sparse": "whole blocks\n(no 2nd stage)",
    "recent tokens": "recent\ntokens alone",
    "random tokens": "random\ntokens",
}
# Ends of the axis of perplexities, in % over flat's.
LEAST, MOST = 2, 100
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
                # Two levels lose about what something in one level loses that costs about as much.
                beside = (-4, -12) if name.startswith("two levels") else (6, 4)
                panel.annotate(name, (cost, lost), fontsize=7, xytext=beside, textcoords="offset points")
            panel.axvline(TOKENS / ratio, color="#999999", linewidth=0.8, linestyle=":")
            panel.set_xscale("log", base=2)
            panel.margins(y=0.1)
            panel.set_title(f"{WHAT[kind]}, {ratio}:1", fontsize=9)
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel(f"coarse products a query, {HEADS} heads\n(dotted: the candidates' own)", fontsize=8)
    for panels in axes:
        panels[0].set_ylabel("attention lost against flat, %", fontsize=8)
    figure.suptitle(f"What a coarse stage loses, and what it costs ({TOKENS} tokens, same candidates)", fontsize=11)
    figure.tight_layout()
    figure.savefig(out / "lost_against_cost.png", dpi=130)


def needles_by_kind(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path, ratio: int) -> None:
    """A line of maps a kind of indexer, a map of length and depth a method: the share of needles found."""
    kinds = [kind for kind in WHAT if any(row["kind"] == kind for row in rows)]
    names = [name for name in names if any(row["method"] == name for row in rows)]
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure, axes = pyplot.subplots(
        len(kinds),
        len(names),
        figsize=(1.2 + (0.35 + 0.38 * len(lengths)) * len(names), 1.3 + (0.7 + 0.21 * len(depths)) * len(kinds)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for panels, kind in zip(axes, kinds, strict=True):
        for panel, name in zip(panels, names, strict=True):
            shares = np.full((len(depths), len(lengths)), np.nan)
            for row in rows:
                if (row["kind"], row["method"]) == (kind, name):
                    shares[depths.index(row["depth"]), lengths.index(row["length"])] = row["right"]
            image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (y, x), found in np.ndenumerate(shares):
                if not np.isnan(found):
                    # On bright cells dark.
                    colour = "#000000" if found > 0.6 else "#ffffff"
                    panel.text(x, y, f"{100 * found:.0f}", ha="center", va="center", fontsize=6, color=colour)
            names_of_lengths = [f"{length // 1024}K" + "*" * (length > model.NATIVE_LENGTH) for length in lengths]
            panel.set_xticks(range(len(lengths)), names_of_lengths, fontsize=7)
            panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=6)
            # Of lengths that every kind has.
            own = shares[:, np.array(lengths) <= model.NATIVE_LENGTH]
            mean = "" if np.isnan(own).all() else f"\n{100 * np.nanmean(own):.0f} % found"
            panel.set_title(TITLES.get(name, name) + mean, fontsize=7.5)
        panels[0].set_ylabel(f"indexers: {WHAT[kind]}\ndepth of the needle", fontsize=8)
    beyond = " (*: positions interpolated)" if lengths[-1] > model.NATIVE_LENGTH else ""
    figure.supxlabel(f"length of the text, tokens{beyond}", fontsize=8)
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01).set_label("needles found, share", fontsize=8)
    figure.suptitle(
        f"Is a number hidden in a long text found again?  % of needles found, by length and depth; HISA at {ratio}:1",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def needle_maps(raw: dict[str, Any], out: Path) -> None:
    """The picture of the page, and one of all methods a kind."""
    rows = raw["rows"]
    needles_by_kind(rows, NEEDLES, out / "needles.png", raw["ratio"])
    every = list(dict.fromkeys(row["method"] for row in rows))
    needles_by_kind(rows, every, out / "needles_all.png", raw["ratio"])


def perplexities(raw: dict[str, Any], out: Path) -> None:
    """One panel a text and kind of indexer: how much more perplexity than flat's each method has, a bar each."""
    rows = raw["rows"]
    # Of the kinds those that have been measured, of the methods those that flat is not the measure of.
    panels = [
        (kind, text) for kind in WHAT for text in ("prose", "code")
        if any((row["kind"], row["text"]) == (kind, text) for row in rows)
    ]  # fmt: skip
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "flat"]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.6 * columns, 0.9 + (0.7 + 0.24 * len(names)) * lines),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for panel, (kind, text) in zip(axes.flat, panels, strict=False):
        here = {row["method"]: row for row in rows if (row["kind"], row["text"]) == (kind, text)}
        for y, name in enumerate(names):
            if name not in here:
                continue
            over = here[name]["over"]
            colour = family(name)[0] if any(name.startswith(start) for start in FAMILIES) else "#BBBBBB"
            panel.barh(y, max(-LEAST, min(over, MOST)), color=colour, height=0.7)
            panel.annotate(f"{over:+.1f} %", (max(0, min(over, MOST)), y), xytext=(4, 0), fontsize=7,
                           textcoords="offset points", va="center")  # fmt: skip
        panel.axvline(0, color="#000000", linewidth=0.8)
        panel.axvline(MOST_OVER, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(names)), [TITLES.get(name, name).replace("\n", " ") for name in names], fontsize=8)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlim(-LEAST, 5 * MOST)
        panel.set_xticks([-1, 0, 1, 10, MOST], ["-1", "0", "1", "10", f"{MOST}"], fontsize=7)
        panel.set_title(f"{text}, {WHAT[kind]} (flat: {here['flat']['perplexity']:.2f})", fontsize=9)
        panel.grid(alpha=0.3, axis="x")
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"perplexity above flat's, % (dotted: the goal, {MOST_OVER:g} %)", fontsize=8)
    figure.suptitle(
        f"How much worse the model reads on ({raw['length']} tokens, the last {raw['last']} sparse, {raw['ratio']}:1)",
        fontsize=11,
    )
    figure.savefig(out / "language.png", dpi=130)
    pyplot.close(figure)


def loss_by_layer(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """IoU by layer, of the paper's coarse stage and of some others; between the worst and the best head a shade."""
    here = [row for row in rows if row["ratio"] == 4 and row["indexer"] != "gaussian" and "by_layer" in row]
    kinds = list(dict.fromkeys(row["indexer"] for row in here))
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(8, 3 * len(kinds)), squeeze=False)
    for panel, kind in zip(axes.flat, kinds, strict=True):
        for name in (PAPER.name, "spread, B/4", "probe", "probe, B/4"):
            for row in here:
                if row["indexer"] == kind and row["method"] == name:
                    (line,) = panel.plot(row["by_layer"], label=name)
                    worst, best = ([of(heads) for heads in row["by_head"]] for of in (min, max))
                    panel.fill_between(range(len(worst)), worst, best, color=line.get_color(), alpha=0.15, linewidth=0)
        heads = any(len(of_layer) > 1 for row in here if row["indexer"] == kind for of_layer in row["by_head"])
        shade = " (shade: from the worst to the best head)" if heads else ""
        panel.set_title(f"{WHAT[kind]}, 4:1{shade}", fontsize=9)
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
        raw = json.loads((results / "needles.json").read_text())
        if (results / "needles_16384.json").exists():
            raw["rows"] += json.loads((results / "needles_16384.json").read_text())["rows"]
        needle_maps(raw, results)
    if (results / "language.json").exists():
        perplexities(json.loads((results / "language.json").read_text()), results)


if __name__ == "__main__":
    main()
