"""Adapters that are a change of one weight, and so can become part of it and leave it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.merging import Merged, merge_into, unmerge_from
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import own_forward


class WeightAdapter(AdapterLayer):
    """Adapters over ``base_layer``, a linear layer or an embedding, dense or quantized.

    A subclass defines ``delta_weight`` (the update of one adapter, fp32, shaped as the base's
    weight) or overrides :meth:`change`. Attributes that it lacks are those of the base.
    """

    def __init__(self) -> None:
        super().__init__()
        self._merge: Merged | None = None

    def change(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What these adapters, in this order, add to the weight, and to the bias if to that.

        Raises:
            ValueError: they cannot become part of this base.
        """
        layer: Any = self
        delta = layer.delta_weight(names[0])
        for name in names[1:]:
            delta += layer.delta_weight(name)
        return delta, None

    @torch.no_grad()
    def merge(
        self, adapter_names: list[str] | None = None, max_error: float | None = None
    ) -> float:
        """Write adapters into the base weight, so that they cost nothing at inference.

        A weight that other modules share stays as it is for them.

        Args:
            adapter_names: which; the active ones when left out.
            max_error: refuse before writing when rounding to the base's dtype or format would
                lose more than this share of the update.

        Returns:
            ||written - (base + update)|| / ||update||: what rounding lost.

        Raises:
            ValueError: an unknown adapter, a non-finite update, or an error above ``max_error``.
            RuntimeError: adapters are merged already, or the base computes a forward of its own.
        """
        base: Any = self.base_layer
        if self.on_linear and not isinstance(base, QuantizedLinear) and own_forward(base):
            raise RuntimeError(
                f"{type(base).__name__} computes a forward of its own; its adapters cannot be "
                "merged into its weight"
            )
        names = self._names_to_merge(adapter_names)
        if not names:
            return 0.0
        delta, bias_delta = self.change(names)
        self._merge = merge_into(base, delta, max_error, bias_delta)
        self.merged_adapters = names
        return self._merge.error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back exactly as it was; does nothing when nothing is merged."""
        base: Any = self.base_layer
        if self._merge is not None:
            unmerge_from(base, self._merge)
        self._merge = None
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)
