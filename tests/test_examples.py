"""The examples run, and their own assertions hold."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ("own_op",)
NEEDS = {"own_op": (), "accelerate_peft": ("peft",), "patch_model": ("transformers", "peft")}


def _cells() -> list[object]:
    names = sorted(file.stem for file in EXAMPLES.glob("*.py"))
    assert len(names) >= 5
    return [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in names]


@pytest.mark.parametrize("name", _cells())
def test_example_runs(name: str, tmp_path: Path) -> None:
    for module in NEEDS.get(name, ("transformers",)):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    root = str(EXAMPLES.parent)
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") >= 4  # it tells what it found
