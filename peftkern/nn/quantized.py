"""What ``Linear4bit`` and ``Linear8bit`` share: frozen bytes that no cast may touch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern.arguments import whole
from peftkern.functional.arguments import FrozenBase
from peftkern.nn.structure import dense_weight, is_dense_linear
from peftkern.quant import QuantizedTensor


class QuantizedLinear(nn.Linear):
    """Base of the quantized linear layers; not for direct use.

    Subclasses list in ``_stored`` the names of their frozen tensors. All of them are plain
    ``nn.Parameter``s without gradient: DDP broadcasts buffers in every forward, sharding loses the
    metadata of parameter subclasses.
    """

    _stored: ClassVar[tuple[str, ...]] = ("weight",)

    def _setup(self, in_features: int, out_features: int) -> None:
        # nn.Linear.__init__ would allocate the float weight that this layer exists to avoid.
        nn.Module.__init__(self)
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        frozen = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(name, frozen)

    def _hold_bias(self, bias: bool, device: Any, dtype: torch.dtype) -> None:
        value = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        self.register_parameter("bias", value if bias else None)

    def _stored_tensors(self) -> dict[str, Tensor]:
        held = ((name, self._parameters.get(name)) for name in self._stored)
        return {name: tensor for name, tensor in held if tensor is not None}

    def _meta(self) -> dict[str, Any]:
        raise AssertionError("subclasses describe their format")

    @property
    def quantized(self) -> QuantizedTensor:
        """The frozen weight as a :class:`QuantizedTensor` over the same memory."""
        raise AssertionError("subclasses build their QuantizedTensor")

    def taken_apart(self) -> FrozenBase:
        """The same as the functions pass it on: what a forward pass reads, and nothing more."""
        raise AssertionError("subclasses take their weight apart")

    @property
    def W_q(self) -> Tensor:
        """The packed bytes, under the name by which PEFT knows to call :meth:`dequantize`.

        PEFT asks for it when it puts an adapter on this layer.
        """
        _known_to_peft()
        return self.weight.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _known_to_peft()  # unpickled below a layer of PEFT, perhaps

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its statistics, without the bias."""
        return sum(t.numel() * t.element_size() for t in self._stored_tensors().values())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor [out, in].

        Args:
            dtype: dtype of the result; the dtype that it was quantized from when left out.

        Returns:
            A new tensor [out_features, in_features].
        """
        return self.quantized.dequantize(dtype)

    def reset_parameters(self) -> None:
        """Refused: quantized bytes are loaded or quantized from a weight, never drawn.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{type(self).__name__} holds frozen quantized bytes and has no random "
            "initialisation; load a state dict or use from_linear"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        held = {id(tensor) for tensor in self._stored_tensors().values()}

        def move_only(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) in held and out.dtype != tensor.dtype:
                # .half() or .to(bf16) on a model must not round fp32 statistics.
                return tensor.detach().to(out.device)
            return out

        return super()._apply(move_only, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})["peftkern"] = self._meta()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._why_not_loadable(state_dict, prefix, local_metadata)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _why_not_loadable(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> str | None:
        kind, where = type(self).__name__, prefix[:-1] or "this layer"
        if any(key.startswith(f"{prefix}weight.quant_state.") for key in state_dict):
            return (
                f"{where}: the state dict was written by bitsandbytes; load it into a bitsandbytes "
                f"layer and use {kind}.from_bnb(layer)"
            )
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.is_floating_point():
            return (
                f"{where}: the state dict holds a {weight.dtype} weight of shape "
                f"{tuple(weight.shape)}, not the bytes of a {kind}; load it into nn.Linear and "
                f"use {kind}.from_linear(linear)"
            )
        saved, mine = local_metadata.get("peftkern"), self._meta()
        if saved is not None and saved != mine:
            differ = ", ".join(
                f"{key}: saved {saved.get(key)!r}, this layer {mine.get(key)!r}"
                for key in sorted({*saved, *mine})
                if saved.get(key) != mine.get(key)
            )
            return f"{where}: the state dict was quantized differently ({differ})"
        for name, tensor in self._stored_tensors().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != tensor.dtype:
                return (
                    f"{prefix}{name}: expected {tensor.dtype}, the state dict holds {given.dtype}"
                )
        return None


def _known_to_peft() -> None:
    """Where PEFT is loaded, see to it that it merges into our layers by their own functions."""
    if "peft.tuners.lora" in sys.modules:
        from peftkern.hf.accelerate.merging import teach_peft

        teach_peft()


def dense_source(linear: nn.Module, maker: str) -> Tensor:
    """The weight [out, in] that ``maker`` is to quantize.

    Raises:
        TypeError: not an ``nn.Linear`` or ``Conv1D`` with a floating point weight.
    """
    if not is_dense_linear(linear):
        raise TypeError(
            f"{maker}: expected nn.Linear or transformers Conv1D with a floating point weight, "
            f"got {type(linear).__name__}"
        )
    return dense_weight(linear).detach().contiguous()


def adopt_bias(layer: QuantizedLinear, source: nn.Module) -> None:
    """Share the bias parameter of ``source``, so that tying and sharding see one object."""
    layer.register_parameter("bias", source._parameters.get("bias"))
    layer.train(source.training)
