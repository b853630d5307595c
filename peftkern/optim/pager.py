"""Buckets of optimizer state in RAM up to a budget, the rest in a file.

A fixed part of the budget keeps the same buckets in RAM; the rest is a few buffers through which
the others pass: one is being updated, the next ones are being read, the last ones are being
written. One background thread reads and another one writes and commits, each in the order in which
it is asked, so that no read waits behind a sync.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.optim.files import PAGE, Disk, PagingError, Record, StateFiles

_LOG = logging.getLogger("peftkern")
_STREAM = 6  # buffers that buckets pass through, where the budget holds more than twice as many
_AHEAD = 2  # buckets that are read ahead
_HUGE = 4 << 20  # bytes from which huge pages are worth their rounding
_HISTORY = 1000  # steps of which the report keeps the figures

__all__ = ["Pager", "PagingError"]


@dataclass
class _Bucket:
    size: int
    buffer: Tensor | None = None
    in_use: bool = False
    dirty: bool = False  # RAM is newer than the file
    slot: int = -1  # newest on disk; -1: none, the state is zero
    checksum: int = 0
    committed: int = -1
    reading: Future[None] | None = None
    writing: Future[tuple[int, int]] | None = None
    ticket: int = 0  # orders the writes that are under way


def _view(buffer: Tensor, size: int) -> memoryview:
    return memoryview(buffer.numpy()[:size])  # type: ignore[arg-type]


def pages(size: int) -> mmap.mmap:
    """Memory of its own, in huge pages where the system has some."""
    made = mmap.mmap(-1, size)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            made.madvise(mmap.MADV_HUGEPAGE)
    return made


def _plain_buffer(size: int) -> Tensor:
    return torch.frombuffer(pages(size), dtype=torch.uint8)


def _shut(pid: int, threads: dict[str, ThreadPoolExecutor], files: StateFiles) -> None:
    """Let the background finish, then close; a forked child leaves its parent's files alone."""
    if os.getpid() == pid:
        for thread in threads.values():
            thread.shutdown(wait=True)
        files.close()


