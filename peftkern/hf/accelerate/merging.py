"""Merging PEFT's adapters into a base layer that peftkern quantized."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.hf.accelerate.fused import counts_of
from peftkern.nn.merging import Merged, merge_into, unmerge_from
from peftkern.nn.quantized import QuantizedLinear

logger = logging.getLogger("peftkern")
_MERGES = "_peftkern_merges"


@dataclass
class Written:
    """What one merge changed: names, the bytes before, and the bias before."""

    names: list[str]
    merged: Merged
    bias: Tensor | None


@torch.no_grad()
def merge(layer: Any, base: Any, names: list[str]) -> None:
    """Dequantize, add the adapters, requantize once, and note what rounding lost.

    Args:
        layer: PEFT's LoRA layer.
        base: its base layer, one of peftkern's quantized layers.
        names: adapters to merge.

    Raises:
        ValueError: the update is not finite.
        RuntimeError: an adapter has a bias (``lora_bias=True``) and the base has none.
    """
    plain = [name for name in names if name not in layer.lora_variant]
    groups = [plain] if len(plain) == len(names) else [[name] for name in names]
    for group in groups:
        before = base.bias
        if before is None and any(layer.lora_bias[name] for name in group):
            raise RuntimeError(
                f"adapters {', '.join(group)} have a bias (lora_bias=True) and the base layer "
                "none to merge it into"
            )
        written = merge_into(base, _delta(layer, base, group), max_error=None)
        kept = None if before is None else before.detach().clone()
        for name in group:
            if before is not None and layer.lora_bias[name]:
                before.data += layer.lora_B[name].bias * layer.scaling[name]
        layer.__dict__.setdefault(_MERGES, []).append(Written(group, written, kept))
        layer.merged_adapters.extend(group)
        counts_of(layer).merge_error = written.error
        logger.info(
            "merged %s into a %s weight: requantizing lost %.1f %% of the update",
            ", ".join(group),
            base.quantized.quant_type,
            100 * written.error,
        )


@torch.no_grad()
def unmerge(layer: Any, base: QuantizedLinear) -> None:
    """Put back the bytes that stood there before the adapters were merged; exact."""
    for entry in reversed(layer.__dict__.pop(_MERGES, [])):
        unmerge_from(base, entry.merged)
        if entry.bias is not None:
            base.bias.data.copy_(entry.bias)
        for name in entry.names:
            layer._caches.pop(f"{name}-weight_norm", None)
    layer.merged_adapters.clear()
    counts_of(layer).merge_error = None


def _delta(layer: Any, base: QuantizedLinear, names: list[str]) -> Tensor:
    name = names[0]
    if name in layer.lora_variant:
        dense = base.dequantize(torch.float32)
        return layer.lora_variant[name].merge_safe(layer, name, dense.clone()) - dense
    total = torch.zeros(base.out_features, base.in_features, device=base.weight.device)
    for each in names:
        down, up = layer.lora_A[each].weight, layer.lora_B[each].weight
        total += (up.float() @ down.float()) * layer.scaling[each]
    return total
