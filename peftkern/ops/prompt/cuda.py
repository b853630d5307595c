"""Embeddings with a trained prompt in front on CUDA devices: csrc/cuda/embedding.cu.

torch looks the tokens up in one pass and joins the prompt in another, which reads and writes them
once more; this is one. There is no Triton variant: a gather leaves nothing to win by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.registry import implementation


def _refusal(ids: Tensor, table: Tensor, prompt: Tensor) -> str | None:
    return cuda_native.refusal(table, prompt)


@implementation("prompt_embedding", device="cuda", backend="cuda", can_use=_refusal)
def prompt_embedding(ids: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
    """Reads each row once and writes it once; an id out of range leaves a row of NaN."""
    (batch, length), rows, width = ids.shape, prompt.shape[-2], table.shape[1]
    out = table.new_empty((batch, rows + length, width))
    cuda_native.launch(
        "prompt_embedding",
        ids.device,
        ids,
        table,
        DTYPES[table.dtype],
        prompt,
        DTYPES[prompt.dtype],
        prompt.stride(0) if prompt.dim() == 3 else 0,
        batch,
        length,
        rows,
        width,
        table.shape[0],
        out,
    )
    return out


def _gradient_refusal(dy: Tensor, length: int, per_row: bool) -> str | None:
    why = cuda_native.refusal(dy)
    return "a prompt for each row: its gradient is a slice" if why is None and per_row else why


@implementation("prompt_gradient", device="cuda", backend="cuda", can_use=_gradient_refusal)
def prompt_gradient(dy: Tensor, length: int, per_row: bool) -> Tensor:
    """Rows of the batch are added in their order."""
    batch, positions, width = dy.shape
    out = dy.new_empty((length, width), dtype=torch.float32)
    args = (dy, DTYPES[dy.dtype], batch, positions * width, length * width, out)
    cuda_native.launch("prompt_gradient", dy.device, *args)
    return out
