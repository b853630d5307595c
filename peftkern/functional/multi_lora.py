"""A frozen linear with a different low-rank term for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.arguments import real, require_tensor
from peftkern.functional.arguments import (
    adapter_for,
    as_matrix,
    bias_for,
    frozen_base,
    needs_grad,
    seed_for,
)
from peftkern.ops.multi_lora.autograd import MultiLoRALinear
from peftkern.quant import QuantizedTensor


def _ids_for(x: Tensor, adapter_ids: Tensor, lead: torch.Size) -> Tensor:
    """One id for each row of x as a matrix."""
    require_tensor("adapter_ids", adapter_ids)
    if adapter_ids.device.type == "meta" and x.device.type != "meta":
        raise ValueError(f"adapter_ids: is on meta, expected {x.device} like x, or cpu")
    if adapter_ids.dtype != torch.int64:
        raise TypeError(f"adapter_ids: got dtype {adapter_ids.dtype}, expected torch.int64")
    shape = adapter_ids.shape
    if shape == (lead.numel(),):
        return adapter_ids.to(x.device).contiguous()
    if len(shape) > len(lead) or shape != lead[: len(shape)]:
        raise ValueError(
            f"adapter_ids: got shape {tuple(shape)}, expected leading dimensions of x's rows "
            f"{tuple(lead)}, or one id for each of the {lead.numel()} rows"
        )
    ids = adapter_ids.view(*shape, *[1] * (len(lead) - len(shape)))
    return ids.expand(lead).reshape(-1).to(x.device).contiguous()


def multi_lora_linear(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`lora_linear` with an adapter of its own for each row, in training and inference.

    Row m of the result is that of ``lora_linear(x, base, *adapters[adapter_ids[m]], ...)`` with
    the same seed, and each adapter gets the gradient of its rows alone. Saves x and one row of
    ``dropout(x) Aᵀ`` for each row of x.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        base: frozen weight [out, in], dense or quantized.
        adapters: ``(lora_A [r, in], lora_B [out, r], scaling)`` of each; ranks may differ.
        adapter_ids: int64; the number of the adapter of each row, -1 for the base alone. One id
            for each row, or for each entry of x's first dimensions (of each sequence, say).
        bias: [out], or ``None``.
        dropout_p: probability of zeroing an element of x on its way into A; one number, or one
            for each adapter.
        training: ``False`` switches dropout off.
        seed: int64 [1] that fixes the mask; default: drawn from torch's CPU generator.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype).

    Raises:
        TypeError: an argument is not a tensor of a dtype that fits.
        ValueError: shapes or devices do not fit, an id has no adapter, or the base requires a
            gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> x, w = torch.randn(3, 5, 64), torch.randn(32, 64)
        >>> small = torch.randn(4, 64), torch.randn(32, 4), 2.0
        >>> large = torch.randn(16, 64), torch.randn(32, 16), 1.0
        >>> ids = torch.tensor([1, -1, 0])  # one a sequence
        >>> pk.functional.multi_lora_linear(x, w, [small, large], ids).shape
        torch.Size([3, 5, 32])
    """
    frozen = frozen_base(base)
    x, lead = as_matrix(x, frozen.in_features)
    frozen = frozen.for_input(x)
    bias = bias_for(x, bias)
    ids = _ids_for(x, adapter_ids, lead)
    if not isinstance(adapters, list | tuple):
        raise TypeError(f"adapters: got {type(adapters).__name__}, expected a list of tuples")
    lora_A, lora_B, scalings = [], [], []
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, tuple | list) or len(adapter) != 3:
            raise TypeError(f"adapters[{i}]: expected a tuple (lora_A, lora_B, scaling)")
        lora_A.append(adapter_for(x, adapter[0], f"adapters[{i}].lora_A"))
        lora_B.append(adapter_for(x, adapter[1], f"adapters[{i}].lora_B"))
        scalings.append(real(f"adapters[{i}].scaling", adapter[2]))
    if not isinstance(dropout_p, list | tuple):
        dropout_p = [real("dropout_p", dropout_p)] * len(lora_A)
    if len(dropout_p) != len(lora_A):
        raise ValueError(
            f"dropout_p: got {len(dropout_p)} numbers, expected one or {len(lora_A)} as in adapters"
        )
    p = [real("dropout_p", value) if training else 0.0 for value in dropout_p]
    seed = seed_for(x, max(p, default=0.0), seed)
    stored = frozen.stored()
    if needs_grad(x, bias, *lora_A, *lora_B):
        y = MultiLoRALinear.apply(x, stored, bias, ids, scalings, p, seed, *lora_A, *lora_B)
    else:
        y, _ = torch.ops.peftkern.multi_lora_linear(
            x, *stored, bias, ids, lora_A, lora_B, scalings, p, seed
        )
    return y.view(*lead, frozen.out_features)
