"""Checksums of state files, by the names that the files record."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from peftkern import native

Checksum = Callable[[memoryview, int], int]  # (data, checksum of what came before) -> checksum


def preferred() -> str:
    """The checksum for new files: CRC-32C where the native module is, else zlib's CRC-32."""
    return "crc32c" if native.available() else "crc32"


def find(name: str) -> Checksum:
    """The function for a name found in a file.

    Raises:
        ValueError: this installation does not have it.
    """
    if name == "crc32":
        return zlib.crc32
    if name != "crc32c":
        raise ValueError(f"checksum: got {name!r}, expected 'crc32' or 'crc32c'")
    if not native.available():
        raise ValueError(
            f"checksum: 'crc32c' needs the native module, which is absent ({native.reason()})"
        )
    function: Checksum = native.kernels().crc32c
    return function
