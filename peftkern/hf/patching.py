"""``patch``: adapters into a model, in place, instance by instance, and out again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftkern.arguments import require_model
from peftkern.hf.adapters import set_adapter
from peftkern.hf.checkpointing import watch_input_embeddings
from peftkern.hf.config import AdapterConfig
from peftkern.hf.planning import Step, make_plan
from peftkern.hf.report import (
    PatchReport,
    Row,
    model_bytes,
    parameter_counts,
    serving_kernel,
)
from peftkern.hf.rows import accept_rows
from peftkern.hf.rules import rule_for
from peftkern.hf.shared import share_inputs
from peftkern.hf.undo import Added, UndoLog
from peftkern.hf.verify import Loss, VerifyReport, verify
from peftkern.nn import Linear4bit, Linear8bit
from peftkern.nn.adapter import AdapterLayer, adapter_layers, check_adapter_name
from peftkern.nn.experts import QuantizedExperts, is_experts
from peftkern.nn.lora import LoRALinear
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.saved import TrainableCopy

if TYPE_CHECKING:
    from peftkern.select.refining import Refined

logger = logging.getLogger("peftkern")

_ATTRIBUTE = "_peftkern_handle"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Note:
    """What the plan said about one module, kept for reports."""

    name: str
    was: str
    acted: bool
    r: int
    reason: str
    asked: bool
    refused: bool


@dataclass
class Applied:
    """One adapter's share of a patched model."""

    config: AdapterConfig
    notes: list[Note]
    log: UndoLog


