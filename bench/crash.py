"""Kill paged training, and saves of adapters, at random moments; check what a restart finds.

``python -m bench.crash`` runs two kinds of kills. Most are simulated in this process by a disk
that dies at a random write, sync or resize: the write is cut at a random byte, and whatever was
not synced is kept, lost or cut, each at random, as after a power failure. The others end a real
child process with SIGKILL. After each, the state is reopened; it must be bit for bit that of the
last finished commit or of the one in progress, and going on from it must end where the
uninterrupted run ended. Adapters that are saved over others die at every call of the system, and
by SIGKILL (``crash_files.py``): what is there is the old one or the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from bench import crash_files
from peftkern.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, PagingError
from peftkern.optim.files import Disk

STEPS = 8
SIZES = (3000, 10_001, 257, 4096)
BUCKET = 8192
CLASSES = {"fp32": (AdamW, PagedAdamW), "8bit": (AdamW8bit, PagedAdamW8bit)}


class Died(OSError):
    """The disk is gone."""


@dataclass
class _Write:
    fd: int
    offset: int
    before: bytes  # what a lost write leaves; shorter than the write where the file grew
    length: int


@dataclass
class DyingDisk(Disk):
    """A disk that dies at its ``dies_at``-th operation and forgets what was not synced."""

    rng: random.Random
    dies_at: int
    operations: int = 0
    dead: bool = False
    unsynced: list[_Write] = field(default_factory=list)
    paths: dict[int, Path] = field(default_factory=dict)

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self.paths[fd] = path
        return fd

    def _tick(self) -> bool:
        if self.dead:
            raise Died("the disk died")
        self.operations += 1
        return self.operations >= self.dies_at

    def _die(self) -> Died:
        self.dead = True
        for write in reversed(self.unsynced):
            fate = self.rng.random()
            if fate < 0.4:
                continue
            cut = 0 if fate < 0.7 else self.rng.randrange(write.length + 1)
            # A file that grew keeps its length: zeros stand where the lost bytes would.
            lost = write.before.ljust(write.length, b"\0")[cut:]
            os.pwrite(write.fd, lost, write.offset + cut)
        return Died("the disk died")

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        dies = self._tick()
        count = self.rng.randrange(len(data) + 1) if dies else len(data)
        self.unsynced.append(_Write(fd, offset, os.pread(fd, count, offset), count))
        super().write(fd, data[:count], offset)
        if dies:
            raise self._die()
        return count

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        if self.dead:
            raise Died("the disk died")
        return super().read(fd, into, offset)

    def sync(self, fd: int) -> None:
        if self._tick():
            raise self._die()
        self.unsynced = [write for write in self.unsynced if write.fd != fd]

    def truncate(self, fd: int, size: int) -> None:
        if self._tick():
            raise self._die()
        super().truncate(fd, size)


class _QuickDisk(Disk):
    """For looking at what a crash left: no crash follows, so nothing needs to be synced."""

    def sync(self, fd: int) -> None:
        """Nothing."""


def parameters() -> list[nn.Parameter]:
    """The start of every run."""
    make = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
    return [
        nn.Parameter(torch.randn(n, generator=make).to(dtype))
        for n, dtype in zip(SIZES, dtypes, strict=True)
    ]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int) -> None:
    """Step number ``step`` of every run."""
    make = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=make).to(p.dtype)
    optimizer.step()


def _facts(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[torch.Tensor]:
    facts = [p.detach().clone() for p in params]
    for _, state in sorted(optimizer.state_dict()["state"].items()):
        tensors = state["__bnb_optimizer_quant_state__"]
        facts += [tensors[key].clone().view(-1) for key in sorted(tensors)]
    return facts


def golden(kind: str) -> list[list[torch.Tensor]]:
    """Parameters and state after each step of a run that nothing interrupts or pages."""
    params = parameters()
    optimizer = CLASSES[kind][0](params, lr=1e-2)
    history = []
    for step in range(STEPS):
        history.append(_facts(optimizer, params))
        train(optimizer, params, step)
    return [*history, _facts(optimizer, params)]


def _paged(kind: str, params: list[nn.Parameter], where: Path, disk: Disk | None) -> PagedAdamW:
    return CLASSES[kind][1](
        params,
        lr=1e-2,
        ram_budget=4 * BUCKET,
        bucket_bytes=BUCKET,
        page_dir=where,
        resume=True,
        keep_parameters=True,
        disk=disk,
    )


def _step_of(optimizer: PagedAdamW, params: list[nn.Parameter]) -> int:
    return int(optimizer.state.get(params[0], {}).get("step", 0))


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(kind: str, where: Path, low: int, high: int, truth: list[list[torch.Tensor]]) -> str:
    """Reopen; the empty string if all is well, else what is wrong."""
    params = parameters()
    try:
        optimizer = _paged(kind, params, where, _QuickDisk())
    except (PagingError, ValueError) as error:
        return f"cannot be reopened: {error}"
    with optimizer:
        found = _step_of(optimizer, params)
        if not low <= found <= high:
            return f"found step {found}, expected {low} to {high}"
        # Before the first step there is no state, and state_dict lists none.
        if not _same(_facts(optimizer, params), truth[found]):
            return f"step {found} holds other bits than the uninterrupted run"
        for step in range(found, STEPS):
            train(optimizer, params, step)
        if not _same(_facts(optimizer, params), truth[STEPS]):
            return f"going on from step {found} ended elsewhere"
    return ""


def simulated_kill(kind: str, seed: int, truth: list[list[torch.Tensor]]) -> tuple[str, int]:
    """One run on a dying disk; what is wrong ("" if nothing), and how many steps it had begun."""
    rng = random.Random(seed)
    disk = DyingDisk(rng, dies_at=rng.randrange(1, 260))
    params = parameters()
    begun = durable = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        optimizer = None
        with contextlib.suppress(PagingError, OSError):
            optimizer = _paged(kind, params, where, disk)
            for step in range(STEPS):
                begun = step + 1
                train(optimizer, params, step)
                if rng.random() < 0.3:
                    optimizer.sync()
                    durable = step + 1
        if optimizer is not None:
            with contextlib.suppress(PagingError):
                optimizer.close()
        return check(kind, where, durable, begun, truth), begun


_CHILD = """
import sys
from pathlib import Path
from bench import crash
params = crash.parameters()
optimizer = crash._paged(sys.argv[1], params, Path(sys.argv[2]), None)
for step in range(crash._step_of(optimizer, params), crash.STEPS):
    crash.train(optimizer, params, step)
    print(step, flush=True)