class Pager:
    """Hands out buckets of bytes and keeps within a RAM budget.

    Args:
        stride: largest bucket, in bytes; what every buffer holds.
        ram_budget: bytes of RAM for state; None for no limit.
        directory: where state survives the process (two slots a bucket, journalled commits);
            None for an unnamed temporary file that is used only if the budget demands it.
        disk: file operations.

    Raises:
        ValueError: the budget does not hold two buckets.
        PagingError: the directory is in use.

    Where a device keeps the first buckets for itself (:class:`~peftkern.optim.tier.DeviceTier`),
    nothing of them is here: :meth:`leave_out`, :meth:`surrender`.
    """

    def __init__(
        self, stride: int, ram_budget: int | None, directory: Path | None, disk: Disk
    ) -> None:
        #: Makes a buffer of so many bytes; the device tier wants pinned ones.
        self.make_buffer: Callable[[int], Tensor] = _plain_buffer
        self._first = 0  # buckets before it are kept by a device
        #: Changes whenever a bucket that stays may have come to lie elsewhere.
        self.version = 0
        self._stride = -(-stride // PAGE) * PAGE
        self._buckets: list[_Bucket] = []
        self._disk = disk
        self._files = None if directory is None else StateFiles(directory, self._stride, disk)
        self._threads: dict[str, ThreadPoolExecutor] = {}  # "read" and "write", once needed
        self._failure: BaseException | None = None
        self._committing: deque[Future[Record]] = deque()
        self._durable = False  # whether the present step will be committed
        self._tickets = 0
        self._free: list[Tensor] = []
        self._allocated = 0
        self._order: deque[int] = deque()
        self._broken: str | None = None
        self._pid = os.getpid()
        self._closed = False
        self._counts = dict.fromkeys(("hits", "misses", "bytes_read", "bytes_written"), 0)
        self._commits = 0
        self._stall = 0.0
        self._steps: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._step = 0
        self._before: dict[str, Any] = {}
        self._began = 0.0
        if self._files is not None:
            weakref.finalize(self, _shut, self._pid, self._threads, self._files)
        self._budget: int | None = None
        self._check_budget(ram_budget)

    # -- what the optimizer calls -----------------------------------------------------------------

    @property
    def persistent(self) -> bool:
        """Whether commits are written."""
        return self._files is not None and self._files.persistent

    def extend(self, sizes: Sequence[int]) -> None:
        """Add buckets of zeros.

        Raises:
            PagingError: the disk has no room for them.
        """
        self._check()
        self.version += 1
        self._buckets.extend(_Bucket(size) for size in sizes)
        if self._files is not None or self._capacity() < len(self._buckets) - self._first:
            self._reserve()

    def leave_out(self, count: int) -> None:
        """Count on the first buckets being kept elsewhere; room is made for the others alone."""
        self._first = count
        if self._files is None and self._capacity() < len(self._buckets) - self._first:
            self._reserve()

    def surrender(self, index: int) -> bool:
        """Give up the bytes of a bucket that somebody else has now; not while it is in use.

        Returns:
            Whether the file still holds them.
        """
        bucket = self._buckets[index]
        for future in (bucket.reading, bucket.writing):
            if future is not None:
                self._wait(future)
        bucket.reading = None
        if bucket.writing is not None:
            self._finish_write(bucket)
        written = bucket.slot >= 0 and not bucket.dirty
        bucket.dirty = False
        self._drop(bucket)
        return written

    def recover(self) -> Record | None:
        """The last commit of the directory; None for none. Its buckets are :meth:`adopt`-ed."""
        return None if self._files is None else self._files.recover()

    def adopt(self, record: Record) -> None:
        """Take the buckets of a recovered commit."""
        for bucket, slot, checksum in zip(
            self._buckets, record.slots, record.checksums, strict=True
        ):
            bucket.slot = bucket.committed = slot
            bucket.checksum = checksum

    def begin(self, order: Sequence[int], *, commit: bool = False) -> None:
        """Announce the buckets that will be acquired, in their order.

        Args:
            order: their numbers.
            commit: whether :meth:`end` will commit: then every changed bucket is written as soon
                as it is released, while the others are still being updated.

        Raises:
            PagingError: writing behind an earlier step failed. Its state is whole in RAM, the
                last commit is whole on disk, and the call can be repeated.
        """
        self._check()
        self._began = time.perf_counter()
        self._before = {**self._counts, "stall_seconds": self._stall}
        # The commit itself may go on: later writes queue behind it.
        self._settle_writes()
        self._collect_commits(wait=self._failure is not None)
        self._raise_failure()
        self._durable = commit and self.persistent
        self._order = deque(order)
        self._read_ahead()

    def acquire(self, index: int, *, overwrite: bool = False) -> Tensor:
        """The bytes of a bucket, uint8, to be read and changed until :meth:`release`.

        Args:
            index: its number.
            overwrite: all of it will be written, so what it holds need not be read.

        Raises:
            PagingError: they cannot be read back.
        """
        self._check()
        bucket = self._buckets[index]
        if self._order and self._order[0] == index:
            self._order.popleft()
        if bucket.writing is not None:
            self._wait(bucket.writing)
            self._finish_write(bucket)
        known = bucket.buffer is not None and bucket.reading is None
        if not overwrite:
            self._counts["hits" if known or bucket.slot < 0 else "misses"] += 1
        if bucket.buffer is None and overwrite:
            bucket.buffer = self._take_buffer(block=True)
        elif bucket.buffer is None:
            self._fetch(index, self._take_buffer(block=True))
        if bucket.reading is not None:
            self._wait(bucket.reading)
            try:
                bucket.reading.result()
            except OSError as error:
                self._broken = (
                    f"optimizer state cannot be read back ({error}); load a checkpoint, or resume "
                    "from the last commit"
                )
                raise PagingError(self._broken) from error
            finally:
                bucket.reading = None
        bucket.in_use = True
        self._read_ahead()
        assert bucket.buffer is not None
        return bucket.buffer[: bucket.size]

    def release(self, index: int, *, dirty: bool) -> None:
        """Hand a bucket back; ``dirty`` says that it was changed."""
        bucket = self._buckets[index]
        bucket.in_use = False
        bucket.dirty |= dirty
        if self._durable or not self.keeps(index):
            self._write_behind(index)

    def end(self, about: Record | None) -> None:
        """Close a step; once the background work is done, the file holds it.

        Args:
            about: what to commit; its slots and checksums are filled in here. None: no commit.
        """
        if about is not None and self._files is not None and self._files.persistent:
            for index in range(len(self._buckets)):
                self._write_behind(index)
            files, buckets = self._files, list(self._buckets)
            pending = [(b.writing, b.slot, b.checksum) for b in buckets]

            def write_record() -> Record:
                places = [
                    writing.result() if writing is not None else (slot, checksum)
                    for writing, slot, checksum in pending
                ]
                record = replace(
                    about, slots=[p[0] for p in places], checksums=[p[1] for p in places]
                )
                files.commit(record)
                for bucket, slot in zip(buckets, record.slots, strict=False):
                    bucket.committed = slot
                return record

            self._committing.append(self._submit("write", write_record))
        self._durable = False
        self._note_step()

    def resident(self) -> bool:
        """Whether every bucket stays in RAM."""
        return self._capacity() >= len(self._buckets)

    def pass_resident(self, count: int) -> None:
        """Book a pass over so many buckets that stay and that are known to have changed before."""
        self._check()
        self._began = time.perf_counter()
        self._before = {**self._counts, "stall_seconds": self._stall}
        self._counts["hits"] += count

    def annotate(self, facts: dict[str, Any]) -> None:
        """Add to what the report's history says of the last step."""
        self._steps[-1].update(facts)

    def stalled(self, seconds: float) -> None:
        """Book time that a step waited for a device."""
        self._stall += seconds

    def _note_step(self) -> None:
        self._step += 1
        now = {**self._counts, "stall_seconds": self._stall}
        moved = {name: value - self._before.get(name, 0) for name, value in now.items()}
        seconds = time.perf_counter() - self._began if self._before else 0.0
        self._steps.append(
            {
                "step": self._step,
                "step_seconds": seconds,
                "resident_bytes": self.resident_bytes(),
                **moved,
            }
        )

    def settle(self) -> None:
        """Wait until everything that was asked for is on disk.

        Raises:
            PagingError: something could not be written; nothing is lost, see :meth:`begin`.
        """
        self._check()
        self._settle_writes()
        self._collect_commits(wait=True)
        self._raise_failure()

    def set_budget(self, ram_budget: int | None) -> None:
        """Change the RAM budget; what no longer fits is written out at once.

        Raises:
            ValueError: the budget does not hold two buckets.
            PagingError: what has to leave cannot be written.
        """
        self.settle()
        self.version += 1
        self._check_budget(ram_budget)
        if self._capacity() < len(self._buckets) - self._first and self._files is None:
            self._reserve()
        for index, bucket in enumerate(self._buckets):
            if not self.keeps(index) and bucket.dirty:
                self._write_behind(index)
        self.settle()
        for index, bucket in enumerate(self._buckets):
            if self._allocated > self._capacity() and not self.keeps(index):
                self._drop(bucket)
        while self._free and self._allocated > self._capacity():
            self._free.pop()
            self._allocated -= 1

    def close(self) -> None:
        """Finish writing, stop the thread and close the files; a second call does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        try:
            self.settle()
        finally:
            self._closed = True
            if self._files is not None:
                _shut(self._pid, self._threads, self._files)
            self._buckets, self._free, self._allocated = [], [], 0

    def resident_bytes(self) -> int:
        """RAM that holds state or passes it on."""
        return self._allocated * self._stride

    def report(self) -> dict[str, Any]:
        """Figures so far; see ``PagedOptimizer.paging_report``."""
        seen = self._counts["hits"] + self._counts["misses"]
        return {
            "total_bytes": sum(bucket.size for bucket in self._buckets),
            "resident_bytes": self.resident_bytes(),
            "ram_budget": self._budget,
            "buckets": len(self._buckets),
            "kept_buckets": sum(self.keeps(i) for i in range(len(self._buckets))),
            **self._counts,
            "hit_rate": self._counts["hits"] / seen if seen else 1.0,
            "stall_seconds": self._stall,
            "commits": self._commits,
            "history": [dict(entry) for entry in self._steps],
        }

    def _settle_writes(self) -> None:
        for bucket in self._buckets:
            if bucket.writing is not None:
                self._wait(bucket.writing)
                self._finish_write(bucket)

    def _collect_commits(self, *, wait: bool) -> None:
        while self._committing and (wait or self._committing[0].done()):
            commit = self._committing.popleft()
            self._wait(commit)
            error = commit.exception()
            if error is None:
                self._commits += 1
            else:
                self._failure = error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise PagingError(
                f"optimizer state could not be written ({failure}). The step itself was done: its "
                "state is whole in memory, and the last commit is whole on disk. Make room and go "
                "on: the next step writes again"
            ) from failure

    # -- RAM --------------------------------------------------------------------------------------

    def _check_budget(self, ram_budget: int | None) -> None:
        if ram_budget is not None and ram_budget < 2 * self._stride:
            raise ValueError(
                f"ram_budget: got {ram_budget} bytes, expected at least {2 * self._stride} (two "
                f"buckets of {self._stride}); give a smaller bucket_bytes"
            )
        self._budget = ram_budget

    def _capacity(self) -> int:
        if self._budget is None:
            return max(len(self._buckets), 1)
        return self._budget // self._stride

    def keeps(self, index: int) -> bool:
        """Whether a bucket stays in RAM, at its place, under the present budget."""
        capacity = self._capacity()
        if index < self._first:
            return False
        if capacity >= len(self._buckets) - self._first:
            return True
        return index - self._first < capacity - self.passing_buffers()

    def passing_buffers(self) -> int:
        """Buffers that buckets which do not stay pass through."""
        return min(_STREAM, max(3, self._capacity() // 2))

    def _take_buffer(self, *, block: bool) -> Tensor | None:
        """A buffer that holds nothing of value; None (only if not ``block``) when there is none."""
        while True:
            if self._free:
                return self._free.pop()
            if self._allocated < self._capacity():
                return self._allocate()
            ahead = set(self._order)
            waiting = []
            for index, bucket in enumerate(self._buckets):
                if bucket.buffer is None:
                    continue
                if bucket.writing is not None and bucket.writing.done():
                    self._finish_write(bucket)
                if bucket.in_use or bucket.reading or self.keeps(index):
                    continue
                if bucket.writing is not None:
                    waiting.append(bucket)
                elif not bucket.dirty and index not in ahead:
                    self._drop(bucket)
                    break
            else:
                if not block:
                    return None
                if not waiting:
                    if self._evict_ahead():
                        continue
                    # Writing failed: rather exceed the budget than lose state.
                    _LOG.warning("optimizer state exceeds its RAM budget: it cannot be written")
                    return self._allocate()
                oldest = min(waiting, key=lambda bucket: bucket.ticket)
                assert oldest.writing is not None
                self._wait(oldest.writing)

    def _evict_ahead(self) -> bool:
        """Give up a clean bucket that was read ahead or comes late in this step."""
        for index in reversed(range(len(self._buckets))):
            bucket = self._buckets[index]
            clean = not (bucket.dirty or bucket.in_use or bucket.writing)
            if bucket.buffer is not None and clean and not self.keeps(index):
                if bucket.reading is not None:
                    self._wait(bucket.reading)
                    bucket.reading = None
                self._drop(bucket)
                return True
        return False

    def _allocate(self) -> Tensor:
        self._allocated += 1
        return self.make_buffer(self._stride)

    def _drop(self, bucket: _Bucket) -> None:
        if bucket.buffer is not None and not bucket.dirty:
            if self._allocated > self._capacity():
                self._allocated -= 1
            else:
                self._free.append(bucket.buffer)
            bucket.buffer = None

    # -- disk -------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        if self._files is None:
            self._files = StateFiles(None, self._stride, self._disk)
            weakref.finalize(self, _shut, self._pid, self._threads, self._files)
        try:
            self._files.reserve(len(self._buckets))
        except OSError as error:
            raise PagingError(
                f"no room for {len(self._buckets)} buckets of {self._stride} bytes: {error}"
            ) from error

    def _fetch(self, index: int, buffer: Tensor | None) -> None:
        """Start filling a buffer with a bucket."""
        bucket = self._buckets[index]
        assert buffer is not None
        bucket.buffer = buffer
        if bucket.slot < 0:
            buffer.zero_()
            return
        assert self._files is not None
        files, slot, checksum = self._files, bucket.slot, bucket.checksum
        into = _view(buffer, bucket.size)
        bucket.reading = self._submit("read", lambda: files.read_slot(index, slot, into, checksum))
        self._counts["bytes_read"] += bucket.size

    def _read_ahead(self) -> None:
        started = 0
        for index in self._order:
            bucket = self._buckets[index]
            if bucket.reading is not None:
                started += 1
            elif bucket.buffer is None and bucket.writing is None and bucket.slot >= 0:
                buffer = self._take_buffer(block=False)
                if buffer is None:
                    return
                self._fetch(index, buffer)
                started += 1
            if started >= _AHEAD:
                return

    def _write_behind(self, index: int) -> None:
        bucket = self._buckets[index]
        if self._files is None or not bucket.dirty or bucket.writing or bucket.buffer is None:
            return
        files, data = self._files, _view(bucket.buffer, bucket.size)

        def write() -> tuple[int, int]:
            # Asked here because commits run on this thread: the last one is known by now.
            slot = 1 - bucket.committed if files.persistent and bucket.committed >= 0 else 0
            return slot, files.write_slot(index, slot, data)

        bucket.dirty = False
        self._tickets += 1
        bucket.ticket = self._tickets
        bucket.writing = self._submit("write", write)
        self._counts["bytes_written"] += bucket.size

    def _finish_write(self, bucket: _Bucket) -> None:
        """Book a write that is done; after a failure the bucket is dirty again."""
        assert bucket.writing is not None
        writing, bucket.writing = bucket.writing, None
        error = writing.exception()
        if error is None:
            bucket.slot, bucket.checksum = writing.result()
        else:
            bucket.dirty = True
            self._failure = error

    def _submit(self, kind: str, work: Callable[[], Any]) -> Future[Any]:
        if kind not in self._threads:
            self._threads[kind] = ThreadPoolExecutor(1, thread_name_prefix=f"peftkern-{kind}")
        return self._threads[kind].submit(work)

    def _wait(self, future: Future[Any]) -> None:
        if not future.done():
            start = time.perf_counter()
            future.exception()
            self._stall += time.perf_counter() - start

    def _check(self) -> None:
        if self._closed:
            raise PagingError("the paged optimizer was closed")
        if os.getpid() != self._pid:
            raise PagingError(
                "a paged optimizer was carried into a forked process; build a new one there"
            )
        if self._broken is not None:
            raise PagingError(self._broken)
