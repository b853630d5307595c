"""Two processes train a model with packed weights as one process does: DDP and FSDP2."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import peftkern as pk

pytest.importorskip("transformers")
from hf_models import PEFT_WARNINGS, batch, build, randomize_adapters

pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    *PEFT_WARNINGS,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
STEPS, ROWS = 3, 4
CASES = [
    ("ddp", "nf4"),
    ("ddp", "int8"),
    ("fsdp2", "nf4"),
    ("fsdp2", "int8"),
    ("ddp", "peft nf4"),
    ("fsdp2", "peft nf4"),
]


def patched(quantize: str, checkpointing: bool) -> Any:
    model = build("llama")
    if quantize == "peft nf4":  # PEFT's layers on our packed weights, accelerated
        peft = pytest.importorskip("peft")
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                model.set_submodule(name, pk.nn.Linear4bit.from_linear(module))
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config).base_model.model
        pk.accelerate(model)
    else:
        pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize, keep_original=False))
    randomize_adapters(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model: nn.Module, rows: slice) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        given = {name: t[rows] for name, t in batch("llama", seed=step, rows=ROWS).items()}
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for way, quantize in CASES:  # in one pair of processes, whose start takes the longest
            result = run_case(rank, way, quantize)
            if rank == 0:
                torch.save(result, f"{folder}/{way}-{quantize}.pt")
    finally:
        dist.destroy_process_group()


def run_case(rank: int, way: str, quantize: str) -> dict[str, Any]:
    model = patched(quantize, checkpointing=way == "fsdp2")
    bytes_before = {n: p.data.clone() for n, p in model.named_parameters()}
    net: Any = model
    if way == "ddp":
        net = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    half = ROWS // 2
    losses = train(net, slice(rank * half, (rank + 1) * half))
    both = torch.tensor(losses)
    dist.all_reduce(both)
    state = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if way == "fsdp2" else parameter
        state[name] = full.detach().clone()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    same = all(torch.equal(state[n], bytes_before[n]) for n in frozen)
    found = {"losses": both / 2, "state": state, "frozen_same": same}
    if quantize.startswith("peft"):
        report = pk.accelerate(model).report()
        found["fast"], found["fallbacks"] = report.fast_calls, report.fallbacks
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    for way, quantize in CASES:
        alone = patched(quantize, checkpointing=False)
        start = copy.deepcopy(alone.state_dict())
        expected = train(alone, slice(0, ROWS))
        got = torch.load(tmp_path / f"{way}-{quantize}.pt", weights_only=True)
        assert got["frozen_same"]  # the packed weights came through sharding and gathering
        if "fast" in got:  # checkpointing computes each layer twice
            assert got["fast"] == 14 * STEPS * (2 if way == "fsdp2" else 1)
            assert got["fallbacks"] == {}
        torch.testing.assert_close(got["losses"], torch.tensor(expected), rtol=1e-5, atol=1e-6)
        trained = {n for n, p in alone.named_parameters() if p.requires_grad}
        assert len(trained) == 28
        for name, parameter in alone.named_parameters():
            if name in trained:
                torch.testing.assert_close(got["state"][name], parameter.data, rtol=1e-4, atol=1e-5)
                assert not torch.equal(parameter.data, start[name])
