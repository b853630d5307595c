"""Matmul with a 4-bit weight on CUDA devices: csrc/cuda/linear4_mma.cu, linear_rows.cu, cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES, QUANT_TYPES
from peftkern.ops.quant4.cuda import dequantize_4bit
from peftkern.registry import implementation

# Which way a product goes, by rows of x. No threshold has been measured yet; the model behind each:
# - "mma": up to 64 rows the weights' 0.52 bytes each are the traffic, and the loop (3.6 to 5.9
#   instructions a weight) keeps up with it. Above, dequantize + cuBLAS costs 326 / M of the
#   product's own time and a fused kernel would have to reach 44 % of cuBLAS at M = 256.
# - "rows" (fp32, or shapes that mma cannot take): every four rows of x cost another 9 instructions
#   a weight, dequantizing costs 6 and a pass over 2 to 4 bytes: even at about 16 rows.
MMA_ROWS = 64
ROWS_ROWS = 16


@dataclass(frozen=True)
class LowRank:
    """A LoRA term for the epilogue: y += scaling * low @ up.T.

    Args:
        low: dropout(x) @ A.T, float32 [M, r].
        up: B, [N, r], float32 or x.dtype.
        scaling: its factor.
    """

    low: Tensor
    up: Tensor
    scaling: float


def low_rank_arguments(
    term: LowRank | None,
) -> tuple[Tensor | None, Tensor | None, int, int, float]:
    """The launcher's (low, up, dtype of up, rank, scaling); a rank of 0 leaves the term out."""
    if term is None:
        return None, None, 0, 0, 0.0
    return term.low, term.up, DTYPES[term.up.dtype], term.up.shape[1], term.scaling


def mma_refusal(x: Tensor, packed: Tensor) -> str | None:
    """Why the tensor-core kernel cannot take these; None if it can."""
    m, k = x.shape
    if x.dtype == torch.float32:
        return "tensor cores have no float32"
    if not 1 <= m <= MMA_ROWS:
        return f"{m} rows, it takes 1 to {MMA_ROWS}"
    if k % 32 or not 0 < k < 2**31:
        return f"{k} input features, it takes a positive multiple of 32"
    if x.data_ptr() % 16 or packed.data_ptr() % 16:
        return "x or packed does not start on a 16-byte boundary"
    return None


def path(x: Tensor, packed: Tensor) -> str:
    """``"mma"``, ``"rows"`` or ``"dequantize"``: how a product with ``x`` is computed."""
    if mma_refusal(x, packed) is None:
        return "mma"
    return "rows" if x.shape[0] <= ROWS_ROWS else "dequantize"


def fused(
    way: str,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    term: LowRank | None = None,
) -> Tensor:
    """``y = x W^T + b + scaling * low up^T`` by the kernel of ``"mma"`` or ``"rows"``."""
    m, k = x.shape
    out = x.new_empty((m, out_features))
    shape = (m, out_features, k)
    weight = (packed, absmax, nested_absmax, nested_offset)
    quantization = (QUANT_TYPES[quant_type], blocksize.bit_length() - 1)
    rest = (*weight, *quantization, bias, *low_rank_arguments(term))
    if way == "rows":
        launch = "linear_rows_4bit"
        cuda_native.launch(launch, x.device, x, DTYPES[x.dtype], *shape, *rest, out)
        return out
    size = cuda_native.library().ask("linear_4bit_workspace", *shape)
    workspace = x.new_empty(size // 4, dtype=torch.float32) if size else None
    launch = "linear_4bit_mma"
    cuda_native.launch(launch, x.device, x, DTYPES[x.dtype], *shape, *rest, workspace, out)
    return out


def _forward_refusal(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> str | None:
    return cuda_native.refusal(x)


@implementation("linear_4bit", device="cuda", backend="cuda", can_use=_forward_refusal)
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """``y = x W^T + b``: fused for few rows, else dequantized for cuBLAS."""
    base = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    way = path(x, packed)
    if way != "dequantize":
        return fused(way, x, *base, out_features, bias)
    w = dequantize_4bit(*base, [out_features, x.shape[1]], x.dtype)
    return torch.nn.functional.linear(x, w, bias)


def _dx_refusal(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> str | None:
    return cuda_native.refusal(dy)


@implementation("linear_4bit_dx", device="cuda", backend="cuda", can_use=_dx_refusal)
def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """``dx = dy W``, dequantized in one launch for cuBLAS."""
    base = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    return dy @ dequantize_4bit(*base, [dy.shape[1], in_features], dy.dtype)
