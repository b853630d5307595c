"""The contenders of every cell: peftkern's public functions and what they are compared with.

bitsandbytes is measured on its training path (a layer in training mode). Its evaluation path on
the CPU exists only on processors with AVX-512 BF16 and only for out % 32 == 0 and in % 64 == 0;
it repacks the weight in place and rounds its statistics, so it is a row of its own.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import peftkern as pk

from .cases import weight_bytes
from .measure import Contender, copies_for

_THRESHOLD = 6.0  # bitsandbytes' usual one
Layer = Callable[[torch.Tensor], torch.Tensor]
Built = tuple[list[Contender], dict[str, str]]


def clones(thing: Any, weight: int) -> list[Any]:
    """``thing`` and as many deep copies as it takes to find none of them in a cache."""
    return [thing, *(copy.deepcopy(thing) for _ in range(copies_for(weight) - 1))]


def _forward(
    name: str, layers: Sequence[Layer], k: int, dtype: torch.dtype, size: int
) -> Contender:
    def prepare(rows: int) -> Callable[[int], object]:
        x = torch.randn(rows, k).to(dtype)
        return lambda i: layers[i](x)

    return Contender(name, prepare, len(layers), size)


def _input_gradient(
    name: str, layers: Sequence[Layer], k: int, n: int, dtype: torch.dtype, size: int
) -> Contender:
    """Backward to the input alone; every contender goes through autograd, as in training."""

    def prepare(rows: int) -> Callable[[int], object]:
        x = torch.randn(rows, k).to(dtype).requires_grad_()
        dy = torch.randn(rows, n).to(dtype)
        ys = [layer(x) for layer in layers]
        return lambda i: torch.autograd.grad(ys[i], x, dy, retain_graph=True)

    return Contender(name, prepare, len(layers), size)


def _step(
    name: str,
    layers: Sequence[Layer],
    trained: Sequence[Sequence[torch.Tensor]],
    k: int,
    n: int,
    dtype: torch.dtype,
    size: int,
) -> Contender:
    """Forward, then backward to the input and the trained parameters."""

    def prepare(rows: int) -> Callable[[int], object]:
        x = torch.randn(rows, k).to(dtype).requires_grad_()
        dy = torch.randn(rows, n).to(dtype)
        return lambda i: torch.autograd.grad(layers[i](x), [x, *trained[i]], dy)

    return Contender(name, prepare, len(layers), size)


def bitsandbytes_module() -> Any:
    """The bitsandbytes package without its import-time chatter."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes


def bitsandbytes_layer(
    fmt: str, w: torch.Tensor, *, nested: bool = False, threshold: float = 0.0
) -> torch.nn.Module:
    """A bitsandbytes layer in training mode over ``w``, quantized by bitsandbytes itself."""
    bnb = bitsandbytes_module()
    n, k = w.shape
    if fmt == "int8":
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight = bnb.nn.Int8Params(w.clone(), has_fp16_weights=False, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=w.dtype, compress_statistics=nested, quant_type=fmt
        )
        layer.weight = bnb.nn.Params4bit(
            w.clone(),
            requires_grad=False,
            compress_statistics=nested,
            quant_type=fmt,
            module=layer,
        )
    return layer.to("cpu").train()


def peftkern_base(fmt: str, w: torch.Tensor) -> Any:
    """``w`` in one of our formats, as :func:`peftkern.functional.lora_linear` takes it."""
    if fmt == "dense":
        return w
    if fmt == "int8":
        return pk.quantize_8bit(w)
    return pk.quantize_4bit(w, quant_type=fmt, blocksize=64, double_quant=False)


def llm_int8(m: int, k: int, n: int, dtype: torch.dtype) -> Built:
    """INT8 with rows of x rounded to 8 bits, against the exact product, bitsandbytes and torch."""
    size, dense = weight_bytes("int8", k, n, 1), weight_bytes("dense", k, n, dtype.itemsize)
    io = m * (k + n) * dtype.itemsize
    w = (torch.randn(n, k) / k**0.5).to(dtype)
    packed = clones(pk.quantize_8bit(w), size)
    function = pk.functional.linear_8bit
    ours: list[Layer] = [lambda x, q=q: function(x, q, threshold=_THRESHOLD) for q in packed]
    exact: list[Layer] = [lambda x, q=q: function(x, q) for q in packed]
    rows = [
        _forward("peftkern", ours, k, dtype, size + io),
        _forward("peftkern-exact", exact, k, dtype, size + io),
    ]
    absent = {}
    try:
        layer = bitsandbytes_layer("int8", w, threshold=_THRESHOLD).eval()
    except ImportError as error:
        absent["bitsandbytes"] = f"not installed: {error}"
    else:
        rows.append(_forward("bitsandbytes", clones(layer, size), k, dtype, size + io))
    plain: list[Layer] = [lambda x, v=v: torch.nn.functional.linear(x, v) for v in clones(w, dense)]
    rows.append(_forward("torch", plain, k, dtype, dense + io))
    return rows, absent


