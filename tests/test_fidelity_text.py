"""What ``hisa_compile.fidelity`` and ``recommend_budget`` say: errors, tables, and the examples of their page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hisa_compile import Budget, Fidelity, fidelity, indexer_topk, recommend_budget

PAGE = Path(__file__).parent.parent / "docs" / "fidelity.md"

# Errors and text ------------------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "q of 3 dims": {"q": torch.zeros(2, 3, 8)},
    "k of another batch": {"k": torch.zeros(3, 40, 8)},
    "weights of float64": {"weights": torch.zeros(2, 3, 2, dtype=torch.float64)},
    "window_start too long": {"window_start": torch.zeros(4, dtype=torch.int32)},
    "window_end of int64": {"window_end": torch.zeros(3, dtype=torch.int64)},
    "mask too short": {"mask": torch.ones(2, 3, 39).bool()},
    "key_valid without batch": {"key_valid": torch.ones(40).bool()},
    "k_scale of float16": {"k_scale": torch.ones(2, 40).half()},
    "k_weight to broadcast": {"k_weight": torch.ones(1, 40)},
    "q_segment alone": {"q_segment": torch.zeros(3).int()},
    "k_segment alone": {"k_segment": torch.zeros(2, 40).int()},
    "k on another device": {"k": torch.zeros(2, 40, 8, device="meta")},
    "a negative topk": {"topk": -1},
    "one block": {"block_topk": 1},
    "an empty block": {"block_size": 0},
    "too few candidates": {"block_size": 2, "block_topk": 3},
    "no such coarse stage": {"coarse": "mean"},
}


def arguments(**changes: Any) -> dict[str, Any]:
    right = {"q": torch.zeros(2, 3, 2, 8), "k": torch.zeros(2, 40, 8), "weights": torch.zeros(2, 3, 2), "topk": 8}
    return right | changes


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_errors_are_the_operators(wrong: dict[str, Any]) -> None:
    """About the arguments as given, not about a sample of them."""
    with pytest.raises((TypeError, ValueError)) as own:
        indexer_topk(**arguments(**wrong))
    functions = [fidelity] if {"block_size", "block_topk"} & wrong.keys() else [fidelity, recommend_budget]
    for function in functions:
        with pytest.raises(own.type, match=f"^{re.escape(str(own.value))}$"):
            function(**arguments(**wrong))


@pytest.mark.parametrize(
    ("function", "wrong", "error", "message"),
    [
        (fidelity, {"queries": 0}, ValueError, "queries: got 0, expected an integer >= 1"),
        (fidelity, {"queries": 2.0}, TypeError, "queries: got 2.0 (float), expected an integer >= 1"),
        (recommend_budget, {"queries": True}, TypeError, "queries: got True (bool), expected an integer >= 1"),
        (fidelity, {"topk": 8.0}, TypeError, "topk: got 8.0 (float), expected an integer >= 0"),
        (fidelity, {"block_size": "16"}, TypeError, "block_size: got '16' (str), expected a positive int or None"),
        (
            fidelity,
            {"coarse": 1},
            TypeError,
            "coarse: got 1 (int), expected None or one of 'paper', 'spread', 'probe', 'two-level'",
        ),
        (recommend_budget, {"coarse": b"paper"}, TypeError, "coarse: got b'paper' (bytes), expected None or one of"),
        (recommend_budget, {"target_recall": 0.0}, ValueError, "target_recall: got 0.0, expected more than 0"),
        (recommend_budget, {"target_recall": 1.01}, ValueError, "target_recall: got 1.01, expected more than 0"),
        (recommend_budget, {"target_recall": float("nan")}, ValueError, "target_recall: got nan, expected more"),
        (recommend_budget, {"target_recall": "1"}, TypeError, "target_recall: got '1' (str), expected a number"),
        (recommend_budget, {"block_sizes": ()}, ValueError, "block_sizes: got none, expected one or more integers"),
        (recommend_budget, {"block_sizes": 64}, TypeError, "block_sizes: got 64 (int), expected several integers"),
        (recommend_budget, {"block_sizes": (8, 0)}, ValueError, "block_sizes: got 0, expected an integer >= 1"),
        (recommend_budget, {"block_sizes": (8, "9")}, TypeError, "block_sizes: got '9' (str), expected an integer"),
    ],
)
def test_errors_of_their_own(function: Any, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """The argument, what it got and expected."""
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        function(**arguments(**wrong))


def test_a_table_says_all_of_it() -> None:
    """Shares are cut off, so that 1.0000 is 1."""
    result = Fidelity(8, Budget(4, 2), "probe", 1000, 100, 64, 0.99996, 0.5, 0.0029, 1.0, 0.0, 1234.5, 99999.6)
    assert str(result).splitlines() == [
        "HISA, topk=8, block_size=4, block_topk=2 (8 candidates), coarse=probe",
        "  queries              1000, 100 exact by construction",
        "  compared             64 of 900",
        "  IoU                  0.9999",
        "  IoU, worst 5 %       0.5000",
        "  recall               0.0029",
        "  score share          1.0000",
        "  equal to flat        0.0000",
        "  keys scored a query  1234, flat 100000",
    ]
    assert "none, nothing is pruned" in str(fidelity(**arguments()))


# The page's examples --------------------------------------------------------------------------------------------------


def examples(title: str) -> list[str]:
    section = PAGE.read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_pages_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, one after the other; what is recorded of the compiled model is what it was called with."""
    names: dict[str, Any] = {}
    first, second = examples("For your own tensors")
    exec(first, names)
    assert re.match("HISA, topk=256, block_size=16, block_topk=64 ", capsys.readouterr().out)
    assert names["found"].prunes
    assert names["options"] == {
        "hisa.block_size": names["found"].budget[0],
        "hisa.block_topk": names["found"].budget[1],
        "hisa.coarse": names["found"].best.coarse,
    }
    exec(second, names)
    given = [names[name] for name in ("q", "k", "weights", "topk")]
    (call,) = names["calls"]
    assert fidelity(**call.arguments) == fidelity(*given, window_end=names["window_end"])
    assert capsys.readouterr().out == f"{call.site} {fidelity(**call.arguments)}\n"


def test_the_pages_example_of_shadow_mode_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a table of one site, and its recall."""
    (example,) = examples("Shadow mode")
    torch.manual_seed(0)
    torch._dynamo.reset()
    exec(example, {})
    head, row, recall = capsys.readouterr().out.splitlines()
    cells = dict(zip(head.split()[:-1], row.split(), strict=False))
    assert (cells["calls"], cells["queries"], cells["exact"], cells["compared"]) == ("4", "256", "0", "64")
    assert 0.3 < float(recall) < 1
