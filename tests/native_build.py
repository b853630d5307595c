"""The test build of the native module: the shipped sources plus AVX-512 on emulated intrinsics."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "test-native"


@functools.cache
def build() -> tuple[Path | None, str]:
    """The build folder, or ``None`` and the reason why there is none. CMake keeps it up to date."""
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        return None, "SIMDe is not installed (libsimde-dev)"
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        return None, "cmake or pybind11 is not installed"
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(BUILD)),
        "-DPEFTKERN_EMULATE_AVX512=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    with open(BUILD / "lock", "w") as lock:  # parallel test workers build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(BUILD), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(
                    f"test build failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
                )
    return BUILD, ""


@functools.cache
def load() -> ModuleType:
    """The test build as a module of its own, beside the installed ``peftkern._C``."""
    folder, reason = build()
    if folder is None:
        raise RuntimeError(reason)
    spec = importlib.util.spec_from_file_location("_C", next(folder.glob("_C*.so")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objects() -> dict[str, Path]:
    """Object files of the test build by source name, for instance ``isa_avx2``."""
    folder, reason = build()
    if folder is None:
        raise RuntimeError(reason)
    return {path.name.removesuffix(".cpp.o"): path for path in folder.rglob("*.cpp.o")}
