"""Merging updates into a frozen weight, and what rounding and quantization make of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import is_conv1d


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Args:
        error: Frobenius norm of (written weight - (base + update)) over that of the update.
        kept: the parameters that stood there before, by name; exact unmerge puts them back.
    """

    error: float
    kept: dict[str, nn.Parameter]


def relative_error(written: Tensor, base: Tensor, delta: Tensor) -> float:
    """||written - (base + delta)|| / ||delta||, in fp32; 0 when there is no update."""
    size = float(torch.linalg.vector_norm(delta))
    if size == 0.0:
        return 0.0
    return float(torch.linalg.vector_norm(written.float() - (base.float() + delta))) / size


@torch.no_grad()
def merge_into(
    base: nn.Module, delta: Tensor, max_error: float | None, bias_delta: Tensor | None = None
) -> Merged:
    """Write base + delta into a dense or quantized linear layer, or into an embedding's table.

    Args:
        base: ``nn.Linear``, ``Conv1D``, ``nn.Embedding``, ``Linear4bit`` or ``Linear8bit``.
        delta: the update, fp32 [out, in] (of an embedding: as its table is stored).
        max_error: refuse before writing when the relative error is larger.
        bias_delta: update of the bias [out], if it has one.

    Returns:
        The error and what was there before.

    Raises:
        ValueError: the update is not finite, or the error exceeds ``max_error``.
    """
    for update in (delta, bias_delta):
        if update is not None and not bool(torch.isfinite(update).all()):
            raise ValueError("the update to merge contains NaN or infinity; nothing was written")
    if isinstance(base, QuantizedLinear):
        merged = _merge_quantized(base, delta, max_error)
    else:
        merged = _merge_dense(base, delta, max_error)
    bias = base._parameters.get("bias")
    if bias_delta is not None and bias is not None:
        wide = torch.promote_types(bias.dtype, torch.float32)
        sum_ = (bias.to(wide) + bias_delta.to(wide)).to(bias.dtype)
        base.bias = nn.Parameter(sum_, requires_grad=bias.requires_grad)
        merged.kept["bias"] = bias
    return merged


def _merge_dense(base: nn.Module, delta: Tensor, max_error: float | None) -> Merged:
    weight = base.weight
    assert isinstance(weight, nn.Parameter)
    update = delta.t() if is_conv1d(base) else delta
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = (weight.to(wide) + update.to(wide)).to(weight.dtype)
    error = relative_error(merged, weight, update)
    _check(error, max_error)
    # A new Parameter, not new data: a tied embedding must not change with this layer.
    base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
    return Merged(error, {"weight": weight})


def _merge_quantized(base: QuantizedLinear, delta: Tensor, max_error: float | None) -> Merged:
    kept = {
        name: tensor
        for name, tensor in base._stored_tensors().items()
        if isinstance(tensor, nn.Parameter)
    }
    if not bool(delta.any()):
        return Merged(0.0, {})  # requantizing an unchanged weight could still move it
    dense = base.dequantize(torch.float32)
    q = base.requantize(dense + delta)  # type: ignore[operator]
    error = relative_error(q.dequantize(torch.float32), dense, delta)
    _check(error, max_error)
    base.adopt(q)  # type: ignore[operator]
    return Merged(error, kept)


def _check(error: float, max_error: float | None) -> None:
    if max_error is not None and error > max_error:
        raise ValueError(
            f"merging would lose {error:.1%} of the update (max_error={max_error:.1%}); nothing "
            "was written. Keep the adapter beside the base, or raise max_error"
        )


@torch.no_grad()
def unmerge_from(base: nn.Module, merged: Merged) -> None:
    """Put back exactly what stood there before, on the device where the layer is now."""
    for name, before in merged.kept.items():
        now = base._parameters[name]
        if now is not None and now.device != before.device:
            before.data = before.data.to(now.device)
        if now is not None and now.is_floating_point() and now.dtype != before.dtype:
            before.data = before.data.to(now.dtype)  # the model was cast while merged
        base.register_parameter(name, before)
