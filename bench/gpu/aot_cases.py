"""Calls whose kernels are compiled ahead of time: every kernel, every branch of its heuristics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.aot import signature
from peftkern import registry
from peftkern.testing import map_tensors
from peftkern.triton_kernels.launch import Launch, recording

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_N, _K = 4096, 4096


def _meta(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _statistics(numel: int, blocksize: int, nested: bool) -> tuple[Tensor, Tensor | None, Any]:
    blocks = numel // blocksize
    if not nested:
        return _meta(blocks, dtype=_FP32), None, None
    codes = _meta(blocks, dtype=torch.uint8)
    return codes, _meta(-(-blocks // 256), dtype=_FP32), _meta(1, dtype=_FP32)


def _base(format: str, blocksize: int, nested: bool) -> tuple[Any, ...]:
    """weight, absmax, nested_absmax, nested_offset, format, blocksize of a [4096, 4096] base."""
    if format == "dense":
        return _meta(_N, _K), None, None, None, "dense", 0
    if format == "int8":
        return _meta(_N, _K, dtype=torch.int8), _meta(_N, dtype=_FP32), None, None, "int8", 0
    packed = _meta(_N * _K // 2, dtype=torch.uint8)
    return packed, *_statistics(_N * _K, blocksize, nested), format, blocksize


def _calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(op, what is special, arguments)."""
    seed = _meta(1, dtype=torch.int64)
    for blocksize in (32, 64, 4096):
        base = _base("nf4", blocksize, True)
        yield "dequantize_4bit", f"b{blocksize} nested bf16", (*base, [_N, _K], _BF16)
    yield "dequantize_4bit", "fp4 b64 fp32", (*_base("fp4", 64, False), [_N, _K], _FP32)
    for kind in ("nf4", "fp4"):
        yield "quantize_4bit", f"{kind} b64 bf16", (_meta(_N, _K), kind, 64, False)
    absmax = _meta(_N * _K // 64, dtype=_FP32)
    yield "quantize_absmax", "", (absmax,)
    yield "dequantize_absmax", "", _statistics(_N * _K, 64, True)
    yield "quantize_8bit", "bf16", (_meta(_N, _K), False)
    codes, scb = _base("int8", 0, False)[:2]
    yield "dequantize_8bit", "bf16", (codes, scb, _BF16)
    yield "philox_dropout", "bf16", (_meta(_N, _K), 0.1, seed)

    for m in (1, 32, 64, 128):
        base = _base("nf4", 64, True)
        yield "linear_4bit", f"nf4 m{m}", (_meta(m, _K), *base, _N, _meta(_N))
        yield "linear_4bit_dx", f"nf4 m{m}", (_meta(m, _N), *base, _K)
        yield "linear_8bit", f"m{m}", (_meta(m, _K), codes, scb, None)
        yield "linear_8bit_dx", f"m{m}", (_meta(m, _N), codes, scb)
    yield "linear_4bit", "fp4 b32 m1", (_meta(1, _K), *_base("fp4", 32, False), _N, None)
    half = _meta(16, _K, dtype=_FP16)
    yield "linear_4bit", "nf4 fp16 m16", (half, *_base("nf4", 64, False), _N, None)

    for format, m in (("dense", 4096), ("nf4", 16), ("nf4", 4096), ("int8", 64)):
        for r, adapter, p in (
            (16, _FP32, 0.1),
            (32, _FP32, 0.0),
            (64, _FP32, 0.1),
            (64, _BF16, 0.0),
        ):
            base = _base(format, 64, format == "nf4")
            x, dy = _meta(m, _K), _meta(m, _N)
            a, b = _meta(r, _K, dtype=adapter), _meta(_N, r, dtype=adapter)
            s = _meta(m, r, dtype=_FP32)
            what = f"{format} m{m} r{r} {str(adapter).removeprefix('torch.')} p{p}"
            tail = (a, b, 2.0, p, seed if p else None)
            yield "lora_linear", what, (x, *base, _N, None, *tail)
            yield "lora_linear_backward", what, (dy, x, s, *base, *tail, True, True)


def _bottleneck_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    seed = _meta(1, dtype=torch.int64)
    for m, r, adapter, p, act, *given in (
        (8, 64, _FP32, 0.1, "gelu", _FP16),
        (2048, 16, _FP32, 0.0, "relu", _FP32),
        (8, 64, _BF16, 0.0, "relu"),
        (2048, 64, _BF16, 0.0, "gelu"),
        (8192, 16, _BF16, 0.1, "gelu_tanh"),
        (4096, 64, _BF16, 0.0, "relu"),
        (8192, 64, _BF16, 0.1, "gelu"),
        (8192, 128, _BF16, 0.0, "silu"),
        (8192, 64, _FP32, 0.1, "relu"),
        (2048, 16, _FP32, 0.0, "gelu"),
        (8192, 256, _BF16, 0.0, "relu"),
        (8192, 256, _FP32, 0.1, "relu"),
        # Narrow enough for launches by whole rows.
        (2048, 16, _BF16, 0.0, "gelu", _BF16, 768),
        (2048, 16, _FP32, 0.1, "relu", _BF16, 768),
        (512, 16, _FP32, 0.0, "gelu", _FP32, 768),
        (512, 16, _FP32, 0.1, "relu", _FP16, 768),
    ):
        dtype = given[0] if given else _BF16
        k, n = (given[1], given[1]) if len(given) > 1 else (_K, _N)
        x, dy = _meta(m, k, dtype=dtype), _meta(m, n, dtype=dtype)
        shapes = ((r, k), (r,), (n, r), (n,), (n,))
        weights = [_meta(*shape, dtype=adapter) for shape in shapes]
        what = f"m{m} r{r} {str(adapter).removeprefix('torch.')} {act} p{p}"
        what += f" {k} features" if len(given) > 1 else ""
        tail = (act, p, seed if p else None)
        z = _meta(m, r, dtype=adapter)
        yield "bottleneck_adapter", what, (x, *weights, x, *tail, True)
        yield "bottleneck_adapter_backward", what, (dy, x, z, *weights, *tail, True, True, True)


def _gated_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    for act in ("silu", "gelu", "gelu_tanh"):
        gate, up, dh = (_meta(4096, 14336) for _ in range(3))
        yield "gated_activation", act, (gate, up, act)
        yield "gated_activation_backward", act, (dh, gate, up, act)


def _prefix_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    seed = _meta(1, dtype=torch.int64)
    for d, dtype, causal, masked, p in (
        (128, _BF16, True, False, 0.0),
        (64, _BF16, True, False, 0.1),
        (64, _BF16, False, True, 0.0),
        (128, _BF16, True, True, 0.0),
        (256, _BF16, True, False, 0.0),
        (256, _BF16, True, True, 0.0),
        (64, _BF16, True, False, 0.0),
        (64, _FP32, True, False, 0.0),
    ):
        q, dout, out = (_meta(4, 2048, 32, d, dtype=dtype).transpose(1, 2) for _ in range(3))
        k, v = (_meta(4, 2048, 8, d, dtype=dtype).transpose(1, 2) for _ in range(2))
        pk, pv = (_meta(8, 64, d, dtype=_FP32) for _ in range(2))
        mask = _meta(4, 1, 1, 2048, dtype=torch.bool) if masked else None
        what = f"d{d} {str(dtype).removeprefix('torch.')}" + " causal" * causal + " mask" * masked
        tail = (mask, causal, d**-0.5, p, seed if p else None)
        yield "prefix_attention", what, (q, k, v, pk, pv, *tail)
        lse = _meta(4, 32, 2048, dtype=_FP32)
        saved = (dout, q, k, v, pk, pv, out, lse)
        yield "prefix_attention_backward", what, (*saved, *tail, True, True)
        if d == 128 and not masked:
            yield "prefix_attention_backward", what + " prefix alone", (*saved, *tail, False, True)
            yield "prefix_attention_backward", what + " no prefix", (*saved, *tail, True, False)


def _multi_lora_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    m, ids, base = 4096, _meta(4096, dtype=torch.int64), _base("nf4", 64, True)
    a = [_meta(16, _K, dtype=_FP32) for _ in range(4)]
    b = [_meta(_N, 16, dtype=_FP32) for _ in range(4)]
    tail = (ids, a, b, [2.0] * 4, [0.0] * 4, None)
    yield "multi_lora_linear", "4 adapters", (_meta(m, _K), *base, _N, None, *tail)
    s = _meta(m, 16, dtype=_FP32)
    saved = (_meta(m, _N), _meta(m, _K), s)
    yield "multi_lora_linear_backward", "4 adapters", (*saved, *base, *tail, True, True)


def _dora_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    seed = _meta(1, dtype=torch.int64)
    for format, m, r, adapter, p in (
        ("dense", 4096, 16, _FP32, 0.0),
        ("dense", 4096, 64, _BF16, 0.1),
        ("nf4", 4096, 16, _FP32, 0.1),
        ("nf4", 8, 64, _FP32, 0.0),
        ("int8", 4096, 32, _BF16, 0.0),
    ):
        base = _base(format, 64, format == "nf4")
        x, dy, u = _meta(m, _K), _meta(m, _N), _meta(m, _N)
        a, b = _meta(r, _K, dtype=adapter), _meta(_N, r, dtype=adapter)
        s, scale = _meta(m, r, dtype=_FP32), _meta(_N, dtype=_FP32)
        what = f"{format} m{m} r{r} {str(adapter).removeprefix('torch.')} p{p}"
        tail = (a, b, scale, 2.0, p, seed if p else None)
        yield "dora_linear", what, (x, *base, _N, _meta(_N), *tail, True)
        yield "dora_linear_backward", what, (dy, x, s, u, *base, *tail, True, True, True)
        yield "weight_norm_sq", what, (*base, _N, _K)
        norm_sq = _meta(_N, dtype=torch.float64)
        yield "dora_weight_norm", what, (*base, _N, a, b, 2.0, norm_sq)


def _sparse_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    for format, m, entries, kind in (
        ("dense", 4096, _N * _K // 100, _FP32),
        ("dense", 128, _N * _K // 100, _FP32),
        ("nf4", 1, _N * _K // 100, _FP32),
        ("nf4", 16, _N * _K // 100, _BF16),
        ("nf4", 4096, _N * _K // 1000, _BF16),
    ):
        base = _base(format, 64, format == "nf4")
        x, dy, indices = _meta(m, _K), _meta(m, _N), _meta(entries, dtype=torch.int64)
        values = _meta(entries, dtype=kind)
        what = f"{format} m{m} {entries} entries {str(kind).removeprefix('torch.')}"
        yield "sparse_delta_linear", what, (x, *base, _N, _meta(_N), indices, values)
        yield "sparse_delta_dx", what, (dy, *base, _K, indices, values)
        yield "sampled_gradient", what, (dy, x, indices)
    few, many = _meta(8, dtype=torch.int64), _meta(_N * _K // 2, dtype=torch.int64)
    half = [_meta(512, 512, dtype=_FP16) for _ in range(2)]
    yield "sampled_gradient", "fp16 m512", (*half, _meta(512 * 512 // 8, dtype=torch.int64))
    for dtype in (_BF16, _FP32):
        pair = [_meta(4096, _N, dtype=dtype) for _ in range(2)]
        what = str(dtype).removeprefix("torch.")
        yield "sampled_gradient", f"{what} half of all", (*pair, many)
        yield "sampled_gradient", f"{what} 8 entries", (*pair, few)


def _optimizer_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    n = 1 << 20
    for rule, eight, dtype in (
        ("adamw", True, _BF16),
        ("adamw", False, _FP32),
        ("lion", True, _BF16),
        ("momentum", True, _FP32),
    ):
        state = [_meta(n, dtype=torch.uint8 if eight else _FP32)]
        scale = [_meta(n // 256 if eight else 0, dtype=_FP32)]
        two = rule == "adamw"
        tensors = ([_meta(n, dtype=dtype)], [_meta(n, dtype=dtype)], state, state * two)
        rounding = _meta(1, 4, dtype=torch.int64) if dtype == _BF16 and two else None
        what = f"{rule} {8 if eight else 32}-bit"
        hyper = _meta(1, 11, dtype=_FP32)
        yield "optimizer_step", what, (hyper, *tensors, scale, scale * two, rule, rounding)
    yield "optimizer_grad_norm", "bf16", (_meta(0, dtype=_FP32), [_meta(n)])


def sampled(dtypes: tuple[torch.dtype, ...]) -> list[tuple[str, Launch]]:
    """(op and sample, launch) of what the contracts' samples launch: each optional argument's ways.

    Shapes are small; what is compiled for them differs in types, absent arguments and switches.
    """
    found: dict[tuple[Any, ...], tuple[str, Launch]] = {}
    for op, spec in registry.specs().items():
        rows = [r for r in registry.implementations(op, "cuda") if r.backend == "triton"]
        for dtype in spec.dtypes if rows else ():
            if dtype not in dtypes:
                continue
            for sample in spec.samples(dtype):
                args = map_tensors(lambda t: t.to("meta"), sample.args)
                if op.startswith("quantize"):  # what is not finite is looked at: not on "meta"
                    args = tuple(False if type(a) is bool else a for a in args)
                with recording() as recorded, torch.no_grad():
                    rows[0].fn(*args)
                for launch in recorded:
                    types, constants, _ = signature(launch)
                    key = (launch.kernel.__name__, *types.items(), *constants.items())
                    found.setdefault(key, (f"{op} {sample.name} {dtype}", launch))
    return list(found.values())


def launches() -> list[tuple[str, Launch]]:
    """(op and what is special, launch), each kernel and configuration once."""
    found: dict[tuple[Any, ...], tuple[str, Launch]] = {}
    families = (
        _calls,
        _bottleneck_calls,
        _gated_calls,
        _prefix_calls,
        _multi_lora_calls,
        _dora_calls,
        _sparse_calls,
        _optimizer_calls,
    )
    for op, what, args in (call for family in families for call in family()):
        row = next(r for r in registry.implementations(op, "cuda") if r.backend == "triton")
        with recording() as recorded, torch.no_grad():
            row.fn(*args)
        for launch in recorded:
            options = tuple(sorted(launch.options.items()))
            kinds = tuple(getattr(a, "dtype", a is None) for a in launch.args)
            found.setdefault((launch.kernel.__name__, options, kinds), (f"{op} {what}", launch))
    return list(found.values())
