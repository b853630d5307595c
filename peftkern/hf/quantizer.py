"""transformers' ``from_pretrained`` straight into our quantized layers, shard by shard.

Importing this module registers the quantization method ``"peftkern"``; a saved model is loaded
again by ``import peftkern.hf.quantizer`` (or any use of ``peftkern.NF4Config``) before
``from_pretrained``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftkern.codebooks import BLOCKSIZES
from peftkern.hf.config import TASK_HEADS
from peftkern.nn import Linear4bit, Linear8bit
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.experts import STACKED, QuantizedExperts, is_experts
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import is_conv1d, is_dense_linear, own_forward
from peftkern.quant import QUANT_TYPES, QuantizedTensor, quantize

METHOD = "peftkern"


class PeftkernConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes the linear layers of a model.

    Args:
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: 4-bit weights that share one absmax.
        double_quant: 4-bit: quantize the absmax values as well.
        skip_modules: names of modules to leave dense; left out, the output embedding or head and
            what shares its weight.

    Raises:
        ValueError: an unknown type or block size.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        skip_modules: list[str] | None = None,
        **more: Any,
    ) -> None:
        more.pop("quant_method", None)
        if more:
            raise ValueError(f"unknown fields: {', '.join(sorted(more))}")
        if quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: got {quant_type!r}, expected one of {QUANT_TYPES}")
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: got {blocksize!r}, expected one of {BLOCKSIZES}")
        self.quant_method: Any = METHOD
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.skip_modules = None if skip_modules is None else list(skip_modules)


class NF4Config(PeftkernConfig):
    """NF4 weights: ``AutoModel.from_pretrained(path, quantization_config=NF4Config())``.

    Args:
        blocksize: weights that share one absmax.
        double_quant: quantize the absmax values as well.
        skip_modules: names of modules to leave dense.
    """

    def __init__(
        self,
        blocksize: int = 64,
        double_quant: bool = True,
        skip_modules: list[str] | None = None,
    ) -> None:
        super().__init__("nf4", blocksize, double_quant, skip_modules)


class INT8Config(PeftkernConfig):
    """INT8 weights with one absmax a row.

    Args:
        skip_modules: names of modules to leave dense.
    """

    def __init__(self, skip_modules: list[str] | None = None) -> None:
        super().__init__("int8", skip_modules=skip_modules)


class Quantize(ConversionOps):
    """One weight from the checkpoint into the codes and statistics of its layer or layers."""

    def __init__(self, config: PeftkernConfig, experts: dict[str, QuantizedExperts]) -> None:
        self.config = config
        self.experts = experts

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: Any = None,
        **more: Any,
    ) -> dict[str, Tensor]:
        """Quantize; the result holds every stored tensor of the layer by its full name."""
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path, _, parameter = name.rpartition(".")
            if path in self.experts:
                self._stack(model, path, parameter, weight, missing_keys)
                continue
            layer, _ = get_module_from_name(model, name)
            if getattr(layer, "_stored_transposed", False):
                weight = weight.T
            for part, tensor in _named(layer, self._quantized(weight)).items():
                full = f"{path}.{part}"
                out[full] = nn.Parameter(tensor, requires_grad=False)
                if missing_keys is not None:
                    missing_keys.discard(full)
            layer._is_hf_initialized = True
        return out

    def _quantized(self, weight: Tensor) -> QuantizedTensor:
        config = self.config
        return quantize(
            weight.contiguous(), config.quant_type, config.blocksize, config.double_quant
        )

    def _stack(
        self, model: Any, path: str, parameter: str, weight: Tensor, missing_keys: Any
    ) -> None:
        """Quantize a stack expert by expert; with the second one the experts change places.

        Until then the model keeps its own, so that what a checkpoint lacks is reported as usual.
        """
        quantized = self.experts[path]
        for layer, dense in zip(quantized.layers(parameter), weight, strict=True):
            for part, tensor in _named(layer, self._quantized(dense)).items():
                setattr(layer, part, nn.Parameter(tensor, requires_grad=False))
            layer._is_hf_initialized = True  # type: ignore[assignment]
        if any(tensor.device.type == "meta" for tensor in quantized.parameters()):
            return
        for tensor in quantized.parameters():
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        quantized._is_hf_initialized = True  # type: ignore[assignment]
        _replace(model, path, quantized)
        for stack in STACKED:
            if missing_keys is not None:
                missing_keys.discard(f"{path}.{stack}")


def _named(layer: nn.Module, q: QuantizedTensor) -> dict[str, Tensor]:
    if isinstance(layer, Linear8bit):
        return {"weight": q.weight, "SCB": q.absmax}
    parts = {
        "weight": q.weight,
        "absmax": q.absmax,
        "nested_absmax": q.nested_absmax,
        "nested_offset": q.nested_offset,
    }
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _makes_stacks(conversion: Any) -> bool:
    targets = conversion.target_patterns if isinstance(conversion, WeightConverter) else []
    return any(target.rpartition(".")[2] in STACKED for target in targets)


class PeftkernQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with a :class:`PeftkernConfig`."""

    requires_calibration = False
    quantization_config: PeftkernConfig
    _model: weakref.ref[nn.Module] | None = None
    _experts: dict[str, QuantizedExperts]  # to take the places of dense ones, by path

    def __init__(self, quantization_config: PeftkernConfig, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        self._experts = {}

    @property
    def quantized_element_size(self) -> float:
        """Bytes of one weight, by which device maps are sized."""
        return 1.0 if self.quantization_config.quant_type == "int8" else 0.53

    def param_needs_quantization(self, model: nn.Module, param_name: str, **more: Any) -> bool:
        """Whether the tensor of this name is a weight still to be quantized."""
        if self.pre_quantized:
            return False
        path, _, name = param_name.rpartition(".")
        if path in self._experts:
            return name in STACKED
        return isinstance(model.get_submodule(path), QuantizedLinear) and name == "weight"

    def get_quantize_ops(self) -> Quantize:
        """The operation for one weight."""
        return Quantize(self.quantization_config, self._experts)

    def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.skip_modules, model._keep_in_fp32_modules
        )
        if config.skip_modules is None:
            # Heads of encoders, which transformers' own rule for the last module misses.
            skip = [*skip, *(head for heads in TASK_HEADS.values() for head in heads)]
        self._model = weakref.ref(model)
        self._experts = {}
        for name, module in list(model.named_modules()):
            if not should_convert_module(name, skip):
                continue
            if is_experts(module):
                experts = QuantizedExperts(module, self._layer)
                if self.pre_quantized:
                    _replace(model, name, experts)
                else:
                    self._experts[name] = experts
            elif is_dense_linear(module) and not own_forward(module):
                layer = self._layer(module)
                layer._stored_transposed = is_conv1d(module)  # type: ignore[assignment]
                _replace(model, name, layer)

    def _layer(self, dense: nn.Module) -> QuantizedLinear:
        config = self.quantization_config
        if config.quant_type == "int8":
            return Linear8bit.from_linear(dense)
        return Linear4bit.from_linear(
            dense, config.quant_type, config.blocksize, config.double_quant
        )

    def _process_model_after_weight_loading(self, model: nn.Module, **more: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                for tensor in module._stored_tensors().values():
                    tensor.requires_grad_(False)
        if any(isinstance(module, QuantizedExperts) for module in model.modules()):
            # Saving would turn stacks back into the checkpoint's layout, and quantized experts have
            # the stacks' names; their own names load again as they are.
            conversions = getattr(model, "_weight_conversions", None) or []
            kept = [c for c in conversions if not _makes_stacks(c)]
            model._weight_conversions = kept  # type: ignore[assignment]
        self._experts = {}
        return model

    def is_serializable(self) -> bool:
        """The stored tensors are plain and named: saving needs nothing special."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over the quantized weights train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets ``Trainer`` take a model once it carries adapters of ours."""
        model = None if self._model is None else self._model()
        return model is not None and any(isinstance(m, AdapterLayer) for m in model.modules())


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a reloaded module must not register twice
    register_quantization_config(METHOD)(PeftkernConfig)
    register_quantizer(METHOD)(PeftkernQuantizer)
