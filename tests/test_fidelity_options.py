"""The table of coarse stages side by side, from results made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.fidelity import options
from benchmarks.fidelity.options import Row, behind, merged, quality, side_by_side, times
from benchmarks.fidelity.selections import OPTIONS

PAPER, HALF, PROBE = Row("paper", 1, "paper: one mean"), Row("probe", 2, "probe, B/2"), Row("probe", 1, "probe")
OVERLAP = {
    "command": "python -m somewhere",
    "rows": [
        {"indexer": "centred", "ratio": 4, "method": name, "iou": iou, "flat_mass": 0.9, "mass": mass}
        for name, iou, mass in (("paper: one mean", 0.7, 0.8), ("probe", 0.75, 0.85), ("probe, B/2", 0.8, 0.84))
    ],
}
COARSE = {
    "machine": "a GPU",
    "rows": {
        "float8": {
            options.TIMED_POINT: {
                "paper, B = 128": {"ms": 0.2, "mib": 40.0},
                "probe, B = 128": {"ms": 0.22, "mib": 30.0},
                "probe, B = 64": {"ms": 0.3, "mib": 31.0},
                "paper, B = 64": {"missing": "out of memory"},
            }
        }
    },
}


def test_every_row_is_an_option_of_the_harness() -> None:
    """Another name would leave its figures out without a word."""
    assert {row.name for row in options.ROWS} <= {option.name for option in OPTIONS}


def test_quality_and_time_of_an_option_meet_in_its_row() -> None:
    found = merged([quality(OVERLAP), times(COARSE)])
    assert list(found) == [PAPER, PROBE, HALF]
    assert found[PROBE] == {
        "centred 4:1 IoU": 0.75,
        "centred 4:1 lost": pytest.approx(0.05),
        "float8 ms": 0.22,
        "float8 MiB": 30.0,
    }


def test_language_and_needles_add_their_columns() -> None:
    """Mean over texts; the longest text's middle half alone."""
    name = PROBE.name
    language = [{"kind": "distilled", "method": name, "text": text, "over": x} for text, x in (("a", 1.0), ("b", 2.0))]
    needles = [
        {"kind": "centred", "method": name, "length": length, "depth": depth, "right": right}
        for length, depth, right in ((8, 0.1, 0.0), (8, 0.25, 1.0), (8, 0.75, 0.5), (4, 0.5, 0.0))
    ]
    parts = [options.more_perplexity({"rows": language}), options.found_needles({"rows": needles})]
    assert merged(parts) == {PROBE: {"distilled perplexity": 1.5, "centred needles": 0.75}}


def test_an_option_is_behind_where_another_is_no_slower_and_loses_no_more() -> None:
    one, same, better = {"t": 2.0, "l": 1.0}, {"t": 2.0, "l": 1.0}, {"t": 2.0, "l": 0.5}
    assert behind(one, [one, same, better], "t", "l")
    assert not behind(one, [one, same], "t", "l")
    assert not behind(better, [one, same, {"t": 1.0, "l": 1.0}, {"l": 0.0}], "t", "l")


def test_the_table_stars_the_front_and_compares_times() -> None:
    lines = side_by_side(merged([quality(OVERLAP), times(COARSE)])).splitlines()
    paper, probe, half = lines[2:]
    assert paper.startswith('| "paper" * |')
    assert probe.startswith('| "probe" * |')
    assert "0.220 (1.10x)" in probe
    # It takes longer than the probe with whole blocks, and loses more.
    assert half.startswith('| "probe", B/2 |')
    assert "needles" not in lines[0]


def test_the_command_writes_table_numbers_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fidelity").mkdir()
    (tmp_path / "coarse.json").write_text(json.dumps(COARSE))
    (tmp_path / "fidelity" / "overlap.json").write_text(json.dumps(OVERLAP))
    out = tmp_path / "options.md"
    monkeypatch.setattr(sys, "argv", ["options", "--results", str(tmp_path), "--out", str(out)])
    options.main()
    assert "1.10x" in out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["rows"][0]["float8 ms"] == 0.2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_missing_results_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["options", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        options.main()
    assert "no coarse.json" in capsys.readouterr().err
