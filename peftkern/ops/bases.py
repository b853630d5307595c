"""A frozen matrix in its storage, as the products of several op families take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Base(NamedTuple):
    """A frozen matrix [rows, cols].

    Args:
        weight: dense of the activation's dtype (row-major or transposed view), uint8 or int8.
        absmax: fp32 or nested uint8 statistics of a 4-bit base, fp32 SCB of int8, else ``None``.
        nested_absmax: fp32, or ``None``.
        nested_offset: fp32 [1], or ``None``.
        format: ``"dense"``, ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: of a 4-bit base, else 0.
        rows: out_features.
        cols: in_features.
    """

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    format: str
    blocksize: int
    rows: int
    cols: int

    @property
    def statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """absmax, nested_absmax, nested_offset."""
        return self.absmax, self.nested_absmax, self.nested_offset

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The base as a matrix [rows, cols] of ``dtype``, by whichever kernel serves the device."""
        if self.absmax is None:
            return self.weight
        if self.format == "int8":
            whole: Tensor = torch.ops.peftkern.dequantize_8bit(self.weight, self.absmax, dtype)
            return whole
        shape = [self.rows, self.cols]
        rest = (self.format, self.blocksize, shape, dtype)
        whole = torch.ops.peftkern.dequantize_4bit(self.weight, *self.statistics, *rest)
        return whole
