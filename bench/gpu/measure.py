"""``python -m bench.gpu.measure RESULTS.json``: the cases of bench_cases.py, one row a contender.

A row is written as soon as its case is measured. A case that breaks the CUDA context ends the
process with status 75; started again, it goes on behind that case.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu.bench_cases import Built, Case, cases
from bench.gpu.results import Results
from bench.gpu.timing import Ceiling, Ruler, Timing, measure_ceiling

AGAIN = 75


def _row(
    case: str, name: str, timing: Timing, built: Built, traffic: int, ceiling: Ceiling
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "contender": name}
    for way in ("graph", "events"):
        taken = timing.seconds(way)
        if taken is not None:
            row[f"{way}_s"] = taken
            row["rounds"] = len(getattr(timing, way))
    samples = timing.graph or timing.events
    if samples:
        row["least_s"] = min(samples)
        row["traffic"], row["flops"] = traffic or built.traffic, built.flops
        floor = ceiling.seconds(traffic or built.traffic, built.flops)
        taken = timing.seconds("graph") or timing.seconds("events")
        if floor and taken:
            row["share_of_floor"] = floor / taken
    for key in ("error", "graph_error"):
        if getattr(timing, key):
            row[key] = getattr(timing, key)
    return row


def measure(case: Case, ruler: Ruler, ceiling: Ceiling, results: Results) -> None:
    """One case; rows for its contenders and for those that are absent."""
    torch.manual_seed(0)
    built = case.build(ruler.device)
    timings = ruler.compare(built.contenders)
    for contender in built.contenders:
        timing = timings[contender.name]
        results.add(_row(case.name, contender.name, timing, built, contender.traffic, ceiling))
    for name, reason in built.absent.items():
        results.add({"case": case.name, "contender": name, "error": f"absent: {reason}"})


def _broken(device: torch.device) -> bool:
    """Whether this process can measure no more: the CUDA context is gone, or a capture that
    failed has left the random generator unusable.
    """
    if device.type != "cuda":
        return False
    try:
        torch.randn(1, device=device).item()
    except RuntimeError:
        return True
    return False


def main() -> int:
    """Measure every case that has no row yet, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=150.0)
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    results = Results(given.results)
    device = torch.device("cpu" if given.dry else "cuda")
    ruler = Ruler(device, seconds=0.01 if given.dry else 0.8)
    ceiling = measure_ceiling(ruler)
    results.set("ceiling", asdict(ceiling))
    failed = 0
    for case in cases(given.dry):
        if results.done(case.name):
            continue
        if time.monotonic() > end:
            results.add({"case": case.name, "contender": "peftkern", "error": "no time left"})
            continue
        start = time.monotonic()
        try:
            measure(case, ruler, ceiling, results)
            said = [r for r in results.data["rows"] if r["case"] == case.name]
            wrong = [r for r in said if r.get("error") and r["contender"] == "peftkern"]
            failed += any("absent" not in r["error"] for r in wrong)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
            results.add({"case": case.name, "contender": "peftkern", "error": text})
            failed += 1
        shown = ", ".join(
            f"{r['contender']} {(r.get('graph_s') or r.get('events_s') or 0) * 1e6:.1f} us"
            if not r.get("error")
            else f"{r['contender']} {r['error'][:60]}"
            for r in results.data["rows"]
            if r["case"] == case.name
        )
        print(f"{case.name} [{time.monotonic() - start:.1f} s]: {shown}", flush=True)
        if _broken(device):
            return AGAIN
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
