"""Projections that share their input, and the feed-forward layer built of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.arguments import real, require_float
from peftkern.functional.arguments import (
    FrozenBase,
    activations,
    adapter_for,
    bias_for,
    frozen_base,
    needs_grad,
    seed_for,
)
from peftkern.ops.gated.autograd import GatedActivation, LoRAMLP
from peftkern.ops.gated.contract import check_activation
from peftkern.ops.lora_group.autograd import LoRALinearGroup
from peftkern.ops.rows import as_rows, like_rows_of
from peftkern.quant import QuantizedTensor


@dataclass(frozen=True)
class LoRAProjection:
    """One linear of a group: a frozen base with its own low-rank term.

    Args:
        base: frozen weight [out, in], dense or quantized.
        lora_A: [r, in], or ``None`` for a projection without an adapter.
        lora_B: [out, r], or ``None`` together with lora_A.
        scaling: factor of the low-rank term.
        bias: [out], or ``None``.
        dropout_p: probability of zeroing an element of the input on its way into A; the mask is
            this projection's own.
        seed: int64 [1] that fixes the mask; default: drawn from torch's CPU generator.
    """

    base: Tensor | QuantizedTensor | FrozenBase
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


Projection = LoRAProjection | tuple[Any, ...]


def _projection(name: str, value: Projection) -> LoRAProjection:
    if isinstance(value, LoRAProjection):
        member = value
    elif isinstance(value, tuple) and 1 <= len(value) <= 7:
        member = LoRAProjection(*value)
    else:
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected a LoRAProjection or a tuple "
            "(base, lora_A, lora_B, scaling, bias, dropout_p)"
        )
    if (member.lora_A is None) != (member.lora_B is None):
        raise ValueError(f"{name}: expected both lora_A and lora_B, or neither")
    return member


class _Group(NamedTuple):
    """The arguments of the ops for several projections, column by column."""

    bases: tuple[tuple[Any, ...], ...]
    biases: list[Tensor | None]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scalings: list[float]
    dropout_p: list[float]
    seeds: list[Tensor | None]

    def flat(self) -> tuple[Tensor | None, ...]:
        return (*self.biases, *self.lora_A, *self.lora_B)

    def drops(self) -> tuple[list[float], list[float], list[Tensor | None]]:
        return self.scalings, self.dropout_p, self.seeds


def _group(
    xs: Sequence[Tensor], names: Sequence[str], members: Sequence[LoRAProjection], training: bool
) -> _Group:
    """``xs``: what each member multiplies; only dtype, device and columns are read."""
    bases, biases, lora_A, lora_B = [], [], [], []
    scalings, dropout_p, seeds = [], [], []
    for x, name, member in zip(xs, names, members, strict=True):
        frozen = frozen_base(member.base)
        if frozen.in_features != x.shape[-1]:
            raise ValueError(
                f"{name}: got a base with {frozen.in_features} input features, "
                f"expected {x.shape[-1]}"
            )
        bases.append(frozen.for_input(x).stored())
        a, b = member.lora_A, member.lora_B
        if a is None or b is None:
            a = x.new_empty((0, frozen.in_features))
            b = x.new_empty((frozen.out_features, 0))
        p = real(f"{name}.dropout_p", member.dropout_p) if training else 0.0
        biases.append(bias_for(x, member.bias))
        lora_A.append(adapter_for(x, a, f"{name}.lora_A"))
        lora_B.append(adapter_for(x, b, f"{name}.lora_B"))
        scalings.append(real(f"{name}.scaling", member.scaling))
        dropout_p.append(p)
        seeds.append(seed_for(x, p, member.seed))
    return _Group(tuple(bases), biases, lora_A, lora_B, scalings, dropout_p, seeds)


def lora_linear_group(
    x: Tensor, projections: Sequence[Projection], training: bool = True
) -> tuple[Tensor, ...]:
    """Several frozen linears with low-rank terms over the same x, as q, k, v or gate, up are.

    Saves x once and the products ``dropout(x) Aᵀ``; the gradient of x is summed in fp32 over all
    projections and rounded once. Dropout masks are independent.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        projections: for each a :class:`LoRAProjection`, or the tuple
            ``(base, lora_A, lora_B, scaling, bias, dropout_p)``, of which the last may be left
            out; formats, ranks and sizes may differ. ``lora_A = lora_B = None`` leaves a base
            without an adapter.
        training: ``False`` switches dropout off.

    Returns:
        A tuple of [..., out] of x's dtype (under autocast: of the autocast dtype), each what
        :func:`lora_linear` gives for that projection.

    Raises:
        TypeError: an argument is not a float tensor or has a dtype that does not fit.
        ValueError: no projection, shapes or devices do not fit, or a base requires a gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> x, w = torch.randn(4, 64), torch.randn(32, 64)
        >>> adapter = torch.randn(8, 64), torch.randn(32, 8), 2.0
        >>> q, k = pk.functional.lora_linear_group(x, [(w, *adapter), (w[:16], None, None)])
        >>> q.shape, k.shape
        (torch.Size([4, 32]), torch.Size([4, 16]))
    """
    if not isinstance(projections, list | tuple):
        raise TypeError(f"projections: got {type(projections).__name__}, expected a list")
    if len(projections) == 0:
        raise ValueError("projections: got none, expected at least one")
    names = [f"projections[{i}]" for i in range(len(projections))]
    members = [_projection(*pair) for pair in zip(names, projections, strict=True)]
    x = activations(x, frozen_base(members[0].base).in_features)
    group = _group([x] * len(members), names, members, training)
    flat = group.flat()
    if needs_grad(x, *flat):
        ys: tuple[Tensor, ...] = LoRALinearGroup.apply(x, group.bases, group.drops(), *flat)
        return ys
    columns = (list(values) for values in zip(*group.bases, strict=True))
    parts, _ = torch.ops.peftkern.lora_linear_group(
        as_rows(x), *columns, group.biases, group.lora_A, group.lora_B, *group.drops()
    )
    return tuple(like_rows_of(x, y) for y in parts)


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``activation(gate) * up``, computed in fp32 and rounded once.

    Args:
        gate: any shape, float32, bfloat16, float16 or float64.
        up: like gate.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (GeGLU, exact), ``"gelu_tanh"`` (its tanh
            approximation) or ``"relu"``. Source: arXiv 2002.05202.

    Returns:
        Like gate. The backward pass computes the activation again: only gate and up are saved.

    Raises:
        TypeError: not float tensors of one dtype.
        ValueError: shapes differ, or an unknown activation.

    Example:
        >>> import torch, peftkern as pk
        >>> gate, up = torch.randn(4, 64), torch.randn(4, 64)
        >>> h = pk.functional.gated_activation(gate, up)
        >>> torch.allclose(h, torch.nn.functional.silu(gate) * up, atol=1e-5)
        True
    """
    require_float("gate", gate)
    require_float("up", up)
    check_activation(activation)
    shape = gate.shape
    if up.shape != shape:
        raise ValueError(f"up: got shape {tuple(up.shape)}, expected {tuple(shape)} like gate")
    columns = shape[-1] if shape else 1
    rows = shape[:-1].numel()
    gate = gate.reshape(rows, columns).contiguous()
    up = up.reshape(rows, columns).contiguous()
    if needs_grad(gate, up):
        return GatedActivation.apply(gate, up, activation).view(shape)
    return torch.ops.peftkern.gated_activation(gate, up, activation).view(shape)


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    training: bool = True,
) -> Tensor:
    """A gated feed-forward layer, ``down(activation(gate(x)) * up(x))``, with low-rank terms.

    Saves x, the outputs of gate and up, and the products with A; the activation's result is
    computed again in the backward pass.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        gate: a :class:`LoRAProjection` [hidden, in], or a tuple as in :func:`lora_linear_group`.
        up: likewise [hidden, in].
        down: likewise [out, hidden].
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (GeGLU, exact), ``"gelu_tanh"`` (its tanh
            approximation) or ``"relu"``.
        training: ``False`` switches dropout off.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype).

    Raises:
        TypeError: an argument is not a float tensor or has a dtype that does not fit.
        ValueError: shapes or devices do not fit, a base requires a gradient, or the activation is
            unknown.

    Example:
        >>> import torch, peftkern as pk
        >>> x, w = torch.randn(4, 64), torch.randn(96, 64)
        >>> pair = torch.randn(8, 64), torch.randn(96, 8), 2.0
        >>> pk.functional.lora_mlp(x, (w, *pair), (w, *pair), (w.t().contiguous(),)).shape
        torch.Size([4, 64])
    """
    check_activation(activation)
    names = ("gate", "up", "down")
    members = [_projection(*pair) for pair in zip(names, (gate, up, down), strict=True)]
    x = activations(x, frozen_base(members[0].base).in_features)
    hidden = [frozen_base(member.base).out_features for member in members[:2]]
    if hidden[0] != hidden[1]:
        raise ValueError(f"up: got a base with {hidden[1]} rows, expected {hidden[0]} like gate")
    # down multiplies a tensor that does not exist yet: a stand-in without data tells its kind.
    inner = x.new_empty((0, hidden[0]))
    group = _group([x, x, inner], names, members, training)
    flat = group.flat()
    if needs_grad(x, *flat):
        y: Tensor = LoRAMLP.apply(x, activation, group.bases, group.drops(), *flat)
        return y
    first = [list(values) for values in zip(*group.bases[:2], strict=True)]
    adapters = (group.biases, group.lora_A, group.lora_B, *group.drops())
    (g, u), _ = torch.ops.peftkern.lora_linear_group(
        as_rows(x), *first, *(values[:2] for values in adapters)
    )
    h = torch.ops.peftkern.gated_activation(g, u, activation)
    y, _ = torch.ops.peftkern.lora_linear(h, *group.bases[2], *(values[2] for values in adapters))
    return like_rows_of(x, y)
