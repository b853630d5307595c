"""Adapters saved over others while the process dies: old or new, never half of each.

:class:`Dying` ends a save at its n-th call of the operating system, as SIGKILL would: nothing
happens afterwards, no cleaning up either. ``python -m bench.crash`` kills real processes too.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkern as pk
from peftkern.checkpoint import files


class Killed(BaseException):
    """The process is dead."""


class Dying:
    """Takes the place of the module ``os`` in ``checkpoint/files.py``.

    Args:
        dies_at: number of the call that is the last, counted from 1; 0: none.
        full: the call fails with ENOSPC instead, and the process goes on.
    """

    _COUNTED = ("open", "replace", "fsync", "unlink")

    def __init__(self, dies_at: int, full: bool = False) -> None:
        self.calls, self.dead = 0, False
        self._dies_at, self._full = dies_at, full

    def tick(self) -> None:
        """One more call; raises where it is the last."""
        self.calls += 1
        if self.dead or self.calls == self._dies_at:
            if self._full:
                raise OSError(errno.ENOSPC, "no space left")
            self.dead = True
            raise Killed

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name not in self._COUNTED:
            return value

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return value(*args, **kwargs)

        return counted

    def fdopen(self, fd: int, mode: str) -> _DyingFile:
        """A file of which a death in the middle leaves half."""
        return _DyingFile(self, os.fdopen(fd, mode))

    def __enter__(self) -> Dying:
        self._os, self._unlink = files.os, Path.unlink
        unlink = Path.unlink

        def counted(path: Path, missing_ok: bool = False) -> None:
            self.tick()
            unlink(path, missing_ok)

        files.os, Path.unlink = self, counted  # type: ignore[assignment,method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        files.os, Path.unlink = self._os, self._unlink  # type: ignore[method-assign]


class _DyingFile:
    def __init__(self, disk: Dying, file: Any) -> None:
        self._disk, self._file = disk, file

    def __enter__(self) -> _DyingFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._disk.tick()
        self._file.write(data[half:])

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number


class Adapters:
    """Two adapters of one model that differ in rank, scaling and values.

    Args:
        kind: ``"lora"``, or ``"bottleneck"`` in AdapterHub's files; the second with a trained head
            beside it, which the first lacks.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        self.models = [self._trained(0), self._trained(1)]
        self.outputs = [self._output(model) for model in self.models]

    def _bare(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "lora":
            return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        import transformers

        config = transformers.BertConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()

    def _trained(self, which: int) -> nn.Module:
        model = self._bare()
        config: Any = pk.LoRAConfig(r=2 + 2 * which, lora_alpha=4 + 12 * which)
        if self.kind != "lora":
            saved = ["classifier"] if which else None
            config = pk.BottleneckConfig(reduction_factor=4 - 2 * which, modules_to_save=saved)
        pk.patch(model, config)
        make = torch.Generator().manual_seed(7 + which)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=make))
        return model

    @torch.no_grad()
    def _output(self, model: nn.Module) -> torch.Tensor:
        if self.kind == "lora":
            return model(self.x)
        logits: torch.Tensor = model(torch.arange(6)[None]).logits
        return logits

    def save(self, which: int, folder: Path) -> None:
        """Save one of the two."""
        format = "peft" if self.kind == "lora" else "adapterhub"
        pk.save_adapter(self.models[which], folder, format)

    def found(self, folder: Path) -> int | None:
        """Which of the two a folder holds; ``None`` if neither."""
        model = self._bare()
        pk.load_adapter(model, folder)
        output = self._output(model)
        for which, want in enumerate(self.outputs):
            if torch.equal(output, want):
                return which
        return None


def simulated(adapters: Adapters, full: bool = False) -> tuple[int, list[str]]:
    """The second saved over the first, cut short at every call; how many, and what went wrong."""
    wrong, dies_at = [], 0
    while True:
        dies_at += 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            adapters.save(0, folder)
            before = sorted(os.listdir(folder))
            try:
                with Dying(dies_at, full) as dying:
                    adapters.save(1, folder)
            except Killed:
                pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            if dying.calls < dies_at:
                return dies_at - 1, wrong
            where = f"{adapters.kind}, call {dies_at}{' fails' if full else ''}"
            try:
                found = adapters.found(folder)
                if found is None:
                    wrong.append(f"{where}: neither the old adapter nor the new one")
                if full and found == 0 and sorted(os.listdir(folder)) != before:
                    wrong.append(f"{where}: leaves {sorted(os.listdir(folder))}")
                adapters.save(1, folder)
                if adapters.found(folder) != 1:
                    wrong.append(f"{where}: cannot be saved over")
            except Exception as error:
                wrong.append(f"{where}: {type(error).__name__}: {error}")


def killed(adapters: Adapters, count: int, seed: int) -> list[str]:
    """Processes that save one over the other until SIGKILL; what went wrong."""
    rng, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters.save(0, folder)
        for i in range(count):
            pid = os.fork()
            if pid == 0:
                _save_for_ever(lambda n: adapters.save(n % 2, folder))
            time.sleep(rng.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            try:
                if adapters.found(folder) is None:
                    wrong.append(f"{adapters.kind}, kill {i}: neither the old adapter nor the new")
            except Exception as error:
                wrong.append(f"{adapters.kind}, kill {i}: {type(error).__name__}: {error}")
    return wrong


def _save_for_ever(save: Callable[[int], None]) -> None:
    n = 1
    try:
        while True:
            save(n)
            n += 1
    finally:
        os._exit(1)
