"""Gradient checkpointing over a frozen embedding.

Reentrant checkpointing computes gradients only when a layer's *input* requires one. The input of
the first layer is the output of a frozen embedding, so adapters would silently get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InputsNeedGrad:
    """Forward hook of an input embedding: its output requires grad while checkpointing is on."""

    def __init__(self, model: nn.Module) -> None:
        self._switches = [
            module
            for module in model.modules()
            if isinstance(getattr(module, "gradient_checkpointing", None), bool)
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and torch.is_grad_enabled()):
            return
        if output.requires_grad or not output.is_floating_point():
            return
        if any(switch.gradient_checkpointing and switch.training for switch in self._switches):
            output.requires_grad_(True)


def watch_input_embeddings(model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Install the hook on every module that a part of the model names as embedding its input.

    Encoders and decoders of one model have embeddings of their own, hence the walk over all parts.
    """
    embeddings: dict[int, nn.Module] = {}
    for module in model.modules():
        getter = getattr(type(module), "get_input_embeddings", None)
        if getter is None:
            continue
        try:
            embedding = getter(module)
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embedding, nn.Module):
            embeddings.setdefault(id(embedding), embedding)
    hook = InputsNeedGrad(model) if embeddings else None
    return [e.register_forward_hook(hook) for e in embeddings.values() if hook is not None]
