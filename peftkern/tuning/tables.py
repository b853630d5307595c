"""Measured tiles: JSON tables by device name, written by ``peftkern tune`` and read on demand.

Reading a table runs nothing on a GPU. A device without a table, a shape that is not in it, or a
file that cannot be used leaves the heuristics of ``configs.py`` in charge; nothing raises.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftkern import env
from peftkern.tuning.configs import LinearConfig, fits

_LOGGER = logging.getLogger("peftkern")
_PACKAGED = Path(__file__).with_name("tables")
VERSION = 1


@dataclass(frozen=True)
class LinearEntry:
    """The fastest way found for one product.

    Args:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        transposed: False for ``x Wᵀ``, True for ``dy W``.
        m: rows of the activation; serves every count up to it and above half of it (16: from 1).
        rows: out_features of the stored base.
        cols: in_features of the stored base.
        config: tiles of the fused kernel; ``None``: dequantizing for cuBLAS was faster.
    """

    format: str
    transposed: bool
    m: int
    rows: int
    cols: int
    config: LinearConfig | None


def bucket(m: int) -> int:
    """The power of two, 16 at least, that holds ``m`` rows."""
    return max(16, 1 << (m - 1).bit_length())


def slug(device_name: str) -> str:
    """A file name for a device name.

    Example:
        >>> slug("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_folder() -> Path:
    """Where ``peftkern tune`` writes; its tables are read before those that came with the package.

    ``PEFTKERN_TUNING_DIR``, else ``peftkern/tuning`` in the user's cache folder.
    """
    chosen = env.tuning_dir()
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "peftkern" / "tuning"


def dump(entries: list[LinearEntry], facts: dict[str, Any]) -> str:
    """A table as JSON; ``facts`` tell where and when it was measured."""
    rows = [asdict(entry) for entry in entries]
    return json.dumps({"version": VERSION, **facts, "linear": rows}, indent=1) + "\n"


def parse(text: str) -> dict[tuple[str, bool, int, int, int], LinearEntry]:
    """The entries of a table by their key.

    Raises:
        ValueError: not a table of this version, or an entry whose tiles its shape cannot take.
    """
    try:
        data = json.loads(text)
        if data["version"] != VERSION:
            raise ValueError(f"version: got {data['version']!r}, expected {VERSION}")
        entries = {}
        for row in data["linear"]:
            config = LinearConfig(**row.pop("config")) if row["config"] else row.pop("config")
            entry = LinearEntry(**row, config=config)
            if config is not None and not fits(
                config, entry.rows, entry.cols, entry.format, entry.transposed
            ):
                raise ValueError(f"tiles {config} do not fit {entry.rows}x{entry.cols}")
            key = (entry.format, entry.transposed, entry.m, entry.rows, entry.cols)
            entries[key] = entry
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a tuning table: {error!r}") from error
    return entries


@functools.cache
def _load(device_name: str) -> dict[tuple[str, bool, int, int, int], LinearEntry]:
    for folder in (user_folder(), _PACKAGED):
        path = folder / f"{slug(device_name)}.json"
        try:
            if path.is_file():
                return parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _LOGGER.warning("tuning table %s is not used: %s", path, error)
    return {}


@functools.cache
def _name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def lookup(
    device: torch.device, m: int, rows: int, cols: int, format: str, transposed: bool
) -> LinearEntry | None:
    """The measured way for a product on ``device``; ``None`` where nothing was measured."""
    if device.type != "cuda":
        return None
    return _load(_name(device.index)).get((format, transposed, bucket(m), rows, cols))


def forget() -> None:
    """Read the tables again at the next call."""
    _load.cache_clear()
