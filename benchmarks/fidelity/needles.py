"""A sentence with a number, hidden in a long text and asked for at its end: by length of the text and depth in it.

    python -m benchmarks.fidelity.needles [--lengths 2048 4096 8192] [--depths 10] [--needles 4] [--out needles.md]

An answer counts if every digit is the model's first choice after those before it, which is what greedy decoding would
give.  The text is read densely, question and answer with sparse attention in every layer.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..harness import command, machine, parser, write
from . import capture
from .language import choosers
from .overlap import Setting, default_device, setting
from .tail import Prefix

CITIES = ("Oslo", "Lima", "Cairo", "Kyoto", "Quebec", "Nairobi", "Lisbon", "Havana")
DIGITS = 5


class Cell(NamedTuple):
    kind: str
    method: str
    length: int
    depth: float


class Needle(NamedTuple):
    """ids [1, T] of the text with the sentence in it, end [1, N] of question and answer."""

    text: Tensor
    end: Tensor


def hide(tokenizer: Any, filler: Tensor, depth: float, number: int) -> Needle:
    """Sentence ``number`` at ``depth`` (0 the beginning, 1 the end) of ``filler`` [1, T], which keeps its length."""
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
    return Needle(torch.cat([filler[:, :place], inside, filler[:, place:room]], dim=1), answered)


def answered(logits: Tensor, end: Tensor) -> bool:
    """Whether the last DIGITS tokens of ``end`` [1, N] are what ``logits`` [N, vocabulary] would choose."""
    return bool((logits[-DIGITS - 1 : -1].argmax(-1) == end[0, -DIGITS:]).all())


def measure(at: Setting, lengths: list[int], depths: int, needles: int, ratio: int) -> dict[Cell, float]:
    """Share of right answers."""
    kinds = ["centred"] + ["distilled"] * (at.indexers is not None)
    right: dict[Cell, list[bool]] = defaultdict(list)
    for length in lengths:
        for step in range(depths):
            depth = (step + 0.5) / depths
            for number in range(needles):
                kind, book, start = capture.OTHERS[number % 3]
                filler = capture.document(at.tokenizer, kind, book, start + 150_000 * number, length)
                needle = hide(at.tokenizer, filler, depth, number)
                prefix = Prefix(at.lm, needle.text.to(at.device), at.means, at.indexers)
                end = needle.end.to(at.device)
                for indexer in kinds:
                    for name, choose in choosers(length, ratio).items():
                        got = answered(prefix.logits(end, indexer, choose), end)
                        right[Cell(indexer, name, length, depth)].append(got)
            print(f"{length} tokens, depth {depth:.2f}", flush=True)
    return {cell: sum(got) / len(got) for cell, got in right.items()}


def table(found: dict[Cell, float], kind: str) -> str:
    """Shares by length, and in the middle half of the longest."""
    here = {cell: share for cell, share in found.items() if cell.kind == kind}
    lengths = sorted({cell.length for cell in here})
    head = ["attention", *map(str, lengths), f"{lengths[-1]}, middle half"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in dict.fromkeys(cell.method for cell in here):
        of = {cell: share for cell, share in here.items() if cell.method == name}
        groups = [[share for cell, share in of.items() if cell.length == length] for length in lengths]
        groups.append([x for cell, x in of.items() if cell.length == lengths[-1] and 0.25 <= cell.depth <= 0.75])
        lines.append(f"| {name} | " + " | ".join(f"{sum(g) / len(g):.2f}" for g in groups) + " |")
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    made.add_argument("--depths", type=int, default=10)
    made.add_argument("--needles", type=int, default=4)
    made.add_argument("--ratio", type=int, default=4)
    made.add_argument("--device", default=default_device())
    options = made.parse_args()
    found = measure(setting(options.device), options.lengths, options.depths, options.needles, options.ratio)
    kinds = list(dict.fromkeys(cell.kind for cell in found))
    asked = command("fidelity.needles", made, options)
    parts = [f"### {kind}, {options.ratio}:1\n\n{table(found, kind)}" for kind in kinds]
    rows = [cell._asdict() | {"right": share} for cell, share in found.items()]
    write(options.out, ["# Needles found", f"`{asked}`, {machine()}", *parts], {"command": asked, "rows": rows})


if __name__ == "__main__":
    main()
