"""What benchmarks.fidelity.overlap makes of the losses it has found."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fidelity import overlap
from benchmarks.fidelity.measures import Loss, Summary
from benchmarks.fidelity.selections import PAPER


def test_the_overlaps_goals_are_of_the_models_own_keys() -> None:
    def of(iou: float, lost: float) -> Summary:
        return Summary(iou, 0.0, 0.0, mass=0.9 - lost, flat_mass=0.9)

    found = {("centred", 4, PAPER.name): of(0.7, 0.08), ("centred", 4, "probe"): of(0.76, 0.05)}
    found |= {("centred", 4, "probe, B/4"): of(0.74, 0.02), ("centred", 16, "probe, B/4"): of(0.7, 0.1)}
    found |= {("distilled", 4, "probe, B/2"): of(0.9, 0.0), ("centred", 8, "probe, B/2"): of(0.9, 0.0)}
    told = [(goal.name, goal.measured, goal.reached) for goal in overlap.goals(found)]
    assert told == [
        ("attention lost over the paper's, 4:1, probe", pytest.approx(0.625), False),
        ("IoU more than the paper's, 4:1, probe", pytest.approx(0.06), True),
        ("attention lost over the paper's, 4:1, probe, B/4", pytest.approx(0.25), True),
        ("IoU more than the paper's, 4:1, probe, B/4", pytest.approx(0.04), False),
        ("IoU, 16:1, probe, B/4", 0.7, True),
    ]
    assert overlap.goals({at: one for at, one in found.items() if at[0] == "distilled"}) == []


def test_overlap_is_told_by_layer_and_head() -> None:
    def of(*ious: float) -> Loss:
        return Loss(torch.tensor(ious), *torch.zeros(3, len(ious)))

    # Two documents: each has an entry of its own.
    losses = [(1, 0, of(0.5)), (0, 1, of(1.0, 0.5)), (0, 0, of(0.25)), (1, 1, of(0.0)), (0, 1, of(0.75, 0.75))]
    assert overlap.by_head(losses) == [[0.25, 0.75], [0.5, 0.0]]
    assert overlap.by_layer(losses) == pytest.approx([(0.25 + 1.0 + 0.5 + 0.75 + 0.75) / 5, 0.25])
