"""The device tier of the pager: buckets on a GPU up to a budget, the rest in pinned RAM or on disk.

As in the pager below it, a fixed part of the budget keeps the first buckets for good, and a few
buffers pass the others through. A bucket that passes is fetched on one stream while an earlier one
is being updated on the current stream and the one before that is stored on a third. The host waits
only where RAM has no room for what is on its way: to pass on bytes, streams wait for marks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftkern.optim.files import PAGE, Record
from peftkern.optim.link import Link, Mark
from peftkern.optim.pager import Pager

_STREAM = 4  # buffers that buckets pass through
_AHEAD = 2  # buckets that are fetched ahead


@dataclass
class _Place:
    size: int
    fresh: bool = True  # all zeros, wherever one looks for it
    buffer: Tensor | None = None
    in_use: bool = False
    dirty: bool = False  # the device is newer than the host
    host: Tensor | None = None  # the pager's bytes, held while copies go to and fro
    fetched: Mark = None
    used: Mark = None
    stored: Mark = None


class DeviceTier:
    """Hands out buckets on a device and keeps within a budget of its memory.

    What is done with a bucket goes to the current stream, between :meth:`acquire` and
    :meth:`release`. Has the methods of :class:`~peftkern.optim.pager.Pager` that an optimizer uses.

    Args:
        pager: holds what the device does not.
        link: copies.
        stride: largest bucket, in bytes.
        budget: bytes of the device's memory; None for no limit.

    Raises:
        ValueError: the budget does not hold two buckets.
    """

    def __init__(self, pager: Pager, link: Link, stride: int, budget: int | None) -> None:
        self.pager, self.link = pager, link
        pager.make_buffer = link.host_buffer
        self._stride = -(-stride // PAGE) * PAGE
        self._places: list[_Place] = []
        self._free: list[tuple[Tensor, list[Mark]]] = []
        self._allocated = 0
        self._order: deque[int] = deque()
        self._pending: deque[int] = deque()  # being stored
        self._loading: list[int] = []  # kept buckets whose host bytes are still being fetched
        self._counts = dict.fromkeys(("fetches", "bytes_fetched", "bytes_stored"), 0)
        self._before = dict(self._counts)
        #: Changes whenever a bucket that stays may have come to lie elsewhere.
        self.version = 0
        self._check_budget(budget)

    # -- what the optimizer calls -----------------------------------------------------------------

    @property
    def persistent(self) -> bool:
        """Whether commits are written."""
        return self.pager.persistent

    def extend(self, sizes: Sequence[int]) -> None:
        """Add buckets of zeros; see :meth:`Pager.extend`."""
        self._places.extend(_Place(size) for size in sizes)
        self.version += 1
        self.pager.leave_out(min(self._kept(), len(self._places) - len(sizes)))
        self.pager.extend(sizes)
        self.pager.leave_out(self._kept())

    def recover(self) -> Record | None:
        """See :meth:`Pager.recover`."""
        return self.pager.recover()

    def adopt(self, record: Record) -> None:
        """See :meth:`Pager.adopt`."""
        self.pager.adopt(record)
        for place, slot in zip(self._places, record.slots, strict=True):
            place.fresh = slot < 0

    def begin(self, order: Sequence[int], *, commit: bool = False) -> None:
        """See :meth:`Pager.begin`."""
        self._collect()
        self._before = dict(self._counts)
        wanted = [i for i in order if self._places[i].buffer is None and not self._places[i].fresh]
        self.pager.begin(wanted, commit=commit)
        self._order = deque(order)
        self._read_ahead()

    def acquire(self, index: int) -> Tensor:
        """The bytes of a bucket on the device, uint8, for work on the current stream.

        Raises:
            PagingError: they cannot be read back.
        """
        if self._order and self._order[0] == index:
            self._order.popleft()
        place = self._places[index]
        if place.buffer is None:
            self._fetch(index)
        assert place.buffer is not None
        self.link.wait(place.fetched)
        place.in_use = True
        return place.buffer[: place.size]

    def release(self, index: int, *, dirty: bool) -> None:
        """Hand a bucket back; ``dirty`` says that it was changed by work on the current stream."""
        place = self._places[index]
        place.in_use = False
        if not self.keeps(index):  # the others' updates are found in the current stream later
            place.used = self.link.mark()
        if dirty:
            place.fresh, place.dirty = False, True
        if place.dirty and not self.keeps(index):
            self._store(index)
        self._collect()
        self._read_ahead()

    def end(self, about: Record | None) -> None:
        """See :meth:`Pager.end`; a commit waits until the host has every changed bucket."""
        if about is not None and self.persistent:
            for index, place in enumerate(self._places):
                if place.dirty:
                    self._store(index)
            self._join_all()
        self.pager.end(about)
        moved = {name: value - self._before[name] for name, value in self._counts.items()}
        self.pager.annotate({**moved, "device_bytes": self.device_bytes()})

    def settle(self) -> None:
        """See :meth:`Pager.settle`."""
        self._join_all()
        self.pager.settle()

    def keeps(self, index: int) -> bool:
        """Whether a bucket stays on the device, at its place, under the present budget."""
        return index < self._kept()

    def set_ram_budget(self, budget: int | None) -> None:
        """See :meth:`Pager.set_budget`."""
        self.settle()
        self._let_go()
        self.version += 1
        self.pager.set_budget(budget)

    def set_device_budget(self, budget: int | None) -> None:
        """Change the budget; what no longer fits is stored at once, what now fits is fetched.

        Raises:
            ValueError: the budget does not hold two buckets.
            PagingError: what has to leave the device finds no room.
        """
        self.settle()
        self._let_go()
        before = self._kept()
        self._check_budget(budget)
        self.version += 1
        if self._kept() < before:
            self.pager.leave_out(self._kept())
        for index, place in enumerate(self._places):
            if place.buffer is not None and not self.keeps(index):
                if place.dirty:
                    self._store(index)
                    self._join_all()
                self._free.append((place.buffer, [self.link.mark()]))
                place.buffer = None
        while self._free and self._allocated > self._capacity():
            self._free.pop()
            self._allocated -= 1
        for index in range(before, self._kept()):
            place = self._places[index]
            if place.buffer is not None:  # on its way through: it stays
                place.dirty |= not self.pager.surrender(index)
            elif not place.fresh:
                self._fetch(index)
                self.link.join(place.fetched)
                self._loaded(index)
        self.pager.leave_out(self._kept())

    def resident(self) -> bool:
        """Whether every bucket stays on the device."""
        return self._kept() == len(self._places)

    def pass_resident(self, count: int) -> None:
        """See :meth:`Pager.pass_resident`."""
        self._before = dict(self._counts)
        self.pager.pass_resident(0)

    def device_bytes(self) -> int:
        """Memory of the device that holds state or passes it on."""
        return self._allocated * self._stride

    def report(self) -> dict[str, Any]:
        """See ``PagedOptimizer.paging_report``."""
        return {
            **self.pager.report(),
            **self._counts,
            "device_bytes": self.device_bytes(),
            "device_budget": self._budget,
            "device_buckets": self._kept(),
        }

    def close(self) -> None:
        """See :meth:`Pager.close`."""
        try:
            self._join_all()
        finally:
            self.pager.close()
            self.link.join(self.link.mark())
            self._places, self._free, self._allocated = [], [], 0

    # -- room -------------------------------------------------------------------------------------

    def _check_budget(self, budget: int | None) -> None:
        if budget is not None and budget < 2 * self._stride:
            raise ValueError(
                f"device_budget: got {budget} bytes, expected at least {2 * self._stride} (two "
                f"buckets of {self._stride}); give a smaller bucket_bytes"
            )
        self._budget = budget

    def _capacity(self) -> int:
        if self._budget is None:
            return max(len(self._places), 1)
        return self._budget // self._stride

    def _kept(self) -> int:
        capacity, count = self._capacity(), len(self._places)
        return count if capacity >= count else capacity - min(_STREAM, max(2, capacity // 2))

    def _spare(self) -> int | None:
        """The bucket that gives up its buffer next: one that is not wanted soon, else the last."""
        last = None
        soon = {index: at for at, index in enumerate(self._order)}
        for index, place in enumerate(self._places):
            if place.buffer is None or place.in_use or self.keeps(index):
                continue
            if index not in soon:
                return index
            if last is None or soon[index] > soon[last]:
                last = index
        return last

    def _has_room(self) -> bool:
        """Whether a bucket can be fetched ahead without giving up one that is wanted."""
        if self._free or self._allocated < self._capacity():
            return True
        spare = self._spare()
        return spare is not None and spare not in self._order

    def _take_buffer(self) -> tuple[Tensor, list[Mark]]:
        """A buffer, and what has to pass before it is written to."""
        if self._free:
            return self._free.pop()
        if self._allocated < self._capacity():
            self._allocated += 1
            # The memory may have been somebody's whose work the current stream has yet to do.
            return self.link.device_buffer(self._stride), [self.link.mark()]
        index = self._spare()
        if index is None:
            raise RuntimeError("every bucket on the device is in use")
        place = self._places[index]
        if place.dirty:
            self._store(index)
        buffer, place.buffer = place.buffer, None
        assert buffer is not None
        marks = [place.fetched, place.used, place.stored]
        if place.host is not None and index not in self._pending:
            self._give_back(index, dirty=False)
        return buffer, marks

    # -- copies -----------------------------------------------------------------------------------

    def _fetch(self, index: int) -> None:
        place = self._places[index]
        buffer, marks = self._take_buffer()
        place.buffer = buffer
        if place.fresh:
            for mark in marks:
                self.link.wait(mark)
            buffer.zero_()
            return
        host = place.host if place.host is not None else self._hold(index, overwrite=False)
        place.fetched = self.link.fetch(buffer[: place.size], host, [*marks, place.stored])
        self._counts["fetches"] += 1
        self._counts["bytes_fetched"] += place.size
        if self.keeps(index):
            self._loading.append(index)

    def _store(self, index: int) -> None:
        place = self._places[index]
        assert place.buffer is not None
        if index in self._pending:  # its bytes are still on their way from an earlier step
            self._join(index)
        host = place.host if place.host is not None else self._hold(index, overwrite=True)
        used = place.used if place.used is not None else self.link.mark()
        place.stored = self.link.store(host, place.buffer[: place.size], [used])
        place.dirty = False
        self._pending.append(index)
        self._counts["bytes_stored"] += place.size

    def _read_ahead(self) -> None:
        ahead = 0
        for index in self._order:
            place = self._places[index]
            if place.buffer is None:
                if not self._has_room() or not (place.fresh or self._may_hold(index)):
                    return
                self._fetch(index)
            if not self.keeps(index):
                ahead += 1
            if ahead >= _AHEAD:
                return

    def _held(self) -> int:
        """Buffers that this takes from those which pass the pager's buckets through."""
        return sum(p.host is not None and not self.pager.keeps(i) for i, p in self._all())

    def _all(self) -> list[tuple[int, _Place]]:
        return list(enumerate(self._places))

    def _most(self) -> int:
        return max(1, self.pager.passing_buffers() - 2)

    def _may_hold(self, index: int) -> bool:
        held = self._places[index].host is not None
        return held or self.pager.keeps(index) or self._held() < self._most()

    def _hold(self, index: int, *, overwrite: bool) -> Tensor:
        """The pager's bytes of a bucket, until :meth:`_give_back`."""
        while not self._may_hold(index):
            if self._pending:
                self._join(self._pending[0])
                continue
            clean = [i for i, p in self._all() if p.host is not None and not p.in_use]
            if not clean:
                break
            self._give_back(clean[-1], dirty=False)
        place = self._places[index]
        place.host = self.pager.acquire(index, overwrite=overwrite)
        return place.host

    def _give_back(self, index: int, *, dirty: bool) -> None:
        place = self._places[index]
        self._wait_for(place.fetched)
        place.host = None
        self.pager.release(index, dirty=dirty)

    def _let_go(self) -> None:
        """Hold no bytes of the pager's, once everything is stored."""
        for index in list(self._loading):
            self._loaded(index)
        for index, place in self._all():
            if place.host is not None:
                self._give_back(index, dirty=False)

    def _collect(self) -> None:
        """Give back the bytes of copies that have ended."""
        while self._pending and self.link.passed(self._places[self._pending[0]].stored):
            self._join(self._pending[0])
        for index in list(self._loading):
            if self.link.passed(self._places[index].fetched):
                self._loaded(index)

    def _loaded(self, index: int) -> None:
        """A bucket that stays on the device is there: the pager need not have it any longer."""
        self._loading.remove(index)
        place = self._places[index]
        if place.host is not None:
            self._give_back(index, dirty=False)
        place.dirty |= not self.pager.surrender(index)

    def _wait_for(self, mark: Mark) -> None:
        if not self.link.passed(mark):
            start = time.perf_counter()
            self.link.join(mark)
            self.pager.stalled(time.perf_counter() - start)

    def _join(self, index: int) -> None:
        """Wait for a bucket to be stored, and let the pager have it."""
        self._wait_for(self._places[index].stored)
        self._pending.remove(index)
        self._give_back(index, dirty=True)

    def _join_all(self) -> None:
        while self._pending:
            self._join(self._pending[0])
