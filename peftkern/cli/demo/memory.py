"""Peak resident memory of this process, from the operating system's own counters."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident() -> int | None:
    """Bytes resident now; None where the system does not say."""
    return _field("VmRSS")


def peak() -> int | None:
    """Most bytes resident since the last `reset_peak` (or since the start of the process)."""
    value = _field("VmHWM")
    if value is not None:
        return value
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Give freed memory back and start the peak anew; False where the peak cannot be reset."""
    gc.collect()
    if not _CLEAR.exists():
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _field(name: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
