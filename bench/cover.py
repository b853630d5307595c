"""``python -m bench.cover``: which lines no test reaches.

    cpp      csrc/cpu, csrc/common and the bindings, over the driver's cases (every instruction set
             of this machine) and the tests of the native module; needs gcovr
    python   peftkern/, over the fast tests and every process that they start; needs coverage

Works in ``build/cover``; the checkout's own build stays as it is. Instruction sets that this
machine cannot run are left out of the count and named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import scratch

FOLDER = scratch.BUILD / "cover"
PASS = {"cpp": 95.0, "python": 92.0}
# What of the fast tests runs native code most.
_NATIVE_TESTS = (
    *("isa", "native", "formats", "lora_ops", "lora_rows", "bottleneck", "prefix_op", "sparse"),
    *("optim_ops", "optim_api", "optim_lookup", "pager_optim", "pager_crash"),
)
# Instruction sets by their source, and what else only they use.
_ONLY = {
    "avx512-bf16": ("isa_avx512_bf16", ("csrc/cpu/kernels/pairs.inl.h", "csrc/cpu/simd_pairs.h")),
    "avx512-amx": ("isa_avx512_amx", ("csrc/cpu/simd_tiles.h",)),
    "avx512": ("isa_avx512", ("csrc/cpu/simd_avx512.h",)),
    "avx2": ("isa_avx2", ("csrc/cpu/simd_avx2.h",)),
}


def _pytest(
    name: str, tree: Path, tests: Sequence[str], options: Sequence[str], **env: str
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    last = ""
    for line in scratch.stream(
        [*command, *options, *tests], tree, scratch.environment(tree, **env), FOLDER / f"{name}.log"
    ):
        if isinstance(line, int):
            if line:
                print(f"    tests failed; see {FOLDER / f'{name}.log'}", flush=True)
        else:
            last = line or last
    print("   ", last, flush=True)


def cpp() -> tuple[float, str]:
    """Percentage of the lines of C++ that ran."""
    folder = FOLDER / "native"
    flags = "-O1 -g1 --coverage -fprofile-update=atomic"
    scratch.configure_and_build(
        scratch.ROOT, folder, flags, ["_C", "driver"], "-DPEFTKERN_DRIVER=ON"
    )
    for old in folder.rglob("*.gcda"):
        old.unlink()
    for part, cases in (("compare", 1500), ("callers", 32), ("memory", 100)):
        command = [str(folder / "driver"), part, str(cases), "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print("   ", done.stdout.strip(), flush=True)
    tree = scratch.copy_of("cover/native-tree")
    scratch.install_module(folder, tree)
    tests = [f"tests/test_{name}.py" for name in _NATIVE_TESTS]
    _pytest("cpp", tree, tests, ("-n", "2", "-k", "not emulated"))
    present = _isas(tree)
    filters, absent = ["csrc/cpu/", "csrc/common/", "csrc/bind"], []
    excluded = ["csrc/cpu/simde_extra.h"]
    for isa, (unit, files) in _ONLY.items():
        if isa not in present:
            absent.append(isa)
            excluded += files
            for notes in folder.rglob(f"{unit}.cpp.gcno"):
                notes.unlink()
    report = FOLDER / "cpp.json"
    command = [sys.executable, "-m", "gcovr", "--root", str(scratch.ROOT), str(folder)]
    command += [word for f in filters for word in ("--filter", f)]
    command += [word for f in excluded for word in ("--exclude", f)]
    command += ["--merge-mode-functions=merge-use-line-min", "--merge-lines"]
    command += ["--exclude-throw-branches", "--gcov-ignore-errors=all"]
    command += ["--json-summary", str(report), "--txt", str(FOLDER / "cpp.txt"), "-j", "2"]
    command += ["--html-details", str(FOLDER / "cpp.html")]
    subprocess.run(command, check=True)
    found = json.loads(report.read_text())
    text = f"{found['line_covered']} of {found['line_total']} lines"
    text += f", branches {found['branch_percent']} %"
    for row in sorted(found["files"], key=lambda row: row["line_percent"] or 0.0)[:8]:
        print(f"    {row['line_percent']:5.1f} %  {row['filename']}", flush=True)
    if absent:
        text += f"; not on this machine: {', '.join(absent)}"
    return float(found["line_percent"]), text


def _isas(tree: Path) -> list[str]:
    code = "from peftkern import native; print(*native.info()['isas'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=scratch.environment(tree),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


_SETTINGS = """\
[run]
source = {tree}/peftkern
parallel = true
data_file = {folder}/data
disable_warnings = no-data-collected, module-not-measured, module-not-imported

[paths]
source =
    {root}/peftkern
    {tree}/peftkern

[report]
exclude_also =
    if TYPE_CHECKING:
    @triton.jit
    @abstractmethod
"""
# Python imports this in every process that finds the folder: also in what tests start.
_HOOK = "import coverage\n\ncoverage.process_startup()\n"


def python() -> tuple[float, str]:
    """Percentage of the lines of Python that ran; Triton's kernels are compiled, not counted."""
    folder = FOLDER / "python"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tree = scratch.copy_of("cover/python-tree")
    for module in (scratch.ROOT / "peftkern").glob("*.so"):
        shutil.copy2(module, tree / "peftkern")
    settings = folder / "settings.ini"
    settings.write_text(_SETTINGS.format(tree=tree, folder=folder, root=scratch.ROOT))
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join(filter(None, (str(folder / "hook"), os.environ.get("COVERAGE_SITE"))))
    env = {"COVERAGE_PROCESS_START": str(settings)}
    env["PYTHONPATH"] = os.pathsep.join((str(tree), path))
    _pytest("python", tree, ["tests"], ("-n", "2", "--dist", "worksteal"), **env)
    run = [sys.executable, "-m", "coverage"]
    rc = f"--rcfile={settings}"
    subprocess.run([*run, "combine", rc, "-q"], check=True, cwd=scratch.ROOT)
    report = FOLDER / "python.json"
    subprocess.run([*run, "json", rc, "-q", "-i", "-o", str(report)], check=True, cwd=scratch.ROOT)
    found = json.loads(report.read_text())
    rows = sorted(found["files"].items(), key=lambda row: -row[1]["summary"]["missing_lines"])
    for name, row in rows[:12]:
        kept = row["summary"]
        shown = os.path.relpath(name, scratch.ROOT)
        print(f"    {kept['percent_covered']:5.1f} %  {kept['missing_lines']:4} lines  {shown}")
    total = found["totals"]
    text = f"{total['covered_lines']} of {total['num_statements']} statements"
    return float(total["percent_covered"]), text


PARTS: dict[str, Callable[[], tuple[float, str]]] = {"cpp": cpp, "python": python}


def main() -> int:
    """Runs the parts that are asked for; status 1 where a percentage is below its mark."""
    rows = []
    for name in scratch.chosen_parts("bench.cover", __doc__, PARTS):
        print(f"== {name}", flush=True)
        start = time.monotonic()
        percent, text = PARTS[name]()
        rows.append((name, percent, f"{text}  ({time.monotonic() - start:.0f} s)"))
    print()
    for name, percent, text in rows:
        print(f"{name:7} {percent:5.1f} % (at least {PASS[name]:.0f}): {text}")
    return 1 if any(percent < PASS[name] for name, percent, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
