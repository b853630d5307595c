"""The CPU benchmarks: their cells, their report, what they measure, and `peftkern bench`."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    bench_adapters,
    bench_linear,
    bench_lora,
    bench_lora_layers,
    bench_optim,
    bench_qlora,
    bench_quantize,
    cases,
    llama_step,
    measure,
    report,
    targets,
)
from peftkern import registry

FILES = (
    bench_adapters,
    bench_linear,
    bench_lora,
    bench_lora_layers,
    bench_optim,
    bench_qlora,
    bench_quantize,
)


@pytest.mark.parametrize("level", ["quick", "standard", "full"])
def test_every_family_has_cells(level: str) -> None:
    cells = [cell for file in FILES for cell in file.cells(level, "bf16")]
    assert {cell.family for cell in cells} == set(cases.FAMILIES)
    assert len({cell.name for cell in cells}) == len(cells)
    for spec in registry.specs().values():
        assert set(spec.bench) <= set(cases.FAMILIES), spec.name
    assert {cell.rows for cell in cells if cell.family == "qlora_layer"} == {32, 512}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_peak_memory_is_that_of_one_call() -> None:
    def prepare(rows: int) -> Any:
        kept = torch.ones(8 << 20)  # 32 MiB that the call does not raise
        return lambda i: (kept[:1] + torch.ones(rows << 20).sum()).item()

    found = measure.peak_memory(measure.Contender("c", prepare, 1, 0), 12)
    assert 46 << 20 <= found < 56 << 20  # the kernel counts pages in batches


def _row(contender: str, **info: Any) -> dict[str, Any]:
    facts = {"cell": "c", "caches": "cold", "contender": contender, "p90_s": 2e-3}
    facts |= {"gb_per_s": 1.0, "gflop_per_s": 2.0, **info}
    return {"extra_info": facts, "stats": {"min": 1e-3, "median": 1e-3}}


def test_report_shows_memory_where_it_was_measured() -> None:
    plain = report.table([_row("peftkern"), _row("torch")])
    assert "peak MB" not in plain[0]
    rows = [_row("peftkern", peak_mb=1.5, times_faster_than_torch=2.0), _row("torch")]
    head, _, ours, theirs = report.table(rows)
    assert "peak MB" in head
    assert "1.5" in ours
    assert "2.00x" in theirs


def test_targets_are_judged_by_their_worst_cell() -> None:
    cells = {cell.name for file in FILES for cell in file.cells("full", "bf16")}
    for target in targets.TARGETS:
        assert any(re.match(target.cells, name) for name in cells), target
    rows = [
        _row("peftkern", cell=f"nf4_fwd-m1-{shape}-bf16", share_of_floor=share)
        for shape, share in (("2048x2048", 0.95), ("4096x4096", 0.5))
    ]
    judged = targets.judged(rows)
    assert judged == [("nf4_fwd-m1-4096x4096-bf16", "floor", 0.9, 0.5)]
    assert "**miss**" in targets.table(rows)[2]
    assert "pass" in targets.table(rows[:1])[2]
    assert targets.table([_row("peftkern")]) == []


def test_the_installed_package_carries_the_benchmarks() -> None:
    pytest.importorskip("typer")
    from peftkern.cli.bench import folder

    root = Path(__file__).resolve().parents[1]
    assert folder() == root / "bench"
    assert 'package_dir={"peftkern.bench": "bench"}' in (root / "setup.py").read_text()
    for file in [*folder().glob("bench_*.py"), folder() / "conftest.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not str(node.module).startswith("bench"), f"{file.name}: absolute import"


def test_command_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from peftkern.cli import make_app

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "pytest_benchmark" else real(n, *a)
    )
    done = testing.CliRunner().invoke(make_app(), ["bench", "--op", "qlora_layer"])
    assert done.exit_code == 2
    assert 'pip install "peftkern[bench]"' in done.output


@pytest.mark.slow
@pytest.mark.hf
def test_llama_step_compares_from_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    small = ["--layers=1", "--width=64", "--vocabulary=64", "--tokens=16", "--rounds=1"]
    found = tmp_path / "found.json"
    contenders = ["frozen", "peft-nf4", "pk-nf4"]
    llama_step.main([*small, "--threads=1", f"--json={found}", "--contenders", *contenders])
    rows = json.loads(found.read_text())
    assert list(rows) == contenders
    assert rows["pk-nf4"]["loss"] == pytest.approx(rows["peft-nf4"]["loss"], rel=1e-2)
    assert all(row["peak"] >= row["kept"] > 0 for row in rows.values())
    assert "peftkern, LoRA over NF4" in capsys.readouterr().out
