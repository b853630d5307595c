"""Feeding a model with what a loader gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; mappings of every class become dicts."""
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), plain)


def first_loss(model: nn.Module, batch: Any, needed: bool = True) -> Any:
    """The ``loss`` of the model's output.

    Raises:
        TypeError: there is none, and it is needed.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, Sequence):
        output = model(*batch)
    else:
        output = model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, Tensor) and output.numel() == 1:
        loss = output
    if loss is None and needed:
        raise TypeError(
            f"loss_fn: the model returned {type(output).__name__} without a loss; put labels into "
            "the batches, or give loss_fn(model, batch) -> loss"
        )
    return loss
