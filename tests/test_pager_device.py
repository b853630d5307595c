"""The device tier of the pager, with a link on the CPU that is as late as it may be.

Copies are carried out only when a mark that stands for them is waited for, or at random moments;
buffers that nobody may read yet hold garbage. A missing wait shows as wrong bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pager_optim import (
    assert_same_params,
    assert_same_state,
    make_params,
    pair,
    state_bytes,
    train,
)
from torch import Tensor, nn

from peftkern import optim


@dataclass(eq=False)
class Copy:
    """A copy that was asked for; its own mark."""

    to: Tensor
    source: Tensor
    after: list[Any]
    done: bool = False


@dataclass
class LateLink:
    """Two queues of copies and a current stream that is never behind (it is the host)."""

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    queues: dict[str, list[Copy]] = field(default_factory=lambda: {"to": [], "from": []})
    moved: dict[str, int] = field(default_factory=lambda: {"to": 0, "from": 0})
    buffers: int = 0

    def __post_init__(self) -> None:
        torch.set_num_threads(1)  # small copies, many of them
        self.dice = random.Random(self.seed)

    def device_buffer(self, size: int) -> Tensor:
        self.buffers += size
        return torch.randint(0, 256, (size,), dtype=torch.uint8)

    def host_buffer(self, size: int) -> Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8)

    def _ask(self, name: str, to: Tensor, source: Tensor, after: Iterable[Any]) -> Copy:
        copy = Copy(to, source, [mark for mark in after if mark is not None])
        self.queues[name].append(copy)
        self.moved[name] += to.numel()
        if all(mark.done for mark in copy.after):
            to.fill_(self.dice.randrange(256))  # nobody may count on what was there
        if self.dice.random() < 0.2:
            self._run(self.queues[self.dice.choice(["to", "from"])], None)
        return copy

    def fetch(self, to: Tensor, source: Tensor, after: Iterable[Any]) -> Copy:
        return self._ask("to", to, source, after)

    def store(self, to: Tensor, source: Tensor, after: Iterable[Any]) -> Copy:
        return self._ask("from", to, source, after)

    def _run(self, queue: list[Copy], until: Copy | None) -> None:
        """Carry out a queue in its order, up to a copy or as far as the others allow."""
        while queue:
            copy = queue[0]
            for mark in copy.after:
                if not mark.done:
                    self.join(mark)
            copy.to.copy_(copy.source)
            copy.done = True
            queue.pop(0)
            if copy is until:
                return

    def mark(self) -> None:
        return None

    def join(self, mark: Copy | None) -> None:
        if mark is not None and not mark.done:
            self._run(next(q for q in self.queues.values() if mark in q), mark)

    wait = join

    def capturing(self) -> bool:
        return False

    def passed(self, mark: Copy | None) -> bool:
        if mark is not None and not mark.done and self.dice.random() < 0.3:
            self.join(mark)
        return mark is None or mark.done


def _budgets(params: list[nn.Parameter], paged: Any, device: float, ram: float) -> dict[str, Any]:
    total = state_bytes(params, paged)
    return {
        "bucket_bytes": total // 24 // 4096 * 4096,
        "device_budget": int(total * device),
        "ram_budget": None if ram == 0 else int(total * ram),
    }


@pair
@pytest.mark.parametrize(
    ("device", "ram"), [(2.0, 0), (0.25, 0), (0.25, 0.5), (0.09, 0.09), (0.5, 0.25)]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_late_copies_change_no_bit(
    plain: Any, paged: Any, device: float, ram: float, seed: int
) -> None:
    mine, theirs = make_params(), make_params()
    reference = plain(theirs, lr=1e-2, max_grad_norm=10.0)
    link = LateLink(seed)
    budgets = _budgets(mine, paged, device, ram)
    with paged(mine, lr=1e-2, max_grad_norm=10.0, link=link, **budgets) as optimizer:
        for step in range(6):
            train(reference, theirs, step, step + 1)
            train(optimizer, mine, step, step + 1)
            report = optimizer.paging_report()
            assert report["device_bytes"] == link.buffers
            assert report["device_bytes"] <= report["device_budget"]
            if ram:
                assert report["resident_bytes"] <= report["ram_budget"]
            assert_same_params(mine, theirs)
        assert_same_state(optimizer, reference)
        if device > 1:
            assert link.moved == {"to": 0, "from": 0}
            assert report["resident_bytes"] == 0
        else:
            assert report["bytes_stored"] == link.moved["from"] > report["total_bytes"]
            assert 0 < report["bytes_fetched"] <= link.moved["to"]


@pair
def test_both_budgets_change_at_run_time(plain: Any, paged: Any) -> None:
    mine, theirs = make_params(), make_params()
    reference = plain(theirs, lr=1e-2)
    total = state_bytes(mine, paged)
    least = 3 * (total // 24 // 4096 * 4096)
    link = LateLink(7)
    with paged(mine, lr=1e-2, bucket_bytes=total // 24 // 4096 * 4096, link=link) as optimizer:
        changes = ((None, None), (total // 4, None), (least, total // 3), (total // 2, total // 3),
                   (None, least), (total // 3, least), (least, None), (total, total))  # fmt: skip
        for i, (device, ram) in enumerate(changes):
            if i % 2:
                optimizer.set_ram_budget(ram)
                optimizer.set_device_budget(device)
            else:
                optimizer.set_device_budget(device)
                optimizer.set_ram_budget(ram)
            report = optimizer.paging_report()
            assert device is None or report["device_bytes"] <= device
            train(reference, theirs, 2 * i, 2 * i + 2)
            train(optimizer, mine, 2 * i, 2 * i + 2)
            report = optimizer.paging_report()
            assert device is None or report["device_bytes"] <= device
            assert ram is None or report["resident_bytes"] <= ram
            assert_same_params(mine, theirs)
        assert_same_state(optimizer, reference)
        with pytest.raises(ValueError, match="device_budget: got 4096 bytes, expected at least"):
            optimizer.set_device_budget(4096)


@pair
@pytest.mark.parametrize(("device", "ram"), [(2.0, 0), (0.25, 0.3)])
def test_commits_and_resumes(
    plain: Any, paged: Any, device: float, ram: float, tmp_path: Path
) -> None:
    mine, theirs = make_params(), make_params()
    reference = plain(theirs, lr=1e-2)
    budgets = _budgets(mine, paged, device, ram)
    for step in range(3):
        params = mine if step == 0 else [nn.Parameter(torch.zeros_like(p)) for p in mine]
        with paged(
            params, lr=1e-2, link=LateLink(step), page_dir=tmp_path, keep_parameters=True,
            resume=step > 0, **budgets,
        ) as optimizer:  # fmt: skip
            for i in (2 * step, 2 * step + 1):
                train(optimizer, params, i, i + 1)
                train(reference, theirs, i, i + 1)
            assert_same_params(params, theirs)
        mine = params
    optimizer = paged(mine, link=LateLink(9), page_dir=tmp_path, keep_parameters=True, resume=True,
                      **budgets)  # fmt: skip
    assert_same_state(optimizer, reference)
    optimizer.close()


def test_state_moves_between_kinds_of_optimizers() -> None:
    mine, theirs = make_params(), make_params()
    reference = optim.AdamW8bit(theirs, lr=1e-2)
    train(reference, theirs, 0, 3)
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q.data)
    budgets = _budgets(mine, optim.PagedAdamW8bit, 0.3, 0.3)
    with optim.PagedAdamW8bit(mine, lr=1e-2, link=LateLink(4), **budgets) as optimizer:
        optimizer.load_state_dict(reference.state_dict())
        train(optimizer, mine, 3, 6)
        train(reference, theirs, 3, 6)
        assert_same_params(mine, theirs)
        assert_same_state(optimizer, reference)


def test_parameters_on_several_devices_are_refused() -> None:
    params = [nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(300, device="meta"))]
    optimizer = optim.PagedAdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="parameter 1: is on meta, the first one on cpu"):
        optimizer.step()


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="device_budget: got 0, expected 1 to"):
        optim.PagedAdamW([nn.Parameter(torch.zeros(5))], device_budget=0)
