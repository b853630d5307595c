"""``Linear4bit``: a linear layer over a frozen NF4 or FP4 weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.arguments import whole
from peftkern.functional.arguments import FrozenBase
from peftkern.nn.quantized import QuantizedLinear, adopt_bias, dense_source
from peftkern.quant import QuantizedTensor, quantize_4bit

_NESTED_BLOCK = 256


def stored_shapes(
    out_features: int, in_features: int, blocksize: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shapes of the packed weight and of absmax, and the number of blocks."""
    numel = out_features * in_features
    blocks = -(-numel // blocksize)
    packed = (out_features, in_features // 2) if in_features % 2 == 0 else ((numel + 1) // 2,)
    by_row = in_features % blocksize == 0
    absmax = (out_features, in_features // blocksize) if by_row else (blocks,)
    return packed, absmax, blocks


class Linear4bit(QuantizedLinear):
    """Linear layer whose weight is frozen in 4 bits; differentiable in its input and bias.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: weights that share one absmax, 32 to 4096.
        double_quant: store the absmax values in 8 bits with nested statistics.
        device: where the (zero) tensors are made; ``"meta"`` makes none.
        dtype: dtype that the weight stands for, and of the bias.

    Raises:
        ValueError: unknown quant_type, blocksize not a power of two in 32..4096.

    Attributes ``weight`` uint8 [out, in/2], ``absmax`` fp32 [out, in/blocksize] (uint8 with
    ``nested_absmax`` and ``nested_offset`` under double quantization) keep the bytes of
    bitsandbytes. The statistics keep their dtype under ``.to(dtype)`` and ``.half()``.

    Example:
        >>> layer = Linear4bit.from_linear(torch.nn.Linear(64, 32), quant_type="nf4")
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    _stored: ClassVar[tuple[str, ...]] = ("weight", "absmax", "nested_absmax", "nested_offset")
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type: got {quant_type!r}, expected 'nf4' or 'fp4'")
        whole("blocksize", blocksize)
        if not (32 <= blocksize <= 4096 and blocksize & (blocksize - 1) == 0):
            raise ValueError(f"blocksize: got {blocksize}, expected a power of two in 32..4096")
        self._setup(in_features, out_features)
        self.quant_type = quant_type
        self.blocksize = int(blocksize)
        self.double_quant = bool(double_quant)
        self.quant_dtype = dtype if dtype is not None else torch.get_default_dtype()
        packed, absmax, blocks = stored_shapes(out_features, in_features, blocksize)
        stat = torch.uint8 if double_quant else torch.float32
        self._hold("weight", torch.zeros(packed, dtype=torch.uint8, device=device))
        self._hold_bias(bias, device, self.quant_dtype)
        self._hold("absmax", torch.zeros(absmax, dtype=stat, device=device))
        nested = -(-blocks // _NESTED_BLOCK)
        self._hold("nested_absmax", torch.zeros(nested, device=device) if double_quant else None)
        self._hold("nested_offset", torch.zeros(1, device=device) if double_quant else None)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: Tensor | None = None) -> Linear4bit:
        """A layer over an existing 4-bit tensor; nothing is copied.

        Args:
            q: NF4 or FP4 tensor of shape (out, in).
            bias: [out] or None.

        Returns:
            The layer, sharing the memory of ``q``.

        Raises:
            ValueError: ``q`` is not a 4-bit matrix.
        """
        if q.quant_type not in ("nf4", "fp4") or len(q.shape) != 2:
            raise ValueError(
                f"q: expected an nf4 or fp4 matrix, got {q.quant_type} of shape {tuple(q.shape)}"
            )
        out_features, in_features = q.shape
        double = q.nested_absmax is not None
        layer = cls(
            in_features, out_features, False, q.quant_type, q.blocksize, double, "meta", q.dtype
        )
        layer.adopt(q)
        if bias is not None:
            as_parameter = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
            layer.register_parameter("bias", as_parameter)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> Linear4bit:
        """Quantize a dense layer.

        Args:
            linear: ``nn.Linear`` (weight [out, in]) or transformers' ``Conv1D`` (weight [in, out],
                quantized transposed).
            quant_type: ``"nf4"`` or ``"fp4"``.
            blocksize: weights that share one absmax.
            double_quant: quantize the absmax values too.

        Returns:
            A new layer that shares the bias parameter of ``linear``.

        Raises:
            TypeError: ``linear`` is neither of these.
            ValueError: non-finite weights, or a bad quant_type or blocksize.
        """
        weight = dense_source(linear, "Linear4bit.from_linear")
        if weight.device.type == "meta":
            out_features, in_features = weight.shape
            layer = cls(
                in_features,
                out_features,
                False,
                quant_type,
                blocksize,
                double_quant,
                "meta",
                weight.dtype,
            )
        else:
            q = quantize_4bit(
                weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
            )
            layer = cls.from_quantized(q)
        adopt_bias(layer, linear)
        return layer

    @classmethod
    def from_bnb(cls, layer: nn.Module) -> Linear4bit:
        """Take over a ``bitsandbytes.nn.Linear4bit`` without copying or requantizing.

        Args:
            layer: the bitsandbytes layer, already quantized.

        Returns:
            A new layer over the same bytes.
        """
        taken = cls.from_quantized(QuantizedTensor.from_bnb(layer))
        adopt_bias(taken, layer)
        return taken

    @property
    def quantized(self) -> QuantizedTensor:
        """The frozen weight as a :class:`QuantizedTensor` over the same memory."""
        return QuantizedTensor(
            weight=self.weight,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.quant_dtype,
        )

    def taken_apart(self) -> FrozenBase:
        """The same as the functions pass it on: what a forward pass reads, and nothing more."""
        held: dict[str, Any] = self._parameters
        try:
            weight, absmax, nested, offset = [held[name] for name in self._stored]
        except KeyError:  # parametrized or sharded: kept elsewhere under the same names
            weight, absmax, nested, offset = [getattr(self, name) for name in self._stored]
        quantized = (weight, absmax, nested, offset, self.quant_type, self.blocksize)
        return FrozenBase(*quantized, self.out_features, self.in_features)

    def adopt(self, q: QuantizedTensor) -> None:
        """Hold the tensors of ``q`` from now on (same shape and format)."""
        self._hold("weight", q.weight)
        self._hold("absmax", q.absmax)
        self._hold("nested_absmax", q.nested_absmax)
        self._hold("nested_offset", q.nested_offset)

    def requantize(self, weight: Tensor) -> QuantizedTensor:
        """``weight`` [out, in] in this layer's own format; the layer itself is left alone."""
        q = quantize_4bit(
            weight,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
        )
        return replace(q, dtype=self.quant_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ W.T + bias`` in the dtype of the input; input [..., in] -> [..., out]."""
        return functional.linear_4bit(input, self.taken_apart(), self.bias)

    def _meta(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.double_quant,
            "shape": [self.out_features, self.in_features],
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={self.quant_type!r}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}"
        )
