"""The optimizers against torch's and bitsandbytes', and the rest of the torch.optim API."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern import optim
from peftkern.testing import assert_same_bits

ALL = [optim.AdamW, optim.AdamW8bit, optim.Lion, optim.Lion8bit, optim.SGD8bit]
SHAPES = ((64, 80), (5,), (), (3, 0), (4097,))


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    make = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in SHAPES]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    make = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=make) * 0.1).to(p.dtype)


def run(optimizer: Any, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


def assert_same_params(a: list[nn.Parameter], b: list[nn.Parameter]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(x.detach(), y.detach(), f"parameter {i}")


def test_adamw_follows_torch() -> None:
    ours, theirs = make_params(), make_params()
    args = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    for maximize in (False, True):
        run(optim.AdamW(ours, **args, maximize=maximize), ours, 0, 30)
        run(torch.optim.AdamW(theirs, **args, maximize=maximize), theirs, 0, 30)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_are_rounded_once(dtype: torch.dtype) -> None:
    low, high = make_params(dtype), [nn.Parameter(p.float()) for p in make_params(dtype)]
    run(optim.AdamW(low, lr=1e-2), low, 0, 1)
    for p in high:
        p.grad = None
    set_grads(low, 0)
    for p, q in zip(high, low, strict=True):
        assert q.grad is not None
        p.grad = q.grad.float()
    optim.AdamW(high, lr=1e-2).step()
    for p, q in zip(low, high, strict=True):
        assert_same_bits(p.detach(), q.detach().to(dtype))


def bnb_pair(name: str, **kwargs: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    if name in ("SGD8bit", "Lion8bit"):
        kwargs.pop("eps", None)
    if name == "SGD8bit":
        kwargs["momentum"] = 0.9
    return getattr(bnb.optim, name), kwargs


@pytest.mark.hf
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit", "Lion", "AdamW"])
def test_follows_bitsandbytes(name: str) -> None:
    cls, kwargs = bnb_pair(name, lr=1e-3, weight_decay=0.05)
    shapes = [p for p in make_params() if p.dim() and p.numel()]
    ours, theirs = copy.deepcopy(shapes), copy.deepcopy(shapes)
    mine, other = getattr(optim, name)(ours, **kwargs), cls(theirs, **kwargs)
    for step in range(15):
        set_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        mine.step()
        other.step()
    # A value near a threshold may take the neighbouring code, and the difference stays.
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 15 * 1e-3
        assert (a - b).abs().mean() < 2e-5


@pytest.fixture
def exact_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' CPU quantizer looks codes up in a coarse table (second moments are off by up
    to 7 codes); its other backends and its own fallback take the nearest, as here."""
    cpu = pytest.importorskip("bitsandbytes.backends.cpu.ops")

    def nearest(x: Tensor, code: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> None:
        rows = nn.functional.pad(x.reshape(-1), (0, -x.numel() % blocksize)).view(-1, blocksize)
        absmax.copy_(rows.abs().amax(1))
        t = (rows * (1 / absmax[:, None])).view(-1)[: x.numel()].double()
        out.copy_((t[:, None] - code.double()).abs().argmin(1).view(out.shape))

    monkeypatch.setattr(cpu, "_quant_blockwise_fp32_direct", nearest)


@pytest.mark.hf
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit", "AdamW", "Lion"])
def test_one_step_from_the_same_state_is_that_of_bitsandbytes(
    name: str, exact_quantizer: None
) -> None:
    """Codes equal but where fp32 rounding meets a threshold; their state loads here."""
    cls, kwargs = bnb_pair(name, lr=1e-2, weight_decay=0.05)
    theirs = [nn.Parameter(torch.randn(130, 64)), nn.Parameter(torch.randn(9))]
    other = cls(theirs, **kwargs)
    run(other, theirs, 0, 3)
    ours = copy.deepcopy(theirs)
    mine = getattr(optim, name)(ours, **kwargs)
    mine.load_state_dict(other.state_dict())
    set_grads(ours, 9)
    set_grads(theirs, 9)
    mine.step()
    other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-7)
        assert mine.state[a]["step"] == other.state[b]["step"] == 4
        for key in ("absmax1", "absmax2"):
            if key in other.state[b]:
                torch.testing.assert_close(mine.state[a][key], other.state[b][key])
        for key in ("state1", "state2"):
            if key in other.state[b]:
                x, y = mine.state[a][key], other.state[b][key]
                assert x.dtype == y.dtype
                if x.dtype == torch.uint8:
                    assert (x.int() - y.int()).abs().max() <= 1
                    assert (x != y).float().mean() < 1e-3
                else:
                    torch.testing.assert_close(x, y, rtol=3e-6, atol=1e-7)


