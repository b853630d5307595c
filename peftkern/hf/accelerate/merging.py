"""Merging PEFT's adapters into a base layer that peftkern quantized."""

from __future__ import annotations

import functools
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.hf.accelerate.fused import Accelerated, counts_of
from peftkern.nn.merging import Merged, merge_into, unmerge_from
from peftkern.nn.quantized import QuantizedLinear

logger = logging.getLogger("peftkern")
_MERGES = "_peftkern_merges"
_TAUGHT = "_peftkern_taught"


@dataclass
class Written:
    """What one merge changed: names, the bytes before, and the bias before."""

    names: list[str]
    merged: Merged
    bias: Tensor | None


def teach_peft() -> None:
    """Have PEFT's ``lora.Linear`` merge into our quantized layers as they are, in this process.

    PEFT adds to the stored bytes as if they were the weight, which for INT8 goes wrong without an
    error. Done once, when PEFT first wraps one of our layers; its layers on other bases do what
    they did.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    if getattr(Linear.merge, _TAUGHT, False):
        return
    theirs, back = Linear.merge, Linear.unmerge

    @functools.wraps(theirs)
    def merging(
        self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        base = self.get_base_layer()
        if not isinstance(base, QuantizedLinear):
            theirs(self, safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        here = [name for name in names if name in self.lora_A]
        if here:
            merge(self, base, here)

    @functools.wraps(back)
    def unmerging(self: Any) -> None:
        base = self.get_base_layer()
        if isinstance(base, QuantizedLinear) and self.merged:
            unmerge(self, base)
        else:
            back(self)

    setattr(merging, _TAUGHT, True)
    Linear.merge, Linear.unmerge = merging, unmerging


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
        told = (
            f"merged {', '.join(group)} into a {base.quantized.quant_type} weight: requantizing "
            f"lost {100 * written.error:.1f} % of the update"
        )
        if isinstance(layer, Accelerated):  # it stands in the report
            logger.info(told)
        else:
            warnings.warn(told, UserWarning, stacklevel=3)


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
