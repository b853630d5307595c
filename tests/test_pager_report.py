"""What the paging report says, the picture of it, and the RAM that paging really takes."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

from peftkern import optim

ROOT = Path(__file__).resolve().parent.parent


def _trained(steps: int, budget: int | None) -> optim.PagedAdamW:
    p = nn.Parameter(torch.zeros(300_000))
    optimizer = optim.PagedAdamW([p], ram_budget=budget)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def test_history_adds_up() -> None:
    with _trained(6, 600_000) as optimizer:
        report = optimizer.paging_report()
    history = report["history"]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    for name in ("bytes_read", "bytes_written", "hits", "misses"):
        assert sum(entry[name] for entry in history) == report[name], name
    assert report["bytes_read"] > 0
    assert history[0]["bytes_read"] == 0, "the state of the first step is zero: nothing to read"
    for entry in history:
        assert 0.0 <= entry["stall_seconds"] <= entry["step_seconds"]
        assert entry["resident_bytes"] <= 600_000
    assert report["hit_rate"] == report["hits"] / (report["hits"] + report["misses"])


@pytest.mark.parametrize("budget", [None, 600_000])
@pytest.mark.parametrize("steps", [1, 5])
def test_picture(steps: int, budget: int | None) -> None:
    with _trained(steps, budget) as optimizer:
        picture = optim.paging_svg(optimizer.paging_report())
    root = ElementTree.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert ("budget" in texts) == (budget is not None)
    assert f"step {steps}" in texts
    assert len([e for e in root.iter(f"{space}path") if e.get("class") in ("a", "b")]) == 5
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")


def test_no_picture_without_steps() -> None:
    with optim.PagedAdamW([nn.Parameter(torch.zeros(3))]) as optimizer:
        report = optimizer.paging_report()
    with pytest.raises(ValueError, match="its history is empty"):
        optim.paging_svg(report)


_CHILD = """
import sys
import torch
from peftkern import optim

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

budget = int(sys.argv[1])
p = torch.nn.Parameter(torch.zeros(32 << 20))
p.grad = torch.ones_like(p)
small = torch.nn.Parameter(torch.zeros(1000))
small.grad = torch.ones_like(small)
warm = optim.AdamW([small])  # loads what every optimizer loads
warm.step()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from here
before = peak()
with optim.PagedAdamW([p], ram_budget=budget) as optimizer:
    for _ in range(3):
        optimizer.step()
    total = optimizer.paging_report()["total_bytes"]
print(peak() - before, total)
"""


@pytest.mark.slow
def test_peak_memory_stays_within_the_budget_and_64_mib() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell the peak of a process")
    budget = 64 << 20
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(budget)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    growth, total = map(int, done.stdout.split())
    assert total >= 256 << 20
    assert growth <= budget + (64 << 20), f"grew by {growth >> 20} MiB"
