"""What kind of linear layer a module is, told from its structure, never from a model's name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HOOKS = (
    ("_forward_hooks", "forward hooks"),
    ("_forward_pre_hooks", "forward pre-hooks"),
    ("_backward_hooks", "backward hooks"),
    ("_backward_pre_hooks", "backward pre-hooks"),
)


def class_names(module: nn.Module) -> set[str]:
    """Names of the module's class and of all its bases."""
    return {cls.__name__ for cls in type(module).__mro__}


def is_conv1d(module: nn.Module) -> bool:
    """True for the GPT-2 family's ``Conv1D``: a linear layer whose weight is stored [in, out]."""
    if type(module) is nn.Linear:  # most layers, asked in every forward pass
        return False
    if "Conv1D" not in class_names(module):
        return False
    weight = getattr(module, "weight", None)
    width = getattr(module, "nf", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == width


def is_dense_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and ``Conv1D`` with a floating point weight of two dimensions."""
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as [out, in]; a transposed view for ``Conv1D``."""
    weight = module.weight
    return weight.t() if is_conv1d(module) else weight  # type: ignore[operator, return-value]


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, dense or quantized."""
    if is_conv1d(module):
        inner, outer = module.weight.shape  # type: ignore[misc]
        return int(inner), int(outer)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def hooks_of(module: nn.Module) -> str | None:
    """Which hooks the module carries, in words; ``None`` when calling it is just its forward."""
    if not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        return None
    for attribute, words in _HOOKS:
        if getattr(module, attribute, None):
            return words
    if "forward" in module.__dict__:  # accelerate's hooks replace forward on the instance
        return "a forward bound on the instance"
    return None


def own_forward(module: nn.Module) -> bool:
    """True when a subclass computes something of its own instead of the plain linear map."""
    if is_conv1d(module):
        conv1d = next(c for c in type(module).__mro__ if c.__name__ == "Conv1D")
        return type(module).forward is not conv1d.forward  # type: ignore[attr-defined]
    return type(module).forward is not nn.Linear.forward


def is_parametrized(module: nn.Module) -> bool:
    """True when the weight is recomputed from other parameters (``torch.nn.utils.parametrize``)."""
    return "weight" not in module._parameters


def default_device(module: nn.Module) -> torch.device:
    """Device of the module's first parameter; the CPU when it has none."""
    first = next(module.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
