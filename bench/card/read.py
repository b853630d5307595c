"""Results files of the CPU and of GPUs as runs of one form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import targets as cpu_targets
from bench.gpu import targets as gpu_targets

US = "peftkern"
_STORED = {"dense": 2.0, "nf4": 0.516, "fp4": 0.516, "int8": 1.0}


@dataclass
class Cell:
    """What one run measured of one thing.

    Args:
        name: as in the results file.
        traffic: least bytes, and
        flops: operations of a call; 0 where unknown or none.
        seconds: median of each contender, comparable within the cell.
        shares: share of the floor of each contender, where there is a floor.
        peaks: peak bytes of each contender, where measured.
    """

    name: str
    traffic: float = 0.0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def faster_than(self, peer: str) -> float | None:
        """How many times faster than a peer we are."""
        if US not in self.seconds or peer not in self.seconds or peer == US:
            return None
        return self.seconds[peer] / self.seconds[US]


@dataclass(frozen=True)
class Verdict:
    """One target: what, the promise and the figure as text; ``met`` None where not measured."""

    what: str
    promised: str
    measured: str
    met: bool | None


@dataclass
class Run:
    """One results file."""

    machine: str
    kind: str  # "GPU" or "CPU"
    date: str
    commit: str
    facts: dict[str, str]
    bytes_per_s: float
    flop_per_s: float
    cells: list[Cell]
    verdicts: list[Verdict]
    notes: list[str]

    def named(self, pattern: str) -> list[tuple[re.Match[str], Cell]]:
        """Cells whose whole name matches."""
        found = ((re.fullmatch(pattern, cell.name), cell) for cell in self.cells)
        return [(match, cell) for match, cell in found if match is not None]


def runs(files: Iterable[Path]) -> list[Run]:
    """The runs of JSON files; newest first, GPUs before CPUs on one day."""
    found = []
    for file in files:
        data = json.loads(file.read_text())
        if "benchmarks" in data:
            found.append(_cpu(data))
        elif "rows" in data and not data.get("rehearsal"):
            found.append(_gpu(data))
    return sorted(found, key=lambda run: (run.date, run.kind), reverse=True)


def newest(found: Iterable[Run]) -> list[Run]:
    """Of each machine the newest run."""
    kept: dict[str, Run] = {}
    for run in found:
        if run.machine not in kept or run.date > kept[run.machine].date:
            kept[run.machine] = run
    return list(kept.values())


def counts(case: str) -> tuple[float, float]:
    """Least bytes and operations of a GPU case by its name; zeros where the name does not tell.

    The formulas of ``bench/gpu/bench_cases.py``, for files whose rows do not hold them.
    """
    if found := re.fullmatch(r"linear (\w+) m(\d+)(?: (\d+)x(\d+))?", case):
        m, n, k = int(found[2]), int(found[3] or 4096), int(found[4] or 4096)
        return n * k * _STORED[found[1]] + 2 * m * (k + n), 2 * m * k * n
    if found := re.fullmatch(r"lora (\w+) d(\d+)", case):
        m, d = 4096, int(found[2])
        return 2 * d * d * _STORED[found[1]] + 10 * m * d, 4 * m * d * d
    if found := re.fullmatch(r"multi lora \d+ adapters", case):
        return 4 * 4096**2 + 10 * 4096**2, 4 * 4096**3
    if case == "bottleneck r64":
        return 10 * 4096**2, 12 * 4096**2 * 64
    return 0.0, 0.0


def _gpu(data: Mapping[str, Any]) -> Run:
    machine, ceiling = data["machine"], data.get("ceiling", {})
    rows: gpu_targets.Rows = {(row["case"], row["contender"]): row for row in data["rows"]}
    cells: dict[str, Cell] = {}
    notes = []
    for (case, who), row in rows.items():
        traffic, flops = row.get("traffic"), row.get("flops")
        if traffic is None:
            traffic, flops = counts(case)
        cell = cells.setdefault(case, Cell(case, traffic, flops or 0))
        if row.get("error"):
            notes.append(f"{case}, {who}: {row['error']}")
            continue
        taken = gpu_targets.seconds(rows, case, who, US)
        ours = gpu_targets.seconds(rows, case, US, who)
        # Device time where both have it. Beside a contender that has none, ours differs as well.
        if taken is None or ours is None:
            continue
        if row.get("graph_s") is None and rows[case, US].get("graph_s") is not None:
            cell = cells.setdefault(f"{case} (with the host)", Cell(f"{case} (with the host)"))
            cell.seconds[US] = ours
        cell.seconds[who] = taken
        if "share_of_floor" in row:
            cell.shares[who] = float(row["share_of_floor"])
        if row.get("peak_bytes"):
            cell.peaks[who] = float(row["peak_bytes"])
    verdicts = []
    for target in gpu_targets.TARGETS:
        value = target.value(rows)
        promised = ("≥ " if target.least else "≤ ") + target.shown.format(target.limit)
        if value is None:
            verdicts.append(Verdict(target.what, promised, "not measured", None))
        else:
            met = value >= target.limit if target.least else value <= target.limit
            verdicts.append(Verdict(target.what, promised, target.shown.format(value), met))
    if tests := data.get("tests"):
        text = ", ".join(f"{n} {outcome}" for outcome, n in tests["counts"].items())
        notes.insert(0, f"GPU tests of the run: {text}.")
    facts = {key: str(value) for key, value in machine.items() if value}
    name, date, commit = (facts.pop(key, "") for key in ("gpu", "date", "commit"))
    return Run(
        *(name, "GPU", date, commit, facts),
        *(ceiling.get("bytes_per_s", 0.0), ceiling.get("flop_per_s", 0.0)),
        *([cell for cell in cells.values() if cell.seconds], verdicts, notes),
    )


def _cpu(data: Mapping[str, Any]) -> Run:
    machine, rows = data["machine_info"], data["benchmarks"]
    cells: dict[str, Cell] = {}
    for row in rows:
        info = row["extra_info"]
        if info["caches"] != "cold":
            continue
        median, who = row["stats"]["median"], info["contender"]
        cell = cells.setdefault(info["cell"], Cell(info["cell"]))
        if who == US:
            cell.traffic = info["gb_per_s"] * 1e9 * median
            cell.flops = info["gflop_per_s"] * 1e9 * median
        cell.seconds[who] = median
        if "share_of_floor" in info:
            cell.shares[who] = info["share_of_floor"]
        if "peak_mb" in info:
            cell.peaks[who] = info["peak_mb"] * 1e6
    verdicts = []
    for cell_name, against, least, figure in cpu_targets.judged(rows):
        floor = against == cpu_targets.FLOOR
        shown = "{:.0%}" if floor else "{:.2f}x"
        what = f"{cell_name}: " + ("share of the floor" if floor else f"faster than {against}")
        promised = "≥ " + shown.format(least)
        verdicts.append(Verdict(what, promised, shown.format(figure), figure >= least))
    floors = [row["extra_info"] for row in rows]
    commit = data.get("commit_info", {})
    names = ("threads", "isa", "peftkern", "torch", "bitsandbytes", "peft", "transformers")
    facts = {name: str(machine[name]) for name in names if machine.get(name)}
    if commit.get("dirty"):
        facts["tree"] = "with uncommitted changes"
    return Run(
        machine.get("cpu", {}).get("brand_raw", machine.get("processor", "unknown processor")),
        *("CPU", data["datetime"][:10], str(commit.get("id"))[:7], facts),
        max((f["dram_gb_per_s"] * 1e9 for f in floors), default=0.0),
        max((f["peak_gflop_per_s"] * 1e9 for f in floors), default=0.0),
        *(list(cells.values()), verdicts, ["Cold weights; medians of interleaved rounds."]),
    )
