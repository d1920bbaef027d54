"""Everything about selection quality, one part after the other, into one folder.

    python -m benchmarks.fidelity [--device cuda] [--out benchmarks/results/fidelity]

Fetches the model and the texts, trains the distilled indexers if there are none, then overlap, language, needles and
plots, and language at twice the native length; each part is a command of its own with more options.
Minutes on a GPU, hours on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from . import distil, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity"))
    options = parser.parse_args()
    sources.fetch()
    on = ["--device", options.device]
    # Result, part, and what is not its default; 16 queries a text are what the page in docs quotes.
    made = [
        ("overlap", "overlap", "--queries", "16"),
        ("language", "language"),
        ("needles", "needles"),
        ("language_16384", "language", "--length", "16384", "--stretch", "2", "--documents", "4"),
    ]
    parts = [[name, *on, *more, "--out", str(options.out / f"{result}.md")] for result, name, *more in made]
    if not distil.default_path().exists():
        parts.insert(0, ["distil", *on])
    parts.append(["plots", "--results", str(options.out)])
    for name, *arguments in parts:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"{__package__}.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
