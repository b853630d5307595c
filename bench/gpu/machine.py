"""What a results file must say about the machine it comes from."""

from __future__ import annotations

import datetime
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "torch", "triton", "bitsandbytes", "peft", "transformers", "unsloth", "liger-kernel",
)  # fmt: skip


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_name() -> str:
    """The name of GPU 0; empty where torch sees none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def commit() -> str:
    """The commit of this tree, marked if files differ from it; empty outside of git."""
    found = _said("git", "rev-parse", "--short=12", "HEAD")
    changed = found and _said("git", "status", "--porcelain", "--untracked-files=no")
    return found + (" with changes" if changed else "")


def facts() -> dict[str, str]:
    """GPU, date, commit, driver, CUDA, versions of what was compared."""
    import torch

    from peftkern import __version__

    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    made = {
        "gpu": gpu_name(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "driver": driver.splitlines()[0] if driver else "",
        "CUDA of torch": str(torch.version.cuda or ""),
        "peftkern": __version__,
    }
    if torch.cuda.is_available():
        shape = torch.cuda.get_device_properties(0)
        made["capability"] = f"{shape.major}.{shape.minor}"
        made["multiprocessors"] = str(shape.multi_processor_count)
        made["L2 MB"] = str(shape.L2_cache_size >> 20)
        made["memory GB"] = f"{shape.total_memory / 1e9:.0f}"
    for package in _PACKAGES:
        try:
            made[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            made[package] = ""
    return made
