"""Experts whose weights are stacked in 3-D parameters, as transformers 5 keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import hooks_of

STACKED = ("gate_up_proj", "down_proj")
# What transformers' decorator of experts says, and the value that :func:`run_experts` computes.
_FACTS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
# (expert, rows) -> rows: one of the two products of an expert.
Product = Callable[[int, Tensor], Tensor]


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes what :func:`run_experts` does, by its structure."""
    if isinstance(module, QuantizedExperts):
        return True
    weights = module._parameters
    if set(weights) != set(STACKED) or any(True for _ in module.children() if not _acts(module)):
        return False
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3:
        return False
    count, wide, hidden = gate_up.shape
    if down.shape != (count, hidden, wide // 2) or wide % 2:
        return False
    gate: Any = getattr(type(module), "_apply_gate", None)
    default = getattr(gate, "__name__", "") == "_default_apply_gate"
    return default and all(getattr(module, k, v) is v for k, v in _FACTS.items())


def _acts(module: nn.Module) -> bool:
    """Whether the only child is the activation."""
    act = getattr(module, "act_fn", None)
    return callable(act) and all(child is act for child in module.children())


def why_not_fused(module: nn.Module) -> str | None:
    """Why a module is computed by its own forward; ``None`` when expert by expert."""
    if not is_experts(module):
        return f"{type(module).__name__} is not a stack of gated experts"
    hooks = hooks_of(module)
    return None if hooks is None else f"its experts carry {hooks}, which must run"


def run_experts(
    experts: nn.Module,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Product,
    down: Product,
) -> Tensor:
    """Each row through its experts: ``sum_k w_k down_e(act(gate) * up)`` with ``e = index[., k]``.

    Args:
        experts: knows ``num_experts`` and ``_apply_gate``.
        hidden: [T, H].
        index: int64 [T, K]; ``num_experts`` stands for none.
        weights: [T, K].
        gate_up: an expert's rows [n, H] -> [n, 2 F].
        down: [n, F] -> [n, H].

    Returns:
        [T, H]. Experts add in their order, each at most once a row: deterministic.
    """
    scheme: Any = experts
    count, per_row = scheme.num_experts, index.shape[-1]
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    sizes = _rows_of_each(flat, count)
    out = torch.zeros_like(hidden)
    share = weights.reshape(-1, 1)
    end = 0
    for expert, size in enumerate(sizes):
        start, end = end, end + size
        if size == 0:
            continue
        own = order[start:end]
        rows = own // per_row
        y = down(expert, scheme._apply_gate(gate_up(expert, hidden[rows])))
        out.index_add_(0, rows, (y * share[own]).to(out.dtype))
    return out


def _rows_of_each(flat: Tensor, count: int) -> list[int]:
    if flat.device.type == "meta":  # shapes alone; a few experts keep as many bytes as all
        busy = min(count, 4)
        share, more = divmod(flat.numel(), busy)
        return [share + (expert < more) for expert in range(busy)] + [0] * (count - busy)
    return torch.bincount(flat, minlength=count + 1)[:count].tolist()


class QuantizedExperts(nn.Module):
    """Gated experts whose weights are quantized, one layer an expert.

    Args:
        experts: what :func:`is_experts` takes; its activation is shared, its weights are not kept.
        make: quantizes a dense layer: ``Linear4bit.from_linear``, say.

    Raises:
        TypeError: not such a module.
    """

    def __init__(self, experts: nn.Module, make: Callable[[nn.Module], QuantizedLinear]) -> None:
        super().__init__()
        if not is_experts(experts) or isinstance(experts, QuantizedExperts):
            raise TypeError(
                f"experts: expected experts stacked in gate_up_proj and down_proj, got "
                f"{type(experts).__name__}"
            )
        source: Any = experts
        self.num_experts = source.gate_up_proj.shape[0]
        self.act_fn = source.act_fn
        self.config = getattr(source, "config", None)
        for name in STACKED:
            setattr(self, name, nn.ModuleList(make(_as_linear(w)) for w in getattr(source, name)))
        self.training = experts.training

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] and the routing [T, K] -> [T, H]."""
        products = (self.product(name) for name in STACKED)
        return run_experts(self, hidden_states, top_k_index, top_k_weights, *products)

    def product(self, name: str) -> Product:
        """One of the products without an adapter."""
        layers = self.layers(name)
        return lambda expert, x: layers[expert](x)

    @property
    def quant_type(self) -> str:
        """``"nf4"``, ``"fp4"`` or ``"int8"``."""
        return self.layers(STACKED[0])[0].quantized.quant_type

    def layers(self, name: str) -> list[QuantizedLinear]:
        """The quantized layers of one product, by expert."""
        return list(getattr(self, name))


def _as_linear(weight: Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def stacked(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """The 3-D parameters of dense experts."""
    found = ((name, module._parameters[name]) for name in STACKED)
    return {name: parameter for name, parameter in found if parameter is not None}
