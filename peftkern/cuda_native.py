"""The CUDA kernels ``peftkern/_cuda.so``: whether they are there, why not, and how they are called.

A plain shared library without libtorch and without Python: ``extern "C"`` launchers that take
addresses, sizes and a stream. Only ``peftkern/ops/*/cuda.py`` calls into it. The tests put the SIMT
executor's build of the same sources in its place (:func:`use_library`).
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from peftkern import native
from peftkern.cuda_kernels.choices import Device
from peftkern.registry import register_backend

_FILE = Path(__file__).with_name("_cuda.so")
# Each argument of a launcher has a slot of 8 bytes: csrc/cuda/launcher.cuh.
_SLOTS = {"p": "Q", "i": "q", "n": "q", "u": "Q", "f": "f4x"}
_INSUFFICIENT_DRIVER = 1035

# Arguments of each launcher: p pointer, i int, n int64, u uint32, f float; the last is the stream.
SIGNATURES = {
    "dequantize_4bit": "ppppiinipp",
    "quantize_4bit": "piniipppp",
    "quantize_absmax": "pnpppp",
    "dequantize_absmax": "pnpppp",
    "quantize_8bit": "pinnpppp",
    "dequantize_8bit": "ppnnipp",
    "philox_dropout": "pinpufpp",
    "low_rank": "pinnpiipufpp",
    "linear_rows_4bit": "pinnnppppiipppiifpp",
    "linear_rows_8bit": "pinnnpppppiifpp",
    "linear_4bit_mma": "pinnnppppiipppiifppp",
    "linear_4bit_few": "pinnnppppiipppiifpp",
    "shrink": "pinnpiiifpufpnpppiinifipp",
    "outer": "pinnpnifpufpiiipp",
    "linear_wgmma": "pinnniippppiipppiiipipp",
    "scatter_add": "pinnnnppinp",
    "transpose": "pinnnpp",
    "sparse_term": "ppinnnppinp",
    "sampled_rows": "ppinnnpnpp",
    "prompt_embedding": "ppipinnnnnnpp",
    "prompt_gradient": "pinnnpp",
    "optimizer_step": "pp",
    "optimizer_norm": "pp",
    "optimizer_run": "pp",
    "optimizer_upload": "pp",
    "optimizer_prepare": "pp",
    "optimizer_finish": "pp",
}


class Library(Protocol):
    """What an implementation calls: the CUDA library, or the executor's build of it."""

    def launch(
        self,
        name: str,
        device: torch.device,
        args: tuple[Any, ...],
        reaches: Iterable[Tensor] = (),
    ) -> None:
        """Run ``pk_cuda_<name>`` on the current stream of ``device``; raises if it fails.

        ``reaches``: tensors whose addresses the kernel finds in memory instead of in ``args``.
        """

    def ask(self, name: str, *args: int) -> int:
        """An ``int64`` that the library computes, such as the size of a workspace."""

    def facts(self, device: torch.device) -> Device:
        """What the choice of a kernel needs to know of ``device``."""


class Slots:
    """Packs the arguments of a launcher, tensors as addresses and None as 0, one slot each.

    Args:
        letters: the kinds of all arguments, the stream last.
    """

    def __init__(self, letters: str) -> None:
        self._pack = struct.Struct("<" + "".join(_SLOTS[letter] for letter in letters)).pack
        self._pointers = [i for i, letter in enumerate(letters[:-1]) if letter == "p"]

    def __call__(self, args: tuple[Any, ...], stream: int) -> bytes:
        values = [*args, stream]
        for i in self._pointers:
            value = values[i]
            if value is None:
                values[i] = 0
            elif type(value) is not int:
                values[i] = value.data_ptr()
        return self._pack(*values)


def launchers(library: ctypes.CDLL) -> dict[str, tuple[Callable[[bytes], int], Slots]]:
    """For each name the function of a loaded library, and what packs its arguments."""
    found = {}
    for name, letters in SIGNATURES.items():
        function = getattr(library, f"pk_cuda_{name}_slots")
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int
        found[name] = function, Slots(letters)
    return found


