"""``LoRALinear``: low-rank adapters beside a frozen linear layer, dense or quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.arguments import real, share, whole
from peftkern.functional.arguments import FrozenBase
from peftkern.nn.adapter import check_adapter_name
from peftkern.nn.lora_init import (
    changes_base,
    check_initialisation,
    draw_factors,
    split_base,
)
from peftkern.nn.magnitude import Magnitude
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.rows import RowChoice, by_rows
from peftkern.nn.shared import SharedInput
from peftkern.nn.structure import (
    default_device,
    dense_weight,
    features,
    hooks_of,
    is_conv1d,
    is_dense_linear,
    own_forward,
)
from peftkern.nn.weight_adapter import WeightAdapter
from peftkern.quant import QuantizedTensor


class LoRALinear(WeightAdapter):
    """``y = base(x) + scaling * dropout(x) A^T B^T`` for every active adapter.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, ``Linear4bit`` or ``Linear8bit``; it is
            frozen in place and not copied.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of the adapter, in [0, 1).
        use_rslora: scaling lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_name: name of the first adapter.
        init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A ~ N(0, 1/r), B zero),
            ``"orthogonal"`` (neither zero, but B A is), or False (both random, for tests).
            ``"pissa"``, ``"pissa_niter_<n>"``, ``"olora"`` and ``"loftq"`` move a part of the
            weight into the adapter: ``base_layer`` is then a changed copy, and disabling the
            adapter leaves that changed base (:mod:`peftkern.nn.lora_init`).
        lora_dtype: dtype of A and B, float32 when left out.
        use_dora: learn the length of each row of the adapted weight (DoRA, arXiv 2402.09353).
        lora_bias: a trained bias on B.
        loftq_config: ``{"loftq_bits": 4 or 8, "loftq_iter": n}`` for ``"loftq"``.
        make_base: makes the base from the layer with the rest of the weight, where the
            initialisation changes it: ``Linear4bit.from_linear``, say.

    Raises:
        TypeError: the base layer is not a linear layer, or not a dense one where the
            initialisation changes it.
        ValueError: a number out of range, or options that exclude one another.

    Attribute names are PEFT's: ``base_layer``, ``lora_A[name]`` [r, in] and ``lora_B[name]``
    [out, r] (``nn.Linear``), ``lora_magnitude_vector[name].weight`` [out], ``r``, ``lora_alpha``,
    ``scaling``, ``lora_dropout``, ``use_dora``, ``lora_bias``.

    Example:
        >>> layer = LoRALinear(torch.nn.Linear(64, 32), r=4, lora_alpha=8)
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    _adapter_containers = ("lora_A", "lora_B", "lora_magnitude_vector")
    _adapter_tables = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "scaling",
        "taken",
    )
    on_linear = True
    serves_rows = True
    shared: SharedInput | None = None  # with the layers that compute together with this one

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
        use_dora: bool = False,
        lora_bias: bool = False,
        loftq_config: Mapping[str, int] | None = None,
        make_base: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        if not (isinstance(base_layer, QuantizedLinear) or is_dense_linear(base_layer)):
            raise TypeError(
                "base_layer: expected nn.Linear, Conv1D, Linear4bit or Linear8bit, got "
                f"{type(base_layer).__name__}"
            )
        super().__init__()
        check_adapter_name(adapter_name)
        _check_numbers(r, lora_alpha, lora_dropout)
        check_initialisation(init_lora_weights, r)
        factors: tuple[Tensor, Tensor] | None = None
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        if isinstance(init_lora_weights, str) and changes_base(init_lora_weights):
            begun = split_base(base_layer, init_lora_weights, r, scaling, loftq_config, make_base)
            base_layer, factors = begun.base, (begun.lora_A, begun.lora_B)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        # What an adapter took out of the base weight, for conversion to a plain one.
        self.taken: dict[str, tuple[str, Tensor, Tensor]] = {}
        # A subclass with a forward of its own is called; reading its weight would skip its maths.
        plain = isinstance(base_layer, QuantizedLinear) or not own_forward(base_layer)
        self._reads_weight = plain
        self.training = base_layer.training
        self._add_adapter(
            adapter_name,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            lora_dtype,
            use_dora,
            lora_bias,
            factors,
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
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """Add an adapter and make it the active one; arguments as for the class.

        Raises:
            ValueError: the name is taken or not usable, a number is out of range, or the
                initialisation would change the base under the adapters that stand on it.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        if self.merged:
            raise RuntimeError("adapters are merged into the base; unmerge before adding another")
        _check_numbers(r, lora_alpha, lora_dropout)
        check_initialisation(init_lora_weights, r)
        if changes_base(init_lora_weights):
            raise ValueError(
                f"init_lora_weights: {init_lora_weights!r} changes the base weight, on which "
                f"{', '.join(self.adapter_names)} stands already; make it the first adapter"
            )
        options = (use_rslora, init_lora_weights, lora_dtype, use_dora, lora_bias, None)
        self._add_adapter(adapter_name, r, lora_alpha, lora_dropout, *options)

    def _add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init: bool | str,
        lora_dtype: torch.dtype | None,
        use_dora: bool,
        lora_bias: bool,
        factors: tuple[Tensor, Tensor] | None,
    ) -> None:
        if use_dora and lora_bias:
            raise ValueError("use_dora and lora_bias exclude one another")
        if use_dora and not self._reads_weight:
            raise ValueError(
                f"use_dora: {type(self.base_layer).__name__} computes a forward of its own, which "
                "need not be linear in its weight"
            )
        inner, outer = features(self.base_layer)
        device = default_device(self.base_layer)
        where = device if device.type == "meta" else torch.device("cpu")
        # Drawn on the CPU in PEFT's order (both layers, then A again): one seed gives the same
        # adapter on every device and in both libraries.
        down = nn.Linear(inner, r, bias=False, device=where, dtype=torch.float32)
        up = nn.Linear(r, outer, bias=lora_bias, device=where, dtype=torch.float32)
        draw_factors(down, up, init, r, self._base_dtype)
        if factors is not None:
            with torch.no_grad():
                down.weight.copy_(factors[0])
                up.weight.copy_(factors[1])
        dtype = lora_dtype if lora_dtype is not None else torch.float32
        down.to(device=device, dtype=dtype).train(self.training)
        up.to(device=device, dtype=dtype).train(self.training)
        self.lora_A[name] = down
        self.lora_B[name] = up
        self.r[name] = r
        self.lora_alpha[name] = lora_alpha
        self.lora_dropout[name] = float(lora_dropout)
        self.use_rslora[name] = bool(use_rslora)
        self.use_dora[name] = bool(use_dora)
        self.lora_bias[name] = bool(lora_bias)
        self.scaling[name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        if factors is not None:
            a, b = self.factors(name)
            self.taken[name] = str(init), a.detach().clone(), b.detach().clone()
        if use_dora:
            a, b = self.factors(name)
            norm = functional.dora_weight_norm(self._frozen, a, b, self.scaling[name])
            held = Magnitude(norm.to(dtype)).train(self.training)
            self.lora_magnitude_vector[name] = held
        self.set_adapter(name)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        base: Any = self._modules["base_layer"]
        bias: Tensor | None = base.bias
        return bias

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

    @property
    def _frozen(self) -> Tensor | QuantizedTensor:
        base = self.base_layer
        return base.quantized if isinstance(base, QuantizedLinear) else dense_weight(base)

    @property
    def _taken_apart(self) -> Tensor | FrozenBase:
        base: Any = self._modules["base_layer"]
        return base.taken_apart() if isinstance(base, QuantizedLinear) else dense_weight(base)

    @property
    def _base_dtype(self) -> torch.dtype:
        base = self.base_layer
        return base.quantized.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype  # type: ignore[return-value]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The weights A [r, in] and B [out, r] of one adapter."""
        # Not as attributes: nn.Module looks for those in Python, three times here.
        modules: dict[str, Any] = self._modules
        down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return down.weight, up.weight

    def why_not_fused(self, name: str) -> str | None:
        """Why the fused kernel does not serve adapter ``name``; ``None`` when it does."""
        if not self._reads_weight:
            return f"{type(self.base_layer).__name__} computes a forward of its own"
        modules: dict[str, Any] = self._modules
        for label, module in (
            ("base layer", modules["base_layer"]),
            ("lora_A", modules["lora_A"]._modules[name]),
            ("lora_B", modules["lora_B"]._modules[name]),
            ("lora_magnitude_vector", modules["lora_magnitude_vector"]._modules.get(name)),
        ):
            hooks = None if module is None else hooks_of(module)
            if hooks is not None:
                return f"its {label} carries {hooks}, which must run"
        return None

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """The op and arguments for 8 rows, or why it does not serve adapter ``name``."""
        reason = self.why_not_fused(name)
        if reason is not None:
            return f"not fused: {reason}"
        base = self.base_layer
        stored: tuple[Any, ...]
        if isinstance(base, QuantizedLinear):
            q = base.quantized
            stored = (q.weight, *q.statistics(), q.quant_type, q.blocksize)
        else:
            stored = (dense_weight(base), None, None, None, "dense", 0)
        x = torch.empty(8, self.in_features, dtype=self._base_dtype, device=stored[0].device)
        shared = (x, *stored, self.out_features, self.bias, *self.factors(name))
        if self.use_dora[name]:
            wide = torch.promote_types(x.dtype, torch.float32)
            scale = torch.ones(self.out_features, dtype=wide, device=x.device)
            return "dora_linear", (*shared, scale, self.scaling[name], 0.0, None, True)
        return "lora_linear", (*shared, self.scaling[name], 0.0, None)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted linear map; x [..., in] -> [..., out] in the dtype of x (autocast obeyed)."""
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(x)
        choice = self.row_choice()
        if choice is not None:
            return self._mixed(x, choice)
        if self.shared is not None:
            y = self.shared.output(self, x)
            if y is not None:
                return y
        return self._sum(x, self._active_adapter)

    def projection(self, alone: bool) -> functional.LoRAProjection | None:
        """The layer as one of a group; ``None`` where a group does not compute what it does.

        Args:
            alone: it is computed before it is called, so that hooks on its call must not matter.
        """
        if self._disable_adapters or self.merged_adapters or self.row_choice() is not None:
            return None
        names = [name for name in self._active_adapter if name in self.lora_A]
        if len(names) != 1 or self.use_dora[names[0]] or self.why_not_fused(names[0]) is not None:
            return None
        if alone and (self._forward_pre_hooks or "forward" in self.__dict__):
            return None
        name = names[0]
        down, up = self.factors(name)
        if down.numel() != self.r[name] * self.in_features:  # sharded, and not gathered now
            return None
        bias = self.bias
        if self.lora_bias[name]:
            extra = self._bias_term(name)
            bias = extra if bias is None else bias + extra
        p = self.lora_dropout[name] if self.training else 0.0
        return functional.LoRAProjection(self._taken_apart, down, up, self.scaling[name], bias, p)

    def _sum(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        y: Tensor | None = None
        known = self._modules["lora_A"]._modules  # type: ignore[union-attr]
        for name in names:
            if name is None or name not in known:
                continue
            if y is None:
                y = self._first(x, name)
            else:
                y = self._add(y, x, name)
        return self.base_layer(x) if y is None else y

    def _mixed(self, x: Tensor, choice: RowChoice) -> Tensor:
        here = tuple(name for name in choice.table if name in self.lora_A)
        if not here:
            choice.for_rows(x.shape[0])
            return self.base_layer(x)
        if any(
            self.use_dora[name] or self.lora_bias[name] or self.why_not_fused(name) is not None
            for name in here
        ):
            return by_rows(choice, x, lambda name, part: self._sum(part, (name,)), here)
        return functional.multi_lora_linear(
            x,
            self._frozen,
            [(*self.factors(name), self.scaling[name]) for name in here],
            choice.ids(here, x.shape[0], x.device),
            bias=self.bias,
            dropout_p=[self.lora_dropout[name] for name in here],
            training=self.training,
        )

    def _first(self, x: Tensor, name: str) -> Tensor:
        if self.why_not_fused(name) is not None:
            return self._add(self.base_layer(x), x, name)
        scaling, p = self.scaling[name], self.lora_dropout[name]
        down, up = self.factors(name)
        bias = self.bias
        if self.use_dora[name]:
            frozen, magnitude = self._frozen, self._magnitude(name)
            norm = magnitude.norm(frozen, down, up, scaling)
            low_rank = (down, up, magnitude.weight, scaling, bias, p, self.training)
            return functional.dora_linear(x, frozen, *low_rank, weight_norm=norm)
        if self.lora_bias[name]:
            extra = self._bias_term(name)
            bias = extra if bias is None else bias + extra
        base = self._taken_apart
        return functional.lora_linear(x, base, down, up, scaling, bias, p, self.training)

    def _bias_term(self, name: str) -> Tensor:
        bias = self.lora_B[name].bias
        assert isinstance(bias, Tensor)
        return bias * self.scaling[name]

    def _add(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        scaling = self.scaling[name]
        down, up = self.factors(name)
        dropped = functional.dropout(x, self.lora_dropout[name], self.training)
        # Called, not read: hooks on the factors (sharding, offloading) must run.
        term = self.lora_B[name](self.lora_A[name](dropped.to(down.dtype))) * scaling
        if self.use_dora[name]:
            magnitude = self._magnitude(name)
            # PEFT's order: without dropout the rows rescale what was computed so far; with it the
            # base sees the dropped input a second time.
            dropping = self.training and self.lora_dropout[name] > 0.0
            so_far = self.base_layer(dropped) if dropping else y
            if self.bias is not None:
                so_far = so_far - self.bias
            ratio = magnitude.weight / magnitude.norm(self._frozen, down, up, scaling)
            term = (ratio - 1) * so_far + ratio * term
        return (y + term).to(y.dtype)

    def _magnitude(self, name: str) -> Magnitude:
        return self.lora_magnitude_vector[name]  # type: ignore[return-value]

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """The update of one adapter: scaling * B A, fp32 [out, in]."""
        down, up = self.factors(name)
        return (up.float() @ down.float()) * self.scaling[name]

    def change(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What these adapters, in this order, add to the base's weight and bias, fp32."""
        biased = [name for name in names if self.lora_bias[name]]
        if biased and self.bias is None:
            raise ValueError(
                f"adapter {biased[0]!r} has a bias (lora_bias), but the base layer has none to "
                "merge it into"
            )
        terms = [self._bias_term(name).float() for name in biased]
        return self._update(names), torch.stack(terms).sum(0) if terms else None

    def _update(self, names: Sequence[str]) -> Tensor:
        """What these adapters, in this order, add to the base weight: fp32 [out, in]."""
        if not any(self.use_dora[name] for name in names):
            return super().change(names)[0]
        frozen = self._frozen
        dense = frozen.dequantize(torch.float32) if isinstance(frozen, QuantizedTensor) else frozen
        base = dense.float()
        merged = base
        for name in names:
            merged = merged + self.delta_weight(name)
            if self.use_dora[name]:
                magnitude = self._magnitude(name)
                norm = magnitude.norm(frozen, *self.factors(name), self.scaling[name])
                merged = (magnitude.weight.float() / norm.float())[:, None] * merged
        return merged - base

    def extra_repr(self) -> str:
        active = ",".join(self._active_adapter)
        state = ", disabled" if self._disable_adapters else ", merged" if self.merged else ""
        return f"format={self.format!r}, r={self.r}, active={active!r}{state}"


def _check_numbers(r: int, lora_alpha: float, lora_dropout: float) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: expected a positive integer, got {r!r}")
    whole("r", r)
    real("lora_alpha", lora_alpha)
    share("lora_dropout", lora_dropout)
