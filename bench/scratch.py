"""Copies of the sources in a folder of their own, and native modules built in special ways.

What instruments or breaks the code on purpose works on such a copy: the checkout, its build and its
module stay as they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
_FOLDERS = ("peftkern", "bench", "tests", "tools", "csrc", "examples", "docs")
_FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "CHANGELOG.md", "mkdocs.yml")
_SKIPPED = ("__pycache__", "*.so", "*.pyc", "results", ".hypothesis")


def chosen_parts(module: str, text: str | None, parts: Mapping[str, object]) -> list[str]:
    """The parts that the command line of ``python -m module`` names; all of them by default."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    chosen: list[str] = parser.parse_args().parts
    unknown = set(chosen) - set(parts)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {', '.join(parts)}")
    return chosen or list(parts)


def copy_of(name: str) -> Path:
    """A fresh copy of the sources under ``build/<name>/tree``, without native modules."""
    tree = BUILD / name / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    skipped = shutil.ignore_patterns(*_SKIPPED)
    for folder in _FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=skipped)
    for file in _FILES:
        shutil.copy2(ROOT / file, tree / file)
    return tree


def configure_and_build(
    source: Path, folder: Path, flags: str, targets: Sequence[str], *options: str
) -> None:
    """Build CMake targets of ``source`` with compiler flags in the place of the release's.

    Raises:
        RuntimeError: the build failed; with the end of what it said.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    ninja = ("-G", "Ninja") if shutil.which("ninja") else ()
    configure = [
        *(cmake, "-S", str(source), "-B", str(folder), *ninja),
        "-DCMAKE_BUILD_TYPE=Special",
        f"-DCMAKE_CXX_FLAGS_SPECIAL={flags}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPEFTKERN_VERSION={_version(source)}",
        *options,
    ]
    build = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, [*build, "--target", *targets]):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


def _version(source: Path) -> str:
    text = (source / "peftkern" / "_version.py").read_text()
    return text.split('"')[-2]


def install_module(folder: Path, tree: Path) -> Path:
    """Copy the module that was built in ``folder`` into the package of ``tree``."""
    (built,) = folder.glob("_C*.so")
    target = tree / "peftkern" / built.name
    shutil.copy2(built, target)
    return target


def runtime_of(name: str) -> str:
    """Where g++ keeps a sanitizer's runtime, for instance ``libasan.so``.

    Raises:
        RuntimeError: there is no g++, or it has no such library.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no g++")
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise RuntimeError(f"g++ has no {name}")
    return str(Path(path).resolve())


def environment(tree: Path, **more: str) -> dict[str, str]:
    """For child processes that import peftkern from ``tree``."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **more}


def stream(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path
) -> Iterator[str | int]:
    """Lines of a command as they come, which also go to ``log``; the last item is its status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            yield line.rstrip("\n")
        yield process.wait()
