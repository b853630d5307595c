"""Deciding, before anything is touched, what a patch will do to every module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from peftkern.hf.config import ALL_LINEAR, AdapterConfig, TargetedConfig
from peftkern.hf.methods import method_of
from peftkern.hf.rules import is_foreign_adapter, rule_for, why_unknown
from peftkern.hf.targets import (
    Choice,
    Site,
    choose,
    excluded,
    is_linear_like,
    near_names,
    saved_by,
    survey,
    unmatched,
)
from peftkern.hf.undo import UndoLog
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.experts import QuantizedExperts, is_experts, why_not_fused
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.saved import TrainableCopy

logger = logging.getLogger("peftkern")


@dataclass
class Step:
    """What happens to one module.

    Args:
        site: the module and its places.
        was: class name of the original.
        wrap: makes the module that takes this one's place from it, or from its quantized form.
        rebase: the same where the adapter takes a part of the weight into itself: makes it from
            the original and from what makes a base of the rest.
        extend: adds an adapter to the adapter layer that stands here already.
        act: anything else; what it changes it notes in the log.
        tied: whether another module holds its weight too.
        copy: it gets a trainable copy.
        quantize: its weight is quantized.
        r: rank, or width, of the adapter.
        parameters: names of the parameters that it is on, where it is not on the module's weight.
        reasons: why something asked for is not done, or why nothing was asked for.
        asked: whether the configuration asked for something.
        refused: whether something asked for is not done.
    """

    site: Site
    was: str
    wrap: Callable[[nn.Module], nn.Module] | None = None
    rebase: Callable[[nn.Module, Callable[[nn.Module], nn.Module]], AdapterLayer] | None = None
    extend: Callable[[], object] | None = None
    act: Callable[[UndoLog], object] | None = None
    tied: bool = False
    copy: bool = False
    quantize: bool = False
    r: int = 0
    parameters: tuple[str, ...] = ()
    reasons: list[str] = field(default_factory=list)
    asked: bool = False
    refused: bool = False

    @property
    def adapts(self) -> bool:
        """Whether the module gets an adapter."""
        ways = (self.wrap, self.rebase, self.extend, self.act)
        return any(way is not None for way in ways)

    @property
    def acts(self) -> bool:
        """Whether anything happens at all."""
        return self.adapts or self.copy or self.quantize

    def refuse(self, reason: str) -> None:
        """Note that something asked for is not done."""
        self.asked = self.refused = True
        self.reasons.append(reason)


class Planning:
    """The steps while they are being decided, one for each module of the model.

    Args:
        model: the model; it is only read.
        adapter_name: name of the adapter to add.
        sites: its modules with their places.
    """

    def __init__(self, model: nn.Module, adapter_name: str, sites: list[Site]) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.sites = sites
        self._steps = {id(s.module): Step(s, _original_class(s.module)) for s in sites}

    @property
    def steps(self) -> list[Step]:
        """All steps, in the model's order."""
        return [self._steps[id(site.module)] for site in self.sites]

    def step(self, module: nn.Module) -> Step:
        """The step of a module of the model."""
        return self._steps[id(module)]

    def targets(self, config: TargetedConfig) -> list[Choice]:
        """The modules that target_modules speaks of, and other linear layers with the reason."""
        return choose(self.model, self.sites, config.target_modules, config)

    def tied(self, site: Site) -> list[str]:
        """Paths of other modules that hold the very weight of this one."""
        return _tied(site, _weight_owners(self.sites))

    def adaptable(
        self,
        choice: Choice,
        layer: type[AdapterLayer],
        refusal: Callable[[nn.Module], str | None] | None = None,
    ) -> Step | None:
        """The step of a target that can carry an adapter ``layer``; else the reason is noted.

        Args:
            choice: the target.
            layer: class of the adapter layer.
            refusal: why a module of the target's kind cannot be adapted; linear layers' rules when
                left out.

        Raises:
            ValueError: it carries an adapter of this name already.
        """
        step = self.step(choice.site.module)
        module, name = step.site.module, step.site.name
        if step.copy or step.reasons:
            return None
        if not choice.wanted:
            step.reasons.append(choice.reason or "")
            return None
        step.asked = True
        if isinstance(module, layer):
            if self.adapter_name in module.adapter_names:
                raise ValueError(_exists(self.adapter_name, name))
        elif (why := _why_not_adapted(module, refusal or _why_not_linear)) is not None:
            step.refuse(why)
            return None
        if step.site.aliases:
            step.reasons.append(f"one adapter serves also {', '.join(step.site.aliases)}")
        return step


