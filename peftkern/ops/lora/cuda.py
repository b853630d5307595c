"""LoRA over a quantized base for few rows on CUDA devices: two launches, y written once.

More rows, dense bases and the backward pass are Triton's, or the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.ops.linear4 import cuda as linear4
from peftkern.ops.linear8 import cuda as linear8
from peftkern.registry import implementation


def _refusal(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    why = cuda_native.refusal(x, lora_A, lora_B)
    if why is not None:
        return why
    if format == "dense":
        return "the CUDA kernels have no dense base"
    rows = x.shape[0]
    if format == "int8":
        if rows > linear8.ROWS_ROWS:
            return f"{rows} rows, the fused INT8 kernel takes up to {linear8.ROWS_ROWS}"
    elif linear4.path(x, weight) == "dequantize":
        return f"{rows} rows, more than the fused 4-bit kernels take"
    return None


@implementation("lora_linear", device="cuda", backend="cuda", can_use=_refusal)
def lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``s = dropout(x) A^T`` in one launch, the rest in the epilogue of the matmul."""
    m, k = x.shape
    rank = lora_A.shape[0]
    s = x.new_empty((m, rank), dtype=torch.float32)
    cuda_native.launch(
        "low_rank",
        x.device,
        x,
        DTYPES[x.dtype],
        m,
        k,
        lora_A.contiguous(),
        DTYPES[lora_A.dtype],
        rank,
        seed if dropout_p > 0.0 else None,
        int(dropout_p * 2**32),
        1.0 / (1.0 - dropout_p),
        s,
    )
    term = linear4.LowRank(s, lora_B.contiguous(), scaling)
    if absmax is None:
        raise ValueError("absmax: got None, expected the statistics of a quantized base")
    if format == "int8":
        return linear8.fused(x, weight, absmax, bias, term), s
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    return linear4.fused(linear4.path(x, weight), x, *base, out_features, bias, term), s
