"""LoRA in PEFT's files: its config's fields, those that we must refuse, and its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peftkern.checkpoint.peft_common import (
    PEFT_VERSION,
    base_model_fields,
    refuse_unknown,
    some,
    task_of,
)
from peftkern.hf.methods.lora import LoRAConfig
from peftkern.hf.targets import Site, by_pattern, excluded, in_layers, matches, minimal_names
from peftkern.nn.lora import LoRALinear

PEFT_TYPE = "LORA"

# Every field of a LoRA config in PEFT_VERSION with the value that means "not used".
FIELDS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Fields that change what an adapter computes and that are not supported: any other value than
# "not used" is refused by name.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "bias": "trained biases of the base layers",
    "ensure_weight_tying": "adapters tied between layers",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on lora_B",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters on bare parameters",
    "trainable_token_indices": "trainable token rows",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Initialisations that leave the base weight alone; the others subtract something from it, so that
# their adapters are right only with the changed base.
_SAFE_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def _check_supported(fields: dict[str, Any], where: str) -> None:
    """Refuse a config that means something this library does not compute.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.

    Raises:
        ValueError: naming every field that is in the way.
    """
    problems = refuse_unknown(fields, FIELDS, _REFUSED)
    start = fields.get("init_lora_weights", True)
    if start not in _SAFE_INITIALISATIONS:
        problems.append(
            f"init_lora_weights={start!r} changes the base weights, so the adapter is right only "
            "with them; convert it in PEFT with save_pretrained("
            "path_initial_model_for_weight_conversion=...)"
        )
    if fields.get("target_modules") in (None, [], ""):
        problems.append("target_modules is missing")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> LoRAConfig:
    """A :class:`LoRAConfig` that computes what the file says.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.
        options: fields of LoRAConfig that the file does not speak of (quantize and the like).

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    _check_supported(fields, where)
    task, saved = task_of(fields)
    try:
        return LoRAConfig(
            r=fields.get("r", 8),
            lora_alpha=fields.get("lora_alpha", 8),
            lora_dropout=fields.get("lora_dropout", 0.0),
            target_modules=fields["target_modules"],
            exclude_modules=fields.get("exclude_modules") or None,
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            modules_to_save=saved,
            layers_to_transform=_none_if_empty(fields.get("layers_to_transform")),
            layers_pattern=fields.get("layers_pattern") or None,
            task_type=task,
            use_rslora=bool(fields.get("use_rslora", False)),
            **options,
        )
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_fields(
    config: LoRAConfig, model: nn.Module, sites: Sequence[Site], adapter_name: str
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
    written = explicit_targets(config, sites, list(layers))
    fields = dict(FIELDS)
    fields.update(
        alpha_pattern=dict(config.alpha_pattern),
        exclude_modules=_plain(written.exclude_modules),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        init_lora_weights=config.init_lora_weights,
        layers_pattern=_plain(written.layers_pattern),
        layers_to_transform=_plain(written.layers_to_transform),
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        modules_to_save=list(config.saved_names) or None,
        r=config.r,
        rank_pattern=dict(config.rank_pattern),
        target_modules=_plain(written.target_modules),
        use_rslora=config.use_rslora,
        **base_model_fields(model, config.task_type),
    )
    return fields


def tensors(model: nn.Module, sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter by PEFT's keys: the model's own, not copies.

    Args:
        model: the model.
        sites: its modules.
        adapter_name: which adapter.

    Returns:
        ``<path>.lora_A.weight`` [r, in] and ``<path>.lora_B.weight`` [out, r].
    """
    held: dict[str, Tensor] = {}
    for path, layer in _layers(sites, adapter_name).items():
        held[f"{path}.lora_A.weight"], held[f"{path}.lora_B.weight"] = layer.factors(adapter_name)
    return held


def check_same_function(sites: Sequence[Site], adapter_name: str, config: LoRAConfig) -> None:
    """Refuse to load into an adapter that would compute something else with the same tensors.

    Raises:
        ValueError: the scaling differs somewhere.
    """
    problems = []
    for path, layer in _layers(sites, adapter_name).items():
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        scaling, have = alpha / (math.sqrt(r) if config.use_rslora else r), layer.scaling
        if r == layer.r[adapter_name] and not math.isclose(
            scaling, have[adapter_name], rel_tol=1e-9
        ):
            problems.append(f"{path}: file {scaling:g}, model {have[adapter_name]:g}")
    if problems:
        raise ValueError(
            "the file's lora_alpha or use_rslora differs from the existing adapter's, so the "
            f"scaling would be wrong ({some(problems)}); unpatch first, or load under another name"
        )


def summary(fields: dict[str, Any]) -> str:
    """One line for the adapter's card."""
    return f"LoRA adapter. Rank {fields['r']}, alpha {fields['lora_alpha']}."


def _layers(sites: Sequence[Site], adapter_name: str) -> dict[str, LoRALinear]:
    return {
        site.name: site.module
        for site in sites
        if isinstance(site.module, LoRALinear) and adapter_name in site.module.adapter_names
    }


def explicit_targets(
    config: LoRAConfig, sites: Sequence[Site], adapted: Sequence[str]
) -> LoRAConfig:
    """The config with targets that mean exactly the adapted modules to PEFT.

    What the user wrote is kept when PEFT would read it so; "all-linear", and targets of which some
    were refused, become the shortest names that mean just these modules.
    """
    if config.target_modules != "all-linear" and _meant(config, sites) == set(adapted):
        return config
    others = [site.name for site in sites if site.name not in set(adapted)]
    exact = replace(
        config,
        target_modules=tuple(minimal_names(adapted, others)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    if _meant(exact, sites) == set(adapted):
        return exact
    # A whole path that is also the end of another one cannot be said as a name.
    return replace(exact, target_modules="|".join(re.escape(path) for path in adapted))


def _meant(config: LoRAConfig, sites: Sequence[Site]) -> set[str]:
    return {
        site.name
        for site in sites
        if matches(config.target_modules, site.name)
        and in_layers(config, site.name)
        and excluded(config, site.name) is None
    }


def _none_if_empty(value: Any) -> Any:
    return None if value == [] else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
