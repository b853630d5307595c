"""What a wheel carries: type information, one version, a stub of the native module."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import peftkern as pk
from peftkern import cli, native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pk.__file__).parent


def test_version_has_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", pk.__version__)
    assert f"## {pk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_types_are_shipped() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = setuptools["package-data"]["peftkern"]
    for name in ("py.typed", "_C.pyi"):
        assert name in shipped
        assert (PACKAGE / name).exists()


@pytest.mark.native
@pytest.mark.skipif(not native.available(), reason=str(native.reason()))
def test_stub_has_every_native_function() -> None:
    from peftkern import _C

    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    typed = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    present = {name for name in dir(_C) if not name.startswith("_")}
    assert typed == present, "run: python tools/native_stub.py"


def test_info_needs_no_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bare installation tells what it has, as JSON; other commands say what to install."""
    for name in [m for m in sys.modules if m.split(".")[0] == "typer"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("bench", "info"):
        monkeypatch.delitem(sys.modules, f"peftkern.cli.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(sys, "argv", ["peftkern", "info"])
    cli.main()
    said = capsys.readouterr()
    assert json.loads(said.out)["backends"]["reference"] == "ok"
    assert "peftkern[cli]" in said.err
    monkeypatch.setattr(sys, "argv", ["peftkern", "demo"])
    with pytest.raises(SystemExit, match="needs typer"):
        cli.main()
