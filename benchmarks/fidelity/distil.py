"""Train the distilled indexers of every layer.

    python -m benchmarks.fidelity.distil [--steps 200] [--device cpu] [--out PATH]

Eight documents of 8192 tokens, other ones than those that are measured; 64 queries a step.  Facts are hidden in them
and asked for at their ends, in other words than those of :mod:`.needles`: in plain text hardly a query needs a token
far away, and indexers that have seen nothing else find no needle, with the flat selection either.  A quarter of an
hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import capture, model, sources
from .indexers import Distilled, train_step

QUERIES = 64
# Of them those that are drawn from the questions.
ASKED = 24
FACTS = 24
ABOUT = ("locker", "room", "code", "telephone", "price", "batch", "key", "year of birth")
OF = ("Anna", "the blue door", "Mr. Brown", "the library", "Peter", "the old mill", "Julia", "the third train")
OF += ("Oscar", "the garden", "Maria", "the station", "Victor", "the small boat", "Helen", "the red car")
FORMS = ("The {about} of {of} is {value}", "{of}: the {about} is {value}", "Remember, the {about} of {of} is {value}")
FORMS += ("The {about} that belongs to {of} was {value}",)


def default_path() -> Path:
    return sources.cache() / "distilled.pt"


def asking(tokenizer: Any, filler: Tensor, number: int) -> tuple[Tensor, int]:
    """ids [1, T] of ``filler`` [1, T] with facts hidden in it and told again at its end, of how many tokens."""
    drawn = random.Random(number)
    facts = []
    for about, of in drawn.sample([(about, of) for about in ABOUT for of in OF], FACTS):
        value = "".join(drawn.choices("0123456789", k=drawn.randint(3, 6)))
        facts.append("\n\n" + drawn.choice(FORMS).format(about=about, of=of, value=value))

    def encode(text: str) -> Tensor:
        ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids

    end = encode("".join(drawn.sample(facts, FACTS)))
    hidden = [encode(f"{fact}.\n\n") for fact in facts]
    room = filler.shape[1] - end.shape[1] - sum(fact.shape[1] for fact in hidden)
    parts, before = [], 0
    for place, fact in zip(sorted(drawn.choices(range(room), k=FACTS)), hidden, strict=True):
        parts += [filler[:, before:place], fact]
        before = place
    return torch.cat([*parts, filler[:, before:room], end], dim=1), end.shape[1]


class Document(NamedTuple):
    """What one layer sees of a document, in half precision: its input, q and k; and the tokens of the questions."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    asked: int


def of_documents(device: str) -> list[list[Document]]:
    """By layer and document."""
    lm = model.load(device)
    tokenizer = model.tokenizer()
    layers: list[list[Document]] = [[] for _ in range(model.LAYERS)]
    for number, (kind, book, start) in enumerate(capture.OTHERS):
        filler = capture.document(tokenizer, kind, book, start, model.NATIVE_LENGTH)
        ids, asked = asking(tokenizer, filler, number)

        def keep(layer: capture.Layer, asked: int = asked) -> None:
            layers[layer.number].append(Document(layer.hidden.half(), layer.q.half(), layer.k.half(), asked))

        capture.look(lm, ids.to(device), keep)
        print(f"document {number + 1} of {len(capture.OTHERS)}", flush=True)
    return layers


def train(documents: list[Document], steps: int, device: str) -> tuple[Distilled, float]:
    indexer = Distilled().to(device)
    optimizer = torch.optim.AdamW(indexer.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    latest = []
    for step in range(steps):
        hidden, q, k, asked = documents[step % len(documents)]
        anywhere = torch.randint(256, len(hidden), (QUERIES - ASKED,), device=device)
        at_end = torch.randint(len(hidden) - asked, len(hidden), (ASKED,), device=device)
        positions = torch.cat([anywhere, at_end])
        attended = capture.group_attention(q[:, positions].float(), k.float(), positions).mean(0)
        loss = train_step(indexer, hidden.float(), positions, attended)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        latest.append(loss.detach())
    return indexer, torch.stack(latest[-16:]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = of_documents(options.device)
    states = []
    for number, documents in enumerate(layers):
        began = time.perf_counter()
        indexer, loss = train(documents, options.steps, options.device)
        states.append({name: x.cpu() for name, x in indexer.state_dict().items()})
        print(f"layer {number}: divergence {loss:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    out = options.out or default_path()
    torch.save(states, out)
    print(out)


if __name__ == "__main__":
    main()
