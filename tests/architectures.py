"""Tiny models of every family that patches are tested on, from configs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 40
_PLAIN = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)
_TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=0)
_GROUPED = _PLAIN | _TOKENS | dict(num_key_value_heads=1)
_HEADS = _GROUPED | dict(head_dim=16)
_ENCODER = _PLAIN | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
_EXPERTS = _GROUPED | dict(num_experts_per_tok=2)
_VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)


class Family(NamedTuple):
    """One architecture.

    Args:
        model: class of the model.
        config: class of its configuration.
        settings: of the configuration.
        kind: of the batch: "causal", "classes", "seq2seq", "speech", "image", "pairs".
        together: names of layers that compute together, as some layer's report says.
        targets: which layers are adapted.
    """

    model: str
    config: str
    settings: dict[str, Any]
    kind: str = "causal"
    together: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    targets: str = "all-linear"


_BERT_QKV = ("query", "key", "value")
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", _GROUPED | dict(sliding_window=4)),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _HEADS),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _HEADS | dict(query_pre_attn_scalar=16, sliding_window=4),
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _HEADS | dict(query_pre_attn_scalar=16, sliding_window=4),
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED, together=()),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, n_inner=48)
        | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1),
        together=(),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _PLAIN | dict(bos_token_id=0, eos_token_id=1),
        together=(),
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        | dict(bos_token_id=0, eos_token_id=1),
        together=(),
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2)
        | dict(num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=32)
        | dict(dropout=0.0, attention_dropout=0.0),
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)
        | dict(hidden_dropout=0.0, attention_dropout=0.0),
        together=(),
    ),
    "bert": Family("BertForSequenceClassification", "BertConfig", _ENCODER, "classes", _BERT_QKV),
    "roberta": Family(
        "RobertaForSequenceClassification", "RobertaConfig", _ENCODER, "classes", _BERT_QKV
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _PLAIN
        | dict(num_labels=3, local_attention=8, pad_token_id=0, cls_token_id=1, sep_token_id=1),
        "classes",
        (),
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dict(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=2, num_labels=3)
        | dict(max_position_embeddings=32, dropout=0.0, attention_dropout=0.0)
        | dict(seq_classif_dropout=0.0),
        "classes",
        ("q_lin", "k_lin", "v_lin"),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
        | dict(dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0),
        "seq2seq",
        ("q", "k", "v"),
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1)
        | dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48)
        | dict(decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0)
        | dict(decoder_start_token_id=1, forced_eos_token_id=1)
        | _TOKENS,
        "seq2seq",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1)
        | dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48)
        | dict(decoder_ffn_dim=48, max_source_positions=8, max_target_positions=16)
        | dict(num_mel_bins=8, dropout=0.0, decoder_start_token_id=1)
        | _TOKENS,
        "speech",
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        _VISION | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3),
        "image",
    ),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        dict(text_config=_PLAIN | _TOKENS, vision_config=dict(_VISION), projection_dim=16),
        "pairs",
    ),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", _EXPERTS | dict(num_local_experts=4)),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _EXPERTS | dict(num_experts=4, moe_intermediate_size=24, head_dim=16),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _EXPERTS
        | dict(num_key_value_heads=2, n_routed_experts=4, moe_intermediate_size=24, n_group=1)
        | dict(topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8)
        | dict(qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1),
        together=("q_a_proj", "kv_a_proj_with_mqa"),
        # PEFT takes the linear layers named as the experts' parts for experts, and drops them.
        targets=r".*self_attn\.\w+proj\w*",
    ),
}


def build(name: str) -> nn.Module:
    """The family's model, random but the same each time; weights large enough to matter."""
    family = FAMILIES[name]
    torch.manual_seed(len(name))
    model = getattr(transformers, family.model)(
        getattr(transformers, family.config)(**family.settings)
    )
    if "num_experts_per_tok" in family.settings:
        model.set_experts_implementation("eager")  # the only one for fp64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _ids(seed: int, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (3, length), generator=generator)


def _floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


_BATCHES: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda seed: {"input_ids": _ids(seed), "labels": _ids(seed)},
    "classes": lambda seed: {"input_ids": _ids(seed), "labels": torch.tensor([0, 1, 2])},
    "seq2seq": lambda seed: {"input_ids": _ids(seed), "labels": _ids(seed + 1, 5)},
    "speech": lambda seed: {"input_features": _floats(seed, 3, 8, 16), "labels": _ids(seed, 5)},
    "image": lambda seed: {
        "pixel_values": _floats(seed, 3, 3, 8, 8),
        "labels": torch.tensor([0, 1, 2]),
    },
    "pairs": lambda seed: {
        "input_ids": _ids(seed),
        "pixel_values": _floats(seed, 3, 3, 8, 8),
        "return_loss": True,
    },
}


def batch(name: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs with labels; floats of ``dtype``."""
    made = _BATCHES[FAMILIES[name].kind](seed)
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in made.items()
    }
