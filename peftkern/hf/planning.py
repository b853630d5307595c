"""Deciding, before anything is touched, what a patch will do to every module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from peftkern.hf.config import ALL_LINEAR, LoRAConfig
from peftkern.hf.rules import is_foreign_adapter, rule_for, why_unknown
from peftkern.hf.targets import (
    Choice,
    Site,
    by_pattern,
    choose,
    is_linear_like,
    near_names,
    saved_by,
    survey,
    unmatched,
)
from peftkern.nn.lora import LoRALinear
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.saved import TrainableCopy

logger = logging.getLogger("peftkern")


@dataclass
class Step:
    """What happens to one module.

    Args:
        site: the module and its places.
        was: class name of the original.
        adapt: it gets an adapter.
        copy: it gets a trainable copy.
        quantize: its weight is quantized.
        r: rank of the adapter.
        alpha: lora_alpha of the adapter.
        reasons: why something asked for is not done, or why nothing was asked for.
        asked: whether the configuration asked for something.
        refused: whether something asked for is not done.
    """

    site: Site
    was: str
    adapt: bool = False
    copy: bool = False
    quantize: bool = False
    r: int = 0
    alpha: float = 0.0
    reasons: list[str] = field(default_factory=list)
    asked: bool = False
    refused: bool = False

    @property
    def acts(self) -> bool:
        """Whether anything happens at all."""
        return self.adapt or self.copy or self.quantize

    def refuse(self, reason: str) -> None:
        """Note that something asked for is not done."""
        self.asked = self.refused = True
        self.reasons.append(reason)


def make_plan(
    model: nn.Module, config: LoRAConfig, adapter_name: str, *, every_name: bool = True
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
    steps = {id(site.module): Step(site, _original_class(site.module)) for site in sites}
    _plan_copies(steps, sites, config, adapter_name)
    targets = choose(model, sites, config.target_modules, config)
    for choice in targets:
        _plan_adapter(steps[id(choice.site.module)], choice, config, adapter_name)
    if config.quantize is not None:
        _plan_quantization(model, steps, sites, targets, config)
    plan = []
    for site in sites:
        step = steps[id(site.module)]
        if not step.asked and not step.reasons and is_linear_like(site.module):
            step.reasons.append("not among target_modules")
        if step.acts or step.reasons:
            plan.append(step)
    if not any(step.adapt for step in plan):
        raise ValueError(_nothing(config, plan, sites))
    _check_patterns(config, plan)
    return plan


def _original_class(module: nn.Module) -> str:
    inner = getattr(module, "base_layer", None) if isinstance(module, LoRALinear) else None
    return type(inner if inner is not None else module).__name__


def _check_names(config: LoRAConfig, sites: Sequence[Site], every_name: bool) -> None:
    for label in ("target_modules", "quantize_modules"):
        spec = getattr(config, label)
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
    if config.exclude_modules:
        for name in unmatched(config.exclude_modules, sites):
            logger.warning("exclude_modules: %r matches no module", name)


def _check_patterns(config: LoRAConfig, plan: Sequence[Step]) -> None:
    adapted = [step.site.name for step in plan if step.adapt]
    for label in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, label):
            if not any(by_pattern({pattern: True}, name, False) for name in adapted):
                logger.warning("%s: %r matches no adapted module", label, pattern)


def _plan_copies(
    steps: dict[int, Step], sites: Sequence[Site], config: LoRAConfig, adapter_name: str
) -> None:
    taken: list[str] = []
    for site in sites:
        if not any(saved_by(config.saved_names, name) for name in site.names):
            continue
        if any(site.name.startswith(f"{path}.") for path in taken):
            continue
        if isinstance(site.module, LoRALinear) or is_foreign_adapter(site.module):
            raise ValueError(
                f"modules_to_save: {site.name} carries an adapter already and cannot also be "
                "trained in full"
            )
        if isinstance(site.module, TrainableCopy) and adapter_name in site.module.adapter_names:
            raise ValueError(_exists(adapter_name, site.name))
        step = steps[id(site.module)]
        step.copy = step.asked = True
        taken.append(site.name)


def _plan_adapter(step: Step, choice: Choice, config: LoRAConfig, adapter_name: str) -> None:
    module, name = step.site.module, step.site.name
    if step.copy or any(step.reasons):
        return
    if not choice.wanted:
        step.reasons.append(choice.reason or "")
        return
    step.asked = True
    if isinstance(module, LoRALinear):
        if adapter_name in module.lora_A:
            raise ValueError(_exists(adapter_name, name))
    elif isinstance(module, TrainableCopy):
        return step.refuse("is trained in full by another adapter")
    elif is_foreign_adapter(module):
        return step.refuse(
            f"is an adapter layer of another library ({type(module).__module__}); patch the model "
            "before that library wraps it, or unload its adapters"
        )
    else:
        rule = rule_for(module)
        if rule is None:
            return step.refuse(why_unknown(module))
        refusal = rule.refusal(module)
        if refusal is not None:
            return step.refuse(refusal)
    step.adapt = True
    step.r = by_pattern(config.rank_pattern, name, config.r)
    step.alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    if step.site.aliases:
        step.reasons.append(f"one adapter serves also {', '.join(step.site.aliases)}")
    return None


def _plan_quantization(
    model: nn.Module,
    steps: dict[int, Step],
    sites: Sequence[Site],
    targets: Sequence[Choice],
    config: LoRAConfig,
) -> None:
    owners = _weight_owners(sites)
    if config.quantize_modules is None:
        wanted = [choice.site for choice in targets if choice.wanted]
    else:
        chosen = choose(model, sites, config.quantize_modules, config)
        wanted = [choice.site for choice in chosen if choice.wanted]
    keep = _kept_wide(model)
    for site in wanted:
        step = steps[id(site.module)]
        if step.copy or (step.refused and not step.adapt):
            continue
        reason = _why_not_quantized(site, config, owners, keep)
        if reason is None:
            step.asked = step.quantize = True
            step.reasons = [r for r in step.reasons if r != "not among target_modules"]
        elif reason:
            step.refuse(f"not quantized: {reason}")


def _why_not_quantized(
    site: Site, config: LoRAConfig, owners: dict[int, list[str]], keep: Sequence[str]
) -> str | None:
    """None: quantize it; "": it is in that format already; else why not."""
    module = site.module
    inner = module.base_layer if isinstance(module, LoRALinear) else module
    if isinstance(inner, QuantizedLinear):
        have = inner.quantized.quant_type
        return "" if have == config.quantize else f"its base is {have} already"
    if isinstance(module, LoRALinear):
        return "it carries an adapter over a dense base already"
    rule = rule_for(module)
    if rule is None:
        return why_unknown(module)
    reason = rule.quantizable(module)
    if reason is not None:
        return reason
    tied = [path for path in owners[id(module.weight)] if path not in site.names]
    if tied:
        return f"its weight is tied to {tied[0]}"
    parts = site.name.split(".")
    if any(name in parts for name in keep):
        return "the model asks to keep it in float32 (_keep_in_fp32_modules)"
    return None


def _weight_owners(sites: Sequence[Site]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for site in sites:
        for parameter in site.module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(site.name)
    return owners


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


def _nothing(config: LoRAConfig, plan: Sequence[Step], sites: Sequence[Site]) -> str:
    reasons = [f"{s.site.name}: {'; '.join(s.reasons)}" for s in plan if s.reasons]
    shown = "\n  ".join(reasons[:10])
    more = f"\n  ... and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    detail = f"\n  {shown}{more}" if reasons else " (it has no linear layers)"
    return (
        f"target_modules={config.target_modules!r} leaves nothing to adapt among "
        f"{len(sites)} modules:{detail}"
    )
