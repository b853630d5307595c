"""Files that hold paged optimizer state: fixed slots for buckets, and a journal of commits.

A bucket has two slots. A step writes into the slot that the last commit does not name; then the
data is synced, and a record that names the new slots and their checksums goes to the older of two
journal files. Whatever byte a crash interrupts, one journal file is whole and every slot that it
names is too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peftkern import native

# Version 1 had no field "checksum" in its records: it was "crc32" always.
_MAGICS = (b"PKPAGES2", b"PKPAGES1")
_HEADER = struct.Struct("<8sQQI")  # magic, sequence number, payload length, CRC of the rest
PAGE = 4096
_PIECE = 1 << 20  # bytes that are moved and summed while they are in the cache


class PagingError(OSError):
    """Optimizer state could not be written or read; the message says what is still whole."""


class Disk:
    """The file operations in use; tests put a failing disk in its place."""

    def open(self, path: Path) -> int:
        """Open for reading and writing, creating the file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Like ``os.pwrite``; may write less."""
        return os.pwrite(fd, data, offset)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """Like ``os.preadv``; may read less."""
        return os.preadv(fd, [into], offset)

    def sync(self, fd: int) -> None:
        """Make what was written durable."""
        os.fdatasync(fd)

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """Have the system begin to write out, so that :meth:`sync` finds little left to do."""
        # What this drops is clean pages; dirty ones it hands to the disk, and they stay cached.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve space, so that a full disk shows before anything depends on it."""
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (95, 22):  # EOPNOTSUPP, EINVAL: the file system cannot reserve
                raise
            os.truncate(fd, max(size, os.fstat(fd).st_size))

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to ``size`` bytes."""
        os.ftruncate(fd, size)

    def write_page(self, fd: int, data: memoryview, offset: int, checksum: str) -> int:
        """Write all of it; returns its checksum."""
        function, value = find_checksum(checksum), 0
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            value = function(piece, value)
            _write_all(self, fd, piece, offset + at)
        return value

    def read_page(self, fd: int, into: memoryview, offset: int, checksum: str) -> int:
        """Read until ``into`` is full; returns the checksum of what was read."""
        function, value = find_checksum(checksum), 0
        for at in range(0, len(into), _PIECE):
            piece = into[at : at + _PIECE]
            _read_all(self, fd, piece, offset + at)
            value = function(piece, value)
        return value


class NativeDisk(Disk):
    """A disk whose pages are moved by one native call each, which needs no interpreter lock."""

    def write_page(self, fd: int, data: memoryview, offset: int, checksum: str) -> int:
        """As in :class:`Disk`."""
        if checksum != "crc32c":
            return super().write_page(fd, data, offset, checksum)
        return int(native.kernels().write_page(fd, data, offset))

    def read_page(self, fd: int, into: memoryview, offset: int, checksum: str) -> int:
        """As in :class:`Disk`."""
        if checksum != "crc32c":
            return super().read_page(fd, into, offset, checksum)
        return int(native.kernels().read_page(fd, into, offset))


def preferred_checksum() -> str:
    """The checksum of new files: CRC-32C where the native module is, else zlib's CRC-32."""
    return "crc32c" if native.available() else "crc32"


