"""Whether Triton can be used, and how a kernel is launched. Does not import triton by itself."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern import codebooks
from peftkern.registry import register_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what :func:`launch` was asked to run."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    options: dict[str, Any]


_RECORDERS: list[list[Launch]] = []


@functools.cache
def reason() -> str | None:
    """Why Triton kernels cannot run on this machine; ``None`` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'peftkern[triton]')"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return None


register_backend("triton", reason)


@functools.cache
def _capability_refusal(index: int | None) -> str | None:
    have = torch.cuda.get_device_capability(index)
    if have < _LEAST_CAPABILITY:
        return f"Triton kernels need compute capability 8.0, this GPU has {have[0]}.{have[1]}"
    return None


def refusal(first: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why Triton kernels cannot serve this call; ``None`` if they can.

    Args:
        first: a tensor of the call; its device is the one that counts.
        dtypes: floating dtypes that the kernels must handle.
    """
    if (why := reason()) is not None:
        return why
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"Triton kernels have no {dtype}"
    return _capability_refusal(first.device.index)


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, statement by statement (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret) and not _RECORDERS


def launch(kernel: Any, grid: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on the device and current stream of ``like``; a grid of 0 runs nothing.

    Args:
        kernel: a ``triton.jit`` function.
        grid: number of programs.
        like: tensor whose device counts.
        args: the kernel's arguments, in order.
        options: its constexprs, ``num_warps`` and the like.
    """
    if grid == 0:
        return
    if _RECORDERS:
        _RECORDERS[-1].append(Launch(kernel, grid, args, options))
        return
    with torch.cuda.device_of(like):
        kernel[(grid,)](*args, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of running them: what the ahead-of-time report compiles.

    Example:
        >>> with recording() as launches:
        ...     pass  # call implementations on tensors of the device "meta"
    """
    launches: list[Launch] = []
    _RECORDERS.append(launches)
    try:
        yield launches
    finally:
        _RECORDERS.pop()


_CONSTANTS: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}
_MOST_CONSTANTS = 512


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of these values on ``device``, copied there once; see :func:`table`."""
    key = (tuple(values), dtype, device)
    if key in _CONSTANTS:
        return _CONSTANTS[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.cat([torch.full((1,), v, dtype=dtype, device=device) for v in values])
    while len(_CONSTANTS) >= _MOST_CONSTANTS:  # values that change with each step, say
        _CONSTANTS.pop(next(iter(_CONSTANTS)))
    _CONSTANTS[key] = torch.tensor(values, dtype=dtype).to(device)
    return _CONSTANTS[key]


_TABLES: dict[tuple[str, torch.device], Tensor] = {}
_SOURCES: dict[str, Callable[[], Tensor]] = {
    "dynamic_map": codebooks.dynamic_map,
    "dynamic_thresholds": codebooks.dynamic_thresholds,
}


def table(name: str, device: torch.device) -> Tensor:
    """A code table on ``device``, copied there once.

    While a CUDA graph is captured nothing may be copied from the host, and what a capture
    allocates belongs to its graph: there the table is built from fill kernels and not kept.
    """
    if (name, device) in _TABLES:
        return _TABLES[name, device]
    source = _SOURCES[name]()
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.cat([torch.full((1,), v, device=device) for v in source.tolist()])
    _TABLES[name, device] = source.to(device)
    return _TABLES[name, device]
