"""Plain torch truth of LLM.int8(). Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.codebooks import INT8_STEP


def round_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x as 8-bit codes.

    Args:
        x: [m, k].
        threshold: magnitudes of at least this are outliers; 0: none are.

    Returns:
        codes int8 [m, k], zero in columns that hold an outlier; absmax fp32 [m] of what is no
        outlier, NaN where a row holds NaN or (as no outlier) Inf; outliers bool [k], the columns.
    """
    x = x.float()
    large = x.abs() >= threshold if threshold > 0.0 else torch.zeros_like(x, dtype=torch.bool)
    columns = large.any(0)
    kept = x.masked_fill(large, 0.0)
    absmax = kept.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    # 127 / absmax must not overflow for tiny rows: those are lifted, exactly.
    lift = torch.where(absmax < 2.0**-96, 2.0**64, 1.0)
    scale = torch.where(finite & (absmax > 0), 127.0 / (absmax * lift), 0.0)
    codes = (kept * lift[:, None] * scale[:, None]).nan_to_num(0.0, 0.0, 0.0).round()
    codes = codes.clamp(-127.0, 127.0).masked_fill(columns, 0.0)
    absmax = torch.where(finite, absmax, torch.nan)
    return codes.to(torch.int8), absmax, columns


def llm_int8(
    x: Tensor,
    codes: Tensor,
    scb: Tensor,
    bias: Tensor | None,
    threshold: float,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``(q Cᵀ) absmax scb / 127² + x_o (C_o scb / 127)ᵀ + b``: q the codes of x, o the outliers."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    rounded, absmax, columns = round_rows(x, threshold)
    sums = rounded.double() @ codes.double().T  # exact: below 2^53
    step = INT8_STEP if wide == torch.float32 else 1.0 / 127.0
    y = sums.to(wide) * (scb.to(wide) * step) * (absmax.to(wide) * step)[:, None]
    weight = codes[:, columns].to(wide) * (scb.to(wide) * step)[:, None]
    y = y + x[:, columns].to(wide) @ weight.T
    y = y if bias is None else y + bias.to(wide)
    return y if compute else y.to(x.dtype)
