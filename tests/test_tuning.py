"""Tuning tables: written, read, refused, and never in the way; the runner of ``make gpu``."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from peftkern.triton_kernels import matmul
from peftkern.triton_kernels.launch import Launch, recording
from peftkern.tuning import tables, tuner
from peftkern.tuning.configs import fits, linear_config

NAME = "NVIDIA Test 9000"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU by name only: lookups see it, nothing runs on it."""
    monkeypatch.setenv("PEFTKERN_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tables, "_name", lambda index: NAME)
    tables.forget()
    return tmp_path / f"{tables.slug(NAME)}.json"


def _lookup(m: int, rows: int = 128, cols: int = 256) -> tables.LinearEntry | None:
    return tables.lookup(torch.device("cuda"), m, rows, cols, "nf4", False)


def _entry(fused: bool = True) -> tables.LinearEntry:
    config = linear_config(32, 128, 256, "nf4", 64, False)
    return tables.LinearEntry("nf4", False, 32, 128, 256, config if fused else None)


def test_a_table_is_read_back(gpu: Path) -> None:
    gpu.write_text(tables.dump([_entry()], {"device": NAME}))
    assert _lookup(32) == _lookup(17) == _entry()
    assert _lookup(16) is None
    assert _lookup(33) is None
    assert _lookup(32, cols=512) is None


def test_an_unknown_gpu_is_served_by_the_heuristics(gpu: Path) -> None:
    assert not gpu.exists()
    assert _lookup(32) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 0, "linear": []}',
        '{"version": 1}',
        '{"version": 1, "linear": [{"m": 1}]}',
        tables.dump([replace(_entry(), cols=96)], {}),
    ],
)
def test_a_bad_table_warns_and_is_not_used(
    gpu: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.write_text(text)
    with caplog.at_level(logging.WARNING, "peftkern"):
        assert _lookup(32) is None
    assert gpu.name in caplog.text


def _launches(m: int) -> list[Launch]:
    x = torch.empty(m, 256, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(128 * 128, dtype=torch.uint8, device="meta")
    absmax = torch.empty(512, dtype=torch.float32, device="meta")
    base = matmul.Base(packed, absmax, None, None, "nf4", 64, 128, 256)
    with recording() as launches:
        matmul.matmul(x, base)
    return launches


def test_a_measured_way_replaces_the_heuristic(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _launches(32)[0].kernel.__name__ == "_linear_kernel"
    gpu.write_text(tables.dump([_entry(fused=False)], {}))
    tables.forget()
    monkeypatch.setattr(
        matmul, "lookup", lambda device, *args: tables.lookup(torch.device("cuda"), *args)
    )
    # The library's way: dequantizing is an op of its own, the product is cuBLAS'.
    assert "_linear_kernel" not in [launch.kernel.__name__ for launch in _launches(32)]
    assert _launches(16)[0].kernel.__name__ == "_linear_kernel"


def test_candidates_fit_their_shapes() -> None:
    for rows, cols in ((4096, 4096), (4304, 1152), (11008, 4096), (64, 96)):
        for format in ("nf4", "int8"):
            for m in (16, 64, 512):
                for transposed in (False, True):
                    found = list(tuner.candidates(m, rows, cols, format, transposed))
                    assert len(set(found)) == len(found) >= 3
                    assert all(fits(c, rows, cols, format, transposed) for c in found)


def test_tuning_keeps_the_fastest() -> None:
    calls = iter(range(1000))
    # The library first, then the candidates: the third call is the second candidate.
    times = {2: 0.5}

    def clock(call: object) -> float:
        return times.get(next(calls), 1.0)

    with recording():
        found = next(
            tuner.tune(
                torch.device("meta"), formats=["nf4"], shapes=[(128, 256)], rows=[32], clock=clock
            )
        )
    assert found.entry.config == list(tuner.candidates(32, 128, 256, "nf4", False))[1]
    assert (found.seconds, found.library) == (0.5, 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_the_command_says_why_it_cannot_run() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from peftkern.cli import make_app

    for arguments, said in (
        ([], "torch sees no NVIDIA GPU"),
        (["--shapes", "12"], "--shapes: got '12'"),
        (["--rows", "24"], "--rows: got 24"),
        (["--formats", "int3"], "--formats: got int3"),
    ):
        result = CliRunner().invoke(make_app(), ["tune", *arguments])
        assert result.exit_code == 2
        assert said in result.output


def test_targets_are_judged_from_rows() -> None:
    from bench.gpu.targets import TARGETS, table

    def row(case: str, who: str, seconds: float, **more: object) -> dict[str, object]:
        return {"case": case, "contender": who, "graph_s": seconds, **more}

    rows = [
        row("lora dense d4096", "peftkern", 1.05),
        row("lora dense d4096", "frozen", 1.0),
        row("dequantize nf4 4096x4096", "peftkern", 1.0, share_of_floor=0.5),
        # Device time of one side and event time of the other are never compared.
        row("lora dense d4096", "hf-peft", 2.0) | {"graph_s": None, "events_s": 9.0},
    ]
    text = table({"rows": rows, "machine": {"gpu": "X"}})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.count("|") > 3}
    assert lines["LoRA step, bf16 base, d 4096, over the frozen linear"].endswith("1.05x | met |")
    share = "NF4 dequantize, nested, 4096x4096: share of the copy rate"
    assert lines[share].endswith("50% | missed |")
    assert "not measured" in lines["LoRA step, bf16 base, faster than eager PEFT"]
    assert len({target.what for target in TARGETS}) == len(TARGETS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_run_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import sys
    from unittest import mock

    from bench.gpu import run

    with mock.patch.object(sys, "argv", ["run"]):
        assert run.main() == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rehearsal_runs_every_case(tmp_path: Path) -> None:
    import sys
    from unittest import mock

    from bench.gpu import run

    arguments = ["run", "--dry", "--parts", "bench,tune", "--output", str(tmp_path)]
    with mock.patch.object(sys, "argv", arguments):
        status = run.main()
    data = json.loads((tmp_path / "gpu-dry.json").read_text())
    wrong = [r for r in data["rows"] if r["contender"] == "peftkern" and r.get("error")]
    assert not [r for r in wrong if not r["error"].startswith("absent")]
    assert status == 0, data["parts"]
    assert data["rehearsal"]
    assert "A rehearsal" in (tmp_path / "gpu-dry.md").read_text()
