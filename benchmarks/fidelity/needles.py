"""A sentence with a number, hidden in a long text and asked for at its end: by length of the text and depth in it.

    python -m benchmarks.fidelity.needles [--lengths 2048 4096 8192] [--depths 10] [--needles 4] [--out needles.md]
    python -m benchmarks.fidelity.needles --lengths 16384 --stretch 2 [--out needles_16384.md]

An answer counts if every digit is the model's first choice after those before it, which is what greedy decoding would
give.  The text is read densely, its last tokens, with question and answer, with sparse attention in every layer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..harness import Goal, command, goals_table, keep, machine, parser, ratio, raw_goals, write
from . import capture
from .language import PROBES, choosers, methods_of
from .overlap import Setting, default_device, setting
from .selections import PAPER
from .tail import Prefix

CITIES = ("Oslo", "Lima", "Cairo", "Kyoto", "Quebec", "Nairobi", "Lisbon", "Havana")
DIGITS = 5
# Tokens read with sparse attention: a multiple of what question and answer are, the same of all texts.
LAST = 32
# Texts to hide in, one a needle, apart from those that indexers are made of and from each other.
FILLERS = (("prose", 0, 450_000), ("prose", 0, 2_700_000), ("prose", 1, 1_000_000), ("prose", 0, 4_500_000))
FILLERS += (("prose", 0, 1_500_000), ("prose", 0, 5_100_000), ("prose", 0, 6_600_000), ("prose", 0, 7_200_000))
# Of the paper's right answers in the middle of a text, which its averages hide, an option is to have so many times.
TIMES = 3.0


class Cell(NamedTuple):
    kind: str
    method: str
    length: int
    depth: float


# Of a cell by needle, whether it was found.
Found = dict[Cell, list[bool]]


def hide(tokenizer: Any, filler: Tensor, depth: float, number: int) -> Tensor:
    """ids [1, T]: sentence ``number`` at ``depth`` (0 the beginning, 1 the end) of ``filler`` [1, T], then the question
    and its answer in place of the filler's end."""
    generator = torch.Generator().manual_seed(number)
    digits = "".join(map(str, torch.randint(0, 10, (DIGITS,), generator=generator).tolist()))
    asked = f"\n\nThe secret number of {CITIES[number % len(CITIES)]} is"
    sentence = f"{asked} {digits}.\n\n"
    inside, question, answered = (
        tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        for text in (sentence, asked, f"{asked} {digits}")
    )
    assert torch.equal(answered[:, : question.shape[1]], question), "the answer's tokens follow the question's"
    room = filler.shape[1] - inside.shape[1] - answered.shape[1]
    place = round(depth * room)
    return torch.cat([filler[:, :place], inside, filler[:, place:room], answered], dim=1)


def answered(logits: Tensor, end: Tensor) -> list[bool]:
    """Whether the last DIGITS tokens of each of ``end`` [B, N] are what ``logits`` [B, N, vocabulary] would choose."""
    right: list[bool] = (logits[:, -DIGITS - 1 : -1].argmax(-1) == end[:, -DIGITS:]).all(-1).tolist()
    return right


class Text(NamedTuple):
    """ids [1, T] with needle ``number`` in them."""

    length: int
    depth: float
    number: int
    ids: Tensor


def texts(at: Setting, lengths: list[int], depths: int, needles: int) -> Iterator[Text]:
    """The longest first, and every depth before the next needle: what tells most, should the time not suffice."""
    for length in sorted(lengths, reverse=True):
        for number in range(needles):
            filler = capture.document(at.tokenizer, *FILLERS[number % len(FILLERS)], length)
            for step in range(depths):
                depth = (step + 0.5) / depths
                yield Text(length, depth, number, hide(at.tokenizer, filler, depth, number))


def batches(every: Iterator[Text], tokens: int) -> Iterator[list[Text]]:
    """Texts of one length, as many as have about ``tokens`` together."""
    batch: list[Text] = []
    for text in every:
        if batch and (text.length != batch[0].length or (len(batch) + 1) * text.length > tokens):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def add(found: Found, at: Setting, batch: list[Text], options: argparse.Namespace) -> None:
    """What texts of one length add to ``found``."""
    ids = torch.cat([text.ids for text in batch]).to(at.device)
    prefix, end = Prefix(at.lm, ids[:, :-LAST], at.means, at.indexers), ids[:, -LAST:]
    named = choosers(ids.shape[1], options.ratio, options.methods)
    for kind in ["distilled"] * (at.indexers is not None) + ["centred"]:
        for name, choose in named.items():
            for text, right in zip(batch, answered(prefix.logits(end, kind, choose), end), strict=True):
                found.setdefault(Cell(kind, name, text.length, text.depth), []).append(right)


