"""A callback for transformers' ``Trainer``: what was patched, what trains, memory, throughput."""

from __future__ import annotations

import logging
import resource
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from peftkern.hf.accelerate import accelerate
from peftkern.hf.accelerate.api import swaps
from peftkern.hf.report import model_bytes, parameter_counts
from peftkern.hf.watchdog import GradientWatchdog

logger = logging.getLogger("peftkern")


class PeftkernCallback(TrainerCallback):
    """Reports at the start, watches gradients, and adds memory and throughput to the logs.

    Args:
        accelerate_layers: swap layers of PEFT and bitsandbytes onto our kernels when training
            begins (see :func:`peftkern.accelerate`); models without any are left as they are.
        watch_steps: optimizer steps after which trainable tensors without a gradient are named;
            0 switches the watchdog off.
        strict: raise, instead of warning, when a trainable tensor does not train.

    Adds to every log: ``peak_memory_mib`` (the GPU's, or the process's on CPU),
    ``samples_per_second`` and, where the batches tell, ``tokens_per_second`` since the last log.

    Example:
        >>> from peftkern.hf.trainer import PeftkernCallback
        >>> PeftkernCallback(watch_steps=5).watch_steps
        5
    """

    def __init__(
        self, accelerate_layers: bool = True, watch_steps: int = 3, strict: bool = False
    ) -> None:
        if watch_steps and watch_steps < 2:
            raise ValueError(f"watch_steps: got {watch_steps}, expected 0 or at least 2")
        self.accelerate_layers = accelerate_layers
        self.watch_steps = watch_steps
        self.strict = strict
        self.watchdog: GradientWatchdog | None = None
        self._since = 0.0
        self._steps = 0
        self._tokens = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        """Swap layers in, log the report, and set up the watchdog."""
        if model is None:
            return
        bare = _unwrapped(model)
        table = swaps()
        if self.accelerate_layers and any(type(m) in table for m in bare.modules()):
            accelerate(bare)
        if state.is_world_process_zero:
            logger.info("%s", describe(bare))
        if self.watch_steps:
            self.watchdog = GradientWatchdog(bare, self.watch_steps, self.strict)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._since, self._steps = time.perf_counter(), state.global_step
        self._tokens = int(getattr(state, "num_input_tokens_seen", 0) or 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the watchdog look at the gradients."""
        if self.watchdog is not None:
            self.watchdog.observe()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Add memory and throughput since the last log."""
        if logs is None:
            return
        added: dict[str, float] = {"peak_memory_mib": round(peak_memory_bytes() / 2**20, 1)}
        steps, elapsed = state.global_step - self._steps, time.perf_counter() - self._since
        if steps > 0 and elapsed > 0:
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            added["samples_per_second"] = round(steps * rows / elapsed, 3)
            tokens = int(getattr(state, "num_input_tokens_seen", 0) or 0)
            if tokens > self._tokens:
                added["tokens_per_second"] = round((tokens - self._tokens) / elapsed, 1)
            self._since, self._steps, self._tokens = time.perf_counter(), state.global_step, tokens
        for name, value in added.items():
            logs.setdefault(name, value)
            if state.log_history:
                state.log_history[-1].setdefault(name, value)


def describe(model: nn.Module) -> str:
    """What is patched or accelerated in a model: the summaries of its reports, in a few lines."""
    lines = []
    for attribute, name in (("_peftkern_handle", "patch"), ("_peftkern_accelerate", "accelerate")):
        handle = model.__dict__.get(attribute)
        if handle is not None:
            lines.append(f"peftkern {name}: {handle.report().summary}")
    trainable, total = parameter_counts(model)
    lines.append(
        f"trainable {trainable:,} of {total:,} parameters; "
        f"{model_bytes(model) / 2**20:.1f} MiB of weights"
    )
    return "\n".join(lines)


def peak_memory_bytes() -> int:
    """Most bytes in use so far: of the current GPU, or else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model below DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or model._modules.get("module")
        if not isinstance(inner, nn.Module):
            return model
        model = inner