def linear(fmt: str, way: str, m: int, k: int, n: int, dtype: torch.dtype) -> Built:
    """Quantized matmul, ``way`` "fwd" or "dx", against bitsandbytes and torch's dense matmul."""
    item = dtype.itemsize
    io = m * (k + n) * item
    packed, dense = weight_bytes(fmt, k, n, item), weight_bytes("dense", k, n, item)
    w = (torch.randn(n, k) / k**0.5).to(dtype)

    def contender(name: str, layers: Sequence[Layer], size: int) -> Contender:
        if way == "fwd":
            return _forward(name, layers, k, dtype, size + io)
        return _input_gradient(name, layers, k, n, dtype, size + io)

    function = pk.functional.linear_8bit if fmt == "int8" else pk.functional.linear_4bit
    ours: list[Layer] = [
        lambda x, q=q: function(x, q) for q in clones(peftkern_base(fmt, w), packed)
    ]
    rows, absent = [contender("peftkern", ours, packed)], {}
    try:
        bnb = bitsandbytes_module()
    except ImportError as error:
        absent["bitsandbytes"] = absent["bitsandbytes-eval"] = f"not installed: {error}"
    else:
        layer = bitsandbytes_layer(fmt, w)
        rows.append(contender("bitsandbytes", clones(layer, packed), packed))
        if fmt == "int8" or way != "fwd":
            absent["bitsandbytes-eval"] = "has no path of its own for this op"
        elif not bnb.functional.has_avx512bf16():
            absent["bitsandbytes-eval"] = "needs a processor with AVX-512 BF16"
        elif n % 32 or k % 64:
            absent["bitsandbytes-eval"] = "wrong results unless out % 32 == 0 and in % 64 == 0"
        else:
            evals = [module.eval() for module in clones(copy.deepcopy(layer), packed)]
            rows.append(contender("bitsandbytes-eval", evals, packed))
    plain: list[Layer] = [lambda x, v=v: torch.nn.functional.linear(x, v) for v in clones(w, dense)]
    rows.append(contender("torch", plain, dense))
    return rows, absent


def lora(fmt: str, r: int, m: int, k: int, n: int, dtype: torch.dtype) -> Built:
    """A LoRA layer's forward and backward, against HF PEFT and the frozen dense layer alone."""
    item = dtype.itemsize
    packed, dense = weight_bytes(fmt, k, n, item), weight_bytes("dense", k, n, item)
    io = m * (3 * k + 2 * n) * item
    w = (torch.randn(n, k) / k**0.5).to(dtype)

    bases = clones(peftkern_base(fmt, w), packed)
    pairs = [
        ((torch.randn(r, k) / k**0.5).requires_grad_(), torch.randn(n, r).requires_grad_())
        for _ in bases
    ]
    ours: list[Layer] = [
        lambda x, q=q, a=a, b=b: pk.functional.lora_linear(x, q, a, b, 1.0)
        for q, (a, b) in zip(bases, pairs, strict=True)
    ]
    rows, absent = [_step("peftkern", ours, pairs, k, n, dtype, 2 * packed + io)], {}
    try:
        theirs = clones(_hf_peft_layer(fmt, w, r), packed)
    except ImportError as error:
        absent["hf-peft"] = f"not installed: {error}"
    else:
        adapters = [[p for p in layer.parameters() if p.requires_grad] for layer in theirs]
        rows.append(_step("hf-peft", theirs, adapters, k, n, dtype, 2 * packed + io))
    plain: list[Layer] = [lambda x, v=v: torch.nn.functional.linear(x, v) for v in clones(w, dense)]
    rows.append(_step("torch-frozen", plain, [()] * len(plain), k, n, dtype, 2 * dense + io))
    return rows, absent


