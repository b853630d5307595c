"""The fast forward of adapted and of plain quantized layers, and when it may be taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.functional.arguments import autocasts
from peftkern.hf.accelerate.bases import Base, base_of, why_not_base
from peftkern.nn.magnitude import RowNorms
from peftkern.nn.rows import BASE
from peftkern.nn.structure import hooks_of
from peftkern.quant import QuantizedTensor

_COUNTS = "_peftkern_counts"
NORMS = "_peftkern_norms"  # adapter -> RowNorms, with DoRA
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Counts:
    """What happened to the calls of one layer since it was swapped in.

    Args:
        fast: calls that our kernels served.
        fallbacks: reason -> calls that went to the original forward.
        merge_error: what requantizing lost of a merged update, while one is merged.
    """

    fast: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    merge_error: float | None = None


def counts_of(module: nn.Module) -> Counts:
    """The counters of a swapped layer."""
    counts: Counts = module.__dict__.setdefault(_COUNTS, Counts())
    return counts


class Accelerated(nn.Module):
    """What every swapped layer has: the class it stands for, and counters outside the state dict.

    Swapping changes the class of the instance and nothing else, so that modules, parameters, hooks
    and names stay; a call that the kernels do not cover goes to the class that was there before.
    """

    original_class: ClassVar[type[nn.Module]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The original layer's function, by our kernels where they cover the call."""
        reason = self.why_not(x, args, kwargs)
        if not torch.compiler.is_compiling():
            counts = counts_of(self)
            if reason is None:
                counts.fast += 1
            else:
                counts.fallbacks[reason] = counts.fallbacks.get(reason, 0) + 1
        if reason is None:
            return self.fast(x, **kwargs)
        return super().forward(x, *args, **kwargs)

    def why_not(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call goes to the original forward; ``None`` when our kernels serve it."""
        if args or kwargs:
            reason = self.why_not_arguments(x, args, kwargs)
            if reason is not None:
                return reason
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                return "called below a torch.func transform"
            if torch._C._get_tracing_state() is not None:
                return "called while torch traces or exports the model"
        return self.why_not_call(x, **kwargs)

    def why_not_arguments(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why further arguments keep the call off the fast path; ``None`` when they do not."""
        given = [name for name, value in kwargs.items() if value is not None]
        if args or given:
            return f"called with {', '.join(given) or 'further arguments'}"
        return None

    def why_not_call(self, x: Tensor, **kwargs: Any) -> str | None:
        """The layer's present state and the input together."""
        reason = self.why_not_now()
        return reason if reason is not None else self.why_not_input(x)

    def why_not_now(self) -> str | None:
        """Why the layer's present state keeps every call off the fast path; else ``None``."""
        raise AssertionError("subclasses know their state")

    def why_not_input(self, x: Tensor) -> str | None:
        """Why this input keeps the call off the fast path; ``None`` when it does not."""
        raise AssertionError("subclasses know their inputs")

    def fast(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The forward pass by our kernels."""
        raise AssertionError("subclasses know their maths")


class FusedQuantized(Accelerated):
    """A bitsandbytes layer on its own: the same bytes, our kernel."""

    def why_not_now(self) -> str | None:
        reason = why_not_base(self)
        return None if reason is None else reason.replace("its base layer", "it")

    def why_not_input(self, x: Tensor) -> str | None:
        return _why_not_activation(x, base_of(self))

    def fast(self, x: Tensor, **kwargs: Any) -> Tensor:
        base = base_of(self)
        assert isinstance(base.frozen, QuantizedTensor)
        run = functional.linear_8bit if base.frozen.quant_type == "int8" else functional.linear_4bit
        inner = x if base.compute is None else x.to(base.compute)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        y = run(inner, base.frozen, _bias_as(inner, bias))
        return y.to(x.dtype)


class FusedLora(Accelerated):
    """PEFT's LoRA on a linear layer: one kernel for the base and the low-rank term.

    Mixed before PEFT's class, whose attributes it reads; the contract is that of PEFT 0.21.
    """

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    lora_variant: dict[str, Any]
    scaling: dict[str, Any]
    base_layer: nn.Module
    disable_adapters: bool
    merged: bool
    active_adapters: list[str]

    def active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.lora_A]

    def why_not_arguments(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        rows = kwargs.get("adapter_names")
        if rows is None:
            return super().why_not_arguments(x, args, kwargs)
        others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        reason = super().why_not_arguments(x, args, others)
        if reason is not None:
            return reason
        if not isinstance(x, Tensor) or x.dim() < 2 or len(rows) != x.shape[0]:
            return "adapter_names does not fit the input"
        for name in self.named_here(rows):
            if name in self.lora_variant or self.lora_B[name].bias is not None:
                return f"adapter_names with {self._kind(name)}"
        return None

    def why_not_call(self, x: Tensor, **kwargs: Any) -> str | None:
        rows = kwargs.get("adapter_names")
        names = self.active_here() if rows is None else self.named_here(rows)
        reason = self.why_not_with(names, together=rows is None)
        return reason if reason is not None else self.why_not_input(x, names)

    def named_here(self, rows: Sequence[str]) -> list[str]:
        """The adapters among ``adapter_names`` that this layer has."""
        return [name for name in dict.fromkeys(rows) if name != BASE and name in self.lora_A]

    def why_not_now(self) -> str | None:
        return self.why_not_with(self.active_here())

    def why_not_with(self, names: list[str], together: bool = True) -> str | None:
        """Why these adapters, all on each row or one a row, keep the layer off the fast path."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapters are merged into the base"
        if not names:
            return "no active adapter here"
        for name in names:
            reason = self._why_not_adapter(name)
            if reason is not None:
                return reason
        if together and len(names) > 1:
            if any(name in self.lora_variant for name in names):
                return "several active adapters, one of them with DoRA"
            if self.training and any(_dropout_p(self.lora_dropout[name]) for name in names):
                return "several active adapters with dropout"
        return why_not_base(self.base_layer)

    def _kind(self, name: str) -> str:
        variant = self.lora_variant.get(name)
        return "lora_bias" if variant is None else type(variant).__name__

    def _why_not_adapter(self, name: str) -> str | None:
        parts = [("lora_A", self.lora_A[name]), ("lora_B", self.lora_B[name])]
        if name in self.lora_variant:
            if self._kind(name) != "DoraLinearVariant" or self.lora_B[name].bias is not None:
                return f"adapter variant {self._kind(name)}"
            magnitude = self.lora_magnitude_vector[name]
            if type(magnitude).__name__ != "DoraLinearLayer":
                return f"its magnitude is {type(magnitude).__name__}"
            hooks = hooks_of(magnitude)
            if hooks is not None:
                return f"its lora_magnitude_vector carries {hooks}, which must run"
            if magnitude.weight.device != self.lora_A[name].weight.device:
                return "its magnitude is on another device than its other parameters"
        for label, module in parts:
            if type(module) is not nn.Linear:
                return f"its {label} is {type(module).__name__}, not a plain nn.Linear"
            hooks = hooks_of(module)
            if hooks is not None:
                return f"its {label} carries {hooks}, which must run"
            # A plain tensor is a view that FSDP put there for this pass.
            if type(module.weight) not in (nn.Parameter, Tensor):
                return f"its {label} weight is a {type(module.weight).__name__}"
        dropout = self.lora_dropout[name]
        if type(dropout) not in (nn.Identity, nn.Dropout) or hooks_of(dropout) is not None:
            return f"its dropout is {type(dropout).__name__} or carries hooks"
        return None

    def why_not_input(self, x: Tensor, names: list[str] | None = None) -> str | None:
        base = base_of(self.base_layer)
        reason = _why_not_activation(x, base)
        if reason is not None:
            return reason
        autocast = autocasts(x)
        dtype = base.compute or x.dtype
        if not autocast:
            if isinstance(base.frozen, Tensor) and base.frozen.dtype != x.dtype:
                return f"its base weight is {base.frozen.dtype} under {x.dtype} activations"
            bias = self.base_layer.bias
            if bias is not None and not base.restores and bias.dtype not in (dtype, torch.float32):
                return f"its base bias is {bias.dtype} under {dtype} activations"
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = set()
        for name in self.active_here() if names is None else names:
            for factor in (self.lora_A[name].weight, self.lora_B[name].weight):
                assert isinstance(factor, Tensor)
                if factor.device != x.device:
                    return "its adapter is on another device than its input"
                if not autocast and factor.dtype not in (dtype, wide):
                    return f"its adapter is {factor.dtype} under {dtype} activations"
                dtypes.add(factor.dtype)
        if len(dtypes) > 1:
            return "its adapters differ in dtype"
        return None

    def fast(self, x: Tensor, **kwargs: Any) -> Tensor:
        rows = kwargs.get("adapter_names")
        base = base_of(self.base_layer)
        inner = x if base.compute is None else x.to(base.compute)
        y = self._mixed(inner, base, rows) if rows is not None else self._together(inner, base)
        return y.to(x.dtype) if base.restores else y

    def _together(self, x: Tensor, base: Base) -> Tensor:
        names = self.active_here()
        down, up, scaling = self.factors(names)
        bias = self._bias(names, x)
        p = _dropout_p(self.lora_dropout[names[0]]) if len(names) == 1 else 0.0
        if names[0] not in self.lora_variant:
            low_rank = (down, up, scaling, bias, p, self.training)
            return functional.lora_linear(x, base.frozen, *low_rank)
        magnitude: Tensor = self.lora_magnitude_vector[names[0]].weight  # type: ignore[assignment]
        norm = None  # computed in the call
        if not torch.compiler.is_compiling():
            kept: dict[str, RowNorms] = self.__dict__.setdefault(NORMS, {})
            norm = kept.setdefault(names[0], RowNorms())(base.frozen, down, up, scaling)
        low_rank_rows = (down, up, magnitude, scaling, bias, p, self.training)
        return functional.dora_linear(x, base.frozen, *low_rank_rows, weight_norm=norm)

    def _mixed(self, x: Tensor, base: Base, rows: Sequence[str]) -> Tensor:
        """Each entry of x's first dimension with the adapter that ``adapter_names`` gives it."""
        names = self.named_here(rows)
        number = {name: i for i, name in enumerate(names)}
        return functional.multi_lora_linear(
            x,
            base.frozen,
            self._each(names),
            torch.tensor([number.get(name, -1) for name in rows], device=x.device),
            bias=_bias_as(x, self.base_layer.bias),  # type: ignore[arg-type]
            dropout_p=[_dropout_p(self.lora_dropout[name]) for name in names],
            training=self.training,
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        self.__dict__.pop(NORMS, None)  # they are norms of the weight that changes now
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        """As PEFT's."""
        self.__dict__.pop(NORMS, None)
        super().unmerge()  # type: ignore[misc]

    def factors(self, names: list[str] | None = None) -> tuple[Tensor, Tensor, float]:
        """A, B and scaling of the active adapters; several become one of their summed rank."""
        names = self.active_here() if names is None else names
        scales = [self.scaling[name] for name in names]
        down = [self.lora_A[name].weight for name in names]
        up = [self.lora_B[name].weight for name in names]
        if len(names) == 1 and not isinstance(scales[0], Tensor):
            return down[0], up[0], float(scales[0])  # type: ignore[return-value]
        # A scaling that differs between adapters, or that PEFT keeps as a tensor so that hot
        # swapping need not recompile, goes into B; in fp32, where it costs no precision.
        scaled = [_wide(b) * s for b, s in zip(up, scales, strict=True)]
        if len(names) == 1:
            return _wide(down[0]), scaled[0], 1.0
        return torch.cat([_wide(a) for a in down]), torch.cat(scaled, dim=1), 1.0

    def _each(self, names: list[str]) -> list[tuple[Tensor, Tensor, float]]:
        """A, B and scaling of each of these adapters, in one dtype."""
        each = [self.factors([name]) for name in names]
        if len({down.dtype for down, _, _ in each}) == 1:
            return each
        return [(_wide(down), _wide(up), scaling) for down, up, scaling in each]

    def _bias(self, names: list[str], inner: Tensor) -> Tensor | None:
        """The base's bias and those of the adapters (``lora_bias=True``), which are scaled."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        for name in names:
            extra: Tensor | None = self.lora_B[name].bias  # type: ignore[assignment]
            if extra is not None:
                term = _wide(extra) * self.scaling[name]
                bias = term if bias is None else bias + term
        return _bias_as(inner, bias)


def _wide(value: Any) -> Tensor:
    """At least fp32."""
    tensor: Tensor = value
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bias_as(x: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None or autocasts(x):
        return bias
    return bias.to(x.dtype)


def _dropout_p(module: Any) -> float:
    return float(module.p) if isinstance(module, nn.Dropout) else 0.0


def _why_not_activation(x: Any, base: Base) -> str | None:
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        return f"its input is not a float tensor ({getattr(x, 'dtype', type(x).__name__)})"
    if type(x) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        return f"its input is a {type(x).__name__}"
    if x.dim() == 0 or x.shape[-1] != base.frozen.shape[1]:
        return "its input does not fit the weight"
    if x.device != base.frozen.device:
        return "its input is on another device than its weight"
    return None
