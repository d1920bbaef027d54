"""Plots of time and memory against context length, from the raw numbers of the benchmarks.

    python -m benchmarks.plot [--results benchmarks/results] [--format svg]

Reads ``indexer.json``, ``memory.json`` and ``decoder_layer.json`` in the folder, those that are there, and writes
``indexer.svg`` and ``decoder_layer.svg`` beside them.  Both axes are logarithmic.  A cross at the upper edge is a
length for which a variant ran out of memory.  Needs matplotlib, which nothing else here does, and no GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise SystemExit("benchmarks.plot needs matplotlib: pip install matplotlib") from error
matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import StrMethodFormatter

from .harness import OUT_OF_MEMORY, K

# Colours that stay apart for the colour-blind; hisa in black and blue.
STYLES = {
    "hisa fp8": ("#0072B2", "o"),
    "hisa bf16": ("#000000", "s"),
    "default fp8": ("#882255", "x"),
    "flat fp8": ("#56B4E9", "^"),
    "TileLang HISA fp8": ("#009E73", "D"),
    "DeepGEMM + topk fp8": ("#E69F00", "v"),
    "DeepGEMM logits fp8": ("#CC79A7", "<"),
    "torch.compile bf16": ("#D55E00", "P"),
    "torch.compile": ("#D55E00", "P"),
    "with HISA": ("#0072B2", "o"),
}
# Where they lie on float8's line both are seen.
LINES = {"hisa bf16": "--", "default fp8": ":"}
OWN = ("hisa", "default", "with HISA")
LEAST_MIB = 0.1  # 0 has no place on a logarithmic axis


class Panel(NamedTuple):
    """Rows are {length: {variant: numbers}}, as the benchmarks keep them; ``key`` is the number that is drawn."""

    title: str
    label: str
    rows: dict[str, dict[str, Any]]
    key: str


def length_text(length: int) -> str:
    return f"{length // K}K" if length < K * K else f"{length // K // K}M"


def draw(axes: Any, panel: Panel) -> None:
    lengths = sorted(map(int, panel.rows))
    names = [name for name in STYLES if any(name in row for row in panel.rows.values())]
    crosses = 0
    for name in names:
        found = {length: panel.rows[str(length)].get(name, {}) for length in lengths}
        drawn = {length: max(row[panel.key], LEAST_MIB) for length, row in found.items() if panel.key in row}
        colour, marker = STYLES[name]
        own = name.startswith(OWN)
        axes.plot(
            list(drawn),
            list(drawn.values()),
            color=colour,
            marker=marker,
            markersize=5,
            label=name,
            linewidth=2.2 if own else 1.3,
            linestyle=LINES.get(name, "-"),
            zorder=3 if own else 2,
        )
        for length, row in found.items():
            if row.get("missing") == OUT_OF_MEMORY:
                height = 0.96 - 0.06 * crosses
                crosses += 1
                at_edge = axes.get_xaxis_transform()
                axes.plot([length], [height], "x", color=colour, transform=at_edge, markersize=9, markeredgewidth=2.2)
                axes.annotate(
                    OUT_OF_MEMORY,
                    (length, height),
                    xycoords=at_edge,
                    xytext=(-8, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=8,
                    color=colour,
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [length_text(length) for length in lengths], fontsize=8)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(panel.label)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if crosses:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.08 * crosses))


def figure(panels: list[Panel], caption: str, path: Path) -> None:
    made, row_of_axes = pyplot.subplots(1, len(panels), figsize=(3.9 * len(panels), 4.6), squeeze=False)
    for axes, panel in zip(row_of_axes[0], panels, strict=True):
        draw(axes, panel)
    handles: dict[str, Any] = {}
    for axes in row_of_axes[0]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    made.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=9)
    made.suptitle(caption, fontsize=9)
    made.tight_layout(rect=(0, 0.11 if len(handles) > 4 else 0.07, 1, 1))
    # No date, no random ids: the same numbers give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    made.savefig(path, facecolor="white", dpi=150, metadata=metadata)
    pyplot.close(made)
    print(path)


def load(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def without(rows: dict[str, dict[str, Any]], variant: str) -> dict[str, dict[str, Any]]:
    return {length: {name: x for name, x in row.items() if name != variant} for length, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "hisa_compile"
    indexer, memory, layer = (load(options.results, name) for name in ("indexer", "memory", "decoder_layer"))
    if indexer is None and layer is None:
        parser.error(f"--results: neither indexer.json nor decoder_layer.json in {options.results}")
    if indexer is not None:
        rows = indexer["contexts"]
        panels = [
            Panel("1024 queries: time", "ms of a call", rows, "ms"),
            # Whose results are the score matrix itself says nothing about memory besides them.
            Panel("1024 queries: extra memory", "MiB besides results", without(rows, "DeepGEMM logits fp8"), "mib"),
        ]
        if memory is not None:
            rows = memory["shapes"]["prefill"]
            panels.append(Panel("a prefill in one call: extra memory", "MiB besides results", rows, "mib"))
        figure(panels, f"One indexer layer, {indexer['machine']}", options.results / f"indexer.{options.format}")
    if layer is not None:
        rows = layer["lengths"]
        panels = [Panel("time", "ms of a prefill", rows, "ms"), Panel("peak memory", "GiB of a prefill", rows, "gib")]
        caption = f"One DeepSeek-V3.2 decoder layer, {layer['machine']}"
        figure(panels, caption, options.results / f"decoder_layer.{options.format}")


if __name__ == "__main__":
    main()