class _CudaLibrary:
    """``_cuda.so``, loaded. Loading needs no driver; launching does."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(_FILE))
        self._launchers = launchers(self._library)
        self._library.pk_cuda_status_text.restype = ctypes.c_char_p
        self._library.pk_cuda_architectures.restype = ctypes.c_char_p
        self._facts: dict[int, Device] = {}

    def architectures(self) -> str:
        """What the kernels were compiled for."""
        return str(self._library.pk_cuda_architectures().decode())

    def problem(self) -> str | None:
        """Why no kernel can run here; None if one can."""
        status = self._library.pk_cuda_probe()
        if status == _INSUFFICIENT_DRIVER:
            return "no NVIDIA driver, or one older than the CUDA toolkit that compiled them"
        return self._text(status) if status else None

    def _text(self, status: int) -> str:
        return f"status {status}: {self._library.pk_cuda_status_text(status).decode()}"

    def launch(
        self,
        name: str,
        device: torch.device,
        args: tuple[Any, ...],
        reaches: Iterable[Tensor] = (),
    ) -> None:
        function, pack = self._launchers[name]
        current = torch._C._cuda_getDevice()
        index = current if device.index is None else device.index
        slots = pack(args, torch._C._cuda_getCurrentRawStream(index))
        if index == current:
            status = function(slots)
        else:
            self._library.pk_cuda_set_device(index)
            try:
                status = function(slots)
            finally:
                self._library.pk_cuda_set_device(current)
        if status:
            raise RuntimeError(f"peftkern::{name}: the CUDA launch failed, {self._text(status)}")

    def facts(self, device: torch.device) -> Device:
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._facts:
            hopper = torch.cuda.get_device_capability(index) == (9, 0)
            self._facts[index] = Device(hopper, self.ask("shared_limit", index))
        return self._facts[index]

    def ask(self, name: str, *args: int) -> int:
        function = getattr(self._library, f"pk_cuda_{name}")
        function.restype = ctypes.c_int64
        return int(function(*map(ctypes.c_int64, args)))


_replacement: Library | None = None


@cache
def _load() -> tuple[_CudaLibrary | None, str | None]:
    if not _FILE.exists():
        module = native.info()
        fact = module.get("cuda") or "no native module"
        return None, f"the CUDA kernels are not built ({fact}); build with PEFTKERN_CUDA=1"
    try:
        library = _CudaLibrary()
    except (OSError, AttributeError) as error:
        return None, f"{_FILE.name} cannot be used ({error}); build again with PEFTKERN_CUDA=1"
    problem = library.problem()
    if problem is not None:
        return None, f"compiled for {library.architectures()}, not usable here: {problem}"
    return library, None


def reason() -> str | None:
    """Why the CUDA kernels cannot be used; None when they can."""
    return None if _replacement is not None else _load()[1]


def library() -> Library:
    """The library that serves launches.

    Raises:
        RuntimeError: there is none, or it cannot run here; the message says why.
    """
    if _replacement is not None:
        return _replacement
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(f"the CUDA kernels cannot be used: {why}")
    return loaded


@contextlib.contextmanager
def use_library(replacement: Library) -> Iterator[None]:
    """Serve all launches from another build of the kernels, such as the SIMT executor's."""
    global _replacement
    before, _replacement = _replacement, replacement
    try:
        yield
    finally:
        _replacement = before


def launch(name: str, device: torch.device, *args: Any, reaches: Iterable[Tensor] = ()) -> None:
    """Launch ``pk_cuda_<name>``; tensors are passed as addresses, the stream is added.

    ``reaches``: tensors whose addresses the kernel finds in memory instead of in ``args``.
    """
    library().launch(name, device, args, reaches)


def device_facts(device: torch.device) -> Device:
    """What the choice of a kernel needs to know of ``device``."""
    return library().facts(device)


def refusal(*values: Tensor | torch.dtype | None) -> str | None:
    """Why the kernels cannot take these tensors; floating ones must be fp32, bf16 or fp16."""
    why = reason()
    if why is not None:
        return why
    for value in values:
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype is not None and dtype.is_floating_point and dtype not in native.DTYPES:
            return f"the CUDA kernels have no {dtype}"
    return None


register_backend("cuda", reason)
