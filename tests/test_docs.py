"""The documentation is true: its code runs, its links lead somewhere, its tables are current."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import peftkern

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Modules that only import where their package is there, and the one that is a program.
_LEFT_OUT = re.compile(r"\.(_C|_cuda|__main__|triton_kernels|triton)\b")


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _snippets(page: Path) -> list[str]:
    return [code for skipped, code in _FENCE.findall(page.read_text()) if not skipped]


@pytest.mark.hf
@pytest.mark.parametrize(
    "page", [p for p in PAGES if _snippets(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for code in _snippets(page):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_examples_of_docstrings() -> None:
    pytest.importorskip("typer")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    attempted, failed = 0, []
    for info in pkgutil.walk_packages(peftkern.__path__, "peftkern."):
        if _LEFT_OUT.search(info.name):
            continue
        source = importlib.util.find_spec(info.name)
        assert source is not None
        assert source.origin is not None
        if ">>>" not in Path(source.origin).read_text():
            continue
        found = doctest.testmod(importlib.import_module(info.name), optionflags=flags)
        attempted += found.attempted
        failed += [info.name] * found.failed
    assert not failed
    assert attempted > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}"


def test_table_of_ops_is_current() -> None:
    pytest.importorskip("triton")
    table = "\n".join(_tool("support_table").op_table())
    assert table in (ROOT / "docs" / "support.md").read_text(), "run: python tools/support_table.py"


@pytest.mark.slow
@pytest.mark.hf
def test_table_of_methods_is_current() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    table = "\n".join(_tool("support_table").method_table())
    for page in ("README.md", "docs/support.md"):
        assert table in (ROOT / page).read_text(), "run: python tools/support_table.py"


def test_variables_are_documented() -> None:
    """Every variable that the library or its build reads stands on the page, and none else."""
    sources = [*(ROOT / "peftkern").rglob("*.py"), ROOT / "setup.py"]
    read = {name for s in sources for name in re.findall(r'"(PEFTKERN_[A-Z_]+)"', s.read_text())}
    page = (ROOT / "docs" / "environment.md").read_text()
    told = set(re.findall(r"^\| `(PEFTKERN_[A-Z_]+)`", page, re.MULTILINE))
    assert told >= read - {"PEFTKERN_COMPACT_", "PEFTKERN_SPARSE_DELTA"}
    assert sys.version_info >= (3, 11)