class PatchHandle:
    """The way back: reports what a patch did and undoes it. Made by :func:`patch`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Applied] = {}
        self.bytes_before = model_bytes(model)

    def report(self, adapter_name: str | None = None) -> PatchReport:
        """One row a module: replaced by what, served by which kernel, or exactly why not.

        Args:
            adapter_name: whose patch; the latest when left out.

        Returns:
            The report; ``print`` it for a table.

        Raises:
            RuntimeError: the model has been unpatched.
            ValueError: no such adapter.
        """
        self._require_live()
        name = adapter_name if adapter_name is not None else next(reversed(self.adapters))
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise ValueError(f"adapter_name: no adapter {name!r}; there are: {known}")
        rows = tuple(self._row(note, name) for note in self.adapters[name].notes)
        trainable, total = parameter_counts(self.model)
        return PatchReport(rows, trainable, total, self.bytes_before, model_bytes(self.model))

    def _row(self, note: Note, adapter_name: str) -> Row:
        module = self.model.get_submodule(note.name)
        if note.acted and not isinstance(module, AdapterLayer):
            # A method that adds to a module instead of replacing it hangs its layer below it.
            added = [c for c in module.children() if isinstance(c, AdapterLayer)]
            module = next((c for c in added if adapter_name in c.adapter_names), module)
        base = getattr(module, "base_layer", module) if isinstance(module, AdapterLayer) else module
        form = "dense"
        if isinstance(base, QuantizedLinear):
            form = base.quantized.quant_type
        elif isinstance(base, QuantizedExperts):
            form = base.quant_type
        reasons = [note.reason] if note.reason else []
        if isinstance(module, LoRALinear) and module.shared is not None:
            partners = module.shared.partners(module)
            if partners:
                reasons.append(f"computes together with {', '.join(partners)}")
        return Row(
            name=note.name,
            was=note.was,
            now=type(module).__name__ if note.acted else "",
            format=form,
            r=note.r,
            kernel=serving_kernel(module, adapter_name) if note.acted else "",
            reason="; ".join(reasons),
            asked=note.asked,
            done=not note.refused,
        )

    def verify(self, batch: Any, loss: Loss | None = None) -> VerifyReport:
        """The kernels against the reference on this model and batch; see :func:`verify`."""
        self._require_live()
        return verify(self.model, batch, loss)

    def refine(self, loader: Iterable[Any], **options: Any) -> Refined:
        """Move the entries of a sparse delta to where the gradient is.

        See :func:`peftkern.refine` for the options.
        """
        self._require_live()
        from peftkern.select.refining import refine  # it stands on this module's package

        return refine(self.model, loader, **options)

    def unpatch(self) -> nn.Module:
        """Bring the model back: the same modules, bytes, requires_grad flags and modes.

        Returns:
            The model.

        Raises:
            RuntimeError: it has been unpatched already; or it was quantized with
                ``keep_original=False``, so that the original weights are gone.
        """
        self._require_live()
        lost = [name for applied in self.adapters.values() for name in applied.log.lost]
        if lost:
            raise RuntimeError(
                f"cannot unpatch: {len(lost)} layers were quantized with keep_original=False, so "
                f"their original weights are gone ({lost[0]}, ...); load the model again, or "
                "patch with keep_original='disk' next time"
            )
        for _, layer in adapter_layers(self.model.named_modules()):
            layer.unmerge()
        for applied in reversed(self.adapters.values()):
            applied.log.rollback()
        self.adapters.clear()
        self.model.__dict__.pop(_ATTRIBUTE, None)
        return self.model

    def drop_latest(self) -> None:
        """Take out the adapter that was added last, as if it had never been."""
        self._require_live()
        if len(self.adapters) == 1:
            self.unpatch()
            return
        _, applied = self.adapters.popitem()
        applied.log.rollback()

    def _require_live(self) -> None:
        if not self.adapters:
            raise RuntimeError("this handle is spent: its model has been unpatched")

    def __repr__(self) -> str:
        names = ", ".join(self.adapters) or "unpatched"
        return f"PatchHandle({type(self.model).__name__}: {names})"


def patch(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str = "default",
    strict: bool = False,
    progress: Progress | None = None,
) -> PatchHandle:
    """Put adapters into a model, in place and reversibly; optionally quantize its frozen weights.

    Only this instance changes, by replacing modules; nothing is patched globally. Every parameter
    but the adapters' and those of modules_to_save is frozen. When anything fails half-way, the
    model is put back as it was. A second call with another ``adapter_name`` adds an adapter and
    makes it the active one.

    Args:
        model: any ``nn.Module``; Hugging Face models tell their head and embeddings themselves.
        config: what to adapt and how: :class:`LoRAConfig` or another method's configuration.
        adapter_name: name of the adapter.
        strict: raise when a module that was asked for cannot be patched as asked, instead of
            logging it and saying why in the report.
        progress: called as ``progress(done, total, module_name)`` after each module.

    Returns:
        The handle: ``handle.report()`` and ``handle.unpatch()``.

    Raises:
        TypeError: ``config`` is no configuration of peftkern, or ``model`` no module.
        ValueError: names match nothing, the adapter exists, nothing can be adapted, weights are
            not finite (when quantizing), or, with ``strict``, something was refused.

    Example:
        >>> from peftkern import LoRAConfig
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> handle = patch(net, LoRAConfig(r=4, target_modules=["0"]))
        >>> handle.report().trainable
        512
        >>> _ = handle.unpatch()
    """
    return apply_config(model, config, adapter_name, strict, progress)


def apply_config(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    strict: bool = False,
    progress: Progress | None = None,
    every_name: bool = True,
) -> PatchHandle:
    """:func:`patch`; with ``every_name=False`` single target names may match nothing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            "config: expected peftkern.LoRAConfig or another configuration of peftkern, got "
            f"{type(config).__module__}.{type(config).__name__}"
        )
    check_adapter_name(adapter_name)
    _check_not_below(model)
    handle = handle_of(model)
    if handle is not None and adapter_name in handle.adapters:
        raise ValueError(
            f"adapter_name: {adapter_name!r} exists already; choose another name, or unpatch first"
        )
    merged = [name for name, layer in adapter_layers(model.named_modules()) if layer.merged]
    if merged:
        raise RuntimeError(
            f"adapters are merged into {len(merged)} layers ({merged[0]}, ...); call "
            "peftkern.unmerge(model) before adding another"
        )
    plan = make_plan(model, config, adapter_name, every_name=every_name)
    refused = [step for step in plan if step.refused]
    if strict and refused:
        lines = "\n  ".join(f"{s.site.name}: {'; '.join(s.reasons)}" for s in refused)
        raise ValueError(f"strict: {len(refused)} modules cannot be patched as asked:\n  {lines}")
    fresh = handle is None
    handle = handle if handle is not None else PatchHandle(model)
    log = UndoLog()
    try:
        _apply(model, config, adapter_name, plan, log, progress)
        share_inputs(model, log)
        if fresh:
            accept_rows(model, log)
            for hook in watch_input_embeddings(model):
                log.on_rollback(hook.remove)
    except BaseException as error:
        _roll_back_failed(log, error)
        raise
    notes = [_note(step) for step in plan]
    handle.adapters[adapter_name] = Applied(config, notes, log)
    model.__dict__[_ATTRIBUTE] = handle
    for step in refused:
        logger.warning("%s not patched as asked: %s", step.site.name, "; ".join(step.reasons))
    return handle


