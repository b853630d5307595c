"""Finds the layers of a model that share their input, so that they compute together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from peftkern.hf.undo import UndoLog
from peftkern.nn.lora import LoRALinear
from peftkern.nn.shared import SharedInput, share_input

# What parents call layers that they give the same tensor, in the order of the calls. Whether they
# do is seen when the model runs (peftkern/nn/shared.py).
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("gate", "up"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Attentions whose keys and values are of other states than the queries, by their path.
_OTHER_STATES = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


class _Settle:
    """Before each call of the model: layers that turned out not to share their input part."""

    def __init__(self, groups: list[SharedInput]) -> None:
        self.groups = groups

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            for group in self.groups:
                group.settle()


def share_inputs(model: nn.Module, log: UndoLog) -> None:
    """Have LoRA layers compute together that their parents call with the same tensor.

    Args:
        model: patched; layers that share their input already are left as they are.
        log: what ends it.
    """
    groups = []
    for path, parent in model.named_modules():
        for layers in _candidates(path, parent._modules):
            shared = share_input(layers)
            if shared is not None:
                groups.append(shared)
                for layer in layers.values():
                    log.on_rollback(partial(_part, layer))
    if groups:
        log.on_rollback(model.register_forward_pre_hook(_Settle(groups)).remove)


def _part(layer: LoRALinear) -> None:
    layer.__dict__.pop("shared", None)


def _candidates(path: str, children: Mapping[str, nn.Module | None]) -> list[dict[str, LoRALinear]]:
    found = []
    for names in _TOGETHER:
        if len(names) == 3 and _OTHER_STATES.search(path):
            names = names[1:]
        layers: dict[str, LoRALinear] = {}
        for name in names:
            layer = children.get(name)
            if isinstance(layer, LoRALinear) and layer.shared is None:
                layers[name] = layer
        if len(layers) > 1 and len({layer.in_features for layer in layers.values()}) == 1:
            found.append(layers)
    return found
