"""Train the distilled indexers of every layer.

    python -m benchmarks.fidelity.distil [--steps 200] [--device cpu] [--out PATH]

Eight documents of 8192 tokens, other ones than those that are measured; 64 queries a step.  A quarter of an hour on two
cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from . import capture, model, sources
from .indexers import Distilled, train_step

QUERIES = 64


def default_path() -> Path:
    return sources.cache() / "distilled.pt"


def of_documents(device: str) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """By layer and document: its input, q and k, in half precision."""
    lm = model.load(device)
    tokenizer = model.tokenizer()
    layers: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(model.LAYERS)]

    def keep(layer: capture.Layer) -> None:
        layers[layer.number].append((layer.hidden.half(), layer.q.half(), layer.k.half()))

    for number, (kind, book, start) in enumerate(capture.OTHERS):
        ids = capture.document(tokenizer, kind, book, start, model.NATIVE_LENGTH)
        capture.look(lm, ids.to(device), keep)
        print(f"document {number + 1} of {len(capture.OTHERS)}", flush=True)
    return layers


def train(documents: list[tuple[Tensor, Tensor, Tensor]], steps: int, device: str) -> tuple[Distilled, float]:
    indexer = Distilled().to(device)
    optimizer = torch.optim.AdamW(indexer.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    latest = []
    for step in range(steps):
        hidden, q, k = documents[step % len(documents)]
        positions = torch.randint(256, len(hidden), (QUERIES,), device=device)
        attended = capture.group_attention(q[:, positions].float(), k.float(), positions).mean(0)
        loss = train_step(indexer, hidden.float(), positions, attended)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        latest.append(loss.item())
    return indexer, sum(latest[-16:]) / len(latest[-16:])


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