@pytest.mark.hf
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit", "AdamW", "Lion"])
def test_bitsandbytes_loads_our_state(name: str) -> None:
    cls, kwargs = bnb_pair(name, lr=1e-2)
    ours = [nn.Parameter(torch.randn(130, 64)), nn.Parameter(torch.randn(9))]
    mine = getattr(optim, name)(ours, **kwargs)
    run(mine, ours, 0, 3)
    theirs = copy.deepcopy(ours)
    other = cls(theirs, **kwargs)
    other.load_state_dict(mine.state_dict())
    run(mine, ours, 3, 4)
    run(other, theirs, 3, 4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-7)


def test_torch_state_loads() -> None:
    for cls, other_cls, tolerance in (
        (optim.AdamW, torch.optim.AdamW, 3e-6),
        (optim.AdamW8bit, torch.optim.AdamW, 3e-2),
        (optim.SGD8bit, torch.optim.SGD, 3e-2),
    ):
        kwargs = {"momentum": 0.9} if cls is optim.SGD8bit else {}
        theirs = make_params()
        other = other_cls(theirs, lr=1e-2, **kwargs)
        run(other, theirs, 0, 3)
        ours = copy.deepcopy(theirs)
        mine = cls(ours, lr=5.0)
        mine.load_state_dict(other.state_dict())
        assert mine.param_groups[0]["lr"] == 1e-2
        run(other, theirs, 3, 4)
        run(mine, ours, 3, 4)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_exactly_at_every_step_of_20(cls: Any, dtype: torch.dtype) -> None:
    extra = {"stochastic_rounding": True} if dtype == torch.bfloat16 else {}
    params = make_params(dtype)
    optimizer = cls(params, lr=1e-2, weight_decay=0.01, **extra)
    history = []
    for step in range(20):
        buffer = io.BytesIO()
        torch.save((optimizer.state_dict(), [p.detach() for p in params]), buffer)
        history.append(buffer)
        run(optimizer, params, step, step + 1)
    threads = torch.get_num_threads()
    for step, buffer in enumerate(history):
        buffer.seek(0)
        state, values = torch.load(buffer, weights_only=True)
        again = [nn.Parameter(v) for v in values]
        torch.set_num_threads(threads + step % 2)
        resumed = cls(again, lr=9.0, **extra)
        resumed.load_state_dict(state)
        run(resumed, again, step, 20)
        assert_same_params(again, params)


@pytest.mark.parametrize("cls", ALL)
def test_api(cls: Any) -> None:
    a, b, frozen = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(7, 3)), torch.randn(2)
    groups = [{"params": [a], "weight_decay": 0.1}, {"params": []}, {"params": [frozen]}]
    optimizer = cls(groups, lr=torch.tensor(0.1))
    optimizer.add_param_group({"params": [b], "lr": 0.01})
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a.square().sum() + b.square().sum()) / 2
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0]
    assert calls == ["pre", "post"] * 4
    assert frozen not in optimizer.state
    assert optimizer.state[a]["step"] == 4
    twin = copy.deepcopy(optimizer)
    assert_same_bits(
        twin.param_groups[0]["params"][0].detach(), optimizer.param_groups[0]["params"][0].detach()
    )
    pickled = pickle.loads(pickle.dumps(optimizer))
    closure()
    for p, q in zip((a, b), (twin, pickled), strict=True):
        assert p.grad is not None
        group = q.param_groups[0 if p is a else 3]
        group["params"][0].grad = p.grad.clone()
        q.step()
    optimizer.step()
    assert_same_bits(twin.param_groups[0]["params"][0].detach(), a.detach())
    assert_same_bits(pickled.param_groups[3]["params"][0].detach(), b.detach())
    optimizer.zero_grad()
    assert a.grad is None
    assert optimizer.step() is None


