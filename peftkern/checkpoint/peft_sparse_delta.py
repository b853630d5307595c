"""Sparse deltas in files. PEFT has no such type: its SHiRA stores no positions in this form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftkern.checkpoint.peft_common import base_model_fields, refuse_unknown, task_of
from peftkern.hf.methods.sparse_delta import SparseDeltaConfig
from peftkern.hf.targets import Site
from peftkern.nn.sparse_delta import SparseDeltaLinear

PEFT_TYPE = "PEFTKERN_SPARSE_DELTA"
PREFIX = ""
ASCENDING = (".sparse_delta.indices",)
FLAT_TOO = (".sparse_delta.values",)  # what a compact file encodes although it has one dimension

FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "entries": {},
    "inference_mode": True,
    "modules_to_save": None,
    "peft_type": PEFT_TYPE,
    "task_type": None,
}


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> SparseDeltaConfig:
    """A configuration with as many entries in each layer as the file has.

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    problems = refuse_unknown(fields, FIELDS, {})
    if not isinstance(fields.get("entries"), dict) or not fields["entries"]:
        problems.append("entries is missing")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    task, saved = task_of(fields)
    try:
        return SparseDeltaConfig(
            entries=fields["entries"],
            pattern="first",
            modules_to_save=saved,
            task_type=task,
            **options,
        )
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_fields(
    config: SparseDeltaConfig, model: nn.Module, sites: Sequence[Site], adapter_name: str
) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    layers = _layers(sites, adapter_name)
    fields = dict(FIELDS)
    fields.update(
        entries={path: layer.held(adapter_name).values.numel() for path, layer in layers.items()},
        modules_to_save=list(config.saved_names) or None,
        **base_model_fields(model, config.task_type),
    )
    return fields


def tensors(model: nn.Module, sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """``<path>.sparse_delta.indices`` int64 [k] and ``<path>.sparse_delta.values`` [k]."""
    held: dict[str, Tensor] = {}
    for path, layer in _layers(sites, adapter_name).items():
        entries = layer.held(adapter_name)
        held[f"{path}.sparse_delta.indices"] = entries.indices
        held[f"{path}.sparse_delta.values"] = entries.values
    return held


def limits(sites: Sequence[Site], adapter_name: str) -> dict[str, int]:
    """What the positions of each key must stay below."""
    return {
        f"{path}.sparse_delta.indices": layer.in_features * layer.out_features
        for path, layer in _layers(sites, adapter_name).items()
    }


def check_same_function(
    sites: Sequence[Site], adapter_name: str, config: SparseDeltaConfig
) -> None:
    """Nothing but the tensors makes the function; their sizes are compared when they are read."""


def summary(fields: dict[str, Any]) -> str:
    """One line for people."""
    entries = fields["entries"]
    return f"Sparse delta, {sum(entries.values()):,} entries in {len(entries)} layers."


def _layers(sites: Sequence[Site], adapter_name: str) -> dict[str, SparseDeltaLinear]:
    return {
        site.name: site.module
        for site in sites
        if isinstance(site.module, SparseDeltaLinear) and adapter_name in site.module.adapter_names
    }
