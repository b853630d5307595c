"""What paging optimizer state costs, against computing alone and against the disk alone.

``python -m bench.paging`` steps three optimizers over the same parameters in turn: one in memory, a
paged one whose budget holds everything, and a paged one with a quarter of the state in RAM. In
every round it also moves the bytes that the last one moved by plain reads and writes of a file,
from one thread each at the same time: that and the step in memory are the floors. The least of all
rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern import optim

CLASSES: dict[str, tuple[Any, Any, int]] = {
    "fp32": (optim.AdamW, optim.PagedAdamW, 8),
    "8bit": (optim.AdamW8bit, optim.PagedAdamW8bit, 2),
}
_PIECE = 2 << 20


class Floor:
    """A file of the size of the state, read and written without anything else."""

    def __init__(self, folder: Path, size: int, durable: bool) -> None:
        self._fd = os.open(folder / "floor.bin", os.O_RDWR | os.O_CREAT)
        self._size, self._durable = max(size, _PIECE), durable
        self._out = memoryview(bytearray(os.urandom(1 << 16)) * (_PIECE >> 16))
        self._into = memoryview(bytearray(_PIECE))
        self._write(self._size)

    def _write(self, count: int) -> None:
        for at in range(0, count, _PIECE):
            os.pwrite(self._fd, self._out, at % self._size)
        if self._durable:
            os.fdatasync(self._fd)

    def _read(self, count: int) -> None:
        for at in range(0, count, _PIECE):
            os.preadv(self._fd, [self._into], at % (self._size - _PIECE + 1))

    def move(self, read: int, written: int) -> None:
        """Read and write so many bytes, at the same time."""
        reader = threading.Thread(target=self._read, args=(read,))
        reader.start()
        self._write(written)
        reader.join()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def parameters(millions: float) -> list[nn.Parameter]:
    """LoRA-like pairs of matrices with gradients."""
    pairs = max(1, round(millions * 1e6 / (16 * 8192)))
    params = [nn.Parameter(torch.randn(shape)) for shape in ((16, 4096), (4096, 16)) * pairs]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(kind: str, millions: float, rounds: int, durable: bool, folder: Path) -> dict[str, Any]:
    """Least times of a step in seconds, and what follows from them."""
    plain_class, paged_class, per_element = CLASSES[kind]
    params = parameters(millions)
    state = per_element * sum(p.numel() for p in params)
    where: dict[str, Any] = {"page_dir": folder / "pages"} if durable else {}
    memory = plain_class(params, lr=1e-4)
    whole = paged_class(params, lr=1e-4, ram_budget=2 * state + (64 << 20))
    quarter = paged_class(params, lr=1e-4, ram_budget=state // 4, **where)
    floor = Floor(folder, state, durable)
    best = dict.fromkeys(("memory", "whole", "quarter", "disk"), float("inf"))
    for _ in range(3):
        quarter.step()
        whole.step()
    for _ in range(rounds):
        best["memory"] = min(best["memory"], _timed(memory.step))
        best["whole"] = min(best["whole"], _timed(whole.step))
        quarter.sync()

        def step() -> None:
            quarter.step()
            if durable:
                quarter.sync()

        best["quarter"] = min(best["quarter"], _timed(step))
        last = quarter.paging_report()["history"][-1]
        start = time.perf_counter()
        floor.move(last["bytes_read"], last["bytes_written"])
        best["disk"] = min(best["disk"], time.perf_counter() - start)
    report = quarter.paging_report()
    for closing in (quarter, whole, floor):
        closing.close()
    return {
        "kind": kind,
        "durable": durable,
        "state_bytes": report["total_bytes"],
        "bytes_read": last["bytes_read"],
        "bytes_written": last["bytes_written"],
        "seconds": best,
        "whole_over_memory": best["whole"] / best["memory"],
        "quarter_over_floor": best["quarter"] / max(best["memory"], best["disk"]),
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.paging", description=__doc__)
    parser.add_argument("--millions", type=float, default=16.8, help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kind", choices=tuple(CLASSES), default="fp32")
    parser.add_argument("--durable", action="store_true", help="commit every step to the disk")
    parser.add_argument("--folder", help="where the files go; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(
            options.kind, options.millions, options.rounds, options.durable, Path(folder)
        )
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
