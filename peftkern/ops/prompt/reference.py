"""Plain torch truth of embeddings with a trained prompt in front. Never optimised.

Prompt tuning: Lester et al. 2021 (arXiv 2104.08691). The prompt is the same for every row of the
batch, or one for each; its gradient is that of the first P positions, summed over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_embedding(ids: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
    """``[prompt; table[ids]]`` as [B, P + L, H] of the table's dtype."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        raise ValueError(
            f"ids: got {int(ids.min())} to {int(ids.max())}, expected values in "
            f"[0, {table.shape[0]}), the rows of the table"
        )
    rows = prompt.to(table.dtype).expand(ids.shape[0], *prompt.shape[-2:])
    return torch.cat([rows, table[ids]], dim=1)


def prompt_gradient(
    dy: Tensor, length: int, per_row: bool, *, compute: torch.dtype | None = None
) -> Tensor:
    """The first ``length`` positions of dy, wide; summed over the batch unless ``per_row``."""
    wide = compute or torch.promote_types(dy.dtype, torch.float32)
    own = dy[:, :length].to(wide)
    return own.clone(memory_format=torch.contiguous_format) if per_row else own.sum(0)
