"""What each method does to a model on the meta device, for planning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peftkern.hf.config import AdapterConfig

METHODS = ("lora", "qlora", "bottleneck", "prefix", "prompt", "full", "as-is")


@dataclass(frozen=True)
class Method:
    """How a method changes a model that has no bytes.

    Args:
        label: its name in the plan.
        apply: adds what is trained and freezes the rest.
    """

    label: str
    apply: Callable[[nn.Module], None]


def method_for(
    method: str | AdapterConfig, r: int, target_modules: Any, virtual_tokens: int, reduction: int
) -> Method:
    """The method by name or by configuration.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(method, AdapterConfig):
        return _patched(type(method).__name__, method)
    if method == "full":
        return Method(method, _train_all)
    if method == "as-is":
        return Method(method, _leave)
    if method not in METHODS:
        raise ValueError(
            f"method: got {method!r}, expected one of {', '.join(METHODS)}, or a configuration "
            "such as peftkern.LoRAConfig"
        )
    from peftkern import hf

    config: AdapterConfig
    if method == "bottleneck":
        config = hf.BottleneckConfig(reduction_factor=reduction)
    elif method == "prefix":
        config = hf.PrefixTuningConfig(num_virtual_tokens=virtual_tokens)
    elif method == "prompt":
        config = hf.PromptTuningConfig(num_virtual_tokens=virtual_tokens)
    else:
        quantize = "nf4" if method == "qlora" else None
        config = hf.LoRAConfig(r=r, target_modules=target_modules, quantize=quantize)
    return _patched(method, config)


def _patched(label: str, config: AdapterConfig) -> Method:
    from peftkern.hf.patching import patch

    if config.quantize is not None:
        config = replace(config, keep_original=False)  # there are no bytes to keep

    def apply(model: nn.Module) -> None:
        patch(model, config)

    return Method(label, apply)


def _train_all(model: nn.Module) -> None:
    model.requires_grad_(True)


def _leave(model: nn.Module) -> None:
    return None