def _why_not_adapted(module: nn.Module, refusal: Callable[[nn.Module], str | None]) -> str | None:
    if isinstance(module, TrainableCopy):
        return "is trained in full by another adapter"
    if isinstance(module, AdapterLayer):
        return f"carries an adapter of another kind already ({type(module).__name__})"
    if is_foreign_adapter(module):
        return (
            f"is an adapter layer of another library ({type(module).__module__}); patch the model "
            "before that library wraps it, or unload its adapters"
        )
    return refusal(module)


def _why_not_linear(module: nn.Module) -> str | None:
    rule = rule_for(module)
    return why_unknown(module) if rule is None else rule.refusal(module)


def make_plan(
    model: nn.Module, config: AdapterConfig, adapter_name: str, *, every_name: bool = True
) -> list[Step]:
    """One step for each module that the configuration speaks of, and for each other linear layer.

    Args:
        model: the model; it is only read.
        config: what to do.
        adapter_name: name of the adapter to add.
        every_name: raise for names in lists that match nothing; else only when nothing matches.

    Raises:
        ValueError: names match nothing, the adapter exists, or no module can be adapted.
    """
    sites = survey(model)
    if not sites:
        raise ValueError(
            f"model: {type(model).__name__} has no submodules, so there is no place to put an "
            "adapter; wrap it, for example in torch.nn.Sequential"
        )
    _check_names(config, sites, every_name)
    planning = Planning(model, adapter_name, sites)
    _plan_copies(planning, config)
    targets = method_of(config).plan(planning, config)
    if config.quantize is not None:
        _plan_quantization(planning, targets, config)
    plan = []
    for step in planning.steps:
        if not step.asked and not step.reasons and is_linear_like(step.site.module):
            step.reasons.append("not among target_modules")
        if step.acts or step.reasons:
            plan.append(step)
    if not any(step.adapts for step in plan):
        raise ValueError(_nothing(config, plan, sites))
    return plan


def _original_class(module: nn.Module) -> str:
    inner = getattr(module, "base_layer", None) if isinstance(module, AdapterLayer) else None
    return type(inner if inner is not None else module).__name__


def _check_names(config: AdapterConfig, sites: Sequence[Site], every_name: bool) -> None:
    for label in ("target_modules", "quantize_modules"):
        spec = getattr(config, label, None)
        if spec is None or spec == ALL_LINEAR:
            continue
        lost = unmatched(spec, sites)
        if not lost or (not every_name and len(lost) < len(spec) and not isinstance(spec, str)):
            continue
        hints = "; ".join(
            f"{name!r}: near names {', '.join(near_names(name, sites))}" for name in lost
        )
        raise ValueError(f"{label}: no module matches {hints}")
    for name in config.modules_to_save or ():
        if every_name and not any(saved_by((name,), path) for s in sites for path in s.names):
            tops = ", ".join(dict.fromkeys(s.name.split(".")[0] for s in sites))
            raise ValueError(
                f"modules_to_save: no module's path ends with {name!r}; the model's parts: {tops}"
            )
    exclude = getattr(config, "exclude_modules", None)
    if exclude:
        for name in unmatched(exclude, sites):
            logger.warning("exclude_modules: %r matches no module", name)


def _plan_copies(planning: Planning, config: AdapterConfig) -> None:
    taken: list[str] = []
    for site in planning.sites:
        if not any(saved_by(config.saved_names, name) for name in site.names):
            continue
        if any(site.name.startswith(f"{path}.") for path in taken):
            continue
        module = site.module
        if isinstance(module, TrainableCopy):
            if planning.adapter_name in module.adapter_names:
                raise ValueError(_exists(planning.adapter_name, site.name))
        elif isinstance(module, AdapterLayer) or is_foreign_adapter(module):
            raise ValueError(
                f"modules_to_save: {site.name} carries an adapter already and cannot also be "
                "trained in full"
            )
        step = planning.step(module)
        step.copy = step.asked = True
        taken.append(site.name)


