"""Reports of what was compiled: the latest ones in memory, and those of cached graphs on disk.

Inductor's caches hand out a compiled graph without running any pass.  The report of such a graph is the one
that was stored beside the cache when the graph was compiled.
"""

from __future__ import annotations

import collections
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from .passes.report import Report, Site

MAX_REPORTS = 256

_lock = threading.Lock()
_reports: collections.deque[Report] = collections.deque(maxlen=MAX_REPORTS)


def reports() -> tuple[Report, ...]:
    """The reports of this process's latest compiles with the HISA backend, oldest first.

    One report for every compiled graph; a model with graph breaks or with several input shapes has several.
    At most ``MAX_REPORTS`` are kept.
    """
    with _lock:
        return tuple(_reports)


def remember(report: Report) -> None:
    """Append to :func:`reports`."""
    with _lock:
        _reports.append(report)


def store(directory: Path, key: str, sites: Sequence[Site]) -> None:
    """Write the report of a cached graph.  Readers see the whole file or none."""
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump([site.to_json() for site in sites], file)
        os.replace(temporary, directory / f"{key}.json")
    except BaseException:
        os.unlink(temporary)
        raise


def load(directory: Path, key: str) -> tuple[Site, ...] | None:
    """The report stored under ``key``, None if there is none or it can't be read."""
    try:
        data = json.loads((directory / f"{key}.json").read_text("utf-8"))
        return tuple(Site.from_json(site) for site in data)
    except (OSError, ValueError, KeyError, TypeError):
        return None
