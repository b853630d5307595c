"""Native LLM.int8() on the CPU: integer dot products, by VNNI where the processor has it."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


def _refusal(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float
) -> str | None:
    return native.refusal(x, codes, scb, bias)


@implementation("llm_int8", device="cpu", backend="native", can_use=_refusal)
def llm_int8(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """Rows of x rounded to 8 bits; outlier columns in fp32."""
    (m, k), n = x.shape, codes.shape[0]
    kernels = native.kernels()
    out = torch.empty(m, n, dtype=x.dtype)
    work = torch.empty(kernels.int8_work(m, k, threshold), dtype=torch.uint8)
    kernels.int8_product(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        n,
        codes.data_ptr(),
        scb.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        threshold,
        out.data_ptr(),
        work.data_ptr(),
        torch.get_num_threads(),
    )
    return out
