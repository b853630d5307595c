"""A pytest plugin: every failure of the GPU tests reaches the results file at once."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.results import Results

_COUNTS: Counter[str] = Counter()
_FAILURES: list[dict[str, str]] = []
_STATE = {"written": 0.0}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a result; write failures at once, and the counts every few seconds."""
    if report.when != "call" and report.outcome == "passed":
        return
    _COUNTS[report.outcome] += 1
    if report.outcome == "failed":
        lines = report.longreprtext.splitlines()
        said = [line[2:] for line in lines if line.startswith("E ")] or lines[-1:]
        _FAILURES.append({"test": report.nodeid, "said": " ".join(said)[:600]})
        _write()
    elif time.monotonic() - _STATE["written"] > 5:
        _write()


def pytest_sessionfinish(session: Any) -> None:
    """The last counts."""
    _write()


def _write() -> None:
    path = os.environ.get("PEFTKERN_GPU_RESULTS")
    # With workers only the process that gathers their reports writes.
    if not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    _STATE["written"] = time.monotonic()
    Results(Path(path)).set("tests", {"counts": dict(_COUNTS), "failures": _FAILURES})
