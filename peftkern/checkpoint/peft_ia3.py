"""(IA)^3 in PEFT's files: its config's fields and its tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peftkern.checkpoint.peft_common import (
    PEFT_VERSION,
    base_model_fields,
    plain,
    refuse_unknown,
    some,
    task_of,
)
from peftkern.hf.methods.ia3 import IA3Config, scales_input
from peftkern.hf.targets import Site, explicit_targets
from peftkern.nn.ia3 import IA3Linear

PEFT_TYPE = "IA3"

# Every field of an IA3 config in PEFT_VERSION with the value that means "not used".
FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "feedforward_modules": None,
    "inference_mode": True,
    "init_ia3_weights": True,
    "modules_to_save": None,
    "peft_type": "IA3",
    "peft_version": PEFT_VERSION,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> IA3Config:
    """An :class:`IA3Config` that computes what the file says.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.
        options: fields of the configuration that the file does not speak of.

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    problems = refuse_unknown(fields, FIELDS, {})
    if fields.get("target_modules") in (None, [], ""):
        problems.append("target_modules is missing")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    task, saved = task_of(fields)
    try:
        return IA3Config(
            target_modules=fields["target_modules"],
            feedforward_modules=fields.get("feedforward_modules") or None,
            exclude_modules=fields.get("exclude_modules") or None,
            modules_to_save=saved,
            task_type=task,
            **options,
        )
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_fields(
    config: IA3Config, model: nn.Module, sites: Sequence[Site], adapter_name: str
) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        config: what the model was patched with.
        model: the model.
        sites: its modules.
        adapter_name: which adapter.

    Returns:
        All fields of PEFT's version, and no other.
    """
    layers = _layers(sites, adapter_name)
    # layers_to_transform is no field of IA3: the targets must say it.
    limited = config.layers_to_transform is not None
    bare = replace(config, feedforward_modules=None)
    written = explicit_targets(bare, sites, list(layers), rewrite=limited)
    inner = config.feedforward_modules
    if written.target_modules != config.target_modules:
        # Names must be among the targets' names, which are new; an expression need not.
        scaled = [re.escape(path) for path, layer in layers.items() if layer.is_feedforward]
        inner = "|".join(scaled) or None
    fields = dict(FIELDS)
    fields.update(
        exclude_modules=plain(written.exclude_modules),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        feedforward_modules=plain(inner) if inner is not None else [],
        init_ia3_weights=config.init_ia3_weights,
        modules_to_save=list(config.saved_names) or None,
        target_modules=plain(written.target_modules),
        **base_model_fields(model, config.task_type),
    )
    return fields


def tensors(model: nn.Module, sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """The factors of one adapter by PEFT's keys: the model's own, not copies.

    Args:
        model: the model.
        sites: its modules.
        adapter_name: which adapter.

    Returns:
        ``<path>.ia3_l``, [out, 1] or, for feed-forward modules, [1, in].
    """
    layers = _layers(sites, adapter_name)
    return {f"{path}.ia3_l": layer.ia3_l[adapter_name] for path, layer in layers.items()}


def check_same_function(sites: Sequence[Site], adapter_name: str, config: IA3Config) -> None:
    """Refuse to load into an adapter that would compute something else with the same tensors.

    Raises:
        ValueError: a layer scales its other side.
    """
    layers = _layers(sites, adapter_name)
    other = [p for p, layer in layers.items() if layer.is_feedforward != scales_input(config, p)]
    if other:
        raise ValueError(
            f"the file's feedforward_modules differ from the existing adapter's ({some(other)}); "
            "unpatch first, or load under another name"
        )


def summary(fields: dict[str, Any]) -> str:
    """One line for the adapter's card."""
    return "(IA)^3 adapter."


def _layers(sites: Sequence[Site], adapter_name: str) -> dict[str, IA3Linear]:
    return {
        site.name: site.module
        for site in sites
        if isinstance(site.module, IA3Linear) and adapter_name in site.module.adapter_names
    }
