"""A pytest plugin: accelerate each model as soon as PEFT has put adapters into it.

``pytest -p bench.peft_plugin --accelerate --outcomes FILE`` (:mod:`bench.peft_suite` does it)
counts the calls that our kernels served and writes every test's result as JSON.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_calls: Counter[str | None] = Counter()  # reason of the fallback, None for our kernels -> calls
_results: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerate", action="store_true", help="run PEFT's layers on our kernels")
    parser.addoption("--outcomes", type=Path, help="JSON file for every test's result")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--accelerate"):
        return
    from peft.tuners.tuners_utils import BaseTuner

    from peftkern.hf.accelerate.fused import Accelerated

    inject, why_not = BaseTuner.inject_adapter, Accelerated.why_not

    @functools.wraps(inject)
    def injected(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = inject(self, model, *args, **kwargs)
        _accelerate(model)
        return found

    @functools.wraps(why_not)
    def counted(self: Any, x: Any, args: Any, kwargs: Any) -> str | None:
        reason = why_not(self, x, args, kwargs)
        _calls[reason] += 1
        return reason

    BaseTuner.inject_adapter = injected
    Accelerated.why_not = counted  # type: ignore[method-assign]


def _accelerate(model: Any) -> None:
    import peftkern as pk
    from peftkern.hf.accelerate.api import swaps

    table = swaps()
    if any(type(module) in table for module in model.modules()):
        pk.accelerate(model)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = str(report.outcome)
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        if _results.get(report.nodeid) != "failed":  # a teardown cannot make it good
            _results[report.nodeid] = outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--outcomes")
    if path is None or session.testscollected == 0:
        return
    fallbacks = {reason: count for reason, count in _calls.items() if reason is not None}
    found = {"results": _results, "fast": _calls[None], "fallbacks": fallbacks}
    path.write_text(json.dumps(found))
