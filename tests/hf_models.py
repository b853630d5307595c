"""Small models built from transformers configs, and batches for them; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
# What PEFT 0.21 itself warns about on transformers 5.23; none of it is ours.
PEFT_WARNINGS = (
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
)
KINDS = ("gpt2", "llama", "bert")
_HEADS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "SEQ_CLS"}


def build(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A GPT-2-, Llama- or BERT-shaped model with dropout off and fixed weights."""
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back
    torch.manual_seed(seed)
    if kind == "gpt2":
        settings = dict(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(settings | changes)))
    if kind == "llama":
        settings = dict(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    config = transformers.BertConfig(**(settings | changes))
    return transformers.BertForSequenceClassification(config)


def task(kind: str) -> str:
    """PEFT's task type of :func:`build`'s model."""
    return _HEADS[kind]


def batch(kind: str, seed: int = 0, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Random token ids with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(3, (rows,), generator=generator) if kind == "bert" else ids.clone()
    return {"input_ids": ids, "labels": labels}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that unpatch must restore: modules, bytes, flags, modes, hooks."""
    return {
        "modules": [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        "modes": {name: m.training for name, m in model.named_modules()},
        "parameters": [
            (name, id(p), p.requires_grad, p.dtype)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "hooks": {
            name: (list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()))
            for name, m in model.named_modules()
        },
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is what it was when ``before`` was taken."""
    now = snapshot(model)
    assert list(now["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        got = now["state"][name]
        assert got.dtype == tensor.dtype, name
        assert torch.equal(_bytes(got), _bytes(tensor)), name
    for part in ("modules", "modes", "parameters", "hooks"):
        assert now[part] == before[part], part


def randomize_adapters(model: nn.Module, seed: int = 7) -> None:
    """Give every trainable parameter values, so that zero-initialised B hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(parameter.dtype))
