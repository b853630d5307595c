"""Shapes, dtypes and defaults of arguments: what every function does before an op is called."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.arguments import require_float, require_tensor
from peftkern.quant import QuantizedTensor


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"base: got shape {tuple(shape)}, expected [out, in]")
    return shape[0], shape[1]


class FrozenBase(NamedTuple):
    """A frozen weight [out, in] in the form in which ops take it.

    Args:
        weight: dense [out, in], or the packed codes.
        absmax: statistics of a quantized weight.
        nested_absmax: statistics of the statistics, with double quantization.
        nested_offset: likewise.
        format: ``"dense"``, ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: of a 4-bit weight, else 0.
        out_features: rows of the weight.
        in_features: columns of the weight.
    """

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    format: str
    blocksize: int
    out_features: int
    in_features: int

    def bundle(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, int]:
        """weight, absmax, nested_absmax, nested_offset, format, blocksize: the order of schemas."""
        return self[:6]

    def stored(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, int, int]:
        """The bundle and out_features."""
        return self[:7]

    def for_input(self, x: Tensor) -> FrozenBase:
        """The same weight with a dense one brought to x's dtype under autocast, or refused."""
        if self.format != "dense":
            return self
        weight = dense_for(x, self.weight)
        return self if weight is self.weight else self._replace(weight=weight)


def frozen_base(base: Tensor | QuantizedTensor | FrozenBase) -> FrozenBase:
    """Take a base weight apart; layers hand it over taken apart already.

    Raises:
        TypeError: neither a tensor nor a :class:`QuantizedTensor`.
        ValueError: not a matrix, or a tensor that requires a gradient.
    """
    if isinstance(base, FrozenBase):
        return base
    if isinstance(base, QuantizedTensor):
        shape = matrix_shape(base.shape)
        return FrozenBase(base.weight, *base.statistics(), base.quant_type, base.blocksize, *shape)
    if not isinstance(base, Tensor):
        raise TypeError(
            f"base: got {type(base).__name__}, expected a torch.Tensor or a QuantizedTensor"
        )
    shape = matrix_shape(base.shape)
    if base.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "base: requires a gradient, but the base of an adapter is frozen; "
            "call base.requires_grad_(False)"
        )
    return FrozenBase(base, None, None, None, "dense", 0, *shape)


def quantized_base(q: QuantizedTensor | FrozenBase, kinds: tuple[str, ...]) -> FrozenBase:
    """Take a quantized weight of one of these formats apart.

    Raises:
        TypeError: not a :class:`QuantizedTensor`, or one of another format.
    """
    if not isinstance(q, FrozenBase):
        if not isinstance(q, QuantizedTensor):
            raise TypeError(f"q: got {type(q).__name__}, expected a QuantizedTensor")
        if q.quant_type not in kinds:
            raise TypeError(f"q: got a {q.quant_type} weight, expected {' or '.join(kinds)}")
        if len(q.shape) != 2:
            raise ValueError(f"q: got shape {tuple(q.shape)}, expected [out, in]")
        q = frozen_base(q)
    return q


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; never on meta, of which torch knows no autocast."""
    if x.is_cuda:
        return torch.is_autocast_enabled("cuda")
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear computes in: x's own, or autocast's (which leaves fp64 alone)."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def activations(x: Tensor, in_features: int) -> Tensor:
    """x [..., in] in the compute dtype, contiguous."""
    require_float("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {in_features}]")
    dtype = autocast_dtype(x)
    # No call where there is nothing to do: to() costs as much as a small kernel.
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def as_matrix(x: Tensor, in_features: int) -> tuple[Tensor, torch.Size]:
    """x as a contiguous [M, in] of the compute dtype, and its leading dimensions."""
    x = activations(x, in_features)
    lead = x.shape[:-1]
    return (x if x.dim() == 2 else x.reshape(lead.numel(), in_features)), lead


def bias_for(x: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    require_float("bias", bias)
    if bias.dtype == x.dtype:
        return bias
    if autocasts(x) or bias.dtype == torch.float32:
        return bias.to(x.dtype)
    raise TypeError(f"bias: got dtype {bias.dtype}, expected {x.dtype} like x, or float32")


def dense_for(x: Tensor, weight: Tensor) -> Tensor:
    require_float("base", weight)
    if weight.dtype != x.dtype:
        if not autocasts(x):
            raise TypeError(f"base: got dtype {weight.dtype}, expected {x.dtype} like x")
        weight = weight.to(x.dtype)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return weight


def adapter_for(x: Tensor, adapter: Tensor, name: str) -> Tensor:
    require_float(name, adapter)
    if adapter.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, torch.float32)
        if adapter.dtype != wide:
            if not autocasts(x) and x.dtype != torch.float64:
                raise TypeError(f"{name}: got dtype {adapter.dtype}, expected {x.dtype} or {wide}")
            adapter = adapter.to(wide)
    return adapter.contiguous()


def seed_for(x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    if p == 0.0:
        return None
    if seed is None:  # by the device's own generator: the host does not wait for a copy
        return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    require_tensor("seed", seed)
    if seed.device.type == "meta" and x.device.type != "meta":
        raise ValueError(f"seed: is on meta, expected {x.device} like x, or cpu")
    return seed.to(x.device)


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
