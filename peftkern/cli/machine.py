"""Facts about this machine and what is installed on it; shared by `info` and the reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

PACKAGES = ("torch", "numpy", "transformers", "peft", "bitsandbytes", "triton")


def versions() -> dict[str, str | None]:
    """Version of peftkern, Python and each library we meet; None for what is not installed."""
    from peftkern._version import __version__

    found: dict[str, str | None] = {
        "peftkern": __version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    """Marketing name of the CPU, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Installed memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def machine() -> dict[str, str | int | None]:
    """System, CPU, cores and memory."""
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "python": sys.version.split()[0],
    }


def human_bytes(count: float | None) -> str:
    """`1.40 MB` for 1400000; a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            digits = 0 if unit == "B" or abs(count) >= 100 else 1 if abs(count) >= 10 else 2
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float | None) -> str:
    """`2 min 05 s`, `8.1 s` or `12 ms`; a dash for None."""
    if seconds is None:
        return "-"
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
