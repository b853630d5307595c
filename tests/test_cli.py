"""The command line: info."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from command_line import ROOT, cli, environment

from peftkern.cli import make_app
from peftkern.cli.facts import collect, warnings_of
from peftkern.cli.info import show


def test_info_parses() -> None:
    result = cli("info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["backends"]["reference"] == "ok"
    assert facts["versions"]["torch"]
    assert {"linear_4bit", "lora_linear"} <= facts["ops"].keys()
    assert all(place["cpu"]["serves"] for place in facts["ops"].values())


def test_info_prints_what_it_knows() -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(make_app(), ["info"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    for word in ("peftkern", "machine", "native module", "threads", "reference", "lora_linear"):
        assert word in result.output


def test_info_warns_of_missing_kernels_and_of_two_openmp_runtimes() -> None:
    from rich.console import Console

    absent: dict[str, Any] = {"available": False, "reason": "no compiler was found"}
    facts = collect() | {"native": absent}
    facts["warnings"] = warnings_of(facts)
    console = Console(record=True, width=200, file=io.StringIO())
    show(facts, console)
    text = console.export_text()
    assert "absent: no compiler was found" in text
    assert "the slow reference serves every op" in text
    two: dict[str, Any] = {"available": True, "openmp": "/a", "openmp_loaded": ["/a", "/b"]}
    assert "2 OpenMP runtimes are loaded (/a, /b)" in warnings_of({"native": two})[0]
    none: dict[str, Any] = {
        "available": True,
        "openmp": None,
        "openmp_reason": "torch has none",
        "openmp_loaded": [],
    }
    assert "one thread: torch has none" in warnings_of({"native": none})[0]


def test_info_names_a_wrong_instruction_set() -> None:
    from peftkern import native

    if not native.available():
        pytest.skip(f"no native module: {native.reason()}")
    result = subprocess.run(
        [sys.executable, "-m", "peftkern", "info"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(), "PEFTKERN_CPU_ISA": "sse1"},
    )
    assert result.returncode == 2
    assert "PEFTKERN_CPU_ISA" in result.stderr
    assert "Traceback" not in result.stderr


def test_import_of_the_command_line_is_lazy() -> None:
    code = (
        "import sys, peftkern.cli; "
        "bad = {'typer', 'rich', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(', '.join(bad) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
