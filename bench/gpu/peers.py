"""Other people's layers on a GPU; ImportError where they are absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


def bitsandbytes_layer(fmt: str, w: Tensor) -> torch.nn.Module:
    """A frozen bitsandbytes layer in training mode that holds ``w``."""
    bnb = importlib.import_module("bitsandbytes")
    n, k = w.shape
    if fmt == "int8":
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(w.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=w.dtype, compress_statistics=True, quant_type=fmt
        )
        layer.weight = bnb.nn.Params4bit(
            w.cpu(),
            requires_grad=False,
            quant_type=fmt,
            blocksize=64,
            compress_statistics=True,
            module=layer,
        )
    return layer.to(w.device).train()


class _Dequantizer:
    """A call without arguments that can be copied with its weight."""

    def __init__(self, fmt: str, w: Tensor) -> None:
        self._functional = "bitsandbytes.functional"
        bnb = importlib.import_module(self._functional)
        self._int8 = fmt == "int8"
        if self._int8:
            codes, statistics, _ = bnb.int8_vectorwise_quant(w.half())
            self._stored = (codes, statistics)
        else:
            self._stored = bnb.quantize_4bit(
                w, blocksize=64, quant_type=fmt, compress_statistics=True
            )

    def __call__(self) -> Tensor:
        bnb = importlib.import_module(self._functional)
        if self._int8:
            return bnb.int8_vectorwise_dequant(*self._stored)
        return bnb.dequantize_4bit(*self._stored)


def bitsandbytes_dequantizer(fmt: str, w: Tensor) -> Callable[[], Tensor]:
    """What dequantizes a copy of ``w``."""
    return _Dequantizer(fmt, w)


def bitsandbytes_adamw(state: str, parameters: list[Tensor]) -> Any:
    """bitsandbytes' AdamW, 8-bit or fp32 state."""
    bnb = importlib.import_module("bitsandbytes")
    kind = bnb.optim.AdamW8bit if state == "8bit" else bnb.optim.AdamW
    return kind(parameters, lr=1e-4)


def hf_peft(fmt: str, w: Tensor, r: int, device: torch.device) -> tuple[Layer, list[Tensor]]:
    """HF PEFT's LoRA layer over ``w`` (quantized by bitsandbytes), and what it trains."""
    peft = importlib.import_module("peft")
    n, k = w.shape
    if fmt == "dense":
        base: torch.nn.Module = torch.nn.Linear(k, n, bias=False, dtype=w.dtype, device=device)
        base.weight.data.copy_(w)
    else:
        base = bitsandbytes_layer(fmt, w)
    holder = torch.nn.Sequential(base)
    holder.is_loaded_in_4bit = fmt in ("nf4", "fp4")
    holder.is_loaded_in_8bit = fmt == "int8"
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False)
    layer: torch.nn.Module = peft.inject_adapter_in_model(config, holder)[0].to(device)
    if not isinstance(layer, peft.tuners.lora.LoraLayer):
        raise RuntimeError(f"HF PEFT left the {fmt} layer as it was: {type(layer).__name__}")
    return layer.train(), [p for p in layer.parameters() if p.requires_grad]


def unsloth(fmt: str, w: Tensor, r: int, device: torch.device) -> tuple[Layer, list[Tensor]]:
    """Unsloth's fused LoRA function over the same weight; bf16 adapters, as it needs them."""
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    n, k = w.shape
    weight, state = w, None
    if fmt != "dense":
        bnb = importlib.import_module("bitsandbytes.functional")
        weight, state = bnb.quantize_4bit(w, blocksize=64, quant_type=fmt, compress_statistics=True)
    a = (torch.randn(r, k, device=device) / k**0.5).to(w.dtype).requires_grad_()
    b = torch.randn(n, r, device=device).to(w.dtype).requires_grad_()
    return lambda x: function.apply(x[None], weight, state, a, b, 1.0)[0], [a, b]


def liger_swiglu() -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's SwiGLU function."""
    return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
