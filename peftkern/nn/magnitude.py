"""The trained row magnitudes of DoRA, and the row norms that they are divided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.quant import QuantizedTensor


@dataclass
class _Norm:
    """A computed norm with exact copies of what it was computed from."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    value: Tensor


class RowNorms:
    """Row norms of ``W + scaling B A`` of one adapter, computed again where something changed."""

    def __init__(self) -> None:
        self._base: tuple[tuple[object, ...], Tensor] | None = None
        self._norm: _Norm | None = None

    @torch.no_grad()
    def __call__(
        self, base: Tensor | QuantizedTensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """The norms, [out].

        The frozen base's share is kept until its tensors change. On the CPU the result is kept as
        well, with copies of A and B to compare with: many optimizers write through ``.data`` or a
        pointer, which leaves no trace in version counters. Elsewhere comparing would wait for the
        device, so the norm, as dear as r more rows of input, is computed each time.
        """
        if torch.compiler.is_compiling():
            return functional.dora_weight_norm(base, lora_A, lora_B, scaling)
        # What is kept must serve a later training step even if this call is an evaluation's:
        # autograd refuses tensors that were made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return self._kept(base, lora_A, lora_B, scaling)

    def _kept(
        self, base: Tensor | QuantizedTensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        weight = base.weight if isinstance(base, QuantizedTensor) else base
        key = (weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype)
        if self._base is None or self._base[0] != key:
            self._base = key, functional.weight_norm_sq(base)
            self._norm = None
        known = self._norm
        if (
            known is not None
            and known.scaling == scaling
            and _equal(known.lora_A, lora_A)
            and _equal(known.lora_B, lora_B)
        ):
            return known.value
        value = functional.dora_weight_norm(base, lora_A, lora_B, scaling, self._base[1])
        if weight.device.type == "cpu":
            self._norm = _Norm(lora_A.detach().clone(), lora_B.detach().clone(), scaling, value)
        return value


class Magnitude(nn.Module):
    """``weight`` [out]: the length that each row of ``W + scaling B A`` is given.

    Args:
        weight: first magnitudes.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.norm = RowNorms()

    def extra_repr(self) -> str:
        return f"out_features={self.weight.shape[0]}"


def _equal(kept: Tensor, now: Tensor) -> bool:
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)
