"""What a patch did: one row a module, and why the others were left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from peftkern import registry
from peftkern.nn.adapter import TORCH, AdapterLayer
from peftkern.nn.experts import STACKED, QuantizedExperts
from peftkern.nn.prefix import PREFIX_LINK
from peftkern.nn.quantized import QuantizedLinear


@dataclass(frozen=True)
class Row:
    """One module of the report.

    Args:
        name: path in the model.
        was: class of the original module.
        now: what stands there now; empty when it was left alone.
        format: format of the base weight.
        r: rank; 0 without an adapter.
        kernel: which backend serves it on its device and dtype.
        reason: why it was left alone, or what to know about it.
        asked: whether the configuration asked for it.
        done: whether all that was asked for was done.
    """

    name: str
    was: str
    now: str
    format: str
    r: int
    kernel: str
    reason: str
    asked: bool
    done: bool


@dataclass(frozen=True)
class PatchReport:
    """Rows and totals of a patch; ``str()`` gives a table, :meth:`to_dict` plain values.

    Args:
        rows: one a module.
        trainable: trainable parameters.
        total: parameters, with quantized weights counted by their logical shape.
        bytes_before: bytes of the model's parameters and buffers before the patch.
        bytes_after: the same now.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int
    bytes_before: int
    bytes_after: int

    @property
    def adapted(self) -> tuple[Row, ...]:
        """Rows of modules that were replaced, even where not all that was asked was done."""
        return tuple(row for row in self.rows if row.now)

    @property
    def refused(self) -> tuple[Row, ...]:
        """Rows of modules where something asked for was not done."""
        return tuple(row for row in self.rows if row.asked and not row.done)

    @property
    def summary(self) -> str:
        """One line: how many modules, the trainable share, bytes before and after."""
        share = self.trainable / self.total if self.total else 0.0
        refused = f", {len(self.refused)} not entirely as asked" if self.refused else ""
        return (
            f"{len(self.adapted)} modules patched{refused}; trainable {self.trainable:,} of "
            f"{self.total:,} parameters ({share:.3%}); "
            f"{_mib(self.bytes_before)} -> {_mib(self.bytes_after)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "trainable": self.trainable,
            "total": self.total,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        head = ("module", "was", "now", "format", "r", "kernel", "note")
        body = [
            (r.name, r.was, r.now or "-", r.format, str(r.r or "-"), r.kernel or "-", r.reason)
            for r in self.rows
        ]
        return "\n".join((*_table(head, body), "", self.summary))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones counted once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized weight counts as the matrix that it stands for."""
    counted = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for tensor in module._stored_tensors().values():
                counted[id(tensor)] = (0, False)
            counted[id(module.weight)] = (module.in_features * module.out_features, False)
    trainable = sum(count for count, wants in counted.values() if wants)
    return trainable, sum(count for count, _ in counted.values())


def serving_kernel(module: nn.Module, adapter_name: str) -> str:
    """Which backend serves a module on its device and dtype, and why not a faster one."""
    link = module.__dict__.get(PREFIX_LINK)
    if link is not None:
        return serving_kernel(link.layer, adapter_name)
    if isinstance(module, AdapterLayer):
        if adapter_name not in module.adapter_names:
            base = getattr(module, "base_layer", None)
            return "torch" if base is None else serving_kernel(base, adapter_name)
        call = module.example_call(adapter_name)
        if isinstance(call, str):
            return "torch" if call == TORCH else f"torch, {call}"
    elif isinstance(module, QuantizedLinear):
        call = _quantized_call(module)
    elif isinstance(module, QuantizedExperts):
        call = _quantized_call(module.layers(STACKED[0])[0])
    else:
        return "torch"
    op, args = call
    device = args[0].device.type
    if device == "meta":
        return "none yet (meta device)"
    offers = registry.explain(op, device, args)
    for backend, reason in offers:
        if reason is None:
            return f"{op}: {backend}"
    return f"{op}: " + "; ".join(f"{backend} not used: {reason}" for backend, reason in offers)


def _quantized_call(module: QuantizedLinear) -> tuple[str, tuple[Any, ...]]:
    q = module.quantized
    x = torch.empty(8, module.in_features, dtype=q.dtype, device=q.device)
    if q.quant_type == "int8":
        return "linear_8bit", (x, q.weight, q.statistics()[0], module.bias)
    stored = (q.weight, *q.statistics(), q.quant_type, q.blocksize)
    return "linear_4bit", (x, *stored, module.out_features, module.bias)
