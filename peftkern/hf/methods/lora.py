"""LoRA: low-rank adapters beside frozen linear layers (arXiv 2106.09685)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from peftkern.hf.config import (
    TargetedConfig,
    check_patterns,
    is_number,
    positive,
    positive_int,
)
from peftkern.hf.planning import Planning
from peftkern.hf.targets import Site, by_pattern
from peftkern.nn.lora import INITIALISATIONS, LoRALinear

logger = logging.getLogger("peftkern")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TargetedConfig):
    """Low-rank adapters on linear layers, optionally over a quantized base.

    Args:
        r: rank of the updates.
        lora_alpha: numerator of the scaling lora_alpha / r.
        lora_dropout: dropout on the adapters' input, in [0, 1).
        rank_pattern: other ranks, by regular expression on the end of the path.
        alpha_pattern: other lora_alpha, in the same way.
        use_rslora: scaling lora_alpha / sqrt(r).
        init_lora_weights: True, ``"gaussian"`` or False; see :class:`peftkern.nn.LoRALinear`.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("r", self.r)
        positive("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout!r}"
            )
        for name, check in (("rank_pattern", positive_int), ("alpha_pattern", positive)):
            value = check_patterns(name, getattr(self, name), check)
            object.__setattr__(self, name, value)
        if self.init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights: got {self.init_lora_weights!r}, expected True, False or "
                "'gaussian'"
            )


def plan(planning: Planning, config: LoRAConfig) -> list[Site]:
    """Note at each target that it gets a low-rank adapter, or why not; gives the targets."""
    targets = planning.targets(config)
    for choice in targets:
        step = planning.adaptable(choice, LoRALinear)
        if step is None:
            continue
        step.r = by_pattern(config.rank_pattern, step.site.name, config.r)
        alpha = by_pattern(config.alpha_pattern, step.site.name, config.lora_alpha)
        arguments = {
            "adapter_name": planning.adapter_name,
            "r": step.r,
            "lora_alpha": alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "init_lora_weights": config.init_lora_weights,
            "lora_dtype": config.adapter_dtype,
        }
        step.wrap = partial(LoRALinear, **arguments)
        if isinstance(step.site.module, LoRALinear):
            step.extend = partial(step.site.module.add_adapter, **arguments)
    adapted = [step.site.name for step in planning.steps if step.adapts]
    for label in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, label):
            if not any(by_pattern({pattern: True}, name, False) for name in adapted):
                logger.warning("%s: %r matches no adapted module", label, pattern)
    return [choice.site for choice in targets if choice.wanted]
