"""Optimizers on an NVIDIA GPU: the CPU's bits, no wait for the device, CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from conftest import nothing_waits
from torch import Tensor

from peftkern.ops.optimizer import reference
from peftkern.ops.optimizer.contract import hyper_row, sample_tensors
from peftkern.optim import AdamW, AdamW8bit, Lion8bit, SGD8bit
from peftkern.testing import assert_same_bits, map_tensors, tensors_of

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no NVIDIA GPU", allow_module_level=True)

SIZES = ((64, 4096), (4096, 64), (5000,), (7,), (0,), (1 << 20,), (333, 331))


def _parameters(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=make).to(dtype).to(device)) for s in SIZES]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    """Multiples of 1/64, so that sums of squares are exact in any order."""
    make = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        g = torch.randint(-20, 21, p.shape, generator=make) / 64
        p.grad = g.to(p.dtype).to(p.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (AdamW8bit, {}),
        (AdamW8bit, {"max_grad_norm": 0.5, "stochastic_rounding": True}),
        (AdamW, {"max_grad_norm": 0.5}),
        (Lion8bit, {"skip_nonfinite_step": True}),
        (SGD8bit, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value) or "plain",
)
def test_the_bits_of_the_cpu(make: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        parameters = _parameters(dtype, device)
        optimizer = make(parameters, lr=1e-2, **options)
        for step in range(4):
            _set_gradients(parameters, step)
            if step == 2:
                parameters[2].grad[300] = float("nan")
            optimizer.step()
        runs.append((parameters, optimizer.state_dict()["state"], optimizer.last_grad_norm))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert_same_bits(q.detach().cpu(), p.detach())
    for key, state in runs[0][1].items():
        theirs = runs[1][1][key]
        assert state["step"] == theirs["step"]
        for name, value in state["__bnb_optimizer_quant_state__"].items():
            assert_same_bits(theirs["__bnb_optimizer_quant_state__"][name].cpu(), value, name)
    if "max_grad_norm" in options:
        assert runs[0][2] == runs[1][2] or all(r[2] != r[2] for r in runs)


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
@pytest.mark.parametrize("eight", [True, False])
def test_many_elements_against_the_reference(rule: str, eight: bool) -> None:
    """Enough of them that a root or a quotient which is not IEEE's would show."""
    lists = sample_tensors((1 << 22, 12345), torch.float32, rule, eight)
    row = hyper_row(rule, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=3)
    args = (torch.tensor([row, row]), *lists, rule, None)
    theirs = copy.deepcopy(args)
    there = map_tensors(lambda t: t.cuda(), args)
    torch.ops.peftkern.optimizer_step(*there)
    reference.optimizer_step(*theirs)
    for i, (got, want) in enumerate(zip(tensors_of(there), tensors_of(theirs), strict=True)):
        assert_same_bits(got.cpu(), want, f"argument {i}")


@pytest.mark.parametrize("exponent", [-100, -60, -30, -2, 0, 3, 40])
def test_every_mantissa(exponent: int) -> None:
    """All mantissas of the second moment, against as many different first moments."""
    n = 1 << 24
    v = torch.arange(n, dtype=torch.int32).add_((exponent + 127) << 23).view(torch.float32)
    m = torch.arange(n, dtype=torch.int32).mul_(977).bitwise_and_((1 << 23) - 1)
    m = m.add_(127 << 23).view(torch.float32) * 2.0 ** (exponent // 2)
    row = hyper_row("adamw", lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, step=50)
    nothing = torch.empty(0)
    args = (torch.tensor([row]), [torch.zeros(n)], [torch.zeros(n)], [m], [v], [nothing], [nothing])
    theirs = copy.deepcopy(args)
    there = map_tensors(lambda t: t.cuda(), args)
    torch.ops.peftkern.optimizer_step(*there, "adamw", None)
    torch.ops.peftkern.optimizer_step(*theirs, "adamw", None)
    assert_same_bits(there[1][0].cpu(), theirs[1][0])


def _lora(count: int = 64) -> tuple[list[torch.nn.Parameter], AdamW8bit]:
    parameters = [torch.nn.Parameter(torch.randn(16, 1024, device="cuda")) for _ in range(count)]
    optimizer = AdamW8bit(parameters, lr=1e-3, max_grad_norm=1.0)
    return parameters, optimizer


def test_a_step_waits_for_nothing() -> None:
    parameters, optimizer = _lora()
    for step in range(6):
        for p in parameters:
            p.grad = torch.randn_like(p)
        with nothing_waits() if step >= 2 else contextlib.nullcontext():
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.zero_grad()
    assert optimizer.state_dict()["state"][0]["step"] == 6


def test_graph_and_plain_steps_agree() -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(6)
        parameters, optimizer = _lora(8)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        step: Any = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for i in range(5):
            for p in parameters:
                p.grad.copy_(torch.full_like(p, 0.125 * (i - 2)))
            step()
        results.append(([p.detach().clone() for p in parameters], optimizer.state_dict()))
    for p, q in zip(results[0][0], results[1][0], strict=True):
        assert_same_bits(p, q)
    assert results[0][1]["state"][0]["step"] == results[1][1]["state"][0]["step"] == 6


def test_skips_are_reported_later() -> None:
    parameters, optimizer = _lora(4)
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[2].grad.view(-1)[5] = float("inf")
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    report = optimizer.nonfinite_report()
    assert report["steps"] == 1
    assert report["last"]["whole_step"]
    for p, q in zip(parameters, before, strict=True):
        assert_same_bits(p.detach(), q)


def test_other_streams_and_moved_gradients() -> None:
    parameters, optimizer = _lora(16)
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    plain = AdamW8bit(others, lr=1e-3, max_grad_norm=1.0)
    stream = torch.cuda.Stream()
    for step in range(5):
        grads = [torch.randn_like(p) for p in parameters]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        for q, g in zip(others, grads, strict=True):
            q.grad = g
        plain.step()
        del step
    for p, q in zip(parameters, others, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_training_a_model_and_going_on(tmp_path: Any) -> None:
    def model() -> tuple[torch.nn.Module, AdamW8bit]:
        torch.manual_seed(2)
        made = torch.nn.Sequential(
            torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
        ).cuda()
        return made, AdamW8bit(made.parameters(), lr=1e-3)

    def steps(made: torch.nn.Module, optimizer: AdamW8bit, first: int, last: int) -> None:
        for i in range(first, last):
            x = torch.randn(32, 256, generator=torch.Generator().manual_seed(i)).cuda()
            made(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first = model(), model()
    steps(*whole, 0, 8)
    steps(*first, 0, 4)
    torch.save([first[0].state_dict(), first[1].state_dict()], tmp_path / "state.pt")
    second = model()
    loaded: list[dict[str, Tensor]] = torch.load(tmp_path / "state.pt", map_location="cpu")
    second[0].load_state_dict(loaded[0])
    second[1].load_state_dict(loaded[1])
    steps(*second, 4, 8)
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
