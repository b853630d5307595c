"""LoRA: low-rank adapters beside frozen linear layers (arXiv 2106.09685)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from peftkern.hf.config import (
    TargetedConfig,
    check_patterns,
    is_number,
    names,
    positive,
    positive_int,
)
from peftkern.hf.planning import Planning
from peftkern.hf.rules import rule_for
from peftkern.hf.targets import Choice, Site, by_pattern, excluded, matches
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.embedding import LoRAEmbedding
from peftkern.nn.experts import STACKED, QuantizedExperts, is_experts
from peftkern.nn.lora import LoRALinear
from peftkern.nn.lora_init import changes_base, check_initialisation, check_loftq
from peftkern.nn.parameter_lora import LoRAParameters
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import features, is_dense_linear, own_forward

logger = logging.getLogger("peftkern")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TargetedConfig):
    """Low-rank adapters on linear layers and embeddings, optionally over a quantized base.

    Args:
        r: rank of the updates.
        lora_alpha: numerator of the scaling lora_alpha / r.
        lora_dropout: dropout on the adapters' input, in [0, 1).
        rank_pattern: other ranks, by regular expression on the end of the path.
        alpha_pattern: other lora_alpha, in the same way.
        use_rslora: scaling lora_alpha / sqrt(r).
        init_lora_weights: True, ``"gaussian"``, ``"orthogonal"`` or False; or ``"pissa"``,
            ``"pissa_niter_<n>"``, ``"olora"`` and ``"loftq"``, which move a part of each dense
            weight into the adapter and quantize what is left, if ``quantize`` says so. See
            :class:`peftkern.nn.LoRALinear`.
        use_dora: learn the length of each row of the adapted weights (DoRA); linear layers only.
        lora_bias: a trained bias on each B; linear layers only.
        target_parameters: names of parameters that are no layer's weight (whole path, or its last
            parts), such as ``["experts.gate_up_proj", "experts.down_proj"]``: matrices, or stacks
            of them, one for each expert. Without dropout, bias and magnitudes. With
            ``target_modules=[]`` nothing else is adapted.
        loftq_config: ``loftq_iter`` rounds of LoftQ, and ``loftq_bits`` (4 or 8) that its dense
            base is rounded to without ``quantize``.

    Further fields: :class:`TargetedConfig` (which modules) and :class:`AdapterConfig` (what is
    trained in full, how the base is kept).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.

    Example:
        >>> LoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], quantize="nf4").r
        16
    """

    kind = "lora"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    loftq_config: Mapping[str, int] = field(default_factory=dict)
    target_parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"target_parameters: expected a list of names, got the string "
                f"{self.target_parameters!r}; write [{self.target_parameters!r}]"
            )
        object.__setattr__(
            self, "target_parameters", names("target_parameters", self.target_parameters)
        )
        positive_int("r", self.r)
        positive("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout!r}"
            )
        for name, check in (("rank_pattern", positive_int), ("alpha_pattern", positive)):
            value = check_patterns(name, getattr(self, name), check)
            object.__setattr__(self, name, value)
        check_initialisation(self.init_lora_weights, self.r)
        check_loftq(self.loftq_config)
        object.__setattr__(self, "loftq_config", dict(self.loftq_config))
        if self.loftq_config and self.init_lora_weights != "loftq":
            raise ValueError("loftq_config: needs init_lora_weights='loftq'")
        if self.use_dora and self.lora_bias:
            raise ValueError("use_dora and lora_bias exclude one another")


def plan(planning: Planning, config: LoRAConfig) -> list[Site]:
    """Note at each target that it gets a low-rank adapter, or why not; gives the linear ones."""
    targets = planning.targets(config)
    linear = []
    for choice in targets:
        module = choice.site.module
        if isinstance(module, nn.Embedding | LoRAEmbedding):
            _plan_embedding(planning, choice, config)
            continue
        _plan_linear(planning, choice, config)
        if choice.wanted:
            linear.append(choice.site)
    linear += _plan_parameters(planning, config)
    adapted = [step.site.name for step in planning.steps if step.adapts]
    adapted += [f"{s.site.name}.{p}" for s in planning.steps for p in s.parameters if s.adapts]
    for label in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, label):
            if not any(by_pattern({pattern: True}, name, False) for name in adapted):
                logger.warning("%s: %r matches no adapted module", label, pattern)
    return linear


def _shared_arguments(planning: Planning, config: LoRAConfig, path: str) -> dict[str, Any]:
    return {
        "adapter_name": planning.adapter_name,
        "r": by_pattern(config.rank_pattern, path, config.r),
        "lora_alpha": by_pattern(config.alpha_pattern, path, config.lora_alpha),
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
        "lora_dtype": config.adapter_dtype,
    }


def _plan_linear(planning: Planning, choice: Choice, config: LoRAConfig) -> None:
    step = planning.adaptable(choice, LoRALinear)
    if step is None:
        return
    module = step.site.module
    shared = _shared_arguments(planning, config, step.site.name)
    arguments = {
        **shared,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }
    check_initialisation(config.init_lora_weights, shared["r"])
    why = _why_not_so(module, config, shared["r"])
    if why is not None:
        step.refuse(why)
        return
    step.r = shared["r"]
    if isinstance(module, LoRALinear):
        step.extend = partial(module.add_adapter, **arguments)
    elif changes_base(config.init_lora_weights):
        step.tied = bool(planning.tied(step.site))
        options = {**arguments, "loftq_config": config.loftq_config}

        def rebase(original: nn.Module, make_base: Callable[[nn.Module], nn.Module]) -> LoRALinear:
            return LoRALinear(original, make_base=make_base, **options)

        step.rebase = rebase
    else:
        step.wrap = partial(LoRALinear, **arguments)


def _for_linear_layers(config: LoRAConfig) -> dict[str, bool]:
    """Options that need a linear layer, and whether they are given."""
    start = config.init_lora_weights
    return {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        f"init_lora_weights={start!r}": start not in (True, False, "gaussian"),
    }


def _plan_parameters(planning: Planning, config: LoRAConfig) -> list[Site]:
    """The same at the modules that hold target_parameters; gives the stacks of experts."""
    wanted = config.target_parameters or ()
    found: dict[str, bool] = dict.fromkeys(wanted, False)
    experts = []
    for site in planning.sites:
        base = site.module.base_layer if isinstance(site.module, LoRAParameters) else site.module
        assert isinstance(base, nn.Module)
        own = []
        stacks = STACKED if isinstance(base, QuantizedExperts) else ()
        for parameter in (*base._parameters, *stacks):
            hits = [w for w in wanted if any(matches((w,), f"{n}.{parameter}") for n in site.names)]
            found.update(dict.fromkeys(hits, True))
            if hits:
                own.append(parameter)
        if not own:
            continue
        _plan_parameter_site(planning, site, own, config)
        if is_experts(base):
            experts.append(site)
    for name, seen in found.items():
        if not seen:
            raise ValueError(f"target_parameters: no parameter matches {name!r}")
    return experts


def _plan_parameter_site(
    planning: Planning, site: Site, own: list[str], config: LoRAConfig
) -> None:
    step = planning.step(site.module)
    step.asked = True
    unlike = _for_linear_layers(config) | {"lora_dropout": bool(config.lora_dropout)}
    if any(unlike.values()):
        option = next(option for option, given in unlike.items() if given)
        step.refuse(f"{option} is for linear layers, these are bare parameters")
        return
    why = excluded(config, site.name)
    if why is not None or step.copy:
        step.reasons.append(why or "")
        return
    ranks = {p: by_pattern(config.rank_pattern, f"{site.name}.{p}", config.r) for p in own}
    alphas = {
        p: by_pattern(config.alpha_pattern, f"{site.name}.{p}", config.lora_alpha) for p in own
    }
    arguments: dict[str, Any] = {
        "adapter_name": planning.adapter_name,
        "r": ranks,
        "lora_alpha": alphas,
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
        "lora_dtype": config.adapter_dtype,
    }
    step.r, step.parameters = max(ranks.values()), tuple(own)
    module = site.module
    if isinstance(module, LoRAParameters):
        if set(own) != set(module.parameter_names):
            step.refuse(
                f"its adapters are on {', '.join(module.parameter_names)}; another one must be on "
                "the same parameters"
            )
            return
        step.extend = partial(module.add_adapter, **arguments)
    elif step.adapts or isinstance(module, AdapterLayer):
        step.refuse("is adapted as a layer already, by target_modules")
    else:
        step.wrap = partial(LoRAParameters, parameters=own, **arguments)


def _why_not_so(module: nn.Module, config: LoRAConfig, r: int) -> str | None:
    """Why this layer, which could carry a plain adapter, cannot carry one with these options."""
    base = module.base_layer if isinstance(module, LoRALinear) else module
    if config.use_dora and is_dense_linear(base) and own_forward(base):
        return f"DoRA reads the weight, but {type(base).__name__} computes a forward of its own"
    if not changes_base(config.init_lora_weights):
        return None
    start = f"init_lora_weights={config.init_lora_weights!r}"
    if isinstance(module, LoRALinear):
        return f"{start} would change the base under the adapters that it carries"
    if isinstance(module, QuantizedLinear) or not is_dense_linear(module):
        return f"{start} needs the dense weight; let this patch quantize it"
    if r > min(features(module)):
        return f"{start} needs a rank of at most {min(features(module))}, not {r}"
    rule = rule_for(module)
    return None if rule is None else rule.quantizable(module)


def _plan_embedding(planning: Planning, choice: Choice, config: LoRAConfig) -> None:
    step = planning.adaptable(choice, LoRAEmbedding, _why_not_embedding)
    if step is None:
        return
    module = step.site.module
    for option, given in _for_linear_layers(config).items():
        if given:
            step.refuse(f"{option} is for linear layers, this is an embedding")
            return
    arguments = _shared_arguments(planning, config, step.site.name)
    step.r = arguments["r"]
    if isinstance(module, LoRAEmbedding):
        step.extend = partial(module.add_adapter, **arguments)
    else:
        step.wrap = partial(LoRAEmbedding, **arguments)


def _why_not_embedding(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        return "its table changes in every forward pass (max_norm)"
    if not module.weight.is_floating_point():
        return f"its table is {module.weight.dtype}"
    return None
