"""The weights that are scored, read by blocks of rows whatever their storage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from peftkern.hf.methods.lora import LoRAConfig
from peftkern.hf.rules import rule_for
from peftkern.hf.targets import choose, near_names, survey, unmatched
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import dense_weight, is_dense_linear
from peftkern.quant import QuantizedTensor

BLOCK = 1 << 22  # elements of a weight, of its gradient or of a score looked at at a time


@dataclass(frozen=True)
class Target:
    """A weight [out, in] to score.

    Args:
        name: path of its layer.
        layer: what the model calls there (a linear layer, or an adapter around one).
        base: the linear layer that holds the weight.
    """

    name: str
    layer: nn.Module
    base: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.out_features, self.base.in_features
        rows, columns = dense_weight(self.base).shape
        return rows, columns


def targets_of(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
) -> list[Target]:
    """The linear layers that a specification of target modules means, in the model's order.

    Raises:
        ValueError: names that match nothing, or nothing to score at all.
        TypeError: a target is no linear layer of ours or torch's.
    """
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    sites = survey(model)
    if config.target_modules != "all-linear":
        lost = unmatched(config.target_modules, sites)
        if lost:
            near = ", ".join(near_names(lost[0], sites))
            raise ValueError(f"target_modules: no module matches {lost[0]!r}; near names: {near}")
    found = []
    for choice in choose(model, sites, config.target_modules, config):
        if not choice.wanted:
            continue
        layer = choice.site.module
        inner = getattr(layer, "base_layer", layer) if isinstance(layer, AdapterLayer) else layer
        if isinstance(inner, QuantizedLinear) or is_dense_linear(inner):
            found.append(Target(choice.site.name, layer, inner))
        elif rule_for(inner) is not None or config.target_modules != "all-linear":
            raise TypeError(
                f"target_modules: {choice.site.name} is {type(inner).__name__}; scores need "
                "nn.Linear, Conv1D, Linear4bit or Linear8bit (peftkern.accelerate or "
                "peftkern.patch takes over bitsandbytes layers)"
            )
    if not found:
        raise ValueError(f"target_modules: {target_modules!r} leaves no linear layer to score")
    return found


def row_step(target: Target) -> int:
    """Rows of a block: about ``BLOCK`` elements, and whole quantization blocks."""
    rows, columns = target.shape
    step = max(1, BLOCK // max(1, columns))
    if isinstance(target.base, QuantizedLinear) and target.base.quantized.blocksize:
        unit = math.lcm(2, target.base.quantized.blocksize)
        group = unit // math.gcd(unit, columns)
        step = max(group, step // group * group)
    return min(step, max(1, rows))


def row_blocks(target: Target) -> Iterator[tuple[int, int]]:
    """``(first, last)`` of each block of rows."""
    rows, step = target.shape[0], row_step(target)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


@torch.no_grad()
def rows_of(target: Target, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` of the weight, in fp32; ``first`` begins a block."""
    if isinstance(target.base, QuantizedLinear):
        return _slice(target.base.quantized, first, last).dequantize(torch.float32)
    return dense_weight(target.base)[first:last].detach().float()


def _slice(q: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    columns = q.shape[1]
    shape = torch.Size((last - first, columns))
    if q.quant_type == "int8":
        return replace(q, weight=q.weight[first:last], absmax=q.absmax[first:last], shape=shape)
    absmax = q.absmax
    if q.nested_absmax is not None and q.nested_offset is not None:
        absmax = torch.ops.peftkern.dequantize_absmax(absmax, q.nested_absmax, q.nested_offset)
    begin, end = first * columns, last * columns
    size = q.blocksize
    return replace(
        q,
        weight=q.weight.reshape(-1)[begin // 2 : -(-end // 2)].clone(),
        absmax=absmax.reshape(-1)[begin // size : -(-end // size)].clone(),
        nested_absmax=None,
        nested_offset=None,
        shape=shape,
    )
