"""What only an NVIDIA GPU can show: streams, graphs, devices, many rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import nothing_waits
from torch import Tensor

import peftkern as pk
from peftkern import registry
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no NVIDIA GPU", allow_module_level=True)

BF16 = torch.bfloat16


def _layer(m: int, d: int, fmt: str = "nf4") -> tuple[Tensor, object, Tensor, Tensor, Tensor]:
    w = torch.randn(d, d, device="cuda").to(BF16) / d**0.5
    base: object = w if fmt == "dense" else pk.quantize_4bit(w, double_quant=True)
    x = torch.randn(m, d, device="cuda").to(BF16)
    a = torch.randn(16, d, device="cuda") / d**0.5
    b = torch.randn(d, 16, device="cuda")
    return x, base, a, b, w


def test_both_backends_are_there() -> None:
    for name in ("cuda", "triton"):
        assert pk.backends()[name] == "ok"


@pytest.mark.parametrize("fmt", ["nf4", "dense"])
@pytest.mark.parametrize("m", [1, 8, 64, 300, 4096])
def test_training_shapes_against_double(fmt: str, m: int) -> None:
    x, base, a, b, w = _layer(m, 1024, fmt)
    dense = w if fmt == "dense" else base.dequantize(BF16)  # type: ignore[attr-defined]

    def eager(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b)
        return (torch.nn.functional.linear(x, dense.to(x.dtype)) + 0.5 * low).to(x.dtype)

    def run(f: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [(t if dtype is None else t.to(dtype)).clone().requires_grad_() for t in (x, a, b)]
        y = f(*leaves)
        dy = torch.randn(m, 1024, device="cuda").to(BF16)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    got = run(lambda x, a, b: F.lora_linear(x, base, a, b, 0.5), None)
    truth, plain = run(eager, torch.float64), run(eager, None)
    for name, g, t, e in zip(("y", "x", "A", "B"), got, truth, plain, strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} {fmt} m{m}")


@pytest.mark.parametrize("m", [1, 8, 64, 2048])
def test_a_graph_replays_the_same_bits(m: int) -> None:
    x, base, a, b, _ = _layer(m, 512)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    dy = torch.randn(m, 512, device="cuda").to(BF16)

    def step() -> list[Tensor]:
        y = F.lora_linear(x, base, a, b, 0.5)  # type: ignore[arg-type]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert_same_bits(got, want)


def test_the_first_call_may_be_captured() -> None:
    """Tables are built without copies from the host: nothing runs before the capture but builds."""
    q = pk.quantize_4bit(torch.randn(64, 128, device="cuda"), double_quant=True)
    q.dequantize(BF16)  # compiles
    from peftkern.triton_kernels import launch

    launch._TABLES.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = q.dequantize(BF16)
    graph.replay()
    assert_same_bits(y, q.dequantize(BF16))


def test_the_current_stream_is_used() -> None:
    x, base, a, b, _ = _layer(2048, 2048)
    want = F.lora_linear(x, base, a, b, 0.5)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = F.lora_linear(late, base, a, b, 0.5)  # type: ignore[arg-type]
    stream.synchronize()
    assert_same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_device_is_used() -> None:
    x, base, a, b, _ = _layer(8, 256)
    want = F.lora_linear(x, base, a, b, 0.5)  # type: ignore[arg-type]
    moved = [t.to("cuda:1") for t in (x, a, b)]
    got = F.lora_linear(moved[0], base.to("cuda:1"), *moved[1:], 0.5)  # type: ignore[attr-defined]
    assert got.device.index == 1
    assert_same_bits(got.cpu(), want.cpu())


def test_more_elements_than_an_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free memory")
    w = torch.randn(32768, 64, device="cuda").to(BF16).repeat(1, 1056)  # 2.3e9
    q = pk.quantize_4bit(w, double_quant=False)
    head = pk.quantize_4bit(w[-64:].contiguous(), double_quant=False)
    assert_same_bits(q.dequantize(BF16)[-64:], head.dequantize(BF16))


def test_seeds_come_from_torchs_generator() -> None:
    x = torch.ones(64, 64, device="cuda")
    torch.manual_seed(7)
    first = F.dropout(x, 0.5)
    torch.manual_seed(7)
    assert_same_bits(F.dropout(x, 0.5), first)
    seed = torch.tensor([11])
    assert_same_bits(F.dropout(x, 0.5, seed=seed.cuda()).cpu(), F.dropout(x.cpu(), 0.5, seed=seed))


def test_no_call_waits_for_the_device() -> None:
    x, base, a, b, _ = _layer(64, 512)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def step() -> None:
        y = F.lora_linear(x, base, a, b, 0.5, dropout_p=0.1)  # type: ignore[arg-type]
        torch.autograd.grad(y.sum(), leaves)

    step()
    torch.cuda.synchronize()
    with nothing_waits():
        step()


@pytest.mark.parametrize("name", list(registry.specs()))
def test_an_op_is_served_by_a_kernel_of_ours(name: str) -> None:
    """Not a promise for every op yet, but nothing that has a GPU kernel may lose it unseen."""
    rows = registry.implementations(name, "cuda")
    if len(rows) == 1:
        pytest.skip("only the reference serves this op on a GPU")
    reasons = dict(registry.explain(name, "cuda"))
    assert any(reasons[row.backend] is None for row in rows[:-1]), reasons
