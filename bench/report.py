"""A results file of pytest-benchmark as a Markdown table.

``python -m bench.report RESULTS.json [--output REPORT.md]``; ``--new-path`` prints where a new
results file of this machine belongs: ``bench/results/<processor>-<date>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import targets

_HEAD = (
    "cell",
    "contender",
    "min",
    "median",
    "p90",
    "GB/s",
    "GFLOP/s",
    "of floor",
    "peak MB",
    "peftkern is",
)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def table(benchmarks: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of a results file as the lines of an aligned Markdown table.

    Args:
        benchmarks: the ``benchmarks`` list of a pytest-benchmark results file.

    Returns:
        One line a contender; "peftkern is" tells how many times faster than that contender.
    """
    body = []
    for row in benchmarks:
        info, stats = row["extra_info"], row["stats"]
        against = [
            other["extra_info"]
            for other in benchmarks
            if other["extra_info"]["cell"] == info["cell"]
            and other["extra_info"]["caches"] == info["caches"]
            and other["extra_info"]["contender"] == "peftkern"
        ]
        faster = against[0].get(f"times_faster_than_{info['contender']}") if against else None
        share = info.get("share_of_floor")
        body.append(
            (
                f"{info['cell']}-{info['caches']}",
                info["contender"],
                _time(stats["min"]),
                _time(stats["median"]),
                _time(info["p90_s"]),
                f"{info['gb_per_s']:.2f}",
                f"{info['gflop_per_s']:.1f}" if info["gflop_per_s"] else "",
                f"{share:.0%}" if share is not None else "",
                f"{info['peak_mb']:.1f}" if "peak_mb" in info else "",
                f"{faster:.2f}x" if faster is not None else "",
            )
        )
    columns = [i for i, name in enumerate(_HEAD) if name != "peak MB" or any(b[i] for b in body)]
    head, *body = [tuple(line[i] for i in columns) for line in (_HEAD, *body)]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    lines = []
    for line in (head, rule, *body):
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def new_path() -> Path:
    """Where a new results file of this machine belongs."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = found.group(1)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Path(__file__).parent / "results" / f"{slug}-{day}.json"


def markdown(results: dict[str, Any]) -> str:
    """A whole results file as a Markdown page."""
    machine, commit = results["machine_info"], results["commit_info"]
    dirty = " with uncommitted changes" if commit.get("dirty") else ""
    facts = [
        f"# {machine.get('cpu', {}).get('brand_raw', machine.get('processor', 'unknown'))}",
        "",
        f"Commit {str(commit.get('id'))[:12]}{dirty}, {results['datetime'][:10]}, "
        f"{machine['threads']} threads, ISA {machine['isa']}, torch {machine['torch']}, "
        f"bitsandbytes {machine['bitsandbytes']}, peft {machine['peft']}.",
    ]
    floors = [row["extra_info"] for row in results["benchmarks"]]
    if floors:
        facts += [
            "",
            f"Floor measured in the same run: {max(f['dram_gb_per_s'] for f in floors):.1f} GB/s "
            f"read, {max(f['peak_gflop_per_s'] for f in floors):.0f} GFLOP/s. Contenders took "
            'turns in rounds; "of floor" compares the op\'s least time with the median; '
            '"peftkern is" compares medians.',
        ]
    verdicts = targets.table(results["benchmarks"])
    if verdicts:
        facts += ["", "## Targets", "", "The worst cell of each, cold.", "", *verdicts]
    return "\n".join([*facts, "", "## Cells", "", *table(results["benchmarks"]), ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m bench.report``."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, help="write here instead of printing")
    parser.add_argument("--new-path", action="store_true")
    options = parser.parse_args(argv)
    if options.new_path:
        path = new_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        print(path)
        return 0
    if options.results is None:
        parser.error("give a results file, or --new-path")
    page = markdown(json.loads(options.results.read_text()))
    if options.output is None:
        sys.stdout.write(page)
    else:
        options.output.write_text(page)
        print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
