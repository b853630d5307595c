"""LoRA in PEFT's files: its config's fields, those that we must refuse, and its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.checkpoint.peft_common import (
    PEFT_VERSION,
    base_model_fields,
    plain,
    refuse_unknown,
    some,
    task_of,
)
from peftkern.hf.methods.lora import LoRAConfig
from peftkern.hf.targets import Site, by_pattern, explicit_targets
from peftkern.nn.embedding import LoRAEmbedding
from peftkern.nn.lora import LoRALinear
from peftkern.nn.lora_init import changes_base, check_loftq, is_reproducible
from peftkern.nn.parameter_lora import LoRAParameters
from peftkern.nn.structure import is_dense_linear

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
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "trainable token rows",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Initialisations that the trained tensors have replaced and that say nothing about the base; the
# others are read as a plain start. PiSSA, OLoRA and LoftQ changed the base: it is derived again.
_FORGOTTEN = (True, False, None, "gaussian", "orthogonal", "eva")


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
    if start not in _FORGOTTEN and not (changes_base(start) and is_reproducible(start)):
        problems.append(
            f"init_lora_weights={start!r} changes the base weights in a way that cannot be derived "
            "again; convert the adapter in PEFT with save_pretrained("
            "path_initial_model_for_weight_conversion=...)"
        )
    if fields.get("target_modules") in (None, [], "") and not fields.get("target_parameters"):
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
    start = fields.get("init_lora_weights", True)
    try:
        return LoRAConfig(
            init_lora_weights=start if changes_base(start) else True,
            loftq_config=_loftq(fields),
            use_dora=bool(fields.get("use_dora", False)),
            lora_bias=bool(fields.get("lora_bias", False)),
            r=fields.get("r", 8),
            lora_alpha=fields.get("lora_alpha", 8),
            lora_dropout=fields.get("lora_dropout", 0.0),
            target_modules=fields.get("target_modules") or (),
            target_parameters=fields.get("target_parameters") or None,
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
        exclude_modules=plain(written.exclude_modules),
        fan_in_fan_out=any(
            layer.fan_in_fan_out for layer in layers.values() if isinstance(layer, LoRALinear)
        ),
        init_lora_weights=config.init_lora_weights,
        layers_pattern=plain(written.layers_pattern),
        loftq_config=_loftq_fields(config),
        layers_to_transform=plain(written.layers_to_transform),
        lora_alpha=config.lora_alpha,
        lora_bias=config.lora_bias,
        lora_dropout=config.lora_dropout,
        modules_to_save=list(config.saved_names) or None,
        r=config.r,
        rank_pattern=dict(config.rank_pattern),
        target_modules=plain(written.target_modules),
        target_parameters=plain(config.target_parameters),
        use_dora=config.use_dora,
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
        ``<path>.lora_A.weight`` [r, in] and ``<path>.lora_B.weight`` [out, r]; where there is one,
        ``<path>.lora_B.bias`` [out] and ``<path>.lora_magnitude_vector`` [out]. For embeddings
        ``<path>.lora_embedding_A`` [r, vocabulary] and ``<path>.lora_embedding_B`` [width, r].
    """
    held: dict[str, Tensor] = {}
    for path, layer in _layers(sites, adapter_name).items():
        a, b = layer.factors(adapter_name)
        if isinstance(layer, LoRAEmbedding):
            held[f"{path}.lora_embedding_A"], held[f"{path}.lora_embedding_B"] = a, b
            continue
        held[f"{path}.lora_A.weight"], held[f"{path}.lora_B.weight"] = a, b
        if layer.lora_bias[adapter_name]:
            held[f"{path}.lora_B.bias"] = layer.lora_B[adapter_name].bias  # type: ignore[assignment]
        if layer.use_dora[adapter_name]:
            magnitude = layer.lora_magnitude_vector[adapter_name].weight
            held[f"{path}.lora_magnitude_vector"] = magnitude  # type: ignore[assignment]
    for path, stack in _parameter_layers(sites, adapter_name).items():
        # PEFT wraps one parameter after the other: the last one's adapter is the outermost.
        for depth, parameter in enumerate(reversed(stack.parameter_names)):
            a, b = stack.factors(adapter_name, parameter)
            place = path + depth * ".base_layer"
            held[f"{place}.lora_A.weight"], held[f"{place}.lora_B.weight"] = a, b
    return held