def _plan_quantization(planning: Planning, targets: Sequence[Site], config: AdapterConfig) -> None:
    owners = _weight_owners(planning.sites)
    wanted = list(targets)
    if config.quantize_modules is not None:
        chosen = choose(planning.model, planning.sites, config.quantize_modules, config)
        wanted = [choice.site for choice in chosen if choice.wanted]
    if (config.quantize_modules or getattr(config, "target_modules", ALL_LINEAR)) == ALL_LINEAR:
        # Most of a mixture model's weights are in its stacks of experts, which are no layers.
        taken = {id(site.module) for site in wanted}
        stacks = (s for s in planning.sites if is_experts(_base_of(s.module)))
        wanted += [s for s in stacks if id(s.module) not in taken and not excluded(config, s.name)]
    keep = _kept_wide(planning.model)
    for site in wanted:
        step = planning.step(site.module)
        if step.copy or (step.refused and not step.adapts):
            continue
        reason = _why_not_quantized(site, config, owners, keep)
        if reason is None:
            step.asked = step.quantize = True
            step.reasons = [r for r in step.reasons if r != "not among target_modules"]
        elif reason:
            step.refuse(f"not quantized: {reason}")


def _why_not_quantized(
    site: Site, config: AdapterConfig, owners: dict[int, list[str]], keep: Sequence[str]
) -> str | None:
    """None: quantize it; "": it is in that format already; else why not."""
    module = site.module
    inner = _base_of(module)
    if isinstance(inner, QuantizedExperts):
        have = inner.quant_type
        return "" if have == config.quantize else f"its experts are {have} already"
    if isinstance(inner, QuantizedLinear):
        have = inner.quantized.quant_type
        return "" if have == config.quantize else f"its base is {have} already"
    if isinstance(module, AdapterLayer):
        return "it carries an adapter over a dense base already"
    if is_experts(module):
        return why_not_fused(module)
    rule = rule_for(module)
    if rule is None:
        return why_unknown(module)
    reason = rule.quantizable(module)
    if reason is not None:
        return reason
    tied = _tied(site, owners)
    if tied:
        return f"its weight is tied to {tied[0]}"
    parts = site.name.split(".")
    if any(name in parts for name in keep):
        return "the model asks to keep it in float32 (_keep_in_fp32_modules)"
    return None


def _base_of(module: nn.Module) -> nn.Module:
    base = getattr(module, "base_layer", module) if isinstance(module, AdapterLayer) else module
    return base if isinstance(base, nn.Module) else module


def _weight_owners(sites: Sequence[Site]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for site in sites:
        for parameter in site.module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(site.name)
    return owners


def _tied(site: Site, owners: dict[int, list[str]]) -> list[str]:
    return [path for path in owners[id(site.module.weight)] if path not in site.names]


def _kept_wide(model: nn.Module) -> tuple[str, ...]:
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names.extend(getattr(model, attribute, None) or ())
    return tuple(names)


def _exists(adapter_name: str, path: str) -> str:
    return (
        f"adapter_name: {path} has an adapter {adapter_name!r} already; choose another name, or "
        "unpatch the model first"
    )


def _nothing(config: AdapterConfig, plan: Sequence[Step], sites: Sequence[Site]) -> str:
    first = sorted(plan, key=lambda step: not step.asked)  # what was asked for explains most
    reasons = [f"{s.site.name}: {'; '.join(s.reasons)}" for s in first if s.reasons]
    shown = "\n  ".join(reasons[:10])
    more = f"\n  ... and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    detail = f"\n  {shown}{more}" if reasons else " (it has no linear layers)"
    targets = getattr(config, "target_modules", None)
    wish = type(config).__name__ if targets is None else f"target_modules={targets!r}"
    return f"{wish} leaves nothing to adapt among {len(sites)} modules:{detail}"