def test_grad_scaler() -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = optim.AdamW([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[p]["step"] == 2
    assert p.detach().isfinite().all()


@pytest.mark.parametrize("cls", ALL)
def test_layouts_and_gradient_dtypes(cls: Any) -> None:
    base = torch.randn(70, 60)
    plain = nn.Parameter(base.clone())
    odd = nn.Parameter(base.t().contiguous().t())
    wide = nn.Parameter(base.to(torch.bfloat16))
    optimizer = cls([plain, odd, wide], lr=1e-2)
    for step in range(3):
        grad = torch.randn(70, 60, generator=torch.Generator().manual_seed(step))
        plain.grad, odd.grad = grad, grad.t().contiguous().t()
        wide.grad = grad.to(torch.bfloat16)
        optimizer.step()
    assert not odd.is_contiguous()
    assert_same_bits(odd.detach().contiguous(), plain.detach())
    expanded = nn.Parameter(torch.zeros(6000))
    expanded.sum().backward()  # a gradient of stride 0
    cls([expanded], lr=1e-2).step()
    assert len(expanded.detach().unique()) == 1


@pytest.mark.parametrize("cls", ALL)
def test_nonfinite_gradients_leave_their_blocks(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    params = [nn.Parameter(torch.randn(5000)), nn.Parameter(torch.randn(300))]
    optimizer = cls(params, lr=1e-2)
    run(optimizer, params, 0, 2)
    before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    set_grads(params, 2)
    assert params[0].grad is not None
    assert params[1].grad is not None
    params[0].grad[300] = float("nan")
    params[1].grad[[3, 299]] = float("inf")
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        optimizer.step()
    assert "NaN or Inf" in caplog.text
    assert optimizer.nonfinite_report()["last"]["parameters"] == {0: 1, 1: 2}
    assert_same_bits(params[0][256:512].detach(), before[1][0][256:512].detach())
    assert (params[0][:256] != before[1][0][:256]).any()
    assert_same_params(params[1:], before[1][1:])
    assert optimizer.state[params[0]]["step"] == 3
    assert optimizer.state[params[1]]["step"] == 2  # nothing of it was updated
    assert all(torch.isfinite(p).all() for p in params)

    optimizer = cls(params, lr=1e-2, skip_nonfinite_step=True)
    run(optimizer, params, 0, 1)
    kept = copy.deepcopy(params)
    set_grads(params, 1)
    assert params[0].grad is not None
    params[0].grad[0] = float("-inf")
    optimizer.step()
    assert_same_params(params, kept)
    assert optimizer.nonfinite_report()["last"]["whole_step"]
    assert optimizer.state[params[0]]["step"] == 1


def test_clipping_inside_the_step() -> None:
    ours, theirs = make_params(), make_params()
    mine = optim.AdamW(ours, lr=1e-2, max_grad_norm=0.5)
    other = torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        mine.step()
        other.step()
        assert mine.last_grad_norm == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lora_plus_groups() -> None:
    model = nn.ModuleDict(
        {"lora_A": nn.ModuleDict({"x": nn.Linear(4, 2)}), "lora_B": nn.Linear(2, 4, bias=False)}
    )
    rest, fast = optim.lora_plus_groups(model, 1e-3, 16, weight_decay=0.0)
    assert [len(rest["params"]), len(fast["params"])] == [2, 1]
    assert math.isclose(fast["lr"], 1.6e-2)
    assert fast["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="no trainable parameter below"):
        optim.lora_plus_groups(nn.Linear(2, 2), 1e-3, 16)
    with pytest.raises(ValueError, match="ratio: got 0"):
        optim.lora_plus_groups(model, 1e-3, 0)


def test_bad_arguments() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="lr: got -1"):
        optim.AdamW([p], lr=-1)
    with pytest.raises(ValueError, match=r"betas\[1\]: got 1.0"):
        optim.AdamW([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="max_grad_norm: got 0"):
        optim.AdamW([p], max_grad_norm=0)
    with pytest.raises(ValueError, match="momentum: got 0"):
        optim.SGD8bit([p], momentum=0)
    with pytest.raises(TypeError, match=r"params\[0\]: got dtype torch.float64"):
        optim.AdamW([p.detach().double()])
    optimizer = optim.AdamW8bit([nn.Parameter(torch.zeros(5000))])
    state = {"step": 3, "state1": torch.zeros(5000, dtype=torch.uint8)}
    saved = {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match="state of parameter 0: absmax1: got nothing"):
        optimizer.load_state_dict(saved)
    state |= {"absmax1": torch.ones(20), "qmap1": torch.zeros(256)}
    with pytest.raises(ValueError, match="qmap1 is not the dynamic map"):
        optimizer.load_state_dict(saved)
    state["state1"] = torch.zeros(7)
    with pytest.raises(ValueError, match="state1 has 7 elements, expected 5000"):
        optimizer.load_state_dict(saved)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optim.AdamW(embedding.parameters()).step()
