"""The frozen layer below an adapter, or alone: what its weight is and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import (
    class_names,
    dense_weight,
    hooks_of,
    is_conv1d,
    is_dense_linear,
    is_parametrized,
    own_forward,
)
from peftkern.quant import QuantizedTensor

_VIEW = "_peftkern_view"
BNB_CLASSES = ("Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class Base:
    """A frozen weight as the functional API takes it.

    Args:
        frozen: dense [out, in] (possibly a transposed view) or quantized.
        compute: dtype the layer was told to compute in; ``None`` for the input's.
        restores: whether the result goes back to the input's dtype, as in bitsandbytes' layers.
    """

    frozen: Tensor | QuantizedTensor
    compute: torch.dtype | None
    restores: bool


@dataclass
class _View:
    """The bytes of a bitsandbytes weight, and what they were read from."""

    weight: Any
    state: Any
    address: int
    q: QuantizedTensor


def is_bnb_linear(module: nn.Module) -> bool:
    """True for bitsandbytes' quantized linear layers and their subclasses."""
    return any(
        cls.__name__ in BNB_CLASSES and cls.__module__.startswith("bitsandbytes.")
        for cls in type(module).__mro__
    )


def why_not_base(module: nn.Module) -> str | None:
    """Why our kernels cannot stand in for the forward of ``module``; ``None`` when they can."""
    hooks = hooks_of(module)
    if hooks is not None:
        return f"its base layer carries {hooks}, which must run"
    if isinstance(module, QuantizedLinear):
        return None
    if is_bnb_linear(module):
        return _why_not_bnb(module)
    if not is_dense_linear(module):
        return f"its base layer is {type(module).__name__}, which no kernel covers"
    if own_forward(module):
        return f"its base layer {type(module).__name__} computes a forward of its own"
    # A plain tensor as an attribute is a view that FSDP put there for this pass; what else leaves
    # one (torch.nn.utils.weight_norm) computes it in a hook.
    if is_parametrized(module) and type(module.__dict__.get("weight")) is not Tensor:
        return "the weight of its base layer is recomputed by a parametrization"
    if module.weight.requires_grad and torch.is_grad_enabled():
        return "the weight of its base layer is trainable"
    return None


def base_of(module: nn.Module) -> Base:
    """The weight of a layer for which :func:`why_not_base` has no reason; nothing is copied."""
    if isinstance(module, QuantizedLinear):
        return Base(module.quantized, None, False)
    if is_bnb_linear(module):
        compute = module.compute_dtype if "Linear4bit" in class_names(module) else None
        return Base(_view(module).q, compute, True)  # type: ignore[arg-type]
    return Base(dense_weight(module), None, False)


def forget(module: nn.Module) -> None:
    """Drop what was remembered about the bytes of a bitsandbytes layer."""
    module.__dict__.pop(_VIEW, None)


def _why_not_bnb(module: Any) -> str | None:
    weight = module.weight
    if weight.device.type == "meta":
        return "its weight is on the meta device"
    state = getattr(module, "state", None)
    if state is not None and getattr(state, "has_fp16_weights", False):
        return "its 8-bit base keeps half precision weights (has_fp16_weights)"
    try:
        _view(module)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("source: ")
    return None


def _view(module: Any) -> _View:
    """The layer's bytes as a QuantizedTensor, read again when the weight or its state changed."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    held: _View | None = module.__dict__.get(_VIEW)
    if held is not None and held.weight is weight and held.state is state:
        # Moving a model changes the data below the same parameter.
        if torch.compiler.is_compiling() or held.address == weight.data_ptr():
            return held
    view = _View(weight, state, weight.data_ptr(), QuantizedTensor.from_bnb(module))
    module.__dict__[_VIEW] = view
    return view


def format_of(module: nn.Module) -> str:
    """``"dense"``, ``"nf4"``, ``"fp4"``, ``"int8"``, or ``"unknown"``."""
    if isinstance(module, QuantizedLinear):
        return module.quantized.quant_type
    if is_bnb_linear(module):
        if "Linear8bitLt" in class_names(module):
            return "int8"
        return str(getattr(module.weight, "quant_type", "unknown"))
    return "dense" if is_dense_linear(module) or is_conv1d(module) else "unknown"
