"""Paged optimizer state on an NVIDIA GPU: device, pinned memory, disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nothing_waits
from torch import nn

from peftkern import optim
from peftkern.testing import assert_same_bits

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no NVIDIA GPU", allow_module_level=True)

PAIRS = [(optim.AdamW, optim.PagedAdamW), (optim.AdamW8bit, optim.PagedAdamW8bit)]
pair = pytest.mark.parametrize(("plain", "paged"), PAIRS, ids=["fp32", "8bit"])
SIZES = (3000, 1_000_001, 257, 1, 0, 400_000, 2_000_000)


def _parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    make = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=make).to(dtype).cuda()) for n in SIZES]


def _train(optimizer: Any, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        make = torch.Generator("cuda").manual_seed(500 + step)
        for i, p in enumerate(params):
            grad = (torch.randn(p.shape, generator=make, device="cuda") * 0.1).to(p.dtype)
            p.grad = None if (step + i) % 5 == 4 else grad
        optimizer.step()


def _same(a: Any, b: Any, mine: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
        assert_same_bits(p.detach(), q.detach(), f"parameter {i}")
    left, right = a.state_dict()["state"], b.state_dict()["state"]
    key = "__bnb_optimizer_quant_state__"
    for i, state in left.items():
        assert state["step"] == right[i]["step"]
        for name, value in state.get(key, {}).items():
            other = right[i][key][name]
            assert_same_bits(value.view(-1).cpu(), other.view(-1).cpu(), f"{i} {name}")


def _total(paged: Any) -> int:
    return (2 if paged is optim.PagedAdamW8bit else 8) * sum(SIZES)


@pair
@pytest.mark.parametrize("ram", [None, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_budgets_change_no_bit(
    plain: Any, paged: Any, ram: float | None, dtype: torch.dtype
) -> None:
    mine, theirs = _parameters(dtype), _parameters(dtype)
    reference = plain(theirs, lr=1e-2, max_grad_norm=10.0)
    total = _total(paged)
    budgets = {
        "bucket_bytes": total // 24 // 4096 * 4096,
        "device_budget": total // 4,
        "ram_budget": None if ram is None else int(total * ram),
    }
    with paged(mine, lr=1e-2, max_grad_norm=10.0, **budgets) as optimizer:
        for step in range(12):
            _train(reference, theirs, step, step + 1)
            _train(optimizer, mine, step, step + 1)
        report = optimizer.paging_report()
        assert report["device_bytes"] <= report["device_budget"]
        assert ram is None or report["resident_bytes"] <= report["ram_budget"]
        assert report["bytes_stored"] > report["total_bytes"]
        _same(optimizer, reference, mine, theirs)


@pair
def test_budgets_change_at_run_time(plain: Any, paged: Any) -> None:
    mine, theirs = _parameters(), _parameters()
    reference = plain(theirs, lr=1e-2)
    total = _total(paged)
    bucket = total // 24 // 4096 * 4096
    with paged(mine, lr=1e-2, bucket_bytes=bucket) as optimizer:
        for i, (device, ram) in enumerate(
            ((None, None), (total // 4, None), (3 * bucket, total // 3), (None, 3 * bucket),
             (total // 3, 3 * bucket), (total, None))
        ):  # fmt: skip
            optimizer.set_device_budget(device)
            optimizer.set_ram_budget(ram)
            _train(reference, theirs, 2 * i, 2 * i + 2)
            _train(optimizer, mine, 2 * i, 2 * i + 2)
        _same(optimizer, reference, mine, theirs)


def test_resident_state_waits_for_nothing_and_can_be_captured() -> None:
    params = _parameters()
    optimizer = optim.PagedAdamW8bit(params, lr=1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with nothing_waits():
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    assert optimizer.state_dict()["state"][0]["step"] == 3
    report = optimizer.paging_report()
    assert report["bytes_fetched"] == report["bytes_stored"] == report["resident_bytes"] == 0
    optimizer.close()


# The refusal leaves a capture without a kernel, of which torch warns.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_graphs_of_passing_state_are_refused() -> None:
    params = _parameters()
    optimizer = optim.PagedAdamW(params, bucket_bytes=1 << 20, device_budget=4 << 20)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph cannot capture"), torch.cuda.graph(graph):
        optimizer.step()
    optimizer.step()
    optimizer.close()


@pair
def test_commits_and_resumes(plain: Any, paged: Any, tmp_path: Path) -> None:
    mine, theirs = _parameters(), _parameters()
    reference = plain(theirs, lr=1e-2)
    total = _total(paged)
    settings = {
        "bucket_bytes": total // 24 // 4096 * 4096,
        "device_budget": total // 4,
        "ram_budget": total // 2,
        "page_dir": tmp_path,
        "keep_parameters": True,
    }
    for session in range(3):
        params = mine if session == 0 else [nn.Parameter(torch.zeros_like(p)) for p in mine]
        with paged(params, lr=1e-2, resume=session > 0, **settings) as optimizer:
            _train(optimizer, params, 2 * session, 2 * session + 2)
            _train(reference, theirs, 2 * session, 2 * session + 2)
            _same(optimizer, reference, params, theirs)
        mine = params
