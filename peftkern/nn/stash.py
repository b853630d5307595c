"""Tensors set aside in an unlinked temporary file, so that they cost no memory."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK = 64 << 20  # bytes a write call; keeps the copy of a GPU tensor on the host small


class DiskStore:
    """An append-only temporary file without a name: it goes when the last reference goes.

    Reads and writes go through the file descriptor, not through a memory map: mapped pages would
    count as this process's memory, and a full disk would kill it with SIGBUS instead of raising.

    Raises:
        OSError: no space left in the temporary directory; the message says how much was needed.
    """

    def __init__(self) -> None:
        fd, path = tempfile.mkstemp(prefix="peftkern-", suffix=".originals")
        os.unlink(path)
        self._fd = fd
        self._end = 0

    def put(self, tensor: Tensor) -> Stashed:
        """Write a tensor and return the slip with which to fetch it."""
        data = tensor.detach().contiguous()
        nbytes = data.numel() * data.element_size()
        offset, self._end = self._end, self._end + nbytes
        flat = data.reshape(-1).view(torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)
        done = 0
        try:
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, offset, nbytes)
            while done < nbytes:
                chunk = flat[done : done + _CHUNK].cpu().numpy().data
                done += os.pwrite(self._fd, chunk, offset + done)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {nbytes / 2**20:.0f} MiB of original weights in "
                f"{tempfile.gettempdir()!r} ({error.strerror}); set TMPDIR to a larger disk, or "
                "patch with keep_original='ram' or keep_original=False",
            ) from error
        return Stashed(tensor.shape, tensor.dtype, tensor.device, self, offset, None)

    def read(self, offset: int, nbytes: int) -> Tensor:
        """The bytes at ``offset`` as a uint8 tensor of its own."""
        out = torch.empty(nbytes, dtype=torch.uint8)
        view = out.numpy().data
        done = 0
        while done < nbytes:
            got = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if got == 0:
                raise OSError("the temporary file of original weights ended too early")
            done += got
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskStore:
        return self  # what is in the file never changes

    def __reduce__(self) -> Any:
        raise TypeError("a DiskStore is pickled through its Stashed slips")

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)
            self._fd = None  # type: ignore[assignment]


@dataclass
class Stashed:
    """A tensor set aside; :meth:`fetch` brings it back with the same bytes, dtype and device."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    store: DiskStore | None
    offset: int
    tensor: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def fetch(self) -> Tensor:
        """The tensor, on the device it came from."""
        if self.store is None:
            assert self.tensor is not None
            return self.tensor.clone()  # slips are shared by copies of a model
        flat = self.store.read(self.offset, self.nbytes)
        typed = flat.view(self.dtype) if self.nbytes else torch.empty(0, dtype=self.dtype)
        return typed.reshape(self.shape).to(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stashed:
        return self  # immutable: copies of a model share what was set aside

    def __reduce__(self) -> Any:
        fields = (self.shape, self.dtype, self.device, None, 0, self.fetch())
        return Stashed, fields
