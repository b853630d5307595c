"""Bottleneck adapters in compact files. Plain ones are written in AdapterHub's layout instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields as fields_of
from typing import Any

from torch import Tensor, nn

from peftkern.checkpoint.peft_common import base_model_fields, refuse_unknown, task_of
from peftkern.hf.config import AdapterConfig
from peftkern.hf.methods.bottleneck import BottleneckConfig, adapter_state, places_of
from peftkern.hf.targets import Site

PEFT_TYPE = "PEFTKERN_BOTTLENECK"
PREFIX = ""

FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bottleneck": {},
    "inference_mode": True,
    "modules_to_save": None,
    "peft_type": PEFT_TYPE,
    "task_type": None,
}


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> BottleneckConfig:
    """The configuration in the file.

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    problems = refuse_unknown(fields, FIELDS, {})
    own = fields.get("bottleneck")
    if not isinstance(own, dict) or set(own) - _own_names():
        problems.append("bottleneck: missing, or with fields that this version does not know")
    if problems or not isinstance(own, dict):
        raise ValueError(f"{where}: " + "; ".join(problems))
    task, saved = task_of(fields)
    try:
        return BottleneckConfig(**own, modules_to_save=saved, task_type=task, **options)
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_fields(
    config: BottleneckConfig, model: nn.Module, sites: Sequence[Site], adapter_name: str
) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    values = {key: value for key, value in config.to_dict().items() if key in _own_names()}
    fields = dict(FIELDS)
    fields.update(
        bottleneck=values,
        modules_to_save=list(config.saved_names) or None,
        **base_model_fields(model, config.task_type),
    )
    return fields


def tensors(model: nn.Module, sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """``<place>.bottleneck.<tensor>``: AdapterHub's places and tensors, without a name."""
    return {
        f"{place.key}.bottleneck.{name}": tensor
        for place, layer in places_of(model, sites)
        if adapter_name in layer.adapters
        for name, tensor in adapter_state(layer, adapter_name).items()
    }


def check_same_function(sites: Sequence[Site], adapter_name: str, config: BottleneckConfig) -> None:
    """Refuse to load into an adapter that would compute something else with the same tensors.

    Raises:
        ValueError: always: which options an existing adapter has is not asked, only a new one is
            made from the file.
    """
    raise ValueError(
        f"adapter_name: a bottleneck adapter {adapter_name!r} exists already; unpatch first, or "
        "load under another name"
    )


def summary(fields: dict[str, Any]) -> str:
    """One line for people."""
    factor = fields["bottleneck"].get("reduction_factor")
    return f"Bottleneck adapters, reduction factor {factor}."


def _own_names() -> set[str]:
    base = {item.name for item in fields_of(AdapterConfig)}
    return {item.name for item in fields_of(BottleneckConfig)} - base
