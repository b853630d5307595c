"""Prompt tuning in PEFT's files: one table."""

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
from peftkern.hf.methods.prompt import PromptTuningConfig
from peftkern.hf.targets import Site
from peftkern.nn.prompt import PromptTuning

PEFT_TYPE = "PROMPT_TUNING"
PREFIX = ""  # the table's key stands alone
COPIES_PREFIX = "base_model."

# Every field of a prompt tuning config in PEFT_VERSION with the value that means "not used".
FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_type": "PROMPT_TUNING",
    "peft_version": PEFT_VERSION,
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "revision": None,
    "task_type": None,
    "token_dim": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> PromptTuningConfig:
    """A configuration that computes what the file says; how the prompt began no longer matters.

    Args:
        fields: content of ``adapter_config.json``.
        where: the file, for messages.
        options: fields that the file does not speak of (quantize and the like).

    Raises:
        ValueError: the config is not supported, or a value is out of range.
    """
    problems = refuse_unknown(fields, FIELDS, {})
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    task, saved = task_of(fields)
    try:
        return PromptTuningConfig(
            num_virtual_tokens=fields.get("num_virtual_tokens"),  # type: ignore[arg-type]
            modules_to_save=saved,
            task_type=task,
            **options,
        )
    except (TypeError, ValueError) as error:
        error.add_note(f"while reading {where}")
        raise


def to_fields(
    config: PromptTuningConfig, model: nn.Module, sites: Sequence[Site], adapter_name: str
) -> dict[str, Any]:
    """The content of ``adapter_config.json``: all fields of PEFT's version, and no other."""
    layer = _prompt(sites, adapter_name)
    rows, width = tensors(model, sites, adapter_name)["prompt_embeddings"].shape
    base: Any = model.config
    fields = dict(FIELDS)
    fields.update(
        modules_to_save=list(config.saved_names) or None,
        num_attention_heads=base.num_attention_heads,
        num_layers=base.num_hidden_layers,
        num_transformer_submodules=layer.num_transformer_submodules,
        num_virtual_tokens=rows // layer.num_transformer_submodules,
        prompt_tuning_init=config.prompt_tuning_init,
        prompt_tuning_init_text=config.prompt_tuning_init_text,
        token_dim=width,
        tokenizer_kwargs=dict(config.tokenizer_kwargs) or None,
        tokenizer_name_or_path=config.tokenizer_name_or_path,
        **base_model_fields(model, config.task_type),
    )
    return fields


def tensors(model: nn.Module, sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """``prompt_embeddings`` [rows, width]: the model's own."""
    weight = _prompt(sites, adapter_name).prompt_encoder[adapter_name].weight
    assert isinstance(weight, Tensor)
    return {"prompt_embeddings": weight.detach()}


def check_same_function(
    sites: Sequence[Site], adapter_name: str, config: PromptTuningConfig
) -> None:
    """Prompts of one shape compute the same function of their tensor."""


def summary(fields: dict[str, Any]) -> str:
    """One line for the adapter's card."""
    return f"Soft prompt of {fields['num_virtual_tokens']} positions."


def _prompt(sites: Sequence[Site], adapter_name: str) -> PromptTuning:
    for site in sites:
        if isinstance(site.module, PromptTuning) and adapter_name in site.module.adapter_names:
            return site.module
    raise ValueError(f"adapter_name: {adapter_name!r} is no prompt of this model")
