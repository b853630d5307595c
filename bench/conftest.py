"""The ``compare`` fixture: interleaved rounds, reported as ordinary pytest-benchmark rows.

pytest-benchmark times one function a test and cannot let several take turns. So the first test of
a cell measures all of its contenders interleaved (bench/measure.py) and keeps the times; each
contender's own test then *replays* its times through pytest-benchmark's public interface: a
benchmark timer that returns the recorded stamps, and ``benchmark.pedantic`` with one round for
each recorded sample. Everything downstream (statistics, tables, JSON, --benchmark-compare) works
on the real samples. Selecting one contender with -k still measures the whole cell, because a
ratio to a peer means nothing otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch

import peftkern as pk
from peftkern import native, registry

from .cases import DTYPES, FAMILIES, Cell
from .measure import Floor, Timing, has_fast_bf16, interleave, peak_memory, summary, too_slow

_STAMPS: deque[float] = deque()


def replayed_time() -> float:
    """The timer that pytest-benchmark reads: the recorded stamps, one after the other."""
    return _STAMPS.popleft()


@dataclass
class _Measured:
    timings: dict[str, Timing]
    traffic: dict[str, int]
    floor_seconds: float
    peaks: dict[str, int]


class _Session:
    """What one run knows: the floor, and every cell measured so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.budget: float = config.getoption("bench_budget")
        self.seconds: float = config.getoption("bench_seconds")
        self.min_rounds: int = config.getoption("bench_rounds")
        self.dtype = DTYPES[_dtype(config)]
        self._cells: dict[str, _Measured] = {}
        self._floor: Floor | None = None

    @property
    def floor(self) -> Floor:
        if self._floor is None:
            self._floor = Floor(self.dtype)
        return self._floor

    def measured(self, cell: Cell) -> _Measured:
        if cell.name not in self._cells:
            self._cells[cell.name] = self._measure(cell)
        return self._cells[cell.name]

    def _measure(self, cell: Cell) -> _Measured:
        torch.manual_seed(0)
        self.floor.probe()
        contenders, absent = cell.build()
        timings = {name: Timing(skipped=reason) for name, reason in absent.items()}
        racing = []
        for c in contenders:
            timings[c.name] = Timing(skipped=too_slow(c, cell.rows, self.budget))
            if not timings[c.name].skipped:
                racing.append(c)
        for caches in ("cold", "warm"):
            times = interleave(
                racing,
                cell.rows,
                cold=caches == "cold",
                seconds=self.seconds,
                min_rounds=self.min_rounds,
            )
            for name, samples in times.items():
                setattr(timings[name], caches, samples)
        self.floor.probe()
        peaks = {c.name: peak_memory(c, cell.rows) for c in racing} if cell.memory else {}
        return _Measured(
            timings,
            {c.name: c.traffic for c in contenders},
            self.floor.seconds(cell.traffic, cell.flops),
            peaks,
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "peftkern benchmarks")
    group.addoption("--bench-level", choices=("quick", "standard", "full"), default="standard")
    group.addoption(
        "--bench-op",
        help="only the cells of this family, or those that the contract of this op names",
    )
    group.addoption(
        "--bench-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: bf16 where the processor multiplies it in hardware, else fp32",
    )
    group.addoption(
        "--bench-seconds", type=float, default=1.0, help="seconds a cell is measured, cold and warm"
    )
    group.addoption("--bench-rounds", type=int, default=10, help="rounds at the least")
    group.addoption(
        "--bench-budget",
        type=float,
        default=1.0,
        help="seconds one call of a contender may take; slower ones are skipped with an estimate",
    )


def _dtype(config: pytest.Config) -> str:
    name: str = config.getoption("bench_dtype")
    return name if name != "auto" else "bf16" if has_fast_bf16() else "fp32"


def _isa() -> str:
    """The instruction set that the native kernels use."""
    return str(native.info().get("isa", "none"))


def _families(op: str | None) -> tuple[str, ...]:
    """The cell families that serve an op, from its contract; all of them for no op."""
    specs = registry.specs()
    for spec in specs.values():
        if unknown := set(spec.bench) - set(FAMILIES):
            raise pytest.UsageError(f"the contract of {spec.name} names no cells: {unknown}")
    if op is None:
        return FAMILIES
    if op in FAMILIES:
        return (op,)
    if op not in specs:
        known = ", ".join(sorted({*FAMILIES, *(name for name in specs if specs[name].bench)}))
        raise pytest.UsageError(f"--bench-op: got {op!r}, expected one of {known}")
    return specs[op].bench


