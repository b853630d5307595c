"""Writing files so that a crash at any moment leaves the old file or the new one, never half."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

JOURNAL = ".peftkern_save.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: temporary neighbour, fsync, rename, fsync of the directory.

    Args:
        path: the file to make or replace.
        data: its content.

    Raises:
        OSError: the directory cannot be written to; the old file is untouched.
    """
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_together(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Replace files that belong together: a crash at any moment leaves all old or all new.

    Everything is written beside first; a journal that names it is the moment of the change, and
    the renames that follow it can be made up for by :func:`current` and by the next save.

    Args:
        folder: where.
        files: name -> content; ``None`` for a file that is no longer there.

    Raises:
        OSError: the directory cannot be written to; the old files are untouched.
    """
    _finish(folder)
    gone = [name for name, data in files.items() if data is None]
    held = {name: data for name, data in files.items() if data is not None}
    if len(held) == 1 and not any((folder / name).exists() for name in gone):
        for name, data in held.items():
            write_atomically(folder / name, data)
        return
    beside: dict[str, str] = {}
    try:
        for name, data in held.items():
            beside[name] = _write_beside(folder / name, data).name
        journal = {"new": beside, "gone": gone}
        write_atomically(folder / JOURNAL, json.dumps(journal).encode())
    except BaseException:
        for temporary in (JOURNAL, *beside.values()):
            (folder / temporary).unlink(missing_ok=True)
        raise
    _finish(folder)


def current(folder: Path, name: str) -> Path:
    """Where the content of a file is now: beside it, if a save was cut short after its change."""
    journal = _journal(folder)
    if name in journal["gone"]:
        return folder / f"{JOURNAL}.gone"  # never there
    beside = folder / journal["new"].get(name, name)
    return beside if beside.is_file() else folder / name


def _journal(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / JOURNAL)
    except (FileNotFoundError, NotADirectoryError):
        return {"new": {}, "gone": []}
    new, gone = found.get("new"), found.get("gone")
    if isinstance(new, dict) and new and isinstance(gone, list):
        # Names of this folder alone: an adapter from a stranger may bring a journal too.
        names = [*new, *new.values(), *gone]
        if all(isinstance(n, str) and n not in ("", ".", "..") and "/" not in n for n in names):
            return {"new": new, "gone": gone}
    raise ValueError(f"{folder / JOURNAL}: not the journal of a save")


def _finish(folder: Path) -> None:
    """Do the renames of a journal, and remove it."""
    journal = _journal(folder)
    if not journal["new"]:
        return
    for name, temporary in journal["new"].items():
        with contextlib.suppress(FileNotFoundError):  # renamed before the crash
            os.replace(folder / temporary, folder / name)
    for name in journal["gone"]:
        (folder / name).unlink(missing_ok=True)
    _sync_directory(folder)
    (folder / JOURNAL).unlink(missing_ok=True)
    _sync_directory(folder)


def json_bytes(value: Any) -> bytes:
    """JSON as PEFT writes it: two spaces, sorted keys."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write JSON as PEFT does."""
    write_atomically(path, json_bytes(value))


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as a safetensors file with the metadata that transformers and PEFT expect.

    Args:
        tensors: by name; views and tied ones are written out in full.
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
    data: bytes = save(ready, metadata={"format": "pt", **(metadata or {})})
    return data


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write :func:`safetensors_bytes` to the file to make or replace."""
    write_atomically(path, safetensors_bytes(tensors, metadata))


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


def _write_beside(path: Path, data: bytes) -> Path:
    """A new synced neighbour of ``path`` with the permissions that a plain file would get."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # systems that cannot open a directory order renames themselves
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