optimizer.close()
"""


def process_kill(kind: str, seed: int, truth: list[list[torch.Tensor]]) -> str:
    """End a child process with SIGKILL at a random moment."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, kind, folder]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        begun = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
            assert child.stdout is not None
            for _ in range(rng.randrange(1, STEPS)):
                begun = int(child.stdout.readline() or begun) + 1
            time.sleep(rng.random() * 0.01)
            child.send_signal(signal.SIGKILL)
            begun = max([begun, *(int(line) + 1 for line in child.stdout.read().split())])
        # A step starts when the pages of the one before are written; the commits of both may still
        # be under way.
        return check(kind, Path(folder), max(0, begun - 2), min(STEPS, begun + 1), truth)


def run(simulated: int, processes: int, seed: int) -> list[str]:
    """Run both kinds; returns what went wrong."""
    truths = {kind: golden(kind) for kind in CLASSES}
    wrong = []
    for i in range(simulated):
        kind = ("fp32", "8bit")[i % 2]
        problem, _ = simulated_kill(kind, seed + i, truths[kind])
        if problem:
            wrong.append(f"simulated kill {seed + i} ({kind}): {problem}")
    for i in range(processes):
        kind = ("fp32", "8bit")[i % 2]
        problem = process_kill(kind, seed + i, truths[kind])
        if problem:
            wrong.append(f"SIGKILL {seed + i} ({kind}): {problem}")
    return wrong


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.crash", description=__doc__)
    parser.add_argument("--simulated", type=int, default=400, help="kills by a dying disk")
    parser.add_argument("--processes", type=int, default=12, help="child processes killed")
    parser.add_argument("--adapters", type=int, default=100, help="saves of adapters killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    wrong = run(options.simulated, options.processes, options.seed)
    calls = 0
    for kind in ("lora", "bottleneck"):
        adapters = crash_files.Adapters(kind)
        for full in (False, True):
            count, problems = crash_files.simulated(adapters, full)
            calls, wrong = calls + count, wrong + problems
        wrong += crash_files.killed(adapters, options.adapters, options.seed)
    for line in wrong:
        print(line)
    print(
        f"paging: {options.simulated} simulated kills and {options.processes} killed processes; "
        f"adapters: {calls} deaths and full disks, {2 * options.adapters} killed processes: "
        f"{len(wrong)} inconsistent states ({time.perf_counter() - start:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
