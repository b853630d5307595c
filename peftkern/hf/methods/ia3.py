"""(IA)^3: learned factors on the inputs or outputs of linear layers (arXiv 2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peftkern.hf.config import ALL_LINEAR, TargetedConfig, names
from peftkern.hf.planning import Planning
from peftkern.hf.targets import Site
from peftkern.nn.ia3 import IA3Linear


@dataclass(frozen=True, kw_only=True)
class IA3Config(TargetedConfig):
    """Learned factors on linear layers, optionally over a quantized base.

    Args:
        feedforward_modules: targets whose input is scaled instead of their output: ends of paths,
            or one regular expression on the whole path. With a list of target_modules, a part of
            that list.
        init_ia3_weights: True (all ones) or False (random, for tests).

    Further fields: :class:`TargetedConfig` (which modules) and :class:`AdapterConfig` (what is
    trained in full, how the base is kept).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.

    Example:
        >>> config = IA3Config(
        ...     target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ... )
        >>> config.feedforward_modules
        ('down_proj',)
    """

    kind = "ia3"

    feedforward_modules: str | Sequence[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = names("feedforward_modules", self.feedforward_modules)
        if inner == ALL_LINEAR:
            raise ValueError("feedforward_modules: give names or a regular expression")
        object.__setattr__(self, "feedforward_modules", inner)
        targets = self.target_modules
        if isinstance(inner, tuple) and isinstance(targets, tuple):
            lost = [name for name in inner if name not in targets]
            if lost:
                raise ValueError(
                    f"feedforward_modules: {lost[0]!r} is not among target_modules; a module is "
                    "scaled on its input or on its output, so list it in both"
                )


def scales_input(config: IA3Config, path: str) -> bool:
    """Whether the module at ``path`` is a feed-forward one (PEFT compares plain endings)."""
    inner = config.feedforward_modules
    if inner is None:
        return False
    if isinstance(inner, str):
        return re.fullmatch(inner, path) is not None
    return any(path.endswith(name) for name in inner)


def plan(planning: Planning, config: IA3Config) -> list[Site]:
    """Note at each target that it gets factors, or why not; gives the targets."""
    targets = planning.targets(config)
    for choice in targets:
        step = planning.adaptable(choice, IA3Linear)
        if step is None:
            continue
        module, feedforward = step.site.module, scales_input(config, step.site.name)
        arguments: dict[str, Any] = {
            "adapter_name": planning.adapter_name,
            "is_feedforward": feedforward,
            "init_ia3_weights": config.init_ia3_weights,
            "ia3_dtype": config.adapter_dtype,
        }
        if not isinstance(module, IA3Linear):
            step.wrap = partial(IA3Linear, **arguments)
        elif module.is_feedforward == feedforward:
            step.extend = partial(module.add_adapter, **arguments)
        else:
            side = "input" if module.is_feedforward else "output"
            step.refuse(f"its adapters scale its {side}, this one would scale the other side")
    return [choice.site for choice in targets if choice.wanted]