def find_checksum(name: str) -> Callable[[memoryview, int], int]:
    """The function for a name found in a file; it takes data and the checksum of what precedes it.

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
    function: Callable[[memoryview, int], int] = native.kernels().crc32c
    return function


def default_disk() -> Disk:
    """The disk that optimizers use unless they are given one."""
    return NativeDisk() if native.available() else Disk()


def _write_all(disk: Disk, fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        count = disk.write(fd, data[done:], offset + done)
        if count <= 0:
            raise OSError(f"short write: {done} of {len(data)} bytes at offset {offset}")
        done += count


def _read_all(disk: Disk, fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = disk.read(fd, into[done:], offset + done)
        if count <= 0:
            raise OSError(f"short read: {done} of {len(into)} bytes at offset {offset}")
        done += count


@dataclass
class Record:
    """What a commit says.

    Args:
        layout: fingerprint of the parameters and their places.
        slots: slot of each bucket; -1 where the state is still all zeros.
        checksums: of each bucket's bytes.
        steps: step number of each parameter; -1 for parameters without state.
        bucket_bytes: size that the buckets were made for.
        seeds: of stochastic rounding, for each group; empty without it.
        checksum: name of the function that gave ``checksums``.
    """

    layout: str
    slots: list[int]
    checksums: list[int]
    steps: list[int]
    bucket_bytes: int
    seeds: list[int]
    checksum: str = "crc32"


class StateFiles:
    """The files of one optimizer.

    Args:
        directory: where they live and survive the process; None uses an unnamed temporary file
            with one slot a bucket and no journal.
        stride: bytes from slot to slot.
        disk: file operations.

    Raises:
        PagingError: the directory is in use by another optimizer.
    """

    def __init__(self, directory: Path | None, stride: int, disk: Disk) -> None:
        self.directory, self.stride, self._disk = directory, stride, disk
        self.persistent = directory is not None
        self._journal: list[int] = []
        self._sequence = 0
        self._fds: list[int] = []
        self._checksum = preferred_checksum()
        if directory is None:
            fd, name = tempfile.mkstemp(prefix="peftkern-pages-")
            os.unlink(name)
            self._data = fd
            self._fds.append(fd)
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._data = self._open(directory / "state.bin")
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fds.pop())
            raise PagingError(
                f"page_dir: {directory} is in use by another optimizer; give each its own"
            ) from error
        self._journal = [self._open(directory / f"journal.{i}") for i in (0, 1)]

    def _open(self, path: Path) -> int:
        fd = self._disk.open(path)
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        """Close the files; an unnamed one is gone then."""
        if self.persistent and self._fds:
            # Children that inherited the descriptor would go on holding the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(self._fds[0], fcntl.LOCK_UN)
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())

    def reserve(self, buckets: int) -> None:
        """Make room for so many buckets."""
        slots = 2 if self.persistent else 1
        self._disk.allocate(self._data, buckets * slots * self.stride)

    def _offset(self, bucket: int, slot: int) -> int:
        return ((2 * bucket + slot) if self.persistent else bucket) * self.stride

    def write_slot(self, bucket: int, slot: int, data: memoryview) -> int:
        """Write a bucket; returns its checksum."""
        offset = self._offset(bucket, slot)
        value = self._disk.write_page(self._data, data, offset, self._checksum)
        if self.persistent:
            self._disk.start_writing(self._data, offset, len(data))
        return value

    def read_slot(self, bucket: int, slot: int, into: memoryview, expected: int) -> None:
        """Read a bucket and check it.

        Raises:
            PagingError: the bytes are not those that were written.
        """
        offset = self._offset(bucket, slot)
        if self._disk.read_page(self._data, into, offset, self._checksum) != expected:
            raise PagingError(f"bucket {bucket}: checksum differs; the file was damaged")

    def commit(self, record: Record) -> None:
        """Make the written slots the ones that a restart finds."""
        self._disk.sync(self._data)
        record = replace(record, checksum=self._checksum)
        payload = json.dumps(asdict(record)).encode()
        sequence = self._sequence + 1
        rest = struct.pack("<QQ", sequence, len(payload)) + payload
        frame = _HEADER.pack(_MAGICS[0], sequence, len(payload), zlib.crc32(rest)) + payload
        fd = self._journal[sequence % 2]
        _write_all(self._disk, fd, memoryview(frame), 0)
        self._disk.truncate(fd, len(frame))
        self._disk.sync(fd)
        if self._sequence == 0 and self.directory is not None:
            folder = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._sequence = sequence

    def recover(self) -> Record | None:
        """The newest whole record; None where nothing was ever committed.

        Raises:
            PagingError: there were commits but no journal file is whole.
        """
        if self.directory is None:
            return None
        self._sequence, record = newest_record(self.directory)
        if record is not None:
            try:
                find_checksum(record.checksum)
            except ValueError as error:
                raise PagingError(
                    f"page_dir: {self.directory} cannot be checked: {error}"
                ) from error
            self._checksum = record.checksum  # what is on disk decides
        return record


def newest_record(directory: Path) -> tuple[int, Record | None]:
    """Sequence number and content of the last commit in a directory; ``(0, None)`` for none.

    Raises:
        PagingError: there were commits but no journal file is whole.
    """
    found: list[tuple[int, Record]] = []
    broken = 0
    for i in (0, 1):
        path = directory / f"journal.{i}"
        raw = path.read_bytes() if path.exists() else b""
        parsed = _parse(raw)
        if parsed is not None:
            found.append(parsed)
        elif raw:
            broken += 1
    if broken == 2:
        raise PagingError(f"page_dir: both journals in {directory} are damaged")
    return max(found, key=lambda pair: pair[0]) if found else (0, None)


def _parse(raw: bytes) -> tuple[int, Record] | None:
    if len(raw) < _HEADER.size:
        return None
    magic, sequence, length, checksum = _HEADER.unpack_from(raw)
    payload = raw[_HEADER.size : _HEADER.size + length]
    rest = struct.pack("<QQ", sequence, length) + payload
    if magic not in _MAGICS or len(payload) != length or zlib.crc32(rest) != checksum:
        return None
    return sequence, Record(**json.loads(payload))