def handle_of(model: nn.Module) -> PatchHandle | None:
    """The handle of a patched model; ``None`` when it is not patched."""
    require_model("model", model)
    return model.__dict__.get(_ATTRIBUTE)


def unpatch(model: nn.Module) -> nn.Module:
    """Bring a patched model back exactly as it was; see :meth:`PatchHandle.unpatch`.

    Args:
        model: the object that was given to :func:`patch`.

    Returns:
        The model.

    Raises:
        RuntimeError: it is not patched, or the original weights were given up.
    """
    handle = handle_of(model)
    if handle is None:
        inner = [n for n, m in model.named_modules() if n and handle_of(m) is not None]
        hint = f"; its part {inner[0]!r} is: unpatch that" if inner else ""
        raise RuntimeError(f"this {type(model).__name__} is not patched by peftkern{hint}")
    return handle.unpatch()


def _check_not_below(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name and handle_of(module) is not None:
            raise ValueError(
                f"model: its part {name!r} is patched already; patch that part, or unpatch it first"
            )


def _note(step: Step) -> Note:
    return Note(
        step.site.name,
        step.was,
        step.acts,
        step.r,
        "; ".join(step.reasons),
        step.asked,
        step.refused,
    )


def _roll_back_failed(log: UndoLog, error: BaseException) -> None:
    lost = list(log.lost)
    log.rollback()
    if lost:
        error.add_note(
            f"{len(lost)} layers had been quantized with keep_original=False ({lost[0]}, ...): "
            "their weights are gone, load the model again"
        )


def _apply(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    plan: list[Step],
    log: UndoLog,
    progress: Progress | None,
) -> None:
    log.remember(model)
    model.requires_grad_(False)
    work = [step for step in plan if step.acts]
    for done, step in enumerate(work, start=1):
        try:
            _apply_step(step, config, adapter_name, log)
        except Exception as error:
            error.add_note(f"while patching {step.site.name}; the model has been put back")
            raise
        if progress is not None:
            progress(done, len(work), step.site.name)
    set_adapter(model, adapter_name)


def _apply_step(step: Step, config: AdapterConfig, adapter_name: str, log: UndoLog) -> None:
    module = step.site.module
    if step.copy:
        if isinstance(module, TrainableCopy):
            log.added.append(Added(module, adapter_name))
            module.add_adapter(adapter_name)
        else:
            log.replace(module, TrainableCopy(module, adapter_name), step.site.slots)
    elif step.extend is not None:
        assert isinstance(module, AdapterLayer)
        log.added.append(Added(module, adapter_name))
        step.extend()
    elif step.rebase is not None:
        layer = step.rebase(module, partial(_base_for, step, config))
        log.replace(module, layer, step.site.slots)
        if not step.tied:
            log.park(module, layer, config.keep_original, step.site.name)
    elif step.wrap is not None or step.quantize:
        base = _base_for(step, config, module)
        current = base if step.wrap is None else step.wrap(base)
        log.replace(module, current, step.site.slots)
        if step.quantize:
            log.park(module, base, config.keep_original, step.site.name)
    if step.act is not None:
        step.act(log)


@torch.no_grad()
def _base_for(step: Step, config: AdapterConfig, module: nn.Module) -> nn.Module:
    if not step.quantize:
        rule = rule_for(module)
        return module if rule is None else rule.base(module)
    if is_experts(module):
        return QuantizedExperts(module, partial(_quantized, config=config))
    return _quantized(module, config)


def _quantized(module: nn.Module, config: AdapterConfig) -> QuantizedLinear:
    if config.quantize == "int8":
        return Linear8bit.from_linear(module)
    assert config.quantize is not None
    return Linear4bit.from_linear(module, config.quantize, config.blocksize, config.double_quant)
