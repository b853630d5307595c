"""``python -m bench.gpu.tune RESULTS.json``: what ``peftkern tune`` would find, kept beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.results import Results
from peftkern.triton_kernels.launch import recording
from peftkern.tuning import tables, tuner


def _counted() -> Callable[[Callable[[], Tensor]], float]:
    """A clock for a rehearsal: launches are recorded, not run; each takes longer than the last."""
    taken = [0.0]

    def clock(call: Callable[[], Tensor]) -> float:
        call()
        taken[0] += 1e-6
        return taken[0]

    return clock


def main() -> int:
    """Tune the products that decide the most, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=50.0)
    given = parser.parse_args()
    results = Results(given.results)
    name = "rehearsal" if given.dry else torch.cuda.get_device_name(0)
    path = given.results.with_name(f"tuning-{tables.slug(name)}.json")
    entries: list[tables.LinearEntry] = []
    settings: dict[str, Any] = {"shapes": [(4096, 4096), (14336, 4096)], "formats": ["nf4"]}

    def keep(found: tuner.Found) -> None:
        entry = found.entry
        entries.append(entry)
        path.write_text(tables.dump(entries, {"device": name}))
        way = "dx" if entry.transposed else "fwd"
        row = {
            "case": f"tune {entry.format} {way} m{entry.m} {entry.rows}x{entry.cols}",
            "contender": "fused" if entry.config else "library",
            "events_s": found.seconds,
            "library_s": found.library,
            "config": str(entry.config),
        }
        results.add(row)
        print(row, flush=True)

    if given.dry:
        settings = {"shapes": [(64, 128)], "formats": ["nf4", "int8"], "rows": [16, 64]}
        with recording():
            for found in tuner.tune(torch.device("meta"), clock=_counted(), **settings):
                keep(found)
    else:
        for found in tuner.tune(torch.device("cuda", 0), seconds=given.seconds, **settings):
            keep(found)
    tables.parse(path.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
