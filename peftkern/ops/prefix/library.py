"""torch's own fused attention with its row sums: the sequence's part of attention with a prefix.

The aten ops behind ``scaled_dot_product_attention`` also give the log-sum-exp of each row, and
their backward takes it: handed the output and the log-sum-exp of the whole row, prefix included,
it computes exactly the sequence's share of the gradients. What torch's attention promises holds for
this share as well: its backward repeats bit for bit under ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)
_VECTOR = 16  # bytes that the libraries load at once
_LARGEST_HEAD = 256
_LARGEST_CUDNN_HEAD = 128  # of its backward on most versions
_NAMES = {1: "flash", 3: "cudnn"}  # torch.nn.attention.SDPBackend


@dataclass(frozen=True)
class Attention:
    """One of torch's fused attentions.

    Args:
        forward: ``(q, k, v, is_causal, scale) -> (out, lse)``, lse natural, fp32 [B, H, Lq].
        backward: ``(dout, q, k, v, out, lse, is_causal, scale) -> (dq, dk, dv)``.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = op(q, k, v, 0.0, is_causal, False, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward
    unused = q.new_empty(2, dtype=torch.int64)  # the state of dropout
    lengths = (None, None, q.shape[2], k.shape[2])
    seeds = (unused, unused)
    return op(dout, q, k, v, out, lse, *lengths, 0.0, is_causal, *seeds, scale=scale)


# Some versions give and want statistics [B, H, Lq, 1]; set by what the forward op returned.
_CUDNN_STATISTICS = [3]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    _CUDNN_STATISTICS[0] = lse.dim()
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    lse = lse if _CUDNN_STATISTICS[0] == 3 else lse[..., None]
    unused = q.new_empty(1, dtype=torch.int64)  # the state of dropout
    lengths = (None, None, q.shape[2], k.shape[2])
    rest = (unused, unused, None, *lengths, 0.0, is_causal)
    return op(dout, q, k, v, out, lse, *rest, scale=scale)


WAYS = {
    "flash": Attention(_flash, _flash_backward),
    "cudnn": Attention(_cudnn, _cudnn_backward),
}


def aligned(value: Tensor) -> bool:
    """Whether rows begin where the libraries' vector loads may begin."""
    size = value.element_size()
    steps = [step * size for step, length in zip(value.stride(), value.shape, strict=True)
             if length > 1][:-1]  # fmt: skip
    start = 0 if value.device.type == "meta" else value.data_ptr()
    return not any(step % _VECTOR for step in (start, *steps))


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> str | None:
    """The name in :data:`WAYS` of what torch would run for the sequence's part; ``None``: nothing.

    Nothing serves masks (the row sums of masked attention are padded), our dropout, fp32, causal
    attention of unequal lengths (whose alignment differs between the libraries) and empty parts.
    """
    unserved = attn_mask is not None or dropout_p > 0 or q.dtype not in _HALVES
    if unserved or 0 in q.shape or k.shape[2] == 0:
        return None
    if is_causal and q.shape[2] != k.shape[2]:
        return None
    if q.shape[3] % 8 or q.shape[3] > _LARGEST_HEAD or not all(map(aligned, (q, k, v))):
        return None
    ask = _DEVICES.get(q.device.type)
    return None if ask is None else ask(q, k, v, is_causal, scale)


def _ask_torch(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    grouped = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    name = _NAMES.get(int(choice))
    return "flash" if name == "cudnn" and q.shape[3] > _LARGEST_CUDNN_HEAD else name


# On "meta" kernels are compiled without a GPU.
_DEVICES: dict[str, Callable[..., str | None]] = {"cuda": _ask_torch, "meta": lambda *_: "flash"}
