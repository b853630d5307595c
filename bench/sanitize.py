"""``python -m bench.sanitize``: the native code under sanitizers and valgrind.

    driver     csrc/driver, the CPU kernels called from C++, with address, undefined-behaviour and
               leak sanitizer: every instruction set, 16 callers, and refused requests for memory
    threads    the same callers with the thread sanitizer, on an OpenMP runtime that it understands
    valgrind   the same cases under memcheck: reads of what nobody wrote, and leaks
    module     the Python module with address and undefined-behaviour sanitizer, in the unit tests
    simt-undefined, simt-address
               the CUDA kernels as the SIMT executor runs them, with one sanitizer each

Every part builds in ``build/sanitize``; the checkout's own build stays as it is. The status is 0
where no part reports anything.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import scratch

FOLDER = scratch.BUILD / "sanitize"
_UNDEFINED = "undefined,float-cast-overflow"
_ADDRESS = f"-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,{_UNDEFINED} -fno-sanitize=vptr"
_THREAD = "-O1 -g1 -fsanitize=thread"
_PLAIN = "-O1 -g1"
_REPORT = re.compile(
    r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:|^FINDING|"
    r"ERROR SUMMARY: [1-9]|definitely lost: [1-9]",
    re.MULTILINE,
)
# What of the unit tests runs native code most; the others reach it through the same bindings.
_TESTS = (
    "tests/test_native.py",
    "tests/test_isa.py",
    "tests/test_formats.py",
    "tests/test_ops.py",
    "tests/test_grad.py",
    "tests/test_bottleneck.py",
    "tests/test_prefix_op.py",
    "tests/test_sparse.py",
    "tests/test_optim_ops.py",
    "tests/test_pager_optim.py",
)
# Not about memory, and either told apart from a plain build or far too slow in this one.
_NOT_TESTS = "not emulated and not isa_code_stays and not links_no_openmp and not compile"


@dataclass(frozen=True)
class Outcome:
    """One part: how many reports, what it ran, and how long it took."""

    part: str
    reports: int
    text: str
    seconds: float


def _run(name: str, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> tuple[int, str]:
    """Reports of one command, and its last line; a status without a report is one too."""
    log = FOLDER / f"{name}.log"
    status, last, reports = 0, "", 0
    for line in scratch.stream(command, cwd, env, log):
        if isinstance(line, int):
            status = line
            continue
        if _REPORT.search(line):
            reports += 1
            print("   ", line.strip()[:200], flush=True)
        last = line if " cases, " in line or " passed" in line else last
    for file in sorted(FOLDER.glob(f"{name}.report.*")):  # of this process and of its children
        text = file.read_text(errors="replace")
        found = len(_REPORT.findall(text))
        reports += found
        if found:
            print(f"    {file}: {found} reports\n{text[:1500]}", flush=True)
    if status and not reports:
        reports = 1
        print(f"    status {status}; see {log}", flush=True)
    return reports, last


def _forget(name: str) -> None:
    for file in FOLDER.glob(f"{name}.report.*"):
        file.unlink()


def _drive(
    name: str, folder: Path, runs: Sequence[tuple[str, int]], before: Sequence[str] = (), **env: str
) -> tuple[int, str]:
    """Several parts of the driver, one after the other."""
    reports, texts = 0, []
    for part, cases in runs:
        command = [*before, str(folder / "driver"), part, str(cases), "1"]
        found, last = _run(
            f"{name}-{part}", command, scratch.environment(scratch.ROOT, **env), FOLDER
        )
        reports += found
        texts.append(last)
        print("   ", last, flush=True)
    return reports, "; ".join(texts)


def _build(name: str, flags: str, *targets: str) -> Path:
    folder = FOLDER / name
    scratch.configure_and_build(scratch.ROOT, folder, flags, targets, "-DPEFTKERN_DRIVER=ON")
    return folder


def driver() -> tuple[int, str]:
    """The C++ program with the address, undefined-behaviour and leak sanitizers."""
    folder = _build("address", _ADDRESS, "driver")
    runs = (("compare", 2000), ("callers", 64), ("memory", 200))
    options = "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1"
    return _drive("driver", folder, runs, ASAN_OPTIONS=options, UBSAN_OPTIONS="print_stacktrace=1")


def threads() -> tuple[int, str]:
    """The C++ program with the thread sanitizer."""
    folder = _build("thread", _THREAD, "driver")
    # Without address randomisation: with it, the sanitizer's own map does not fit on new kernels.
    fixed = (shutil.which("setarch") or "setarch", "-R")
    return _drive("threads", folder, (("callers", 64), ("memory", 60)), fixed)


def valgrind() -> tuple[int, str]:
    """The C++ program under memcheck, which has no AVX-512: scalar and AVX2 run."""
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed (apt-get install valgrind)")
    folder = _build("plain", _PLAIN, "driver")
    before = ("valgrind", "--error-exitcode=9", "--leak-check=full", "--num-callers=20")
    return _drive("valgrind", folder, (("compare", 150), ("memory", 16)), before)


def module(jobs: int = 2) -> tuple[int, str]:
    """The unit tests of what runs natively, in a copy whose module is instrumented."""
    folder = _build("address", _ADDRESS, "_C")
    tree = scratch.copy_of("sanitize/module")
    scratch.install_module(folder, tree)
    preload = scratch.runtime_of("libasan.so") + " " + scratch.runtime_of("libstdc++.so")
    log = f"log_path={FOLDER / 'module.report'}"
    env = scratch.environment(
        tree,
        LD_PRELOAD=preload,
        # Python and torch keep much for ever: leaks are the driver's part.
        ASAN_OPTIONS=f"detect_leaks=0:allocator_may_return_null=1:{log}",
        UBSAN_OPTIONS=f"print_stacktrace=1:{log}",
        OMP_NUM_THREADS="1",
    )
    _forget("module")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(jobs)]
    command += ["-m", "not slow", "-k", _NOT_TESTS, "--timeout", "1200", *_TESTS]
    return _run("module", command, env, tree)


def simt(kind: str, jobs: int = 2) -> tuple[int, str]:
    """The CUDA kernels as they are executed; the executor's own checks are others."""
    name = f"simt-{kind}"
    tree = scratch.copy_of(f"sanitize/{name}")
    for so in (scratch.ROOT / "peftkern").glob("_C*.so"):
        shutil.copy2(so, tree / "peftkern")
    log = f"log_path={FOLDER / f'{name}.report'}"
    library = "libasan.so" if kind == "address" else "libubsan.so"
    env = scratch.environment(
        tree,
        SIMT_SANITIZER=kind,
        ASAN_OPTIONS=f"detect_leaks=0:detect_stack_use_after_return=0:{log}",
        UBSAN_OPTIONS=f"print_stacktrace=1:{log}",
        LD_PRELOAD=scratch.runtime_of(library) + " " + scratch.runtime_of("libstdc++.so"),
    )
    _forget(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(jobs)]
    command += ["-k", "matches_reference or fused or entries or row_and_batch"]
    command += ["tests/test_cuda_simt.py", "--timeout", "1200"]
    return _run(name, command, env, tree)


PARTS: dict[str, Callable[[], tuple[int, str]]] = {
    "driver": driver,
    "threads": threads,
    "valgrind": valgrind,
    "module": module,
    "simt-undefined": lambda: simt("undefined"),
    "simt-address": lambda: simt("address"),
}


def main() -> int:
    """Builds and runs the parts that are asked for, all by default."""
    outcomes = []
    for name in scratch.chosen_parts("bench.sanitize", __doc__, PARTS):
        print(f"== {name}: building and running", flush=True)
        start = time.monotonic()
        try:
            reports, text = PARTS[name]()
        except RuntimeError as error:
            reports, text = 1, f"cannot run: {error}"
        outcomes.append(Outcome(name, reports, text.strip("= "), time.monotonic() - start))
    print()
    for o in outcomes:
        print(f"{o.part:14} {o.reports:3} reports  {o.seconds:5.0f} s  {o.text}")
    return 1 if any(o.reports for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
