"""Unmodified bitsandbytes layers on our kernels, through the ops that bitsandbytes calls."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peftkern.codebooks import NESTED_BLOCKSIZE, dynamic_map
from peftkern.ops.rows import as_rows, like_rows_of
from peftkern.quant import _shaped_absmax, _shaped_codes

_KEYS = ("CPU", "CUDA")
_standard = WeakTensorKeyDictionary()  # nested code table -> whether it is the standard one


class BitsandbytesOps:
    """The registration of our kernels in bitsandbytes; made by :func:`register_bitsandbytes_ops`.

    Also a context manager, which takes the registration back at its end.

    Attributes:
        calls: op -> calls that our kernels served.
    """

    _current: BitsandbytesOps | None = None

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._library: torch.library.Library | None = torch.library.Library("bitsandbytes", "IMPL")
        with warnings.catch_warnings():  # torch warns that a kernel is replaced: it was asked for
            warnings.simplefilter("ignore")
            for key in _KEYS:
                self._library.impl("gemm_4bit", self._gemm_4bit, key)
                self._library.impl("dequantize_4bit", self._dequantize_4bit, key)

    def remove(self) -> None:
        """Bring bitsandbytes' own kernels back; does nothing the second time."""
        if self._library is not None:
            self._library._destroy()
            self._library = None
        if BitsandbytesOps._current is self:
            BitsandbytesOps._current = None

    def __enter__(self) -> BitsandbytesOps:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _gemm_4bit(
        self,
        a: Tensor,
        b: Tensor,
        shape: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        """``a @ W.T + bias``; with double quantization ``absmax`` is that of the statistics."""
        self.calls["gemm_4bit"] += 1
        size = torch.Size(shape)
        nested: tuple[Tensor | None, Tensor | None] = (None, None)
        if absmax_8bit is not None:
            assert absmax_code is not None
            assert absmax_offset is not None
            offset = absmax_offset.float().reshape(1)
            if _is_standard(absmax_code):
                absmax, nested = absmax_8bit, (absmax, offset)
            else:
                scales = absmax.reshape(-1).repeat_interleave(NESTED_BLOCKSIZE)
                codes = absmax_code.float()[absmax_8bit.reshape(-1).long()]
                absmax = codes * scales[: codes.numel()] + offset
        x = a.contiguous()
        y = torch.ops.peftkern.linear_4bit(
            as_rows(x),
            _shaped_codes(b.view(torch.uint8).reshape(-1), size),
            _shaped_absmax(absmax.reshape(-1), size, blocksize),
            *nested,
            quant_type,
            blocksize,
            size[0],
            None if bias is None else bias.to(a.dtype),
        )
        return like_rows_of(x, y)

    def _dequantize_4bit(
        self,
        a: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        self.calls["dequantize_4bit"] += 1
        size = torch.Size(shape)
        return torch.ops.peftkern.dequantize_4bit(
            _shaped_codes(a.contiguous().view(torch.uint8).reshape(-1), size),
            _shaped_absmax(absmax.float().reshape(-1), size, blocksize),
            None,
            None,
            quant_type,
            blocksize,
            size,
            dtype,
        )


def register_bitsandbytes_ops() -> BitsandbytesOps:
    """Have bitsandbytes' 4-bit layers call our kernels, in the whole process, until taken back.

    For code whose layers must stay what they are; :func:`peftkern.accelerate` swaps the layers of
    one model instead, covers INT8, and fuses adapters. Registered are ``bitsandbytes::gemm_4bit``
    and ``dequantize_4bit`` for CPU and CUDA: the products of ``Linear4bit`` in training, in
    evaluation and under ``torch.compile``. On CPUs with AVX-512 BF16 bitsandbytes rewrites its
    weights in the first evaluation pass and then calls a kernel of its own, which stays.

    Returns:
        The registration; ``remove()`` it, or use it in a ``with`` statement. One exists at a time:
        a second call returns the first one's.

    Raises:
        ImportError: bitsandbytes is not installed.

    Example:
        >>> import peftkern as pk
        >>> with pk.hf.register_bitsandbytes_ops() as ops:  # doctest: +SKIP
        ...     loss = model(**batch).loss
        >>> ops.calls["gemm_4bit"]  # doctest: +SKIP
        224
    """
    try:
        import bitsandbytes  # noqa: F401  (defines the ops)
    except ImportError as error:
        raise ImportError(
            "register_bitsandbytes_ops needs bitsandbytes: pip install 'peftkern[bnb]'"
        ) from error
    if BitsandbytesOps._current is None:
        BitsandbytesOps._current = BitsandbytesOps()
    return BitsandbytesOps._current


def _is_standard(code: Any) -> bool:
    """Whether a nested code table is the signed dynamic map; compared once for each tensor."""
    known: bool | None = _standard.get(code)
    if known is None:
        known = bool(torch.equal(code.float(), dynamic_map().to(code.device)))
        _standard[code] = known
    return known
