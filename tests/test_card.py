"""The report card: every results file on one page, nothing mixed, nothing left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.card.__main__ import main
from bench.card.page import crossovers, page
from bench.card.picture import picture
from bench.card.read import US, counts, newest, runs
from bench.card.readme import BEGIN, END, written
from bench.gpu import targets as gpu_targets

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
FILES = sorted(RESULTS.glob("*.json"))


def _cpu_file(tmp_path: Path) -> Path:
    """A small file as pytest-benchmark writes it: we are twice as fast at one row, half at 512."""
    rows: list[dict[str, Any]] = []
    for m, ours, theirs in ((1, 1e-3, 2e-3), (32, 1e-3, 1e-3), (512, 4e-3, 2e-3)):
        for who, median in ((US, ours), ("bitsandbytes", theirs)):
            for caches in ("cold", "warm"):
                info: dict[str, Any] = {
                    **dict(cell=f"nf4_fwd-m{m}-4096x4096-bf16", caches=caches, contender=who),
                    **dict(gb_per_s=8e6 / median / 1e9, gflop_per_s=m * 3.3e7 / median / 1e9),
                    **dict(dram_gb_per_s=20.0, peak_gflop_per_s=300.0, p90_s=median),
                    "peak_mb": 3.0 if who == US else 12.0,
                }
                if caches == "cold":
                    info["share_of_floor"] = 0.4
                if who == US:
                    info["times_faster_than_bitsandbytes"] = theirs / ours
                rows.append({"extra_info": info, "stats": {"median": median, "min": median}})
    data = {
        "machine_info": {"cpu": {"brand_raw": "A Processor"}, "threads": 1, "isa": "avx2"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": rows,
    }
    path = tmp_path / "a-processor-2026-01-02.json"
    path.write_text(json.dumps(data))
    return path


def test_page_holds_every_run_and_loads_nothing(tmp_path: Path) -> None:
    found = runs([*FILES, _cpu_file(tmp_path)])
    text = page(found)
    assert len(found) == len(FILES) + 1
    for run in found:
        assert run.machine in text
        assert run.commit in text
        for verdict in run.verdicts:
            assert verdict.measured in text
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\(", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_what_we_lose_is_shown(tmp_path: Path) -> None:
    run = runs([_cpu_file(tmp_path)])[0]
    assert [cell.faster_than("bitsandbytes") for cell in run.cells] == [2.0, 1.0, 0.5]
    text = page([run])
    assert "0.50x" in text
    assert "2.00x" in text
    assert any(v.met is False for v in run.verdicts)
    title, series = crossovers(run)[0]
    assert title == "nf4 4096x4096"
    assert [point[:2] for point in series[0].points] == [(1, 1e3), (32, 1e3), (512, 4e3)]


def test_machines_do_not_mix(tmp_path: Path) -> None:
    one = _cpu_file(tmp_path)
    data = json.loads(one.read_text())
    data["machine_info"]["cpu"]["brand_raw"] = "Another"
    for row in data["benchmarks"]:
        row["stats"]["median"] *= 10
    other = tmp_path / "another.json"
    other.write_text(json.dumps(data))
    first, second = runs([one, other])
    for cell, slow in zip(first.cells, second.cells, strict=True):
        assert slow.faster_than("bitsandbytes") == pytest.approx(cell.faster_than("bitsandbytes"))
    assert {run.machine for run in newest([first, second])} == {"A Processor", "Another"}


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("nvidia")], ids=str)
def test_counts_are_those_of_the_run(file: Path) -> None:
    """Bytes and operations told from a name give the share of the floor that the run noted.

    Up to the ceilings: each sitting of a run measures its own, and the file keeps the last.
    """
    data = json.loads(file.read_text())
    ceiling, judged = data["ceiling"], 0
    for row in data["rows"]:
        traffic, flops = counts(row["case"])
        taken = row.get("graph_s") or row.get("events_s")
        if not traffic or not taken or "share_of_floor" not in row:
            continue
        floor = max(traffic / ceiling["bytes_per_s"], flops / ceiling["flop_per_s"])
        assert floor / taken == pytest.approx(row["share_of_floor"], rel=0.15), row["case"]
        judged += 1
    assert judged > 20
    run = runs([file])[0]
    assert len(run.verdicts) == len(gpu_targets.TARGETS)


def test_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, svg = tmp_path / "page.html", tmp_path / "picture.svg"
    assert main([str(_cpu_file(tmp_path)), "--output", str(out), "--picture", str(svg)]) == 0
    assert "A Processor" in out.read_text()
    ElementTree.fromstring(svg.read_text())
    assert "A Processor" in svg.read_text()
    assert "1 run(s)" in capsys.readouterr().out
    assert picture([]).startswith("<svg")


def test_table_of_the_readme(tmp_path: Path) -> None:
    made = written(f"before\n{BEGIN}\nold\n{END}\nafter\n", runs([_cpu_file(tmp_path)]))
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "old" not in made
    assert "Of 3 pairs 2 are faster here and 1 slower." in made
    assert (
        "| nf4_fwd-m512-4096x4096-bf16 | 4000.0 µs | bitsandbytes 2000.0 µs | **0.50x** |" in made
    )
