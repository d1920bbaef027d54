"""Inductor's caches are used, never hand one model's code to another, and the report survives them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_indexer import flat_selection, hidden_states
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import hisa_compile
from hisa_compile import hisa, history
from hisa_compile.config import parse_options
from hisa_compile.fingerprint import rewrite_id
from hisa_compile.passes import MARK_KEY, Mark, PassSettings, rewrite

ROOT = Path(__file__).parent.parent


def plain(x):
    """An indexer whose inputs are views of one tensor; both variants below are this very code."""
    q = x[..., :8].unsqueeze(2) * torch.arange(1.0, 4.0)[:, None]
    return flat_selection(q, x[..., 2:10], x[..., 9:12], 4)


off = hisa(enabled=False)(plain)
small = hisa(block_size=4, block_topk=2)(plain)
# Equal but for the coarse stage.
by_mean = hisa(block_size=4, block_topk=4, coarse="paper")(plain)
by_probe = hisa(block_size=4, block_topk=4, coarse="probe")(plain)
VARIANTS = {"plain": plain, "off": off, "small": small, "by_mean": by_mean, "by_probe": by_probe}


def run(function, **options):
    """Compile anew and run; return (result, report, hits of AOTAutograd's cache, misses)."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend=hisa_compile.hisa_backend, options=options)
    with torch.no_grad():
        result = compiled(hidden_states(64))
    seen = counters["aot_autograd"]
    return result, hisa_compile.reports()[-1], seen["autograd_cache_hit"], seen["autograd_cache_miss"]


def in_a_second_process() -> None:
    """Run by :func:`test_a_second_process_hits_and_reports_alike`; prints what :func:`run` saw."""

    def refuse(graph, settings):
        raise AssertionError("the pass ran: the stored report was not found")

    rewrite.rewrite_indexers = refuse
    told = {}
    for name, function in (("small", small), ("off", off)):
        result, report, hits, misses = run(function)
        told[name] = [result.tolist(), [site.to_json() for site in report.sites], hits, misses]
    print(json.dumps(told))


@pytest.fixture(scope="module", autouse=True)
def _cache():
    """One empty cache directory for this file."""
    with fresh_cache():
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def first():
    """What the first compile of each variant gave."""
    return {name: run(function) for name, function in VARIANTS.items()}


def test_models_that_differ_in_marks_alone_share_nothing(first):
    """The graphs are equal and the cache directory is one: each still gets code of its own."""
    for _, _, hits, misses in first.values():
        assert (hits, misses) == (0, 1)
    budgets = {name: report.sites[0].budget for name, (_, report, _, _) in first.items()}
    assert budgets == {"plain": (16, 16), "off": None, "small": (4, 2), "by_mean": (4, 4), "by_probe": (4, 4)}
    stages = {name: report.sites[0].coarse for name, (_, report, _, _) in first.items()}
    assert stages == {"plain": None, "off": None, "small": None, "by_mean": "paper", "by_probe": "probe"}
    with torch.no_grad():
        assert torch.equal(first["off"][0], plain(hidden_states(64)))
    assert not torch.equal(first["plain"][0], first["off"][0])
    assert not torch.equal(first["plain"][0], first["small"][0])
    assert not torch.equal(first["by_mean"][0], first["by_probe"][0])


def test_a_hit_in_the_same_process_has_the_same_report(first, monkeypatch):
    """The pass does not run on a hit; result and report are the first compile's."""
    monkeypatch.setattr(rewrite, "rewrite_indexers", None)
    for name, function in VARIANTS.items():
        result, report, hits, misses = run(function)
        assert (hits, misses) == (1, 0), name
        assert torch.equal(result, first[name][0])
        assert report == first[name][1]


def test_other_settings_are_other_code(first):
    """A changed budget, coarse stage or scope misses the cache and is in the report."""
    _, report, hits, _ = run(plain, **{"hisa.block_size": 32})
    assert (hits, report.sites[0].budget) == (0, (32, 16))
    _, report, hits, _ = run(plain, **{"hisa.scope": "marked"})
    assert (hits, report.rewritten) == (0, ())
    for stage, same in (("paper", "by_mean"), ("probe", "by_probe")):
        result, report, hits, _ = run(plain, **{"hisa.block_size": 4, "hisa.block_topk": 4, "hisa.coarse": stage})
        assert (hits, report.sites[0].budget, report.sites[0].coarse) == (0, (4, 4), stage)
        assert torch.equal(result, first[same][0])


def test_a_lost_report_is_found_out_again(first):
    """Cached code without its report is compiled once more, rather than guessed; then the report is back."""
    directory = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "hisa_compile"
    shutil.rmtree(directory)
    for hits_expected in (1, 1):
        result, report, hits, _ = run(small)
        assert hits == hits_expected
        assert report == first["small"][1]
        assert torch.equal(result, first["small"][0])
    assert len(list(directory.iterdir())) == 1


def test_a_second_process_hits_and_reports_alike(first):
    """Nothing of this process's memory is needed: no address, no order of dictionaries, no counter."""
    for function in (off, small):
        run(function)
    script = "import test_cache; test_cache.in_a_second_process()"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, (result, sites, hits, misses) in json.loads(done.stdout.splitlines()[-1]).items():
        assert (hits, misses) == (1, 0), name
        assert result == first[name][0].tolist()
        assert tuple(map(hisa_compile.Site.from_json, sites)) == first[name][1].sites


def test_the_id_covers_settings_and_every_mark():
    """Marks are compared node by node, in the graphs of higher-order operators too."""

    def graph(*marks):
        gm = torch.fx.symbolic_trace(lambda x: x.relu().topk(2))
        for node, mark in zip(gm.graph.nodes, marks, strict=False):
            node.meta["custom"] = {MARK_KEY: mark}
        return gm

    on, off, probed = (Mark(*own).to_annotation() for own in ((True,), (False,), (True, None, None, "probe")))
    nested = graph()
    nested.add_submodule("body", graph(on))
    ids = [
        rewrite_id(graph(), PassSettings()),
        rewrite_id(graph(), PassSettings(block_size=8)),
        rewrite_id(graph(), PassSettings(scope="marked")),
        rewrite_id(graph(), PassSettings(coarse="paper")),
        rewrite_id(graph(), PassSettings(coarse="probe")),
        rewrite_id(graph(probed), PassSettings()),
        rewrite_id(graph(on), PassSettings()),
        rewrite_id(graph(off), PassSettings()),
        rewrite_id(graph(on, off), PassSettings()),
        rewrite_id(graph(off, on), PassSettings()),
        rewrite_id(nested, PassSettings()),
    ]
    assert len(set(ids)) == len(ids)
    assert rewrite_id(graph(on), PassSettings()) == ids[6]
    assert rewrite_id(graph(), parse_options({"max_autotune": True}).settings) == ids[0]


def test_stored_reports_are_read_whole_or_not_at_all(tmp_path):
    """What can't be read counts as not there; nothing is left over beside the file."""
    site = hisa_compile.Site("topk", "layer (Indexer)", "model.py:7", "", 4, 2, 8, hisa_compile.Budget(8, 2), ("note",))
    site = dataclasses.replace(site, coarse="probe")
    history.store(tmp_path / "reports", "key", [site])
    assert history.load(tmp_path / "reports", "key") == (site,)
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["key.json"]
    assert history.load(tmp_path / "reports", "other") is None
    (tmp_path / "reports" / "key.json").write_text('[{"op": "topk"')
    assert history.load(tmp_path / "reports", "key") is None
