"""``GradientWatchdog``: names trainable tensors that do not train."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn

from peftkern.arguments import require_model, whole

logger = logging.getLogger("peftkern")


@dataclass(frozen=True)
class Silent:
    """A trainable tensor whose gradient never became anything but nothing or zero.

    Args:
        name: its path in the model.
        reason: ``"no gradient"`` (the loss does not depend on it), ``"all zero"`` or
            ``"not finite"``.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class GradientWatchdog:
    """Watches gradients for a few steps and names the tensors that never got one.

    The silent failure it exists for: adapters that are attached, counted as trainable, saved, and
    never trained. One step is not enough to tell: ``lora_A`` has a zero gradient as long as
    ``lora_B`` is zero, which it is at first.

    Args:
        model: the model in training.
        steps: optimizer steps to watch before judging, at least 2.
        raises: raise a ``RuntimeError`` instead of logging a warning.

    Raises:
        ValueError: ``steps`` is smaller than 2.

    Example:
        >>> net = torch.nn.Linear(4, 2)
        >>> net.unused = torch.nn.Parameter(torch.ones(3))
        >>> watchdog = GradientWatchdog(net, steps=2)
        >>> for _ in range(2):
        ...     net(torch.ones(1, 4)).sum().backward()
        ...     watchdog.observe()
        >>> [str(silent) for silent in watchdog.silent]
        ['unused: no gradient']
    """

    def __init__(self, model: nn.Module, steps: int = 3, raises: bool = False) -> None:
        require_model("model", model)
        if whole("steps", steps, 0) < 2:
            raise ValueError(
                f"steps: got {steps}, expected at least 2: lora_A has a zero gradient in the first "
                "step, because lora_B starts at zero"
            )
        self.steps = steps
        self.raises = raises
        self.seen = 0
        self.silent: tuple[Silent, ...] = ()
        self._pending = {
            name: (parameter, "no gradient")
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def done(self) -> bool:
        """Whether the verdict is known: every tensor has trained, or the steps are over."""
        return not self._pending or self.seen >= self.steps

    def observe(self) -> None:
        """Look at the gradients; call it after the backward pass, before the optimizer's step.

        Raises:
            RuntimeError: with ``raises``, after the last step, naming the silent tensors.
        """
        if self.done:
            return
        self.seen += 1
        for name, (parameter, _) in list(self._pending.items()):
            reason = _judge(parameter)
            if reason is None:
                del self._pending[name]
            elif reason != "no gradient":
                self._pending[name] = (parameter, reason)
        if self._pending and self.seen >= self.steps:
            self._report()

    def _report(self) -> None:
        self.silent = tuple(Silent(name, reason) for name, (_, reason) in self._pending.items())
        self._pending.clear()
        lines = "\n  ".join(str(silent) for silent in self.silent)
        text = (
            f"{len(self.silent)} trainable tensors did not train in {self.seen} steps:\n  {lines}\n"
            "'no gradient': the loss does not depend on the tensor (its module is not called, or "
            "a frozen input of a checkpointed block cut the graph); 'all zero': it is called, but "
            "what follows ignores it"
        )
        if self.raises:
            raise RuntimeError(text)
        logger.warning(text)


def _judge(parameter: nn.Parameter) -> str | None:
    """Why the gradient counts as silent; ``None`` when it is alive."""
    gradient = parameter.grad
    if gradient is None:
        return "no gradient"
    if gradient.numel() == 0:
        return None
    norm = torch.linalg.vector_norm(gradient.detach().float()).item()
    if not math.isfinite(norm):
        return "not finite"
    return None if norm > 0.0 else "all zero"
