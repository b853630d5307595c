"""Linear with a low-rank term by Triton on an NVIDIA GPU."""

from __future__ import annotations

from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import refusal
from peftkern.triton_kernels.matmul import Dropout, LowRank, matmul
from peftkern.triton_kernels.passes import adapter_gradient, down_gradient, shrink


def _forward_refusal(
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
    return refusal(x, x.dtype, lora_A.dtype)


@implementation("lora_linear", device="cuda", backend="triton", can_use=_forward_refusal)
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
    """S in a pass of its own; S Bᵀ in the epilogue of the base matmul, or one pass after cuBLAS."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    s = shrink(x, lora_A, Dropout.of(dropout_p, seed))
    term = LowRank(s, lora_B, float(scaling), Dropout.of(0.0, None))
    return matmul(x, base, bias=bias, low_rank=term), s


def _backward_refusal(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> str | None:
    return refusal(x, x.dtype, lora_A.dtype)


@implementation("lora_linear_backward", device="cuda", backend="triton", can_use=_backward_refusal)
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS and dB in one pass over dy; mask(dS A) in the epilogue of dx; the mask is drawn again."""
    dx, da, db = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if not (need_dx or need_dab):
        return dx, da, db
    dropout = Dropout.of(dropout_p, seed)
    ds, db = adapter_gradient(dy, s, lora_B, scaling, need_dab)
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        base = Base(weight, *statistics, format, blocksize, dy.shape[1], x.shape[1])
        dx = matmul(dy, base, transposed=True, low_rank=LowRank(ds, lora_A.t(), 1.0, dropout))
    if need_dab:
        da = down_gradient(ds, x, lora_A, dropout)
    return dx, da, db
