"""The table of look-ups finds the codes of the reference, at every threshold and between."""

from __future__ import annotations

import pytest
import torch

from peftkern.codebooks import dynamic_map, dynamic_thresholds
from peftkern.ops.optimizer import lookup, reference


def _codes(t: torch.Tensor, signed: bool) -> torch.Tensor:
    """As ``lookup_key`` and ``lookup_place`` of csrc/common/optimizer.h tell."""
    words, bits = lookup.lookup_table().long(), t.view(torch.int32).long()
    magnitude = (bits & 0x7FFFFFFF).clamp_min(lookup.SMALLEST)
    if signed:
        key = torch.where(bits < 0, ~magnitude, magnitude) & 0xFFFFFFFF
        place = (key >> 16) & 8191
    else:
        key = magnitude
        place = lookup.UNSIGNED + ((key >> 16) & 4095)
    return ((key + words[place]) >> 16) & 0xFF


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    thresholds = dynamic_thresholds() if signed else reference.unsigned_thresholds()
    bits = thresholds.view(torch.int32)
    near = torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)
    make = torch.Generator().manual_seed(0)
    small = torch.rand(100_000, generator=make) ** 8
    values = torch.cat([near, small, -small, torch.tensor([0.0, -0.0, 1.0, 1e-30, 1e-45])])
    values = values[values.abs() <= 1.0]
    if not signed:
        values = values.abs()
    assert torch.equal(_codes(values, signed), torch.bucketize(values, thresholds))


def test_the_maps_are_in_it() -> None:
    words = lookup.lookup_table()
    for first, values in (
        (lookup.VALUES1, dynamic_map()),
        (lookup.VALUES2, reference.unsigned_map()),
    ):
        assert torch.equal(words[first : first + 256].view(torch.float32), values)
