"""The code table of kernels that look up: ``CodeLookup`` of csrc/common/optimizer.h in Python."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from peftkern.codebooks import dynamic_map, dynamic_thresholds
from peftkern.ops.optimizer import reference

WORDS = 12288
UNSIGNED = 8192  # first word of the unsigned bins
VALUES1 = UNSIGNED  # of the values of the signed map
VALUES2 = UNSIGNED + 256
_BASE = (127 - 23) << 7  # bits above 16 of the smallest float that has a bin to itself
_BINS = (23 << 7) + 2
SMALLEST = (_BASE - 1) << 16  # bits of a float in the bin of everything smaller


def _entries(thresholds: Tensor, negative: bool) -> np.ndarray:
    """For each bin: the code at its lower end above bit 16, and what makes a carry below it.

    A bin holds the floats whose upper 16 bits agree; at most one threshold cuts it. The lower 16
    bits of a float carry into the code exactly where the float is above that threshold. Negative
    floats grow downwards: theirs are counted with all bits flipped.
    """
    upper = np.arange(_BASE - 1, _BASE - 1 + _BINS, dtype=np.uint32)
    if negative:
        low = ((upper << np.uint32(16)) | np.uint32(0x8000FFFF)).view(np.float32)
        low[0] = np.uint32(((_BASE << 16) - 1) | 0x80000000).reshape(()).view(np.float32)
    else:
        low = (upper << np.uint32(16)).view(np.float32)
        low[0] = 0.0
    cuts = thresholds.numpy()
    codes = np.searchsorted(cuts, low, side="left").astype(np.uint32)
    following = np.append(cuts, np.float32(np.nan)).astype(np.float32)[codes].view(np.uint32)
    sign = np.uint32(0x8000) if negative else np.uint32(0)
    cut = (following >> np.uint32(16)) == (upper | sign)
    cut[0] = False
    lower = following & np.uint32(0xFFFF)
    carry = lower if negative else np.uint32(0xFFFF) - lower
    return (codes << np.uint32(16)) | np.where(cut, carry, 0).astype(np.uint32)


@functools.cache
def lookup_table() -> Tensor:
    """int32 [12288], on the CPU; how it is read: ``lookup_key`` in csrc/common/optimizer.h."""
    upper = np.arange(_BASE - 1, _BASE - 1 + _BINS, dtype=np.uint32)
    words = np.zeros(WORDS, dtype=np.uint32)
    signed, unsigned = dynamic_thresholds(), reference.unsigned_thresholds()
    words[upper & 8191] = _entries(signed, False) - (upper << np.uint32(16))
    words[~upper & 8191] = _entries(signed, True) - (~upper << np.uint32(16))
    words[UNSIGNED + (upper & 4095)] = _entries(unsigned, False) - (upper << np.uint32(16))
    words[VALUES1:VALUES2] = dynamic_map().numpy().view(np.uint32)
    words[VALUES2 : VALUES2 + 256] = reference.unsigned_map().numpy().view(np.uint32)
    return torch.from_numpy(words.view(np.int32))
