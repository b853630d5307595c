"""``adapter_config.json``: PEFT's fields, which of them we compute, and which we must refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peftkern.hf.config import TASK_HEADS, TASK_TYPES, LoRAConfig
from peftkern.hf.targets import Site, excluded, in_layers, matches, minimal_names

PEFT_VERSION = "0.21.2"  # whose fields these are

# Every field of a LoRA config in that version with the value that means "not used".
LORA_FIELDS: dict[str, Any] = {
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


def check_supported(fields: dict[str, Any], where: str) -> None:
    """Refuse a config that means something this library does not compute.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.

    Raises:
        ValueError: naming every field that is in the way.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind!r}; this version reads 'LORA' only")
    problems = []
    for name, value in fields.items():
        if name in _REFUSED:
            if value not in (LORA_FIELDS[name], None, False, {}, []):
                problems.append(f"{name}={value!r} ({_REFUSED[name]}) is not supported")
        elif name not in LORA_FIELDS and name != "runtime_config":
            if value not in (None, False, {}, [], ""):
                problems.append(
                    f"{name}={value!r} is unknown (PEFT {PEFT_VERSION} does not have it either); "
                    "it may change what the adapter computes"
                )
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


def from_peft(fields: dict[str, Any], where: str, options: dict[str, Any]) -> LoRAConfig:
    """A :class:`LoRAConfig` that computes what the file says.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.
        options: fields of LoRAConfig that the file does not speak of (quantize and the like).

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    check_supported(fields, where)
    task = fields.get("task_type")
    saved = list(fields.get("modules_to_save") or ())
    if task not in TASK_TYPES or not set(TASK_HEADS.get(task, ())) <= set(saved):
        task = None  # only modules_to_save itself then says what was trained in full
    try:
        return LoRAConfig(
            r=fields.get("r", 8),
            lora_alpha=fields.get("lora_alpha", 8),
            lora_dropout=fields.get("lora_dropout", 0.0),
            target_modules=fields["target_modules"],
            exclude_modules=fields.get("exclude_modules") or None,
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            modules_to_save=saved or None,
            layers_to_transform=_none_if_empty(fields.get("layers_to_transform")),
            layers_pattern=fields.get("layers_pattern") or None,
            task_type=task,
            use_rslora=bool(fields.get("use_rslora", False)),
            **options,
        )
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_peft(
    config: LoRAConfig,
    model: nn.Module,
    sites: Sequence[Site],
    adapted: Sequence[str],
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        config: what the model was patched with.
        model: the model.
        sites: its modules.
        adapted: paths that carry the adapter.
        fan_in_fan_out: whether any of them stores its weight as [in, out].

    Returns:
        All fields of PEFT's version, and no other.
    """
    written = explicit_targets(config, sites, adapted)
    hf_config = getattr(model, "config", None)
    base = getattr(hf_config, "name_or_path", None) or getattr(model, "name_or_path", None)
    mapping = None
    if config.task_type is None:
        cls = type(model)
        mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    fields = dict(LORA_FIELDS)
    fields.update(
        alpha_pattern=dict(config.alpha_pattern),
        auto_mapping=mapping,
        base_model_name_or_path=base or None,
        exclude_modules=_plain(written.exclude_modules),
        fan_in_fan_out=fan_in_fan_out,
        init_lora_weights=config.init_lora_weights,
        layers_pattern=_plain(written.layers_pattern),
        layers_to_transform=_plain(written.layers_to_transform),
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        modules_to_save=list(config.saved_names) or None,
        r=config.r,
        rank_pattern=dict(config.rank_pattern),
        target_modules=_plain(written.target_modules),
        task_type=config.task_type,
        use_rslora=config.use_rslora,
    )
    return fields


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
