"""Every environment variable that peftkern reads, in one place (listed in docs/environment.md)."""

import os


def backend() -> str:
    """``PEFTKERN_BACKEND``: the backend that every op is forced to at import; default ``auto``."""
    return os.environ.get("PEFTKERN_BACKEND", "auto").strip() or "auto"


def cpu_isa() -> str:
    """``PEFTKERN_CPU_ISA``: the CPU instruction set to force; empty means the best one present."""
    return os.environ.get("PEFTKERN_CPU_ISA", "").strip()


def tuning_dir() -> str:
    """``PEFTKERN_TUNING_DIR``: the folder of tuning tables; empty means the user's cache folder."""
    return os.environ.get("PEFTKERN_TUNING_DIR", "").strip()
