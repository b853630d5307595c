"""``accelerate``: models that PEFT or bitsandbytes has wrapped already, in place and reversibly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftkern.hf.accelerate.bases import forget, format_of
from peftkern.hf.accelerate.fused import NORMS, Accelerated
from peftkern.hf.accelerate.report import AccelerateReport, LayerRow, row_of
from peftkern.hf.verify import Loss, VerifyReport, verify

logger = logging.getLogger("peftkern")
_ATTRIBUTE = "_peftkern_accelerate"
_PRIVATE = ("_peftkern_counts", NORMS)


class AccelerateHandle:
    """Reports on an accelerated model, checks it, and brings it back; made by :func:`accelerate`.

    It walks the model each time, so that layers which PEFT adds, replaces or unwraps meanwhile are
    seen as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def report(self) -> AccelerateReport:
        """One row a layer: what it is now, how often which way was taken, and why.

        Returns:
            The report; ``print`` it for a table.
        """
        table = swaps()
        rows = []
        for name, module in self.model.named_modules():
            if isinstance(module, Accelerated):
                rows.append(row_of(name, module))
            elif (reason := why_left_alone(module, table)) is not None:
                base = getattr(module, "base_layer", module)
                was = type(module).__name__
                rows.append(LayerRow(name, was, "", format_of(base), reason=reason))
        return AccelerateReport(tuple(rows))

    def verify(
        self, batch: Any, loss: Loss | None = None, against: str = "reference"
    ) -> VerifyReport:
        """The kernels against the reference, or against PEFT's own forward; see :func:`verify`."""
        return verify(self.model, batch, loss, against)

    def unpatch(self) -> nn.Module:
        """Give every layer its class back; counters go, everything else stays as it is.

        Returns:
            The model.
        """
        for module in self.model.modules():
            if isinstance(module, Accelerated):
                restore(module)
        self.model.__dict__.pop(_ATTRIBUTE, None)
        return self.model

    def __repr__(self) -> str:
        count = sum(isinstance(m, Accelerated) for m in self.model.modules())
        return f"AccelerateHandle({type(self.model).__name__}: {count} layers)"


def accelerate(model: nn.Module, strict: bool = False) -> AccelerateHandle:
    """Run the layers of PEFT's LoRA and of bitsandbytes on our kernels, in place and reversibly.

    Each layer instance changes its class to a subclass of the one it has; modules, parameters,
    names and bytes stay, and so do PEFT's functions (``set_adapter``, ``merge_and_unload``,
    ``save_pretrained``, ...). Calls that the kernels do not cover go to the original forward, and
    the report counts them with their reason. Call it again after ``add_adapter`` or anything else
    that makes new layers: layers swapped already are left as they are.

    Args:
        model: a ``PeftModel``, a transformers model with adapters of its own, a model quantized by
            bitsandbytes, or any module that contains such layers.
        strict: raise when a layer of theirs is left alone, instead of naming it in the report.

    Returns:
        The handle: ``handle.report()``, ``handle.verify(batch)`` and ``handle.unpatch()``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has none of these layers, or, with ``strict``, one was left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    table = swaps()
    found = [module for module in model.modules() if type(module) in table]
    present = any(isinstance(module, Accelerated) for module in model.modules())
    if not found and not present:
        raise ValueError(
            f"model: this {type(model).__name__} has no LoRA layer of PEFT and no linear layer of "
            "bitsandbytes; use peftkern.patch to put adapters into a plain model"
        )
    left = [
        f"{name}: {reason}"
        for name, module in model.named_modules()
        if (reason := why_left_alone(module, table)) is not None
    ]
    if strict and left:
        raise ValueError(f"strict: {len(left)} layers are left alone:\n  " + "\n  ".join(left))
    for module in found:
        module.__class__ = table[type(module)]
        assert isinstance(module, Accelerated)
        module.why_not_now()  # reads the quantized bytes once, before anything compiles the model
    for line in left:
        logger.info("left alone: %s", line)
    handle: AccelerateHandle | None = model.__dict__.get(_ATTRIBUTE)
    if handle is None or handle.model is not model:
        handle = AccelerateHandle(model)
        model.__dict__[_ATTRIBUTE] = handle
    return handle


def restore(module: nn.Module) -> None:
    """Give one swapped layer its class back."""
    assert isinstance(module, Accelerated)
    for name in _PRIVATE:
        module.__dict__.pop(name, None)
    forget(module)
    swapped: Any = module
    swapped.__class__ = module.original_class


def swaps() -> Mapping[type[nn.Module], type[nn.Module]]:
    """Class -> class that replaces it, for the libraries that this process has loaded."""
    table: dict[type[nn.Module], type[nn.Module]] = {}
    peft, bnb = "peft.tuners.lora" in sys.modules, "bitsandbytes" in sys.modules
    if peft:
        from peftkern.hf.accelerate.peft_layers import SWAPS as DENSE

        table |= DENSE
    if bnb:
        from peftkern.hf.accelerate.bnb_layers import SWAPS as QUANTIZED

        table |= QUANTIZED
    if peft and bnb:
        from peftkern.hf.accelerate.peft_bnb_layers import SWAPS as BOTH

        table |= BOTH
    return table


def why_left_alone(module: nn.Module, table: Mapping[type[nn.Module], Any]) -> str | None:
    """Why a layer of PEFT or bitsandbytes is not swapped; ``None`` for all other modules."""
    kind = type(module)
    if kind in table or isinstance(module, Accelerated):
        return None
    theirs = kind.__module__.startswith(("peft.tuners.", "bitsandbytes."))
    names = {cls.__name__ for cls in kind.__mro__}
    if theirs and ("BaseTunerLayer" in names or isinstance(module, nn.Linear)):
        if kind.__name__ == "Embedding":
            return "an embedding is a table look-up, which peftkern has no faster kernel for"
        return f"{kind.__module__.split('.')[0]}'s {kind.__name__} has no counterpart here"
    if any(issubclass(kind, original) for original in table):
        return f"{kind.__name__} is a subclass with code of its own"
    return None
