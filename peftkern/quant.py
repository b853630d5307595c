"""Quantized weights: the object that holds them, and how to make, read and hand them over.

Formats (bytes and order are those of bitsandbytes, see docs/formats.md): NF4 and FP4 in blocks over
the flattened weight, with double quantization of the statistics (QLoRA, arXiv 2305.14314); INT8
with one absmax a row (LLM.int8, arXiv 2208.07339).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftkern.arguments import require_tensor, whole
from peftkern.codebooks import BLOCKSIZES, NESTED_BLOCKSIZE, dynamic_map, table_4bit
from peftkern.ops import checks

QUANT_TYPES = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class QuantizedTensor:
    """A frozen weight [out, in] in 4 or 8 bits; a plain object, not a tensor subclass.

    Args:
        weight: 4-bit: packed uint8 [out, in/2] (flat where ``in`` is odd), even element in the high
            nibble; INT8: int8 [out, in].
        absmax: block statistics, fp32, or uint8 codes where double-quantized; [out, in/blocksize]
            where the block size divides ``in``, else flat. INT8: fp32 row absmax [out] (SCB).
        nested_absmax: fp32 [ceil(blocks/256)] with double quantization, else ``None``.
        nested_offset: fp32 [1] with double quantization, else ``None``.
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: weights that share a scale; 0 for INT8.
        shape: logical shape of the weight.
        dtype: dtype it was quantized from: what :meth:`dequantize` returns by default.

    Example:
        >>> import torch, peftkern as pk
        >>> q = pk.quantize_4bit(torch.randn(128, 64))
        >>> q.dequantize().shape, q.nbytes < 128 * 64
        (torch.Size([128, 64]), True)
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: got {self.quant_type!r}, expected one of {QUANT_TYPES}")

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and statistics together."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and statistics that are present."""
        parts = (self.weight, self.absmax, self.nested_absmax, self.nested_offset)
        return tuple(part for part in parts if part is not None)

    def statistics(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(absmax, nested_absmax, nested_offset)`` as the ops take them."""
        return self.absmax, self.nested_absmax, self.nested_offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as an ordinary tensor.

        Args:
            dtype: float32, bfloat16, float16 or float64; default: what it was quantized from.

        Returns:
            Tensor of ``shape``: fp32 code times fp32 absmax, rounded once to ``dtype``.
        """
        dtype = dtype or self.dtype
        if self.quant_type == "int8":
            return torch.ops.peftkern.dequantize_8bit(self.weight, self.absmax, dtype)
        return torch.ops.peftkern.dequantize_4bit(
            self.weight, *self.statistics(), self.quant_type, self.blocksize, self.shape, dtype
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on another device; the statistics keep their dtypes."""
        moved = {
            name: value.to(device)
            for name in ("weight", "absmax", "nested_absmax", "nested_offset")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    @classmethod
    def from_bnb(cls, source: Any) -> QuantizedTensor:
        """Take over a bitsandbytes weight without copying its bytes.

        Args:
            source: ``Linear4bit``, ``Linear8bitLt``, ``Params4bit`` or ``Int8Params``, quantized.

        Raises:
            TypeError: not one of these.
            ValueError: not quantized yet, repacked in place by bitsandbytes' CPU inference path,
                or with code tables other than the standard ones.
        """
        return _from_bnb(source)

    def to_bnb(self, requires_grad: bool = False) -> Any:
        """A bitsandbytes ``Params4bit`` or ``Int8Params`` over the same bytes.

        Raises:
            ImportError: bitsandbytes is not installed.
        """
        return _to_bnb(self, requires_grad)


def quantize_4bit(
    w: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    allow_nonfinite: bool = False,
) -> QuantizedTensor:
    """Quantize a weight to NF4 or FP4.

    Args:
        w: any shape, float32, bfloat16 or float16.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: 32, 64, ..., 4096 weights per scale, counted over the flattened tensor.
        double_quant: store the scales themselves in 8 bits (4.127 instead of 4.5 bits a weight).
        allow_nonfinite: do not raise for NaN or Inf; only their own block is affected.

    Raises:
        TypeError: ``w`` is not a float tensor.
        ValueError: unknown type or block size, or NaN/Inf in ``w``.

    Example:
        >>> import torch, peftkern as pk
        >>> pk.quantize_4bit(torch.zeros(2, 64), double_quant=False).absmax
        tensor([[0.],
                [0.]])
    """
    require_tensor("w", w)
    whole("blocksize", blocksize)
    checks.quant_type_4bit(quant_type, blocksize)
    w = w.detach()
    packed, absmax = torch.ops.peftkern.quantize_4bit(
        w.contiguous(), quant_type, blocksize, not allow_nonfinite
    )
    nested_absmax = nested_offset = None
    if double_quant:
        absmax, nested_absmax, nested_offset = torch.ops.peftkern.quantize_absmax(absmax)
    return QuantizedTensor(
        _shaped_codes(packed, w.shape),
        _shaped_absmax(absmax, w.shape, blocksize),
        nested_absmax,
        nested_offset,
        quant_type,
        blocksize,
        w.shape,
        w.dtype,
    )


def quantize_8bit(w: Tensor, allow_nonfinite: bool = False) -> QuantizedTensor:
    """Quantize a matrix [out, in] to INT8 with one absmax a row.

    Args:
        w: [out, in], float32, bfloat16 or float16.
        allow_nonfinite: do not raise for NaN or Inf; only their own row is affected.

    Raises:
        TypeError: ``w`` is not a float tensor.
        ValueError: not a matrix, or NaN/Inf in ``w``.
    """
    require_tensor("w", w)
    w = w.detach()
    codes, scb = torch.ops.peftkern.quantize_8bit(w.contiguous(), not allow_nonfinite)
    return QuantizedTensor(codes, scb, None, None, "int8", 0, w.shape, w.dtype)


def quantize(
    w: Tensor, quant_type: str, blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Quantize to any format by name: ``"nf4"``, ``"fp4"`` or ``"int8"``.

    Raises:
        ValueError: unknown format; else as :func:`quantize_4bit` and :func:`quantize_8bit`.
    """
    if quant_type == "int8":
        return quantize_8bit(w)
    return quantize_4bit(w, quant_type, blocksize, double_quant)


def _shaped_codes(packed: Tensor, shape: torch.Size) -> Tensor:
    rows = len(shape) == 2 and shape[1] % 2 == 0 and shape[1] > 0
    return packed.view(shape[0], shape[1] // 2) if rows else packed


def _shaped_absmax(absmax: Tensor, shape: torch.Size, blocksize: int) -> Tensor:
    rows = len(shape) == 2 and shape[1] > 0 and shape[1] % blocksize == 0
    return absmax.view(shape[0], shape[1] // blocksize) if rows else absmax


def _from_bnb(source: Any) -> QuantizedTensor:
    weight: Any = source.weight if isinstance(source, torch.nn.Module) else source
    name = type(weight).__name__
    if name == "Int8Params" or getattr(weight, "SCB", None) is not None:
        return _from_bnb_int8(source, weight)
    if name != "Params4bit" and getattr(weight, "quant_state", None) is None:
        raise TypeError(
            f"source: got {type(source).__name__}, expected a bitsandbytes Linear4bit, "
            "Linear8bitLt, Params4bit or Int8Params"
        )
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError("source: is not quantized yet; move it to its device first (.to('cpu'))")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "source: bitsandbytes has repacked this weight in place for CPU inference, which "
            "rounds its statistics; reload the model and convert before the first eval forward"
        )
    if state.blocksize not in BLOCKSIZES:
        raise ValueError(f"source: block size {state.blocksize}, expected one of {BLOCKSIZES}")
    table = table_4bit(state.quant_type).to(state.code.device)
    if not torch.equal(state.code.float(), table):
        raise ValueError(f"source: its code table is not the {state.quant_type} table")
    absmax, nested_absmax, nested_offset = state.absmax, None, None
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"source: nested block size {state.state2.blocksize}, expected 256")
        if not torch.equal(state.state2.code.float(), dynamic_map().to(absmax.device)):
            raise ValueError("source: its nested code table is not the signed dynamic map")
        nested_absmax = state.state2.absmax
        nested_offset = torch.as_tensor(state.offset, device=absmax.device).float().reshape(1)
    shape = torch.Size(state.shape)
    return QuantizedTensor(
        _shaped_codes(weight.data.view(torch.uint8).reshape(-1), shape),
        _shaped_absmax(absmax.reshape(-1), shape, state.blocksize),
        nested_absmax,
        nested_offset,
        state.quant_type,
        state.blocksize,
        shape,
        state.dtype,
    )


def _from_bnb_int8(source: Any, weight: Any) -> QuantizedTensor:
    # After the first forward the statistics move from the parameter to the module's state.
    scb = getattr(weight, "SCB", None)
    if scb is None:
        scb = getattr(getattr(source, "state", None), "SCB", None)
    if scb is None or weight.data.dtype != torch.int8:
        raise ValueError("source: is not quantized yet; move it to its device first (.to('cpu'))")
    codes = weight.data.contiguous()
    return QuantizedTensor(
        codes, scb.float().reshape(-1), None, None, "int8", 0, codes.shape, torch.float16
    )


def _to_bnb(q: QuantizedTensor, requires_grad: bool) -> Any:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError("to_bnb needs bitsandbytes: pip install 'peftkern[bnb]'") from error
    if q.quant_type == "int8":
        return bnb.nn.Int8Params(
            q.weight, requires_grad=requires_grad, has_fp16_weights=False, CB=q.weight, SCB=q.absmax
        )
    described = {
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    table = table_4bit(q.quant_type) + 0.0  # their stored table has no -0
    stats = {"absmax": q.absmax.reshape(-1), "quant_map": table.to(q.device)}
    if q.nested_absmax is not None and q.nested_offset is not None:
        stats["nested_absmax"] = q.nested_absmax
        stats["nested_quant_map"] = dynamic_map().to(q.device)
        described |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": q.nested_offset.item(),
        }
    blob = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    stats[f"quant_state.bitsandbytes__{q.quant_type}"] = blob
    return bnb.nn.Params4bit.from_prequantized(
        data=q.weight.reshape(-1, 1),
        quantized_stats=stats,
        requires_grad=requires_grad,
        device=q.device,
    )