def pytest_configure(config: pytest.Config) -> None:
    _families(config.getoption("bench_op"))  # a wrong name stops the run here
    # Ten columns of statistics wrap on every terminal; the summary below has the rest.
    if hasattr(config.option, "benchmark_columns"):
        config.option.benchmark_columns = ["min", "median", "rounds"]
        config.option.benchmark_sort = "name"
        config.option.benchmark_group_by = "group"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    level = metafunc.config.getoption("bench_level")
    families = _families(metafunc.config.getoption("bench_op"))
    rows = [
        pytest.param(cell, caches, who, id=f"{cell.name}-{caches}-{who}")
        for cell in metafunc.module.cells(level, _dtype(metafunc.config))
        if cell.family in families
        for caches in ("cold", "warm")
        for who in cell.contenders
    ]
    metafunc.parametrize("cell,caches,contender", rows)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not item.name.endswith("[NOTSET]")]  # files without cells
    for item in items:
        # A peer's warning is its own affair; a benchmark is no place to fail on it.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.timeout(1800))
        item.add_marker(pytest.mark.benchmark(timer=replayed_time))


_SESSION = pytest.StashKey[_Session]()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Cell, str, str], None]:
    """``compare(cell, caches, contender)`` reports one contender of an interleaved measurement."""

    def report(cell: Cell, caches: str, contender: str) -> None:
        stash = request.config.stash
        if _SESSION not in stash:
            stash[_SESSION] = _Session(request.config)
        session = stash[_SESSION]
        measured = session.measured(cell)
        timing = measured.timings[contender]
        if timing.skipped:
            pytest.skip(f"{contender}: {timing.skipped}")
        times: list[float] = getattr(timing, caches)
        stats = summary(times)
        benchmark.group = f"{cell.name}-{caches}"
        info: dict[str, object] = {
            "cell": cell.name,
            "caches": caches,
            "contender": contender,
            "p90_s": stats["p90"],
            "gb_per_s": measured.traffic[contender] / stats["median"] / 1e9,
            "gflop_per_s": cell.flops / stats["median"] / 1e9,
            "dram_gb_per_s": session.floor.bandwidth / 1e9,
            "peak_gflop_per_s": session.floor.peak / 1e9,
        }
        if contender in measured.peaks:
            info["peak_mb"] = measured.peaks[contender] / 1e6
        if caches == "cold":  # data that sits in a cache has no floor in memory traffic
            info["share_of_floor"] = measured.floor_seconds / stats["median"]
        for name, other in measured.timings.items():
            samples: list[float] = getattr(other, caches)
            if name != contender and samples:
                info[f"times_faster_than_{name}"] = summary(samples)["median"] / stats["median"]
        benchmark.extra_info.update(info)
        _STAMPS.clear()
        for sample in times:
            _STAMPS.extend((0.0, sample))
        benchmark.pedantic(lambda: None, rounds=len(times))

    return report


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    for name in ("node", "release"):  # the host's name and kernel build say nothing of its speed
        machine_info.pop(name, None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["backends"] = pk.backends()
    machine_info["isa"] = _isa()
    for package in ("peftkern", "torch", "bitsandbytes", "peft", "transformers"):
        try:
            machine_info[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine_info[package] = None


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)  # every sample: megabytes that no report reads


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks or _SESSION not in config.stash:
        return
    from . import targets
    from .report import table

    rows = [bench.as_dict(include_data=False) for bench in session.benchmarks]
    floor = config.stash[_SESSION].floor
    terminalreporter.section("contenders, interleaved")
    terminalreporter.write_line(
        f"{torch.get_num_threads()} threads, ISA {_isa()}, reads "
        f"{floor.bandwidth / 1e9:.1f} GB/s, multiplies {floor.peak / 1e9:.0f} GFLOP/s (measured "
        "in this run)"
    )
    for line in table(rows):
        terminalreporter.write_line(line)
    verdicts = targets.table(rows)
    if verdicts:
        terminalreporter.section("targets, by their worst cell")
        for line in verdicts:
            terminalreporter.write_line(line)
