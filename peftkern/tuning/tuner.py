"""Measures tiles on the GPU at hand: the work behind ``peftkern tune``. Runs only when called."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.triton_kernels.launch import reason
from peftkern.triton_kernels.matmul import fused, unfused
from peftkern.tuning.configs import LinearConfig, fits, linear_config
from peftkern.tuning.tables import LinearEntry

ROWS = (16, 64, 256, 1024, 32, 128, 512)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
FORMATS = ("nf4", "int8")
_REPEATS = 9


@dataclass(frozen=True)
class Found:
    """What was measured for one product.

    Args:
        entry: the choice.
        seconds: of the choice.
        library: of dequantizing for cuBLAS.
        tried: number of configurations that ran.
    """

    entry: LinearEntry
    seconds: float
    library: float
    tried: int


def candidates(
    m: int, rows: int, cols: int, format: str, transposed: bool
) -> Iterator[LinearConfig]:
    """The heuristic's tiles, then their neighbours, each once; only such as the shape can take."""
    first = linear_config(m, rows, cols, format, 64 if "4" in format else 0, transposed)
    if first is None:
        return
    seen: set[LinearConfig] = set()
    changed = [
        first,
        replace(first, split=2 * first.split),
        replace(first, split=max(1, first.split // 2)),
        replace(first, block_o=first.block_o // 2, num_warps=4),
        replace(first, num_stages=4),
        replace(first, block_m=2 * first.block_m, num_warps=8),
        replace(first, num_stages=2),
        replace(first, num_warps=12 - first.num_warps),
    ]
    for config in changed:
        tile = config.block_m * config.block_o
        if config in seen or config.block_o < 32 or tile > 128 * 128:
            continue
        if fits(config, rows, cols, format, transposed):
            seen.add(config)
            yield config


def _base(format: str, rows: int, cols: int, device: torch.device) -> Base:
    from peftkern.ops.quant4.triton import quantize_4bit
    from peftkern.ops.quant8.triton import quantize_8bit

    w = torch.randn(rows, cols, device=device, dtype=torch.float32).to(torch.bfloat16)
    if format == "int8":
        codes, scb = quantize_8bit(w, False)
        return Base(codes, scb, None, None, "int8", 0, rows, cols)
    packed, absmax = quantize_4bit(w, format, 64, False)
    return Base(packed, absmax, None, None, format, 64, rows, cols)


def gpu_clock(device: torch.device) -> Callable[[Callable[[], Tensor]], float]:
    """Times a call on ``device``: the median of some runs, each with a cold L2 cache."""
    spoiler = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def clock(call: Callable[[], Tensor]) -> float:
        call()
        taken = []
        for _ in range(_REPEATS):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            spoiler.zero_()
            before.record()
            call()
            after.record()
            after.synchronize()
            taken.append(before.elapsed_time(after) * 1e-3)
        return statistics.median(taken)

    return clock


def tune(
    device: torch.device,
    *,
    formats: Sequence[str] = FORMATS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    seconds: float = 600.0,
    clock: Callable[[Callable[[], Tensor]], float] | None = None,
) -> Iterator[Found]:
    """Measure the fused kernels' tiles against dequantizing for cuBLAS, product by product.

    Args:
        device: the GPU.
        formats: of the bases.
        shapes: (out_features, in_features) of the bases.
        rows: row counts of the activations.
        seconds: after this time no further product is begun.
        clock: times a call; by default with events on ``device``.

    Yields:
        one :class:`Found` a product, as soon as it is known.

    Raises:
        RuntimeError: Triton cannot be used here; the message says why.
    """
    if clock is None:
        why = reason()
        if why is not None:
            raise RuntimeError(f"tuning needs the Triton kernels, but {why}")
        clock = gpu_clock(device)
    end = time.monotonic() + seconds
    for out_features, in_features in shapes:
        for format in formats:
            base = _base(format, out_features, in_features, device)
            for m in rows:
                for transposed in (False, True):
                    if time.monotonic() > end:
                        return
                    yield _product(base, m, transposed, clock)


def _product(
    base: Base, m: int, transposed: bool, clock: Callable[[Callable[[], Tensor]], float]
) -> Found:
    width = base.rows if transposed else base.cols
    x = torch.randn(m, width, device=base.weight.device).to(torch.bfloat16)
    library = clock(lambda: unfused(x, base, transposed, None, None))
    best, chosen, tried = library, None, 0
    for config in candidates(m, base.rows, base.cols, base.format, transposed):
        try:
            taken = clock(lambda config=config: fused(x, base, transposed, None, None, config))  # type: ignore[misc]
        except Exception as error:
            # Too much shared memory or too many registers on this GPU: not a choice here.
            if "out of resource" not in str(error).lower():
                raise
            continue
        tried += 1
        if taken < best:
            best, chosen = taken, config
    entry = LinearEntry(base.format, transposed, m, base.rows, base.cols, chosen)
    return Found(entry, best, library, tried)
