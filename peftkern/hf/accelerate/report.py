"""What ``accelerate`` did: one row a layer, its calls so far, and why others were left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import registry
from peftkern.hf.accelerate.bases import base_of, format_of, is_bnb_linear
from peftkern.hf.accelerate.fused import Accelerated, FusedLora, counts_of
from peftkern.hf.report import _table
from peftkern.quant import QuantizedTensor


@dataclass(frozen=True)
class LayerRow:
    """One layer of the report.

    Args:
        name: path in the model.
        was: its class before.
        now: its class now; empty when it was left alone.
        format: format of the frozen weight.
        adapters: name -> rank of the adapters it has.
        kernel: which backend serves it in its present state; empty when none does.
        reason: why its present state keeps it off the fast path, or why it was left alone.
        fast: calls that our kernels served.
        fallbacks: reason -> calls that went to the original forward.
        merge_error: share of the update that requantizing lost, while adapters are merged.
    """

    name: str
    was: str
    now: str
    format: str
    adapters: dict[str, int] = field(default_factory=dict)
    kernel: str = ""
    reason: str = ""
    fast: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    merge_error: float | None = None


@dataclass(frozen=True)
class AccelerateReport:
    """Rows of an accelerated model; ``str()`` gives a table, :meth:`to_dict` plain values."""

    rows: tuple[LayerRow, ...]

    @property
    def accelerated(self) -> tuple[LayerRow, ...]:
        """Rows of layers whose class was swapped."""
        return tuple(row for row in self.rows if row.now)

    @property
    def fast_calls(self) -> int:
        """Calls that our kernels served, over all layers."""
        return sum(row.fast for row in self.rows)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason -> calls that went to the original forward, over all layers."""
        total: Counter[str] = Counter()
        for row in self.rows:
            total.update(row.fallbacks)
        return dict(total.most_common())

    @property
    def summary(self) -> str:
        """One line, and one more for each reason of a fallback."""
        left = len(self.rows) - len(self.accelerated)
        lines = [
            f"{len(self.accelerated)} layers accelerated, {left} left alone; "
            f"{self.fast_calls} fast calls, {sum(self.fallbacks.values())} fallbacks"
        ]
        lines += [f"  {count} calls: {reason}" for reason, count in self.fallbacks.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "fast_calls": self.fast_calls,
            "fallbacks": self.fallbacks,
        }

    def __str__(self) -> str:
        head = ("layer", "was", "now", "format", "adapters", "kernel", "fast", "fallbacks", "note")
        body = [
            (
                row.name,
                row.was,
                row.now or "-",
                row.format,
                ",".join(f"{name}:{r}" for name, r in row.adapters.items()) or "-",
                row.kernel or "-",
                str(row.fast),
                str(sum(row.fallbacks.values())),
                row.reason,
            )
            for row in self.rows
        ]
        return "\n".join((*_table(head, body), "", self.summary))


def row_of(name: str, module: nn.Module) -> LayerRow:
    """The row of a swapped layer."""
    assert isinstance(module, Accelerated)
    counts = counts_of(module)
    base = module.base_layer if isinstance(module, FusedLora) else module
    reason = module.why_not_now()
    notes = [] if reason is None else [reason]
    if reason is None and is_bnb_linear(base):
        compute = base_of(base).compute
        if compute is not None:
            notes.append(f"computes in {str(compute).removeprefix('torch.')} as configured")
    return LayerRow(
        name=name,
        was=type(module).original_class.__name__,
        now=type(module).__name__,
        format=format_of(base),
        adapters=dict(getattr(module, "r", {})),
        kernel="" if reason is not None else _kernel(module, base),
        reason="; ".join(notes),
        fast=counts.fast,
        fallbacks=dict(counts.fallbacks),
        merge_error=counts.merge_error,
    )


def _kernel(module: nn.Module, layer: nn.Module) -> str:
    base = base_of(layer)
    device = base.frozen.device.type
    if device == "meta":
        return "none yet (meta device)"
    op, args = _example_call(module, base.frozen, base.compute, layer.bias)  # type: ignore[arg-type]
    offers = registry.explain(op, device, args)
    for backend, reason in offers:
        if reason is None:
            return f"{op}: {backend}"
    return f"{op}: " + "; ".join(f"{backend} not used: {reason}" for backend, reason in offers)


def _example_call(
    module: nn.Module,
    frozen: Tensor | QuantizedTensor,
    compute: torch.dtype | None,
    bias: Tensor | None,
) -> tuple[str, tuple[Any, ...]]:
    """An op and arguments as a forward pass of this layer would give them (8 rows)."""
    outer, inner = frozen.shape
    x = torch.empty(8, inner, dtype=compute or frozen.dtype, device=frozen.device)
    parts: tuple[Any, ...]
    if isinstance(frozen, QuantizedTensor):
        parts, kind, size = (
            (frozen.weight, *frozen.statistics()),
            frozen.quant_type,
            frozen.blocksize,
        )
    else:
        parts, kind, size = (frozen, None, None, None), "dense", 0
    if isinstance(module, FusedLora):
        down, up, scaling = module.factors()
        if module.active_here()[0] in module.lora_variant:  # DoRA
            scale = torch.ones(outer, dtype=_wide_dtype(x), device=x.device)
            low_rank = (bias, down, up, scale, scaling, 0.0, None, True)
            return "dora_linear", (x, *parts, kind, size, outer, *low_rank)
        return "lora_linear", (x, *parts, kind, size, outer, bias, down, up, scaling, 0.0, None)
    if kind == "int8":
        return "linear_8bit", (x, parts[0], parts[1], bias)
    return "linear_4bit", (x, *parts, kind, size, outer, bias)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