def qlora_layer(r: int, m: int, k: int, n: int, dtype: torch.dtype) -> Built:
    """A QLoRA layer's forward and backward: nested NF4, fp32 adapters, a bias-free projection."""
    packed = weight_bytes("nf4", k, n, dtype.itemsize)
    io = m * (3 * k + 2 * n) * dtype.itemsize
    w = (torch.randn(n, k) / k**0.5).to(dtype)

    def contender(name: str, layer: torch.nn.Module) -> Contender:
        layers = clones(layer, packed)
        trained = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        return _step(name, layers, trained, k, n, dtype, 2 * packed + io)

    config = pk.LoRAConfig(r=r, lora_alpha=r, target_modules=["0"], quantize="nf4")
    dense = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    dense.weight.data.copy_(w)
    model = torch.nn.Sequential(dense)
    pk.patch(model, config)
    rows, absent = [contender("peftkern", model[0].train())], {}
    try:
        rows.append(contender("hf-peft+bitsandbytes", _hf_peft_layer("nf4", w, r, nested=True)))
    except ImportError as error:
        absent["hf-peft+bitsandbytes"] = f"not installed: {error}"
    return rows, absent


def _hf_peft_layer(fmt: str, w: torch.Tensor, r: int, *, nested: bool = False) -> torch.nn.Module:
    import peft

    n, k = w.shape
    if fmt == "dense":
        base: torch.nn.Module = torch.nn.Linear(k, n, bias=False, dtype=w.dtype)
        base.weight.data.copy_(w)
    else:
        base = bitsandbytes_layer(fmt, w, nested=nested)
    holder = torch.nn.Sequential(base)
    # The flags by which PEFT learns that transformers has quantized the model.
    holder.is_loaded_in_4bit = fmt in ("nf4", "fp4")
    holder.is_loaded_in_8bit = fmt == "int8"
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False)
    layer: torch.nn.Module = peft.inject_adapter_in_model(config, holder)[0]
    if not isinstance(layer, peft.tuners.lora.LoraLayer):
        raise RuntimeError(f"HF PEFT left the {fmt} layer as it was: {type(layer).__name__}")
    return layer.train()


def quantize(fmt: str, k: int, n: int, dtype: torch.dtype) -> Built:
    """Quantizing a weight, against bitsandbytes."""
    item = dtype.itemsize
    size = weight_bytes("dense", k, n, item) + weight_bytes(fmt, k, n, item)
    ws = clones(torch.randn(n, k).to(dtype), weight_bytes("dense", k, n, item))
    rows = [_plain("peftkern", lambda i: peftkern_base(fmt, ws[i]), len(ws), size)]
    try:
        bnb = bitsandbytes_module()
    except ImportError as error:
        return rows, {"bitsandbytes": f"not installed: {error}"}
    if fmt == "int8":
        halves = [w.half() for w in ws]  # the only dtype that it takes
        call: Callable[[int], object] = lambda i: bnb.functional.int8_vectorwise_quant(  # noqa: E731
            halves[i]
        )
    else:
        call = lambda i: bnb.functional.quantize_4bit(  # noqa: E731
            ws[i], blocksize=64, quant_type=fmt, compress_statistics=False
        )
    return [*rows, _plain("bitsandbytes", call, len(ws), size)], {}


def dequantize(fmt: str, k: int, n: int, dtype: torch.dtype) -> Built:
    """Dequantizing a weight into fresh memory, against bitsandbytes."""
    packed = weight_bytes(fmt, k, n, dtype.itemsize)
    size = weight_bytes("dense", k, n, dtype.itemsize) + packed
    w = torch.randn(n, k).to(dtype)
    qs = clones(peftkern_base(fmt, w), packed)
    rows = [_plain("peftkern", lambda i: qs[i].dequantize(dtype), len(qs), size)]
    try:
        bnb = bitsandbytes_module()
    except ImportError as error:
        return rows, {"bitsandbytes": f"not installed: {error}"}
    if fmt == "int8":
        codes, scb, _ = bnb.functional.int8_vectorwise_quant(w.half())
        pairs = clones((codes, scb), packed)
        call: Callable[[int], object] = lambda i: bnb.functional.int8_vectorwise_dequant(  # noqa: E731
            *pairs[i]
        )
    else:
        data, state = bnb.functional.quantize_4bit(
            w, blocksize=64, quant_type=fmt, compress_statistics=False
        )
        states = clones((data, state), packed)
        call = lambda i: bnb.functional.dequantize_4bit(*states[i])  # noqa: E731
    return [*rows, _plain("bitsandbytes", call, len(qs), size)], {}


def _plain(name: str, call: Callable[[int], object], copies: int, size: int) -> Contender:
    return Contender(name, lambda rows: call, copies, size)
