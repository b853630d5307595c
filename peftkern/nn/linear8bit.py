"""``Linear8bit``: a linear layer over a frozen row-wise INT8 weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.functional.arguments import FrozenBase
from peftkern.functional.linear import checked_threshold
from peftkern.nn.quantized import QuantizedLinear, adopt_bias, dense_source
from peftkern.quant import QuantizedTensor, quantize_8bit


class Linear8bit(QuantizedLinear):
    """Linear layer whose weight is frozen in INT8 with one absmax a row.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        device: where the (zero) tensors are made; ``"meta"`` makes none.
        dtype: dtype that the weight stands for, and of the bias.
        threshold: ``None`` (the exactly dequantized weight multiplies), or that of LLM.int8(); see
            :func:`peftkern.functional.linear_8bit`. An adapter over the layer takes the exact
            product.

    Attributes ``weight`` int8 [out, in] and ``SCB`` fp32 [out] keep the names and bytes of
    bitsandbytes; ``W = weight * SCB / 127``.

    Example:
        >>> layer = Linear8bit.from_linear(torch.nn.Linear(64, 32))
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    _stored: ClassVar[tuple[str, ...]] = ("weight", "SCB")
    SCB: nn.Parameter
    threshold: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        threshold: float | None = None,
    ) -> None:
        self._setup(in_features, out_features)
        self.threshold = None if threshold is None else checked_threshold(threshold)
        self.quant_dtype = dtype if dtype is not None else torch.get_default_dtype()
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self._hold("weight", codes)
        self._hold_bias(bias, device, self.quant_dtype)
        self._hold("SCB", torch.zeros(out_features, device=device))

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: Tensor | None = None, threshold: float | None = None
    ) -> Linear8bit:
        """A layer over an existing INT8 tensor; nothing is copied.

        Args:
            q: INT8 tensor of shape (out, in).
            bias: [out] or None.
            threshold: as for the class.

        Returns:
            The layer, sharing the memory of ``q``.

        Raises:
            ValueError: ``q`` is not INT8.
        """
        if q.quant_type != "int8":
            raise ValueError(f"q: expected int8, got {q.quant_type}")
        out_features, in_features = q.shape
        layer = cls(in_features, out_features, False, "meta", q.dtype, threshold)
        layer.adopt(q)
        if bias is not None:
            as_parameter = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
            layer.register_parameter("bias", as_parameter)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, threshold: float | None = None) -> Linear8bit:
        """Quantize a dense layer.

        Args:
            linear: ``nn.Linear`` (weight [out, in]) or transformers' ``Conv1D`` (weight [in, out],
                quantized transposed).
            threshold: as for the class.

        Returns:
            A new layer that shares the bias parameter of ``linear``.

        Raises:
            TypeError: ``linear`` is neither of these.
            ValueError: non-finite weights.
        """
        weight = dense_source(linear, "Linear8bit.from_linear")
        if weight.device.type == "meta":
            out_features, in_features = weight.shape
            layer = cls(in_features, out_features, False, "meta", weight.dtype, threshold)
        else:
            layer = cls.from_quantized(quantize_8bit(weight), threshold=threshold)
        adopt_bias(layer, linear)
        return layer

    @classmethod
    def from_bnb(cls, layer: nn.Module, threshold: float | None = None) -> Linear8bit:
        """Take over a ``bitsandbytes.nn.Linear8bitLt`` without copying or requantizing.

        Args:
            layer: the bitsandbytes layer, already quantized.
            threshold: as for the class; the layer's own is ``layer.state.threshold``.

        Returns:
            A new layer over the same bytes.
        """
        taken = cls.from_quantized(QuantizedTensor.from_bnb(layer), threshold=threshold)
        adopt_bias(taken, layer)
        return taken

    @property
    def quantized(self) -> QuantizedTensor:
        """The frozen weight as a :class:`QuantizedTensor` over the same memory."""
        return QuantizedTensor(
            weight=self.weight,
            absmax=self.SCB,
            nested_absmax=None,
            nested_offset=None,
            quant_type="int8",
            blocksize=0,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.quant_dtype,
        )

    def taken_apart(self) -> FrozenBase:
        """The same as the functions pass it on: what a forward pass reads, and nothing more."""
        shape = (self.out_features, self.in_features)
        return FrozenBase(self.weight, self.SCB, None, None, "int8", 0, *shape)

    def adopt(self, q: QuantizedTensor) -> None:
        """Hold the tensors of ``q`` from now on (same shape)."""
        self._hold("weight", q.weight)
        self._hold("SCB", q.absmax)

    def requantize(self, weight: Tensor) -> QuantizedTensor:
        """``weight`` [out, in] in this layer's own format; the layer itself is left alone."""
        return replace(quantize_8bit(weight), dtype=self.quant_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ W.T + bias`` in the dtype of the input; input [..., in] -> [..., out]."""
        base = self.taken_apart()
        return functional.linear_8bit(input, base, self.bias, threshold=self.threshold)

    def _meta(self) -> dict[str, Any]:
        return {"quant_type": "int8", "shape": [self.out_features, self.in_features]}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
            + ("" if self.threshold is None else f", threshold={self.threshold:g}")
        )
