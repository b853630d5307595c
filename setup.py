"""Builds the native module with CMake; everything else is in pyproject.toml.

Environment: ``PEFTKERN_CUDA`` (``auto``, ``0``, ``1``), ``PEFTKERN_REQUIRE_NATIVE=1`` (a failed
native build fails the installation; otherwise the install is pure Python and remembers why),
``PEFTKERN_CMAKE_ARGS`` (more arguments for CMake). Does not import torch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILURE_FILE = "_native_build_failure.txt"
CUDA_FILE = "_cuda.so"


def version() -> str:
    text = (ROOT / "peftkern" / "_version.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("peftkern/_version.py holds no version")
    return found.group(1)


def find_nvcc() -> str | None:
    """The compiler to build the CUDA kernels with; None if they are not wanted or it is absent."""
    wish = os.environ.get("PEFTKERN_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"PEFTKERN_CUDA: got {wish!r}, expected auto, 0 or 1")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None and wish == "1":
        raise RuntimeError(
            "PEFTKERN_CUDA=1 but no nvcc on PATH or in CUDA_HOME; install the CUDA toolkit, "
            "or build with PEFTKERN_CUDA=auto"
        )
    return nvcc


def run(commands: list[list[str]]) -> None:
    """Runs each command; an error carries what the command said."""
    for command in commands:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(done.stdout, end="")
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)


def find_cmake() -> str:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise FileNotFoundError("cmake was not found")
    return cmake


def reason_of(error: Exception) -> str:
    """The lines of a failed command that say why."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in (error.output or "").splitlines() if line.strip()]
    marked = [line for line in lines if "error" in line.lower()]
    return " | ".join((marked or lines)[:3])


class CMakeBuild(build_ext):
    """Runs CMake for the one extension, or records why it could not."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        failure = target.parent / FAILURE_FILE
        failure.unlink(missing_ok=True)
        cuda = self._build_cuda(target.parent)
        try:
            self._run_cmake(target.parent, cuda)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("PEFTKERN_REQUIRE_NATIVE") == "1":
                raise
            reason = reason_of(error)
            if isinstance(error, subprocess.CalledProcessError):
                reason = "the native build failed: " + reason
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            failure.write_text(reason[:2000] + "\n")
            self.warn(f"peftkern installs without native kernels: {reason}")

    def _build_cuda(self, out_dir: Path) -> str:
        """Builds the CUDA kernels where there is an nvcc; what the build says about them."""
        library = out_dir / CUDA_FILE
        library.unlink(missing_ok=True)
        nvcc = find_nvcc()
        if nvcc is None:
            wish = os.environ.get("PEFTKERN_CUDA", "auto")
            return "no (PEFTKERN_CUDA=0)" if wish == "0" else "no (no nvcc found)"
        build_dir = Path(self.build_temp).resolve() / "cuda"
        build_dir.mkdir(parents=True, exist_ok=True)
        try:
            cmake = find_cmake()
            configure = [
                cmake,
                "-S",
                str(ROOT / "csrc" / "cuda"),
                "-B",
                str(build_dir),
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out_dir}",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
            ]
            if shutil.which("ninja"):
                configure += ["-G", "Ninja"]
            run([configure, [cmake, "--build", str(build_dir), "--parallel"]])
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("PEFTKERN_CUDA") == "1":
                raise
            self.warn(f"peftkern installs without CUDA kernels: {reason_of(error)}")
            return f"no ({nvcc} failed: {reason_of(error)[:300]})"
        return "yes"

    def _run_cmake(self, out_dir: Path, cuda: str) -> None:
        import pybind11

        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = find_cmake()
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPEFTKERN_VERSION={version()}",
            f"-DPEFTKERN_CUDA_FACT={cuda}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += shlex.split(os.environ.get("PEFTKERN_CMAKE_ARGS", ""))
        run([configure, [cmake, "--build", str(build_dir), "--parallel"]])

    def copy_extensions_to_source(self) -> None:
        """In-place builds: the module lands in the package, as does the note of a failure."""
        package = ROOT / "peftkern"
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            note = built.parent / FAILURE_FILE
            for file in (FAILURE_FILE, CUDA_FILE):
                (package / file).unlink(missing_ok=True)
            if (built.parent / CUDA_FILE).exists():
                self.copy_file(str(built.parent / CUDA_FILE), str(package / CUDA_FILE))
            if built.exists():
                self.copy_file(str(built), str(package / built.name))
            elif note.exists():
                (package / built.name).unlink(missing_ok=True)
                self.copy_file(str(note), str(package / FAILURE_FILE))


# The benchmarks lie beside the package in the sources and inside it once installed.
setup(
    version=version(),
    packages=[*find_packages(include=["peftkern", "peftkern.*"]), "peftkern.bench"],
    package_dir={"peftkern.bench": "bench"},
    ext_modules=[Extension("peftkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    package_data={"peftkern": ["py.typed", "_C.pyi", FAILURE_FILE]},
)
