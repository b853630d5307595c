"""Writing files so that a crash at any moment leaves the old file or the new one, never half."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: temporary neighbour, fsync, rename, fsync of the directory.

    Args:
        path: the file to make or replace.
        data: its content.

    Raises:
        OSError: the directory cannot be written to; the old file is untouched.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as PEFT does: two spaces, sorted keys."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors with the metadata that transformers and PEFT expect.

    Args:
        path: the file to make or replace.
        tensors: its tensors; views and tied ones are written out in full.
        metadata: further entries of the header.

    Raises:
        ImportError: safetensors is not installed.
    """
    save = _safetensors().torch.save
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory; a copy of one of them is what is meant.
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        ready[key] = value
    write_atomically(path, save(ready, metadata={"format": "pt", **(metadata or {})}))


def open_safetensors(path: Path) -> Any:
    """Open for reading; use as a context manager. Shapes can be read without the data.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is damaged or no safetensors file.
    """
    library = _safetensors()
    try:
        return library.safe_open(path, framework="pt", device="cpu")
    except library.SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need the safetensors package: pip install safetensors"
        ) from error
    return safetensors


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # systems that cannot open a directory order renames themselves
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
