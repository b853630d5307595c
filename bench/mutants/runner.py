"""Building a mutant and running the tests that should notice it.

Tests run in a child that is forked where torch and pytest are imported already and peftkern is not:
it finds the changed files first. Each worker has a copy of the sources; a changed C++ file is
compiled for one instruction set, and linked with the objects of an unchanged build.
"""

from __future__ import annotations

import compileall
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import scratch
from bench.mutants.sites import Mutant, changed
from bench.mutants.targets import Target

NATIVE = scratch.BUILD / "mutants" / "native"
_SECONDS = 600.0  # a loop that does not end is noticed as well


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: ``killed`` by a test (named), or ``survived``."""

    killed: bool
    by: str
    seconds: float


def build_native() -> None:
    """The unchanged objects, without optimisation that costs time."""
    scratch.configure_and_build(
        scratch.ROOT, NATIVE, "-O1", ["_C"], "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"
    )


def prepare(worker: int) -> Path:
    """The sources of one worker, with the unchanged module in them."""
    tree = scratch.copy_of(f"mutants/{worker}")
    scratch.install_module(NATIVE, tree)
    compileall.compile_dir(str(tree / "peftkern"), quiet=2)
    return tree


def _compile(tree: Path, target: Target) -> str:
    """Put the changed module into ``tree``; what the compiler says, if it refuses."""
    commands = json.loads((NATIVE / "compile_commands.json").read_text())
    folder = tree.parent / "objects"
    folder.mkdir(exist_ok=True)
    fresh_objects = {}
    compiler = ""
    for unit in target.units:
        (row,) = [row for row in commands if row["file"].endswith(f"csrc/{unit}.cpp")]
        made = folder / f"{Path(unit).name}.cpp.o"
        words = shlex.split(row["command"].replace(str(scratch.ROOT / "csrc"), str(tree / "csrc")))
        words[words.index("-o") + 1] = str(made)
        done = subprocess.run(words, cwd=NATIVE, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr
        compiler, fresh_objects[made.name] = words[0], made
    objects = [
        fresh_objects.get(path.name, path)
        for path in sorted(NATIVE.rglob("*.cpp.o"))
        if "/driver.dir/" not in str(path)
    ]
    (module,) = (tree / "peftkern").glob("_C*.so")
    fresh = module.with_suffix(".new")
    link = [compiler, "-shared", "-fPIC", "-o", str(fresh), *map(str, objects), "-ldl"]
    subprocess.run(link, check=True, capture_output=True)
    fresh.replace(module)
    return ""


def _test(
    tree: Path, target: Target, log: Path, seconds: float, focus: str = ""
) -> tuple[int, str]:
    """Status of pytest in a forked child, and the test that failed first."""
    pid = os.fork()
    if pid == 0:
        _become_pytest(tree, target, log, focus)
    ends = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > ends:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 124, "timeout"
        time.sleep(0.02)
    text = log.read_text(errors="replace")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    code = os.waitstatus_to_exitcode(status)
    # On a line of its own, the first failed test; a process that died tells by its signal.
    return code, failed[0].split(" - ")[0] if failed else f"status {code}"


def _become_pytest(tree: Path, target: Target, log: Path, focus: str) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        os.environ.pop("PEFTKERN_CPU_ISA", None)
        if target.isa:
            os.environ["PEFTKERN_CPU_ISA"] = target.isa
        for name in [n for n in sys.modules if n.partition(".")[0] in ("bench", "peftkern")]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(scratch.ROOT)))]
        sys.dont_write_bytecode = True
        import pytest

        # The tests of other instruction sets hold nothing of what was changed.
        others = {"scalar", "avx2", "avx512"} - {target.isa} if target.isa else set()
        chosen = " and ".join(f"not {name}" for name in ("emulated", *sorted(others)))
        if focus:
            chosen += f" and ({focus})"
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
        arguments += ["-m", "not slow", "-k", chosen, "--timeout", "0", "--tb", "line"]
        code = int(pytest.main([*arguments, *target.tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def baseline(tree: Path, target: Target) -> Verdict:
    """The tests of unchanged code, which must pass for a failure to mean anything."""
    start = time.monotonic()
    code, by = _test(tree, target, tree.parent / "log.txt", 4 * _SECONDS)
    return Verdict(code != 0, by if code else "", time.monotonic() - start)


def judge(tree: Path, mutant: Mutant, target: Target) -> Verdict:
    """Apply, build, test, and put the file back."""
    start = time.monotonic()
    file = tree / mutant.path
    kept, when = file.read_bytes(), file.stat()
    log = tree.parent / "log.txt"
    (module,) = (tree / "peftkern").glob("_C*.so")
    kept_module = tree.parent / "module.so"
    if not kept_module.exists():
        shutil.copy2(module, kept_module)
    file.write_text(changed(scratch.ROOT, mutant))
    os.utime(file, (when.st_atime + 10, when.st_mtime + 10))  # its bytecode is not this one's
    try:
        if target.units and (refused := _compile(tree, target)):
            errors = [line for line in refused.splitlines() if "error:" in line] or [refused]
            return Verdict(True, f"does not compile: {errors[0].rpartition('error:')[2]}", 0.0)
        if target.focus:
            code, by = _test(tree, target, log, _SECONDS, target.focus)
        if not target.focus or code == 0:
            code, by = _test(tree, target, log, _SECONDS)
        return Verdict(code != 0, by if code else "", time.monotonic() - start)
    finally:
        file.write_bytes(kept)
        os.utime(file, (when.st_atime, when.st_mtime))
        if target.units:
            shutil.copy2(kept_module, module)