def share(found: Found, kind: str, name: str, length: int, *, middle: bool = False) -> float | None:
    """Of right answers, over all depths or the middle half of them."""
    cells = [cell for cell in found if cell[:3] == (kind, name, length) and (not middle or 0.25 <= cell.depth <= 0.75)]
    return statistics.fmean(right for cell in cells for right in found[cell]) if cells else None


def table(found: Found, kind: str) -> str:
    """Shares by length, of all depths and of the middle half of them."""
    lengths = sorted({cell.length for cell in found})
    head = ["attention", *map(str, lengths), *(f"{length}, middle half" for length in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in dict.fromkeys(cell.method for cell in found if cell.kind == kind):
        shares = [share(found, kind, name, length, middle=middle) for middle in (False, True) for length in lengths]
        lines.append(f"| {name} | " + " | ".join("" if x is None else f"{x:.2f}" for x in shares) + " |")
    return "\n".join(lines)


def goals(found: Found) -> list[Goal]:
    """Of each kind and length, what the probes find in the middle half against what the paper's stage finds."""
    made = []
    for kind in dict.fromkeys(cell.kind for cell in found):
        for length in sorted({cell.length for cell in found}):
            for name in PROBES:
                of, paper, flat = (share(found, kind, each, length, middle=True) for each in (name, PAPER.name, "flat"))
                if of is None or paper is None or flat is None:
                    continue
                times = ratio(of, paper)
                if times is None:
                    # Something against nothing is any number of times, nothing against nothing is no gain.
                    times = math.inf if of else 0.0
                note = f"{of:.2f}; one mean {paper:.2f}, flat {flat:.2f}"
                if flat < TIMES * paper:
                    note += ", which is less than that"
                name = f"mid-depth answers over the paper's, {kind}, {length}, {name}"
                made.append(Goal(name, TIMES, times, note=note))
    return made


def report(found: Found, asked: str, options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The page and the raw numbers, of as many texts as there are."""
    kinds = list(dict.fromkeys(cell.kind for cell in found))
    parts = ["# Needles found", f"`{asked}`, {machine()}"]
    parts += ["Share of right answers, all depths and those from 25 to 75 %."]
    if options.stretch != 1:
        parts += [f"Positions interpolated by {options.stretch:g}."]
    parts += [f"### {kind}, {options.ratio}:1\n\n{table(found, kind)}" for kind in kinds]
    wanted = goals(found)
    parts.append(goals_table(wanted))
    rows = [
        cell._asdict() | {"right": statistics.fmean(rights), "of": len(rights)}
        for cell, rights in sorted(found.items(), key=lambda item: (item[0].length, item[0].depth))
    ]
    return parts, {
        "command": asked,
        "ratio": options.ratio,
        "stretch": options.stretch,
        "rows": rows,
        "goals": raw_goals(wanted),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    made.add_argument("--stretch", type=float, default=1.0, help="interpolate positions to so many times the native")
    made.add_argument("--depths", type=int, default=10)
    made.add_argument("--needles", type=int, default=4)
    made.add_argument("--ratio", type=int, default=4)
    made.add_argument("--device", default=default_device())
    made.add_argument("--batch", type=int, help="tokens read at once; 65536 on a GPU, one text on a CPU")
    methods_of(made)
    options = made.parse_args()
    asked = command("fidelity.needles", made, options)
    at = setting(options.device, options.stretch)
    tokens = options.batch or (1 if options.device == "cpu" else 65536)
    found: Found = {}
    for batch in batches(texts(at, options.lengths, options.depths, options.needles), tokens):
        began = time.perf_counter()
        add(found, at, batch, options)
        keep(options.out, *report(found, asked, options))
        print(f"{len(batch)} texts of {batch[0].length}: {time.perf_counter() - began:.1f} s", flush=True)
    write(options.out, *report(found, asked, options))


if __name__ == "__main__":
    main()
