"""``IA3Linear``: learned factors on the input or the output of a frozen linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.adapter import TORCH, check_adapter_name
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.rows import by_rows
from peftkern.nn.structure import (
    default_device,
    dense_weight,
    features,
    is_conv1d,
    is_dense_linear,
)
from peftkern.nn.weight_adapter import WeightAdapter


class IA3Linear(WeightAdapter):
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

    def change(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What scaling by these factors adds to the weight and, where the output is, the bias."""
        base = self.base_layer
        factor = self._factor(names)
        assert factor is not None
        change = factor.float() - 1.0
        if isinstance(base, QuantizedLinear):
            weight = base.dequantize(torch.float32)
        else:
            weight = dense_weight(base).float()
        if self.is_feedforward:
            return weight * change, None
        bias = base._parameters["bias"]
        return weight * change[:, None], None if bias is None else bias.float() * change

    def extra_repr(self) -> str:
        active = ",".join(self._active_adapter)
        state = ", disabled" if self._disable_adapters else ", merged" if self.merged else ""
        return f"is_feedforward={self.is_feedforward}, active={active!r}{state}"
