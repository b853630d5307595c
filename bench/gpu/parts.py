"""The parts of ``make gpu``, those worth the most first, each with a budget of its own.

On a machine with 16 cores the budgets add up to less than nine minutes. A part is a process: one
that hangs, crashes or runs over its budget is ended, and the next one starts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.machine import ROOT

TEST_FILES = (
    "tests/test_ops.py",
    "tests/test_grad.py",
    "tests/test_gpu.py",
    "tests/test_gpu_methods.py",
    "tests/test_optim_gpu.py",
    "tests/test_pager_gpu.py",
)


@dataclass(frozen=True)
class Context:
    """What the parts need to know.

    Args:
        results: the results file.
        dry: a rehearsal on a CPU.
        seconds: what is left for the part.
    """

    results: Path
    dry: bool
    seconds: float


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Args:
        name: as it is asked for.
        budget: seconds at most.
        sets: the make targets that run it.
        command: what to run; a string is the reason why it cannot be run here.
        environment: variables for it.
        again: it is started again while it ends with status 75.
        optional: that it cannot be run here is no failure.
    """

    name: str
    budget: float
    sets: tuple[str, ...]
    command: Callable[[Context], list[str] | str]
    environment: Callable[[Context], dict[str, str]] = lambda context: {}
    again: bool = False
    optional: bool = False


def _build(context: Context) -> list[str] | str:
    for tool in ("cmake", "pybind11"):
        if shutil.which(tool) is None and importlib.util.find_spec(tool) is None:
            return f"{tool} is not installed"
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    if context.dry:  # beside the tree, which a rehearsal leaves alone
        return [*command, "--build-lib", "build/gpu-dry/lib", "--build-temp", "build/gpu-dry/tmp"]
    return [*command, "--inplace"]


def _build_environment(context: Context) -> dict[str, str]:
    # cmake and ninja installed as Python packages stand beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        "PEFTKERN_REQUIRE_NATIVE": "1",
        "PEFTKERN_CUDA": "0" if context.dry else "1",
        "PATH": path,
    }


def _tests(context: Context) -> list[str] | str:
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.recorder"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # it warns of workers
    if context.dry:
        return [*command, "tests/test_triton_interpret.py", "-k", "philox_dropout"]
    if importlib.util.find_spec("xdist") is not None:
        # Triton compiles on the host, so workers help although there is one GPU.
        workers = max(1, min(12, (os.cpu_count() or 2) - 2))
        command += ["-n", str(workers), "--dist", "worksteal"]
    return [*command, "-m", "gpu", *TEST_FILES]


def _tests_environment(context: Context) -> dict[str, str]:
    return {"PEFTKERN_GPU_RESULTS": str(context.results), "OMP_NUM_THREADS": "1"}


def _module(name: str) -> Callable[[Context], list[str] | str]:
    def command(context: Context) -> list[str]:
        made = [sys.executable, "-m", f"bench.gpu.{name}", str(context.results)]
        # A little less than the limit, so that the part can end by itself.
        made += ["--seconds", f"{max(1.0, context.seconds - 8):.0f}"]
        return made + ["--dry"] * context.dry

    return command


def _sanitizer(tool: str) -> Callable[[Context], list[str] | str]:
    def command(context: Context) -> list[str] | str:
        script = [sys.executable, "-m", "bench.gpu.checks"]
        if context.dry:
            return [*script, "--dry"]
        found = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if found is None:
            return "compute-sanitizer is not installed"
        return [found, "--tool", tool, "--error-exitcode", "9", *script, "--backend", "cuda"]

    return command


def _without_caching(context: Context) -> dict[str, str]:
    # Allocations of their own: an access behind the end of one does not land in another.
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


PARTS = (
    Part("build", 120, ("gpu", "test", "bench"), _build, _build_environment),
    Part("tests", 150, ("gpu", "test"), _tests, _tests_environment),
    Part("bench", 120, ("gpu", "bench"), _module("measure"), again=True),
    Part("qlora", 40, ("gpu", "bench"), _module("step")),
    Part("tune", 50, ("gpu",), _module("tune")),
    *(
        Part(tool, budget, ("gpu", "test"), _sanitizer(tool), _without_caching, optional=True)
        for tool, budget in (("memcheck", 35), ("racecheck", 20))
    ),
)


def root() -> Path:
    """Where the commands run."""
    return ROOT
