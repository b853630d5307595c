"""Native linear with a low-rank term on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


@cache
def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def base_by_torch(dtype: torch.dtype) -> bool:
    """Whether torch multiplies with a dense base, so that we add only the low-rank term.

    fp32 goes to torch's BLAS, which reaches the FMA peak. bf16 does so where the CPU multiplies
    bf16. Elsewhere torch's 16-bit matmul runs unvectorised (4096 x 4096 on 2 AVX2 cores, bf16:
    F.linear 811 ms at M=512 and dy @ W 57 s, against 137 ms in fp32), and our kernel converts
    inside the cache instead.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _cpu_has_bf16())


def native_base(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> native.NativeWeight:
    """The base [N, K] as kernels take it; a quantized one decodes to ``dtype``."""
    if format == "dense" or absmax is None:
        return native.weight_dense(weight)
    if format == "int8":
        return native.weight_8bit(weight, absmax, dtype)
    statistics = (absmax, nested_absmax, nested_offset)
    return native.weight_4bit(weight, *statistics, format, blocksize, shape, dtype)


def _forward_refusal(*args: Any) -> str | None:
    return native.refusal(*args)


@implementation("lora_linear", device="cpu", backend="native", can_use=_forward_refusal)
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
    """The low-rank term is the last steps of the base product's own sum."""
    m, k = x.shape
    rank = lora_A.shape[0]
    s = torch.empty(m, rank, dtype=torch.float32)
    base: native.NativeWeight | None = None
    if format == "dense" and base_by_torch(x.dtype):
        y = torch.nn.functional.linear(x, weight, bias)
        bias = None
    else:
        y = torch.empty(m, out_features, dtype=x.dtype)
        statistics = (absmax, nested_absmax, nested_offset)
        shape = (out_features, k)
        base = native_base(weight, *statistics, format, blocksize, shape, x.dtype)
    native.kernels().lora_forward(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        out_features,
        base,
        0 if bias is None else bias.data_ptr(),
        lora_A.data_ptr(),
        lora_B.data_ptr(),
        native.DTYPES[lora_A.dtype],
        rank,
        scaling,
        native.dropout_parameters(dropout_p, seed, k),
        s.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y, s


@implementation("lora_linear_backward", device="cpu", backend="native", can_use=_forward_refusal)
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
    """dy B once, then each gradient in one product; sums over rows stay inside one task."""
    m, k = x.shape
    n = dy.shape[1]
    rank = lora_A.shape[0]
    base: native.NativeWeight | None = None
    dx = torch.empty(0, dtype=x.dtype)
    if need_dx and format == "dense" and base_by_torch(x.dtype):
        dx = torch.matmul(dy, weight)
    elif need_dx:
        dx = torch.empty(m, k, dtype=x.dtype)
        statistics = (absmax, nested_absmax, nested_offset)
        base = native_base(weight, *statistics, format, blocksize, (n, k), x.dtype)
    da = torch.empty(lora_A.shape if need_dab else 0, dtype=lora_A.dtype)
    db = torch.empty(lora_B.shape if need_dab else 0, dtype=lora_B.dtype)
    ds = torch.empty(m, rank, dtype=torch.float32)
    native.kernels().lora_backward(
        dy.data_ptr(),
        x.data_ptr(),
        s.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        n,
        base,
        lora_A.data_ptr(),
        lora_B.data_ptr(),
        native.DTYPES[lora_A.dtype],
        rank,
        scaling,
        native.dropout_parameters(dropout_p, seed, k),
        ds.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        da.data_ptr() if need_dab else 0,
        db.data_ptr() if need_dab else 0,
        torch.get_num_threads(),
    )
    return dx, da, db
