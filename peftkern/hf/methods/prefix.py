"""Prefix tuning: trainable keys and values in front of every layer's (arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from peftkern.hf.config import ALL_LINEAR, AdapterConfig, positive_int
from peftkern.hf.planning import Planning
from peftkern.hf.prefixes import ModelPrefix, attention_modules, backbone_of, key_shape
from peftkern.hf.targets import Site, choose
from peftkern.hf.undo import UndoLog

ATTRIBUTE = "prefix_tuning"


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(AdapterConfig):
    """A trainable prefix for the keys and values of every attention layer.

    Args:
        num_virtual_tokens: length of the prefix.
        prefix_projection: train a smaller table and a two-layer MLP that makes the prefix of it.
        encoder_hidden_size: width of that MLP; the prefix's width of one layer when left out.
        init_weights: ``None`` (random) or ``"zero"``.

    Further fields: :class:`AdapterConfig` (what is trained in full, how the base is kept).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.

    Example:
        >>> PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM").num_virtual_tokens
        20
    """

    kind = "prefix"

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("num_virtual_tokens", self.num_virtual_tokens)
        if self.encoder_hidden_size is not None:
            positive_int("encoder_hidden_size", self.encoder_hidden_size)
            if not self.prefix_projection:
                raise ValueError("encoder_hidden_size: needs prefix_projection=True")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights: got {self.init_weights!r}, expected None or 'zero'")


def plan(planning: Planning, config: PrefixTuningConfig) -> list[Site]:
    """Note at each self-attention that it gets a prefix; gives the linear layers to quantize."""
    model = planning.model
    backbone = backbone_of(model)
    attentions = [module for _, module in attention_modules(backbone)]
    heads, head_dim = key_shape(model.config)
    hidden = config.encoder_hidden_size if config.prefix_projection else None
    if config.prefix_projection and hidden is None:
        hidden = heads * head_dim
    arguments: dict[str, Any] = {
        "num_virtual_tokens": config.num_virtual_tokens,
        "encoder_hidden_size": hidden,
        "init_weights": config.init_weights,
        "dtype": config.adapter_dtype,
    }
    held = getattr(model, ATTRIBUTE, None)
    if isinstance(held, ModelPrefix):
        step = planning.step(held)
        step.asked = True
        step.extend = partial(held.add_adapter, planning.adapter_name, **arguments)
        step.r = config.num_virtual_tokens
    else:
        shape = {"num_layers": len(attentions), "num_heads": heads, "head_dim": head_dim}
        make = partial(ModelPrefix, adapter_name=planning.adapter_name, **shape, **arguments)
        for index, module in enumerate(attentions):
            step = planning.step(module)
            step.asked = True
            step.r = config.num_virtual_tokens
            step.act = (
                partial(_attach, model, backbone, attentions, make) if index == 0 else _linked
            )
    found = choose(model, planning.sites, ALL_LINEAR, config)
    return [choice.site for choice in found if choice.wanted]


def _attach(
    model: nn.Module,
    backbone: nn.Module,
    attentions: list[nn.Module],
    make: partial[ModelPrefix],
    log: UndoLog,
) -> None:
    layer = make().to(next(model.parameters()).device)
    layer.train(model.training)
    log.attach(model, ATTRIBUTE, layer)
    log.on_rollback(layer.attach(backbone, attentions))


def _linked(log: UndoLog) -> None:
    """The first layer's step has linked them all."""
