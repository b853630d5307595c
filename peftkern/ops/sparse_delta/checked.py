"""Positions on a GPU, checked once for each tensor: looking at them waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from peftkern.ops.sparse_delta.reference import check_indices

_SEEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_once(indices: Tensor, numel: int) -> None:
    """Raise ``ValueError`` unless the positions ascend strictly within ``[0, numel)``.

    The same tensor, unchanged, is looked at once, in the forward pass; while a graph is captured,
    and for tensors without data, not at all. Kernels mask what is out of range in any case.
    """
    if indices.device.type == "meta":
        return
    if indices.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    known = (0 if indices.is_inference() else indices._version, numel)
    if _SEEN.get(indices) != known:
        check_indices(indices, numel)
        _SEEN[indices] = known