def frozen_tensors(sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """Weights that PEFT writes beside the adapters of embeddings and output layers.

    Args:
        sites: the model's modules.
        adapter_name: which adapter.

    Returns:
        ``<path>.base_layer.weight`` of dense layers: a file may hold it, and then its values must
        be the model's own.
    """
    held: dict[str, Tensor] = {}
    for path, layer in _layers(sites, adapter_name).items():
        base = layer.base_layer
        if isinstance(layer, LoRAEmbedding) or is_dense_linear(base):
            held[f"{path}.base_layer.weight"] = base.weight  # type: ignore[assignment]
    return held


@torch.no_grad()
def as_plain_lora(
    fields: dict[str, Any], held: dict[str, Tensor], sites: Sequence[Site], adapter_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter that changed its base, as one of twice the rank on the original base.

    With ``W = base + s B0 A0``, ``base + s B A = W + s (B A - B0 A0)``: the factors stand side by
    side, and lora_alpha grows so that s stays (PEFT's conversion).

    Args:
        fields: content of ``adapter_config.json``.
        held: the adapter's tensors by their keys without prefix.
        sites: the model's modules.
        adapter_name: which adapter.

    Returns:
        The new fields and tensors; the same ones when no base was changed.

    Raises:
        ValueError: the adapter began with LoftQ, whose base is more than this away from the
            original weight, or has DoRA's magnitudes.
    """
    layers = _layers(sites, adapter_name)
    taken = {
        path: layer.taken[adapter_name]
        for path, layer in layers.items()
        if isinstance(layer, LoRALinear) and adapter_name in layer.taken
    }
    if not taken:
        return fields, held
    if len(taken) != len(layers):
        whole = next(path for path in layers if path not in taken)
        raise ValueError(f"plain_lora: {whole} did not change its base, so its rank would differ")
    for why, names in (
        (
            "began with LoftQ, whose rounding is not low-rank",
            [p for p in taken if taken[p][0] == "loftq"],
        ),
        ("learns magnitudes (DoRA)", [p for p in taken if layers[p].use_dora[adapter_name]]),
    ):
        if names:
            raise ValueError(f"plain_lora: the adapter {why}; save it as it is ({some(names)})")
    out = dict(held)
    for path, (_, a, b) in taken.items():
        down, up = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        out[down] = torch.cat([held[down], a.to(held[down])])
        out[up] = torch.cat([held[up], -b.to(held[up])], dim=1)
    factor = math.sqrt(2) if fields["use_rslora"] else 2
    changed = {
        "init_lora_weights": True,
        "loftq_config": {},
        "r": 2 * fields["r"],
        "lora_alpha": factor * fields["lora_alpha"],
        "rank_pattern": {key: 2 * r for key, r in fields["rank_pattern"].items()},
        "alpha_pattern": {key: factor * a for key, a in fields["alpha_pattern"].items()},
    }
    return fields | changed, out


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
        if isinstance(layer, LoRALinear):
            begun = layer.taken[adapter_name][0] if adapter_name in layer.taken else True
            wanted = config.init_lora_weights if changes_base(config.init_lora_weights) else True
            if begun != wanted:
                raise ValueError(
                    f"the file's adapter stands on a base changed by init_lora_weights={wanted!r}, "
                    f"the existing one on {begun!r} ({path}); unpatch first"
                )
        if r == layer.r[adapter_name] and not math.isclose(
            scaling, have[adapter_name], rel_tol=1e-9
        ):
            problems.append(f"{path}: file {scaling:g}, model {have[adapter_name]:g}")
    for path, stack in _parameter_layers(sites, adapter_name).items():
        for parameter, own in stack.scaling[adapter_name].items():
            full = f"{path}.{parameter}"
            r = by_pattern(config.rank_pattern, full, config.r)
            alpha = by_pattern(config.alpha_pattern, full, config.lora_alpha)
            wanted_scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
            if not math.isclose(wanted_scaling, own, rel_tol=1e-9):
                problems.append(f"{full}: file {wanted_scaling:g}, model {own:g}")
    if problems:
        raise ValueError(
            "the file's lora_alpha or use_rslora differs from the existing adapter's, so the "
            f"scaling would be wrong ({some(problems)}); unpatch first, or load under another name"
        )


def summary(fields: dict[str, Any]) -> str:
    """One line for the adapter's card."""
    return f"LoRA adapter. Rank {fields['r']}, alpha {fields['lora_alpha']}."


def _layers(sites: Sequence[Site], adapter_name: str) -> dict[str, LoRALinear | LoRAEmbedding]:
    return {
        site.name: site.module
        for site in sites
        if isinstance(site.module, LoRALinear | LoRAEmbedding)
        and adapter_name in site.module.adapter_names
    }


def _parameter_layers(sites: Sequence[Site], adapter_name: str) -> dict[str, LoRAParameters]:
    return {
        site.name: site.module
        for site in sites
        if isinstance(site.module, LoRAParameters) and adapter_name in site.module.adapter_names
    }


def _loftq_fields(config: LoRAConfig) -> dict[str, int]:
    """PEFT insists on bits and rounds; where the base is quantized, the bits are its own."""
    if config.init_lora_weights != "loftq":
        return {}
    bits = {} if config.quantize is None else {"loftq_bits": 8 if config.quantize == "int8" else 4}
    return check_loftq({**config.loftq_config, **bits})


def _loftq(fields: dict[str, Any]) -> dict[str, int]:
    config = fields.get("loftq_config") or {}
    if not isinstance(config, dict):
        raise ValueError(f"loftq_config: got {config!r}, expected a map")
    return {key: value for key, value in config.items() if value is not None}


def _none_if_empty(value: Any) -> Any:
    return None if value == [] else value
