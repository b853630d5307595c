"""Unmodified bitsandbytes layers served through its ops, and brought back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.hf


def layer(quant: str, inner: int, outer: int, double: bool, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        inner, outer, bias=True, quant_type=quant, compress_statistics=double, **settings
    )
    return made.to("cpu").train()


def decoded(linear: Any) -> nn.Linear:
    """A dense layer with the stored bytes decoded by our reference."""
    q = pk.QuantizedTensor.from_bnb(linear)
    twin = nn.Linear(q.shape[1], q.shape[0])
    with pk.use_backend("reference"):
        twin.weight.data = q.dequantize(torch.float32)
    twin.bias.data = linear.bias.data.float()
    return twin


def step(linear: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = linear(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, linear.bias.grad  # type: ignore[return-value]


# 48 and 30 are widths at which bitsandbytes' own CPU kernel decodes wrongly or across rows.
@pytest.mark.parametrize(("inner", "outer"), [(64, 32), (48, 7), (30, 5)])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_results_and_gradients_are_those_of_the_stored_bytes(
    inner: int, outer: int, quant: str, double: bool
) -> None:
    linear = layer(quant, inner, outer, double)
    before = linear.weight.data.clone()
    x = torch.randn(3, 4, inner)
    with pk.hf.register_bitsandbytes_ops() as ops:
        got = step(linear, x)
    assert ops.calls == {"gemm_4bit": 1, "dequantize_4bit": 1}
    for mine, other in zip(got, step(decoded(linear), x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.weight.data, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_float_storage(dtype: torch.dtype) -> None:
    linear = layer("nf4", 64, 32, True, compute_dtype=dtype, quant_storage=torch.bfloat16)
    x = torch.randn(5, 64).to(dtype)
    with pk.hf.register_bitsandbytes_ops() as ops:
        got = step(linear, x)
    assert ops.calls["gemm_4bit"] == 1
    assert got[0].dtype == dtype
    for mine, other in zip(got, step(decoded(linear), x.float()), strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=4e-2, atol=4e-2)


def test_other_nested_tables_are_obeyed() -> None:
    linear = layer("nf4", 64, 32, True)
    x = torch.randn(5, 64)
    state = linear.weight.quant_state.state2
    want = step(copy.deepcopy(linear), x)
    state.code, state.absmax = state.code / 2, state.absmax * 2  # the same scales, told otherwise
    with pk.hf.register_bitsandbytes_ops():
        got = step(linear, x)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_registered_once_and_taken_back() -> None:
    linear = layer("nf4", 64, 32, True)
    x = torch.randn(5, 64)
    own = step(linear, x)
    ops = pk.hf.register_bitsandbytes_ops()
    assert pk.hf.register_bitsandbytes_ops() is ops
    linear.bias.grad = None
    ours = step(linear, x)
    assert ops.calls["gemm_4bit"] == 1
    ops.remove()
    ops.remove()
    linear.bias.grad = None
    again = step(linear, x)
    assert ops.calls["gemm_4bit"] == 1
    for a, b, c in zip(own, again, ours, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)
    with pk.hf.register_bitsandbytes_ops() as later:
        assert later is not ops


def test_empty_batches_and_compiled_layers() -> None:
    linear = layer("nf4", 64, 32, True)
    x = torch.randn(5, 64)
    with pk.hf.register_bitsandbytes_ops() as ops:
        assert linear(torch.zeros(0, 64)).shape == (0, 32)
        want = step(linear, x)
        linear.bias.grad = None
        compiled = torch.compile(linear, backend="aot_eager")
        x = x.clone().requires_grad_()
        compiled(x).square().sum().backward()
        assert ops.calls["gemm_4bit"] == 2
        torch.testing.assert_close(x.grad, want[1], rtol=1e-5, atol=1e-5)
