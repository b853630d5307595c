"""``IA3Linear``: learned factors on the input or the output of a frozen linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.adapter import TORCH, AdapterLayer, check_adapter_name
from peftkern.nn.merging import Merged, merge_into, unmerge_from
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.rows import by_rows
from peftkern.nn.structure import (
    default_device,
    dense_weight,
    features,
    is_conv1d,
    is_dense_linear,
    own_forward,
)


class IA3Linear(AdapterLayer):
    """``y = l * base(x)``, or ``y = base(l * x)`` for feed-forward layers.

    (IA)^3, arXiv 2205.05638; the factors of several active adapters multiply.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, ``Linear4bit`` or ``Linear8bit``; it is
            frozen in place and not copied.
        is_feedforward: scale the input instead of the output.
        adapter_name: name of the first adapter.
        init_ia3_weights: True (all ones) or False (random, for tests).
        ia3_dtype: dtype of the factors, float32 when left out.

    Raises:
        TypeError: the base layer is not a linear layer.

    Attribute names are PEFT's: ``base_layer`` and ``ia3_l[name]``, [out, 1] or, for feed-forward
    layers, [1, in].

    Example:
        >>> layer = IA3Linear(torch.nn.Linear(64, 32))
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    _adapter_containers = ("ia3_l",)
    on_linear = True
    serves_rows = True

    def __init__(
        self,
        base_layer: nn.Module,
        is_feedforward: bool = False,
        adapter_name: str = "default",
        init_ia3_weights: bool = True,
        ia3_dtype: torch.dtype | None = None,
    ) -> None:
        if not (isinstance(base_layer, QuantizedLinear) or is_dense_linear(base_layer)):
            raise TypeError(
                "base_layer: expected nn.Linear, Conv1D, Linear4bit or Linear8bit, got "
                f"{type(base_layer).__name__}"
            )
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.is_feedforward = bool(is_feedforward)
        self.ia3_l = nn.ParameterDict()
        self._merge: Merged | None = None
        self.training = base_layer.training
        self.add_adapter(adapter_name, is_feedforward, init_ia3_weights, ia3_dtype)

    def add_adapter(
        self,
        adapter_name: str,
        is_feedforward: bool = False,
        init_ia3_weights: bool = True,
        ia3_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter and make it the active one; arguments as for the class.

        Raises:
            ValueError: the name is taken or not usable, or the layer's adapters scale the other
                side.
            RuntimeError: adapters are merged into the base.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.ia3_l:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        if self.merged:
            raise RuntimeError("adapters are merged into the base; unmerge before adding another")
        if bool(is_feedforward) != self.is_feedforward:
            side = "input" if self.is_feedforward else "output"
            raise ValueError(f"is_feedforward: the adapters of this layer scale its {side}")
        inner, outer = features(self.base_layer)
        device = default_device(self.base_layer)
        where = device if device.type == "meta" else torch.device("cpu")
        factor = torch.randn((1, inner) if self.is_feedforward else (outer, 1), device=where)
        if init_ia3_weights:
            factor.fill_(1.0)
        kind = ia3_dtype if ia3_dtype is not None else torch.float32
        self.ia3_l[adapter_name] = nn.Parameter(factor.to(device=device, dtype=kind))
        self.set_adapter(adapter_name)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return features(self.base_layer)[1]

    @property
    def fan_in_fan_out(self) -> bool:
        """True when the base layer stores its weight as [in, out]."""
        return is_conv1d(self.base_layer)

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """The factors are applied by torch, whatever serves the base."""
        return TORCH

    def forward(self, x: Tensor) -> Tensor:
        """The scaled linear map; x [..., in] -> [..., out] in the dtype of the base's result."""
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(x)
        choice = self.row_choice()
        if choice is None:
            return self._scaled(x, self._active_adapter)
        known = self.adapter_names
        return by_rows(choice, x, lambda name, part: self._scaled(part, (name,)), known)

    def _scaled(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        factor = self._factor(names)
        if factor is None:
            return self.base_layer(x)
        if self.is_feedforward:
            return self.base_layer((x * factor).to(x.dtype))
        y = self.base_layer(x)
        return (y * factor).to(y.dtype)

    def _factor(self, names: Sequence[str | None]) -> Tensor | None:
        product: Tensor | None = None
        for name in names:
            if name is not None and name in self.ia3_l:
                own = self.ia3_l[name].flatten()
                product = own if product is None else product * own
        return product

    @torch.no_grad()
    def merge(
        self, adapter_names: list[str] | None = None, max_error: float | None = None
    ) -> float:
        """Multiply adapters into the base weight (and, where the output is scaled, its bias).

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
        if self.merged:
            raise RuntimeError(
                f"adapters {', '.join(self.merged_adapters)} are merged already; unmerge first"
            )
        base = self.base_layer
        if not isinstance(base, QuantizedLinear) and own_forward(base):
            raise RuntimeError(
                f"{type(base).__name__} computes a forward of its own; its adapters cannot be "
                "merged into its weight"
            )
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        names = [name for name in names if name in self.ia3_l]
        factor = self._factor(names)
        if factor is None:
            return 0.0
        change = factor.float() - 1.0
        if isinstance(base, QuantizedLinear):
            weight = base.dequantize(torch.float32)
        else:
            weight = dense_weight(base).float()
        delta = weight * (change if self.is_feedforward else change[:, None])
        update: Tensor | None = None
        if isinstance(base.bias, Tensor) and not self.is_feedforward:
            update = base.bias.float() * change
        self._merge = merge_into(base, delta, max_error, update)
        self.merged_adapters = names
        return self._merge.error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base back exactly as it was; does nothing when nothing is merged."""
        if self._merge is not None:
            unmerge_from(self.base_layer, self._merge)
        self._merge = None
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        active = ",".join(self._active_adapter)
        state = ", disabled" if self._disable_adapters else ", merged" if self.merged else ""
        return f"is_feedforward={self.is_feedforward}, active={active!r}{state}"
