"""The optimizers under DDP and FSDP2, two gloo processes, against one process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkern import optim
from peftkern.ops.optimizer import reference

STEPS = 4
pytestmark = pytest.mark.slow


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 128), nn.Tanh(), nn.Linear(128, 48))


def batch(step: int, part: slice) -> torch.Tensor:
    make = torch.Generator().manual_seed(step)
    return torch.randn(8, 48, generator=make)[part]


def train(model: nn.Module, optimizer: Any, first: int, last: int, part: slice) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        x = batch(step, part)
        (model(x) - x).square().mean().backward()
        optimizer.step()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for p in model.parameters()
    ]


def alone(cls: Any, **kwargs: Any) -> list[torch.Tensor]:
    model = make_model()
    train(model, cls(model.parameters(), **kwargs), 0, STEPS, slice(0, 8))
    return values(model)


def check_ddp(part: slice, rank: int, folder: Path) -> None:
    for cls, extra in (
        (optim.AdamW, {}),
        (optim.AdamW8bit, {}),
        (optim.PagedAdamW8bit, {"ram_budget": 8192, "bucket_bytes": 4096}),
    ):
        model = nn.parallel.DistributedDataParallel(make_model())
        paged = {"page_dir": folder / f"rank{rank}"} if extra else {}
        optimizer = cls(model.parameters(), lr=1e-2, max_grad_norm=1.0, **extra, **paged)
        train(model, optimizer, 0, STEPS, part)
        base = optim.AdamW if cls is optim.AdamW else optim.AdamW8bit
        for a, b in zip(values(model), alone(base, lr=1e-2, max_grad_norm=1.0), strict=True):
            assert (a - b).abs().mean() < (1e-5 if cls is optim.AdamW else 1e-4)
        mine = torch.cat([v.view(-1) for v in values(model)])
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        assert torch.equal(both[0], both[1]), "the ranks have drifted apart"


def check_fsdp2(part: slice, rank: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def sharded() -> nn.Module:
        model = make_model()
        for layer in model:  # type: ignore[attr-defined]
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    expected = alone(optim.AdamW, lr=1e-2, max_grad_norm=0.05)
    model = sharded()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.05)
    train(model, optimizer, 0, 2, part)
    whole = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    weights = values(model)

    # On the same two ranks, in a new optimizer.
    again = sharded()
    for p, value in zip(again.parameters(), weights, strict=True):
        shard = torch.chunk(value, 2)[rank]
        p.data.to_local().copy_(shard)  # type: ignore[attr-defined]
    resumed = optim.AdamW(again.parameters(), lr=9.0, max_grad_norm=0.05)
    set_optimizer_state_dict(again, resumed, whole, options=StateDictOptions(full_state_dict=True))
    train(again, resumed, 2, STEPS, part)
    train(model, optimizer, 2, STEPS, part)
    for a, b, c in zip(values(again), values(model), expected, strict=True):
        assert torch.equal(a, b)
        assert (a - c).abs().max() < 1e-4

    # At another world size: one process, by parameter name.
    if rank == 0:
        single = make_model()
        for p, value in zip(single.parameters(), weights, strict=True):
            p.data.copy_(value)
        names = [name for name, _ in single.named_parameters()]
        one = optim.AdamW(single.parameters(), lr=1e-2, max_grad_norm=0.05)
        state = {i: whole["state"][name] for i, name in enumerate(names)}
        one.load_state_dict({"state": state, "param_groups": one.state_dict()["param_groups"]})
        train(single, one, 2, STEPS, slice(0, 8))
        for a, b in zip(values(single), expected, strict=True):
            assert (a - b).abs().max() < 1e-4

    eight = sharded()
    optimizer = optim.AdamW8bit(eight.parameters(), lr=1e-2, min_8bit_size=1024)
    train(eight, optimizer, 0, STEPS, part)
    for a, b in zip(
        values(eight), alone(optim.AdamW8bit, lr=1e-2, min_8bit_size=1024), strict=True
    ):
        assert (a - b).abs().mean() < 1e-3
    check_eight_bit_state(sharded, part, rank)
    with pytest.raises(ValueError, match="is a DTensor"):
        train(eight, optim.PagedAdamW(eight.parameters()), 0, 1, part)


def check_eight_bit_state(sharded: Any, part: slice, rank: int) -> None:
    """Saved whole, loaded on the same ranks bit for bit, and in one process within rounding."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def codes(optimizer: Any) -> list[torch.Tensor]:
        names = ("state1", "absmax1", "state2", "absmax2")
        return [s[n].clone() for s in optimizer.state.values() for n in names if "absmax1" in s]

    options = StateDictOptions(full_state_dict=True)
    kwargs: dict[str, Any] = dict(min_8bit_size=1024)
    model = sharded()
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2, **kwargs)
    train(model, optimizer, 0, 3, part)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    again = sharded()
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        p.data.to_local().copy_(q.data.to_local())  # type: ignore[attr-defined]
    resumed = optim.AdamW8bit(again.parameters(), lr=9.0, **kwargs)
    set_optimizer_state_dict(again, resumed, whole, options=options)
    assert codes(optimizer)
    for a, b in zip(codes(optimizer), codes(resumed), strict=True):
        assert torch.equal(a, b)
    weights = values(model)
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, 3, 5, part)
    ended = values(model)
    for a, b in zip(ended, values(again), strict=True):
        assert torch.equal(a, b)
    if rank == 0:
        single = make_model()
        for p, value in zip(single.parameters(), weights, strict=True):
            p.data.copy_(value)
        names = [name for name, _ in single.named_parameters()]
        one = optim.AdamW8bit(single.parameters(), lr=1e-2, **kwargs)
        state = {i: whole["state"][name] for i, name in enumerate(names)}
        one.load_state_dict({"state": state, "param_groups": one.state_dict()["param_groups"]})
        for i, p in enumerate(single.parameters()):
            want, kept = whole["state"][names[i]]["state1"], one.state[p]
            got = kept["state1"]
            if "absmax1" in kept:
                got = reference.decode(got.view(-1), kept["absmax1"], True).view_as(want)
            assert (got - want).abs().max() <= 0.02 * want.abs().max()
        train(single, one, 3, 5, slice(0, 8))
        for a, b in zip(values(single), ended, strict=True):
            assert (a - b).abs().mean() < 1e-3


def _worker(rank: int, check: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    globals()[check](slice(4 * rank, 4 * rank + 4), rank, Path(folder))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("check", ["check_ddp", "check_fsdp2"])
def test_two_processes(check: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (check, folder), nprocs=2)
