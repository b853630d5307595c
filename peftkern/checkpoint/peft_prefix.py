"""Prefix tuning in PEFT's files: one flat table, whether or not an MLP made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftkern.checkpoint.peft_common import (
    PEFT_VERSION,
    base_model_fields,
    refuse_unknown,
    task_of,
)
from peftkern.hf.methods.prefix import PrefixTuningConfig
from peftkern.hf.targets import Site
from peftkern.nn.prefix import PrefixEncoder, PrefixTuning

PEFT_TYPE = "PREFIX_TUNING"
PREFIX = ""  # the table's key stands alone
COPIES_PREFIX = "base_model."

# Every field of a prefix tuning config in PEFT_VERSION with the value that means "not used".
FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "encoder_hidden_size": None,
    "inference_mode": True,
    "init_weights": None,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_type": "PREFIX_TUNING",
    "peft_version": PEFT_VERSION,
    "prefix_projection": False,
    "revision": None,
    "task_type": None,
    "token_dim": None,
}


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> PrefixTuningConfig:
    """A configuration that computes what the file says.

    A file made with the MLP holds the MLP's result, so that it is read as a plain prefix.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.
        options: fields that the file does not speak of (quantize and the like).

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    problems = refuse_unknown(fields, FIELDS, {})
    submodules = fields.get("num_transformer_submodules")
    if submodules not in (None, 1, 2):
        problems.append(f"num_transformer_submodules: got {submodules!r}, expected 1 or 2")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    task, saved = task_of(fields)
    try:
        return PrefixTuningConfig(
            num_virtual_tokens=fields.get("num_virtual_tokens"),  # type: ignore[arg-type]
            modules_to_save=saved,
            task_type=task,
            **options,
        )
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_fields(
    config: PrefixTuningConfig, model: nn.Module, sites: Sequence[Site], adapter_name: str
) -> dict[str, Any]:
    """The content of ``adapter_config.json``: all fields of PEFT's version, and no other."""
    layer, encoder = _prefix(sites, adapter_name)
    hidden = None if encoder.transform is None else encoder.transform[0].out_features
    fields = dict(FIELDS)
    fields.update(
        encoder_hidden_size=hidden,
        init_weights=config.init_weights,
        modules_to_save=list(config.saved_names) or None,
        num_transformer_submodules=2 if _doubled(model) else 1,
        num_attention_heads=layer.num_heads,
        num_layers=layer.num_layers,
        num_virtual_tokens=encoder.embedding.num_embeddings,
        prefix_projection=encoder.transform is not None,
        token_dim=layer.num_heads * layer.head_dim,
        **base_model_fields(model, config.task_type),
    )
    return fields


def tensors(model: nn.Module, sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """``prompt_embeddings`` [P, layers * 2 * width]; a copy where an MLP makes it."""
    return {"prompt_embeddings": _prefix(sites, adapter_name)[1]().detach()}


def check_same_function(
    sites: Sequence[Site], adapter_name: str, config: PrefixTuningConfig
) -> None:
    """Refuse to load into a prefix with an MLP: files hold only what it made.

    Raises:
        ValueError: the existing prefix has one.
    """
    if _prefix(sites, adapter_name)[1].transform is not None:
        raise ValueError(
            f"adapter_name: {adapter_name!r} has a reparametrization MLP, of which files hold only "
            "the result; load under another name"
        )


def summary(fields: dict[str, Any]) -> str:
    """One line for the adapter's card."""
    return f"Prefix of {fields['num_virtual_tokens']} positions."


def _doubled(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _prefix(sites: Sequence[Site], adapter_name: str) -> tuple[PrefixTuning, PrefixEncoder]:
    for site in sites:
        layer = site.module
        if isinstance(layer, PrefixTuning) and adapter_name in layer.adapter_names:
            encoder = layer.prefix_encoder[adapter_name]
            assert isinstance(encoder, PrefixEncoder)
            return layer, encoder
    raise ValueError(f"adapter_name: {adapter_name!r} is no prefix of this model")
