"""The compiled module ``peftkern._C``: whether it is there, why not, and what it was built with.

Only ``peftkern/ops/*/cpu.py`` and, for pages on disk, ``peftkern/optim/files.py`` call into it.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from peftkern import env
from peftkern._version import __version__
from peftkern.registry import register_backend

_LOG = logging.getLogger("peftkern")
_FAILURE_FILE = Path(__file__).with_name("_native_build_failure.txt")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = {*DTYPES, torch.uint8, torch.int8, torch.int64}
QUANT_TYPES = {"nf4": 0, "fp4": 1}
_DENSE, _INT8, _FOUR_BIT = 0, 1, 2

# Weight as _C takes it: see make_base() in csrc/bind.cpp.
NativeWeight = tuple[int, int, int, int, int, int, bool, int, int, int, int, int, int]
NativeDropout = tuple[int, int, float, int]


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    # torch is imported above, so its OpenMP runtime is in the process: the module binds to that.
    try:
        from peftkern import _C
    except ImportError as error:
        if _FAILURE_FILE.exists():
            return None, _FAILURE_FILE.read_text().strip()
        return None, f"the native module is not built ({error}); run `pip install .`"
    built = _C.build_info()["version"]
    if built != __version__:
        return None, (
            f"the native module was built for peftkern {built}, this is {__version__}; "
            "run `pip install .` again"
        )
    openmp = _C.openmp_info()
    if not openmp["bound"]:
        _LOG.warning("kernels run on one thread: %s", openmp["reason"])
    elif len(openmp["loaded"]) > 1:
        _LOG.warning(
            "two OpenMP runtimes are loaded (%s); kernels use %s",
            ", ".join(openmp["loaded"]),
            openmp["library"],
        )
    return _C, None


def available() -> bool:
    """Whether the native kernels can be used."""
    return _load()[0] is not None


def reason() -> str | None:
    """Why the native kernels cannot be used; ``None`` when they can."""
    return _load()[1]


register_backend("native", reason)


@cache
def kernels() -> Any:
    """The native module, with the instruction set of ``PEFTKERN_CPU_ISA`` chosen.

    Raises:
        RuntimeError: there is no native module.
        ValueError: ``PEFTKERN_CPU_ISA`` names an instruction set that this build or CPU lacks.
    """
    module, why = _load()
    if module is None:
        raise RuntimeError(f"native kernels cannot be used: {why}")
    wish = env.cpu_isa()
    if wish:
        try:
            module.set_isa(wish)
        except ValueError as error:
            raise ValueError(f"PEFTKERN_CPU_ISA={wish!r}: {error}") from error
    return module


def set_isa(name: str) -> None:
    """Use one of :func:`info`'s ``isas`` from now on.

    Raises:
        ValueError: this build or CPU does not have it; the message lists what there is.
    """
    kernels().set_isa(name)


def info() -> dict[str, Any]:
    """Version, build facts, instruction sets and OpenMP runtime, for ``peftkern info``.

    Returns:
        ``available`` and ``reason`` always; with a native module also ``version``, ``compiler``,
        ``flags``, ``cuda``, ``isas_built``, ``isas`` (those this CPU runs), ``isa`` (in use),
        ``openmp`` (the runtime's file, or None), ``openmp_reason``, ``openmp_loaded`` (all OpenMP
        runtimes in the process), ``threads``.
    """
    module, why = _load()
    if module is None:
        return {"available": False, "reason": why}
    module = kernels()
    build, openmp = module.build_info(), module.openmp_info()
    return {
        "available": True,
        "reason": None,
        "version": build["version"],
        "compiler": build["compiler"],
        "flags": build["flags"],
        "cuda": build["cuda"],
        "isas_built": build["isas"],
        "isas": module.isas(),
        "isa": module.isa(),
        "openmp": openmp["library"] or None,
        "openmp_reason": openmp["reason"] or None,
        "openmp_loaded": openmp["loaded"],
        "threads": torch.get_num_threads(),
    }


def refusal(*values: Any) -> str | None:
    """Why native kernels cannot take these tensors; floating ones must be fp32, bf16 or fp16.

    Lists stand for what is in them; arguments that are no tensors are passed over.
    """
    why = _load()[1]
    if why is not None:
        return why
    for value in values:
        if isinstance(value, torch.Tensor):
            # Eight bytes are enough for every dtype; most tensors need no closer look.
            if value.dtype in _PLAIN and value.is_cpu and not value.data_ptr() & 7:
                continue
            why = _tensor_refusal(value)
        elif isinstance(value, list):
            why = refusal(*value)
        if why is not None:
            return why
    return None


def _tensor_refusal(value: torch.Tensor) -> str | None:
    if value.device.type != "cpu":
        return f"a tensor is on {value.device}"
    if value.dtype.is_floating_point and value.dtype not in DTYPES:
        return f"native kernels have no {value.dtype}"
    if value.data_ptr() % value.element_size():
        return f"a {value.dtype} tensor starts at an address that is not a multiple of its size"
    return None


def weight_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> NativeWeight:
    """A 4-bit weight [N, K] that decodes to ``dtype``."""
    nested = nested_absmax is not None and nested_offset is not None
    return (
        _FOUR_BIT,
        DTYPES[dtype],
        packed.data_ptr(),
        *shape,
        shape[1],
        False,
        0 if nested else absmax.data_ptr(),
        absmax.data_ptr() if nested else 0,
        nested_absmax.data_ptr() if nested_absmax is not None else 0,
        nested_offset.data_ptr() if nested_offset is not None else 0,
        QUANT_TYPES[quant_type],
        blocksize.bit_length() - 1,
    )


def weight_8bit(codes: torch.Tensor, scb: torch.Tensor, dtype: torch.dtype) -> NativeWeight:
    """A row-wise INT8 weight [N, K] that decodes to ``dtype``."""
    n, k = codes.shape
    address, scale = codes.data_ptr(), scb.data_ptr()
    return (_INT8, DTYPES[dtype], address, n, k, k, False, scale, 0, 0, 0, 0, 0)


def weight_dense(weight: torch.Tensor) -> NativeWeight:
    """A dense weight [N, K], row-major or the transposed view of a row-major [K, N]."""
    swapped = not weight.is_contiguous()
    stored = weight.t() if swapped else weight
    rows, cols = stored.shape
    address = stored.data_ptr()
    return (_DENSE, DTYPES[weight.dtype], address, rows, cols, cols, swapped, 0, 0, 0, 0, 0, 0)


def dropout_parameters(p: float, seed: torch.Tensor | None, cols: int) -> NativeDropout | None:
    """What the kernels need to regenerate a mask over a matrix with ``cols`` columns."""
    if seed is None or p == 0.0:
        return None
    return (int(seed.item()), int(p * 2**32), 1.0 / (1.0 - p), cols)
