"""Which module classes can be adapted, how, and why the others cannot: one table.

A rule says how a kind of layer is recognised (by structure), what the adapter then stands on, and
whether its weight may be quantized. New kinds of layers are new rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from peftkern.nn import Linear4bit, Linear8bit
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import (
    hooks_of,
    is_conv1d,
    is_dense_linear,
    is_parametrized,
    own_forward,
)


@dataclass(frozen=True)
class Rule:
    """How one kind of layer is handled.

    Args:
        kind: what reports call it.
        matches: whether a module is of this kind.
        base: the module that the adapter wraps, made from the original.
        refusal: why this instance cannot be adapted, or None.
        quantizable: why this instance cannot be quantized, or None.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    base: Callable[[nn.Module], nn.Module]
    refusal: Callable[[nn.Module], str | None]
    quantizable: Callable[[nn.Module], str | None]


def _is_bnb(name: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        return any(
            cls.__name__ == name and cls.__module__.startswith("bitsandbytes.")
            for cls in type(module).__mro__
        )

    return matches


def _same(module: nn.Module) -> nn.Module:
    return module


def _never(module: nn.Module) -> str | None:
    return None


def _already(module: nn.Module) -> str | None:
    return "is quantized already"


def _refuse_hooked(module: nn.Module) -> str | None:
    hooks = hooks_of(module)
    return f"carries {hooks}, which would be lost" if hooks is not None else None


def _refuse_dense(module: nn.Module) -> str | None:
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if module.weight.device.type == "meta" and hooks_of(module) is not None:
        return "its weight is offloaded and lives in a hook"
    return None


def _quantizable_dense(module: nn.Module) -> str | None:
    if own_forward(module):
        return f"{type(module).__name__} computes a forward of its own"
    if is_parametrized(module):
        return "its weight is recomputed by a parametrization"
    return _refuse_hooked(module)


RULES: tuple[Rule, ...] = (
    Rule("quantized", lambda m: isinstance(m, QuantizedLinear), _same, _never, _already),
    Rule("bnb 4-bit", _is_bnb("Linear4bit"), Linear4bit.from_bnb, _refuse_hooked, _already),
    Rule("bnb 8-bit", _is_bnb("Linear8bitLt"), Linear8bit.from_bnb, _refuse_hooked, _already),
    Rule(
        "Conv1D",
        lambda m: is_conv1d(m) and is_dense_linear(m),
        _same,
        _refuse_dense,
        _quantizable_dense,
    ),
    Rule(
        "Linear",
        lambda m: isinstance(m, nn.Linear) and is_dense_linear(m),
        _same,
        _refuse_dense,
        _quantizable_dense,
    ),
)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module; ``None`` when no rule takes its class."""
    for rule in RULES:
        if rule.matches(module):
            return rule
    return None


def is_foreign_adapter(module: nn.Module) -> bool:
    """True for another library's adapter layer around a base layer (PEFT's tuner layers)."""
    own = module._modules
    return "base_layer" in own and any(name.startswith(("lora_", "ia3_", "oft_")) for name in own)


def why_unknown(module: nn.Module) -> str:
    """Why a module that no rule takes cannot be adapted."""
    if isinstance(module, nn.Linear):
        weight = module.weight
        return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}, not a dense matrix"
    if isinstance(module, nn.Embedding):
        return "nn.Embedding is a table, not a linear layer"
    if next(module.children(), None) is not None:
        return f"{type(module).__name__} is a container, not a linear layer"
    return f"{type(module).__name__} is not a linear layer"
