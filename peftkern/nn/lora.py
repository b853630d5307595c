"""``LoRALinear``: low-rank adapters beside a frozen linear layer, dense or quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.nn.adapter import AdapterLayer, check_adapter_name
from peftkern.nn.merging import Merged, merge_into, unmerge_from
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import (
    default_device,
    dense_weight,
    features,
    hooks_of,
    is_conv1d,
    is_dense_linear,
    own_forward,
)

INITIALISATIONS = (True, False, "gaussian")


class LoRALinear(AdapterLayer):
    """``y = base(x) + scaling * dropout(x) A^T B^T`` for every active adapter.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, ``Linear4bit`` or ``Linear8bit``; it is
            frozen in place and not copied.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of the adapter, in [0, 1).
        use_rslora: scaling lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_name: name of the first adapter.
        init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A ~ N(0, 1/r), B zero)
            or False (both random, for tests).
        lora_dtype: dtype of A and B, float32 when left out.

    Raises:
        TypeError: the base layer is not a linear layer.
        ValueError: a number out of range.

    Attribute names are PEFT's: ``base_layer``, ``lora_A[name]`` [r, in] and ``lora_B[name]``
    [out, r] (bias-free ``nn.Linear``), ``r``, ``lora_alpha``, ``scaling``, ``lora_dropout``.

    Example:
        >>> layer = LoRALinear(torch.nn.Linear(64, 32), r=4, lora_alpha=8)
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    _adapter_containers = ("lora_A", "lora_B")
    on_linear = True

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        if not (isinstance(base_layer, QuantizedLinear) or is_dense_linear(base_layer)):
            raise TypeError(
                "base_layer: expected nn.Linear, Conv1D, Linear4bit or Linear8bit, got "
                f"{type(base_layer).__name__}"
            )
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self._merge: Merged | None = None
        # A subclass with a forward of its own is called; reading its weight would skip its maths.
        plain = isinstance(base_layer, QuantizedLinear) or not own_forward(base_layer)
        self._reads_weight = plain
        self.training = base_layer.training
        self.add_adapter(
            adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_dtype
        )

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter and make it the active one; arguments as for the class.

        Raises:
            ValueError: the name is taken or not usable, or a number is out of range.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        if self.merged:
            raise RuntimeError("adapters are merged into the base; unmerge before adding another")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected a positive integer, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected a number in [0, 1), got {lora_dropout!r}")
        if init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights: got {init_lora_weights!r}, expected True, False or 'gaussian'"
            )
        inner, outer = features(self.base_layer)
        device = default_device(self.base_layer)
        where = device if device.type == "meta" else torch.device("cpu")
        # Drawn on the CPU in PEFT's order (both layers, then A again): one seed gives the same
        # adapter on every device and in both libraries.
        down = nn.Linear(inner, r, bias=False, device=where, dtype=torch.float32)
        up = nn.Linear(r, outer, bias=False, device=where, dtype=torch.float32)
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        elif init_lora_weights == "gaussian":
            nn.init.normal_(down.weight, std=1 / r)
        if init_lora_weights is not False:
            nn.init.zeros_(up.weight)
        dtype = lora_dtype if lora_dtype is not None else torch.float32
        down.to(device=device, dtype=dtype).train(self.training)
        up.to(device=device, dtype=dtype).train(self.training)
        self.lora_A[adapter_name] = down
        self.lora_B[adapter_name] = up
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = float(lora_dropout)
        self.use_rslora[adapter_name] = bool(use_rslora)
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.set_adapter(adapter_name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter and its tensors; unknown names are ignored.

        Raises:
            RuntimeError: it is merged into the base.
        """
        if name in self.merged_adapters:
            raise RuntimeError(f"adapter {name!r} is merged into the base; unmerge first")
        super().delete_adapter(name)
        for table in (self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.scaling):
            table.pop(name, None)

    def set_adapter(self, names: Any, trainable: bool = True) -> None:
        """Make exactly these adapters active; see :class:`AdapterLayer`.

        Raises:
            RuntimeError: adapters are merged into the base.
        """
        if self.merged:
            raise RuntimeError(
                f"adapters {', '.join(self.merged_adapters)} are merged into the base; unmerge "
                "before activating others"
            )
        super().set_adapter(names, trainable)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

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

    @property
    def format(self) -> str:
        """``"dense"``, ``"nf4"``, ``"fp4"`` or ``"int8"``."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer.quantized.quant_type
        return "dense"

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The weights A [r, in] and B [out, r] of one adapter."""
        down, up = self.lora_A[name], self.lora_B[name]
        return down.weight, up.weight  # type: ignore[return-value]

    def why_not_fused(self, name: str) -> str | None:
        """Why the fused kernel does not serve adapter ``name``; ``None`` when it does."""
        if not self._reads_weight:
            return f"{type(self.base_layer).__name__} computes a forward of its own"
        parts = (
            ("base layer", self.base_layer),
            ("lora_A", self.lora_A[name]),
            ("lora_B", self.lora_B[name]),
        )
        for label, module in parts:
            hooks = hooks_of(module)
            if hooks is not None:
                return f"its {label} carries {hooks}, which must run"
        return None

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """``lora_linear`` and arguments for 8 rows, or why it does not serve adapter ``name``."""
        reason = self.why_not_fused(name)
        if reason is not None:
            return f"not fused: {reason}"
        base = self.base_layer
        frozen: tuple[Any, ...]
        if isinstance(base, QuantizedLinear):
            q = base.quantized
            frozen, dtype = (q.weight, *q.statistics(), q.quant_type, q.blocksize), q.dtype
        else:
            weight = dense_weight(base)
            frozen, dtype = (weight, None, None, None, "dense", 0), weight.dtype
        x = torch.empty(8, self.in_features, dtype=dtype, device=frozen[0].device)
        low_rank = (*self.factors(name), self.scaling[name], 0.0, None)
        return "lora_linear", (x, *frozen, self.out_features, self.bias, *low_rank)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted linear map; x [..., in] -> [..., out] in the dtype of x (autocast obeyed)."""
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(x)
        y: Tensor | None = None
        for name in self._active_adapter:
            if name not in self.lora_A:
                continue
            if y is None:
                y = self._first(x, name)
            else:
                y = self._add(y, x, name)
        return self.base_layer(x) if y is None else y

    def _first(self, x: Tensor, name: str) -> Tensor:
        if self.why_not_fused(name) is not None:
            return self._add(self.base_layer(x), x, name)
        base = self.base_layer
        frozen = base.quantized if isinstance(base, QuantizedLinear) else dense_weight(base)
        down, up = self.factors(name)
        return functional.lora_linear(
            x,
            frozen,
            down,
            up,
            self.scaling[name],
            bias=self.bias,
            dropout_p=self.lora_dropout[name],
            training=self.training,
        )

    def _add(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        dropped = functional.dropout(x, self.lora_dropout[name], self.training)
        dropped = dropped.to(self.factors(name)[0].dtype)
        # Called, not read: hooks on the factors (sharding, offloading) must run.
        term = self.lora_B[name](self.lora_A[name](dropped)) * self.scaling[name]
        return (y + term).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """The update of one adapter: scaling * B A, fp32 [out, in]."""
        down, up = self.factors(name)
        return (up.float() @ down.float()) * self.scaling[name]

    def merge(
        self, adapter_names: list[str] | None = None, max_error: float | None = None
    ) -> float:
        """Write adapters into the base weight, so that they cost nothing at inference.

        Args:
            adapter_names: which; the active ones when left out.
            max_error: refuse before writing when rounding to the base's dtype or format would
                lose more than this share of the update.

        Returns:
            ||written - (base + update)|| / ||update||: what rounding lost.

        Raises:
            ValueError: an unknown adapter, a non-finite update, or an error above ``max_error``.
            RuntimeError: adapters are merged already.
        """
        if self.merged:
            raise RuntimeError(
                f"adapters {', '.join(self.merged_adapters)} are merged already; unmerge first"
            )
        if not self._reads_weight:
            raise RuntimeError(
                f"{type(self.base_layer).__name__} computes a forward of its own; its adapters "
                "cannot be merged into its weight"
            )
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        if adapter_names is None:
            names = [name for name in names if name in self.lora_A]
        for name in names:
            if name not in self.lora_A:
                known = ", ".join(self.adapter_names)
                raise ValueError(f"adapter_names: no adapter {name!r} here; there are: {known}")
        if not names:
            return 0.0
        delta = self.delta_weight(names[0])
        for name in names[1:]:
            delta += self.delta_weight(name)
        self._merge = merge_into(self.base_layer, delta, max_error)
        self.merged_adapters = names
        return self._merge.error

    def unmerge(self) -> None:
        """Put the base weight back exactly as it was; does nothing when nothing is merged."""
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
        return f"format={self.format!r}, r={self.r}, active={active!r}{state}"
