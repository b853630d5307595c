"""What is measured: shapes, row counts and the least bytes and operations of each cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .measure import Contender

# (in_features, out_features). Square and MLP shapes of Llama-like models, one vision shape whose
# rows are no multiple of a 64-block run, and MiniLM's MLP.
SHAPES = {
    "quick": ((2048, 2048),),
    "standard": ((2048, 2048), (4096, 4096), (384, 1536)),
    "full": (
        (2048, 2048),
        (4096, 4096),
        (4096, 11008),
        (11008, 4096),
        (4096, 14336),
        (1152, 4304),
        (384, 1536),
    ),
}
ROWS = {
    "quick": (1, 32),
    "standard": (1, 8, 32, 128, 512),
    "full": (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048),
}
LORA_ROWS = {"quick": (32,), "standard": (32, 512), "full": (32, 512)}
LORA_RANKS = {"quick": (16,), "standard": (16,), "full": (8, 16, 64)}

# What an op's contract may name in OpSpec.bench; --bench-op takes an op or one of these.
FAMILIES = (
    "linear",
    "llm_int8",
    "lora",
    "qlora_layer",
    "lora_group",
    "lora_mlp",
    "multi_lora",
    "dora",
    "bottleneck",
    "prefix",
    "sparse_delta",
    "quantize",
    "dequantize",
    "optimizer",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """One thing to measure with every contender.

    Args:
        name: the group that the rows share, e.g. ``nf4_fwd-m1-4096x4096-fp32``.
        family: one of ``FAMILIES``.
        rows: rows of activations; 0 for an op that has none.
        contenders: names of the rows to print, ours first.
        traffic: bytes that the op must move at the very least.
        flops: operations that the op must do.
        build: makes the contenders; called once, just before measuring. The second value tells
            for each absent contender why it is absent.
        memory: whether each contender's peak memory is measured too.
    """

    name: str
    family: str
    rows: int
    contenders: tuple[str, ...]
    traffic: int
    flops: int
    build: Callable[[], tuple[list[Contender], dict[str, str]]]
    memory: bool = False


def weight_bytes(fmt: str, k: int, n: int, itemsize: int) -> int:
    """Bytes of a frozen [n, k] weight in a storage format, statistics included."""
    if fmt in ("nf4", "fp4"):
        return k * n // 2 + 4 * (k * n // 64)
    if fmt == "int8":
        return k * n + 4 * n
    return k * n * itemsize


def linear_traffic(fmt: str, m: int, k: int, n: int, itemsize: int) -> int:
    """Least bytes of a matmul: the weight once, activations in once, activations out once."""
    return weight_bytes(fmt, k, n, itemsize) + m * (k + n) * itemsize
