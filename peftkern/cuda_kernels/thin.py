"""The passes that contract with a thin matrix: csrc/cuda/shrink.cu, outer.cu and low_rank.cu."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels.choices import HALVES
from peftkern.native import DTYPES


class Dropout(NamedTuple):
    """A mask over an activation, drawn again by whoever needs it."""

    p: float = 0.0
    seed: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, int, float]:
        """The launchers' (seed, threshold, scale of what is kept)."""
        if self.seed is None or self.p == 0.0:
            return None, 0, 1.0
        return self.seed, int(self.p * 2**32), 1.0 / (1.0 - self.p)


def refusal(x: Tensor, features: int, *adapters: Tensor) -> str | None:
    """Why the tensor-core passes cannot take activations [M, features] and these adapters."""
    if x.dtype not in HALVES:
        return f"the CUDA passes over activations have no {x.dtype}"
    if features % 8 or x.data_ptr() % 16:
        return f"{features} features, the passes take whole 8s on 16-byte addresses"
    for adapter in adapters:
        if adapter.numel() == 0:
            return "an adapter of rank 0"
        if adapter.dtype != x.dtype and (adapter.dtype, x.dtype) != (torch.float32, torch.bfloat16):
            return f"the passes have no {adapter.dtype} adapters under {x.dtype} activations"
        if adapter.data_ptr() % 16:
            return "an adapter does not start on a 16-byte boundary"
    return None


@functools.lru_cache(maxsize=4096)
def _workspace_floats(name: str, *sizes: int) -> int:
    return cuda_native.library().ask(f"{name}_workspace", *sizes) // 4


def shrink(
    x: Tensor,
    a: Tensor,
    *,
    transposed: bool = False,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    out: Tensor | None = None,
    parts: tuple[Tensor, float, bool] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """s = scale dropout(x) aᵀ, float32 [M, r], in one read of x.

    Args:
        x: [M, depth] bf16 or fp16, contiguous.
        a: [r, depth], or ``transposed``: [depth, r]; contiguous, of a dtype :func:`refusal` takes.
        transposed: see ``a``.
        scale: factor.
        dropout: mask over x.
        out: where s goes: columns of a wider float32 matrix; by default a new one.
        parts: (up, scaling, across): also make the factors u and v of ``scaling s upᵀ`` for a
            product that takes them; up is [outputs, r], across [r, outputs].

    Returns:
        s, u, v; the last two ``None`` without ``parts``.
    """
    m, depth = x.shape
    rank = a.shape[1] if transposed else a.shape[0]
    s = x.new_empty(m, rank, dtype=torch.float32) if out is None else out
    up, u_scale, across = (None, 1.0, False) if parts is None else parts
    u = v = None
    outputs = columns = 0
    if up is not None:
        outputs = up.shape[1] if across else up.shape[0]
        columns = -(-(2 if up.dtype == torch.bfloat16 else 3) * rank // 8) * 8
        u = x.new_empty(m, columns, dtype=torch.bfloat16)
        v = u.new_empty((columns, outputs) if across else (outputs, columns))
    kind, a_kind = DTYPES[x.dtype], DTYPES[a.dtype]
    shared = cuda_native.device_facts(x.device).shared
    floats = _workspace_floats("shrink", m, depth, rank, kind, a_kind, shared)
    cuda_native.launch(
        "shrink",
        x.device,
        x,
        kind,
        m,
        depth,
        a,
        a_kind,
        rank,
        int(transposed),
        scale,
        *(dropout or Dropout()).arguments(),
        s,
        s.stride(0),
        u,
        v,
        up,
        0 if up is None else DTYPES[up.dtype],
        int(across),
        outputs,
        columns,
        u_scale,
        shared,
        x.new_empty(floats, dtype=torch.float32),
    )
    return s, u, v


def outer(
    x: Tensor,
    s: Tensor,
    like: Tensor,
    *,
    transposed: bool = False,
    scale: float = 1.0,
    dropout: Dropout | None = None,
) -> Tensor:
    """scale sᵀ dropout(x), [r, C] (transposed [C, r]) of the shape and dtype of ``like``."""
    m, c = x.shape
    out = torch.empty_like(like)
    floats = _workspace_floats("outer", m, c, s.shape[1])
    cuda_native.launch(
        "outer",
        x.device,
        x,
        DTYPES[x.dtype],
        m,
        c,
        s,
        s.stride(0),
        s.shape[1],
        scale,
        *(dropout or Dropout()).arguments(),
        out,
        DTYPES[out.dtype],
        int(transposed),
        cuda_native.device_facts(x.device).shared,
        x.new_empty(floats, dtype=torch.float32) if floats else None,
    )
    return out


def shrink_any(x: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """The same s for few rows of any dtype and shape (csrc/cuda/low_rank.cu)."""
    m, k = x.shape
    s = x.new_empty(m, a.shape[0], dtype=torch.float32)
    cuda_native.launch(
        "low_rank",
        x.device,
        x,
        DTYPES[x.dtype],
        m,
        k,
        a,
        DTYPES[a.dtype],
        a.shape[0],
        *dropout.arguments(),
        s,
    )
    return s
