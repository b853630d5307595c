"""Prompt tuning: trainable embeddings in front of the sequence (arXiv 2104.08691)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from peftkern.hf.config import ALL_LINEAR, AdapterConfig, positive_int
from peftkern.hf.planning import Planning
from peftkern.hf.prompts import ModelPrompt
from peftkern.hf.targets import Site, choose
from peftkern.hf.undo import UndoLog
from peftkern.nn.prompt import sampled_rows, text_rows

ATTRIBUTE = "prompt_tuning"
INITIALISATIONS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(AdapterConfig):
    """A trainable prompt in front of the input embeddings.

    Args:
        num_virtual_tokens: length of the prompt.
        prompt_tuning_init: ``"RANDOM"``, ``"SAMPLE_VOCAB"`` (embeddings of random tokens) or
            ``"TEXT"``.
        prompt_tuning_init_text: with ``"TEXT"``: whose tokens to start from, cut off or repeated.
        tokenizer_name_or_path: with ``"TEXT"``: the tokenizer's folder or name.
        tokenizer_kwargs: further arguments of the tokenizer; remote code is never run.

    Further fields: :class:`AdapterConfig` (what is trained in full, how the base is kept).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.

    Example:
        >>> PromptTuningConfig(num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB").kind
        'prompt'
    """

    kind = "prompt"

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("num_virtual_tokens", self.num_virtual_tokens)
        if self.prompt_tuning_init not in INITIALISATIONS:
            raise ValueError(
                f"prompt_tuning_init: got {self.prompt_tuning_init!r}, expected one of "
                f"{', '.join(INITIALISATIONS)}"
            )
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if self.prompt_tuning_init == "TEXT" and not getattr(self, name):
                raise ValueError(f"{name}: is needed for prompt_tuning_init='TEXT'")
        if self.tokenizer_kwargs.get("trust_remote_code"):
            raise ValueError("tokenizer_kwargs: trust_remote_code is refused")


def plan(planning: Planning, config: PromptTuningConfig) -> list[Site]:
    """Note at the input embeddings that a prompt joins them; gives the layers to quantize."""
    model = planning.model
    embeddings = _embeddings(model)
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    submodules = 2 if encoder_decoder else 1
    initial = partial(_initial, config, embeddings, config.num_virtual_tokens * submodules)
    step = planning.step(embeddings)
    held = getattr(model, ATTRIBUTE, None)
    if isinstance(held, ModelPrompt):
        step = planning.step(held)
        step.extend = partial(_extend, held, planning.adapter_name, config, initial)
    else:
        step.act = partial(
            _attach,
            model,
            initial,
            labels_by_token=not encoder_decoder and _labels_by_token(model, config),
            num_virtual_tokens=config.num_virtual_tokens,
            token_dim=_size(embeddings)[1],
            adapter_name=planning.adapter_name,
            num_transformer_submodules=submodules,
            dtype=config.adapter_dtype,
        )
    step.asked = True
    step.r = config.num_virtual_tokens
    found = choose(model, planning.sites, ALL_LINEAR, config)
    return [choice.site for choice in found if choice.wanted]


def _embeddings(model: nn.Module) -> nn.Module:
    own = getattr(model, "get_input_embeddings", None)
    if own is None or not hasattr(model, "config"):
        raise ValueError(
            f"model: prompt tuning needs a transformers model, got {type(model).__name__}"
        )
    embeddings = own()
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters or "inputs_embeds" not in parameters or embeddings is None:
        raise ValueError(
            f"model: {type(model).__name__} does not take inputs_embeds in place of input_ids, "
            "which prompt tuning needs"
        )
    assert isinstance(embeddings, nn.Module)
    return embeddings


def _size(embeddings: nn.Module) -> tuple[int, int]:
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"model: its input embeddings ({type(embeddings).__name__}) have no weight "
            "[vocabulary, width]"
        )
    return weight.shape[0], weight.shape[1]


def _labels_by_token(model: nn.Module, config: PromptTuningConfig) -> bool:
    if config.task_type is not None:
        return config.task_type in ("CAUSAL_LM", "TOKEN_CLS")
    return "SequenceClassification" not in type(model).__name__


def _initial(config: PromptTuningConfig, embeddings: nn.Module, rows: int) -> Tensor | None:
    if config.prompt_tuning_init == "RANDOM":
        return None
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return sampled_rows(embeddings, rows, _size(embeddings)[0])
    assert config.prompt_tuning_init_text
    assert config.tokenizer_name_or_path
    options = {k: v for k, v in config.tokenizer_kwargs.items() if k != "trust_remote_code"}
    text, tokenizer = config.prompt_tuning_init_text, config.tokenizer_name_or_path
    return text_rows(embeddings, rows, text, tokenizer, options)


def _extend(
    layer: ModelPrompt, name: str, config: PromptTuningConfig, initial: partial[Tensor | None]
) -> None:
    layer.add_adapter(name, config.num_virtual_tokens, initial(), config.adapter_dtype)


def _attach(
    model: nn.Module, initial: partial[Tensor | None], log: UndoLog, **arguments: Any
) -> None:
    layer = ModelPrompt(initial=initial(), **arguments).to(next(model.parameters()).device)
    layer.train(model.training)
    log.attach(model, ATTRIBUTE, layer)
    log.on_rollback(layer.attach(model))
