"""LoRA over a frozen base on CUDA devices: passes over x and dy, and products with a term.

Few rows of any dtype go in two launches; 16-bit activations whose sizes are whole 8s in two (y) and
four (dx, dA, dB). The rest is Triton's, or the reference's.
"""

from __future__ import annotations

from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels import products, thin
from peftkern.cuda_kernels.products import LowRank, product
from peftkern.cuda_kernels.thin import Dropout
from peftkern.ops.bases import Base
from peftkern.ops.dropout.cuda import philox_dropout
from peftkern.registry import implementation


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
    why = cuda_native.refusal(x, lora_A, lora_B)
    passes = thin.refusal(x, x.shape[1], lora_A, lora_B)
    if why is not None or passes is None:  # with the passes every way can go
        return why
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    return passes if products.needs_parts(products.way_of(x, base, False)) else None


@implementation("lora_linear", device="cuda", backend="cuda", can_use=_forward_refusal)
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
    """``s = dropout(x) A^T`` in one launch; its term joins the sum of the base's product."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    way = products.way_of(x, base, False)
    dropout = Dropout(dropout_p, seed)
    if products.needs_parts(way):
        parts = (lora_B, scaling, False)
        s, u, v = thin.shrink(x, lora_A, dropout=dropout, parts=parts)
        term = LowRank(s, lora_B, scaling, u, v)
    else:
        if thin.refusal(x, x.shape[1], lora_A, lora_B) is None:
            s = thin.shrink(x, lora_A, dropout=dropout)[0]
        else:
            s = thin.shrink_any(x, lora_A, dropout)
        term = LowRank(s, lora_B, scaling)
    return product(x, base, False, bias, term, way=way), s


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
    why = cuda_native.refusal(x, lora_A, lora_B)
    if why is not None:
        return why
    why = thin.refusal(x, x.shape[1], lora_A, lora_B)
    return thin.refusal(dy, dy.shape[1]) if why is None else why


@implementation("lora_linear_backward", device="cuda", backend="cuda", can_use=_backward_refusal)
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
    """dS in one pass over dy, dB in another, dx with its term in the sum, dA in one pass over x."""
    if not (need_dx or need_dab):
        return x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, dy.shape[1], x.shape[1])
    dropout = Dropout(dropout_p, seed)
    dx, ds = input_gradient(dy, x, base, lora_A, lora_B, scaling, dropout, need_dx)
    if not need_dab:
        return dx, lora_A.new_empty(0), lora_B.new_empty(0)
    db = thin.outer(dy, s, lora_B, transposed=True, scale=scaling)
    da = thin.outer(x, ds, lora_A, dropout=dropout)
    return dx, da, db


def input_gradient(
    dy: Tensor,
    x: Tensor,
    base: Base,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout,
    need_dx: bool,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``dx = dy W + mask(dS A)`` (added to ``onto``) and dS = scaling dy B, float32 [M, r]."""
    parts = (lora_A, 1.0, True) if need_dx else None
    ds, u, v = thin.shrink(dy, lora_B, transposed=True, scale=scaling, parts=parts)
    if not need_dx:
        return x.new_empty(0), ds
    term = LowRank(ds, lora_A, 1.0, u, v)
    if dropout.seed is None or dropout.p == 0.0:
        return product(dy, base, True, term=term, onto=onto), ds
    # The mask lies over the term alone, which therefore is made first.
    low = products.low_rank(dy, True, term)
    masked = philox_dropout(low, dropout.p, dropout.seed)
    onto = masked if onto is None else onto.add_(masked)
    return product(dy, base, True, onto=onto), ds
