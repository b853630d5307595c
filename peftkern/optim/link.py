"""What the device tier of the pager asks of a device: buffers, copies behind its back, marks.

:class:`CudaLink` is the real one: copies to the device on one stream, from it on another, so that
both directions of the bus are busy while the current stream updates. Tests put a link in its place
that delays every copy for as long as the marks allow.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from peftkern.optim.pager import pages

Mark = Any  # a point in a stream's work; None is one that has passed


class Link(Protocol):
    """Buffers of a device and of the host, and copies between them."""

    device: torch.device

    def device_buffer(self, size: int) -> Tensor:
        """uint8 [size] on the device."""

    def host_buffer(self, size: int) -> Tensor:
        """uint8 [size] in memory that the device copies from and to by itself."""

    def fetch(self, to: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """Copy host to device, once the marks have passed; returns the mark of its end."""

    def store(self, to: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """Copy device to host, once the marks have passed; returns the mark of its end."""

    def mark(self) -> Mark:
        """What the current stream has been given so far."""

    def wait(self, mark: Mark) -> None:
        """Let the current stream go on only behind the mark; the host does not wait."""

    def passed(self, mark: Mark) -> bool:
        """Whether it has, as far as the host knows."""

    def join(self, mark: Mark) -> None:
        """Let the host wait for the mark."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured, not run."""


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class CudaLink:
    """Two copy streams of one CUDA device.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._to = torch.cuda.Stream(device)
        self._from = torch.cuda.Stream(device)

    def device_buffer(self, size: int) -> Tensor:
        """As in :class:`Link`."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def host_buffer(self, size: int) -> Tensor:
        """As in :class:`Link`; pages of its own, pinned where they lie.

        torch's allocator of pinned memory would round sizes up to powers of two.
        """
        memory = pages(size)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        address = buffer.data_ptr()
        with torch.cuda.device(self.device):
            status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if status:
            raise RuntimeError(
                f"{size} bytes of host memory could not be pinned (CUDA status {status}); give a "
                "smaller ram_budget, or a larger device_budget"
            )
        # The mapping goes with the last tensor on it: unpinned first, by this finalizer.
        weakref.finalize(memory, _unpin, address)
        return buffer

    def _copy(
        self, stream: torch.cuda.Stream, to: Tensor, source: Tensor, after: Iterable[Mark]
    ) -> Mark:
        for mark in after:
            if mark is not None:
                stream.wait_event(mark)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def fetch(self, to: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """As in :class:`Link`."""
        return self._copy(self._to, to, source, after)

    def store(self, to: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """As in :class:`Link`."""
        return self._copy(self._from, to, source, after)

    def mark(self) -> Mark:
        """As in :class:`Link`."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return done

    def wait(self, mark: Mark) -> None:
        """As in :class:`Link`."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def passed(self, mark: Mark) -> bool:
        """As in :class:`Link`."""
        return mark is None or bool(mark.query())

    def join(self, mark: Mark) -> None:
        """As in :class:`Link`."""
        if mark is not None:
            mark.synchronize()

    def capturing(self) -> bool:
        """As in :class:`Link`."""
        return torch.cuda.is_current_stream_capturing()
