"""Prefixes in Hugging Face models, through transformers' attention and mask interfaces.

No cache object and no joined keys: the attention function of the interface hands its queries, keys
and values to :func:`peftkern.functional.prefix_attention`. So generation keeps the ordinary cache,
and activation checkpointing works.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.functional.prefix import prefix_attention
from peftkern.hf.prompts import arguments_by_name
from peftkern.nn.prefix import PREFIX_LINK, PrefixTuning

NAME = "peftkern_prefix"

# Families whose positions are counted 0, 1, 2, ... from the cache's length when none are given;
# read in transformers 5.23. Elsewhere an offset would mean something else.
COUNTING = (
    "bert",
    "gemma",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
)
# Encoder-decoder models whose decoder adds a bias by distance instead; the prefix is the decoder's.
BIASED = ("mt5", "t5")
FAMILIES = (*COUNTING, *BIASED)


def register() -> None:
    """Make the attention function known to transformers; no model uses it by that alone."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in a layer: its prefix in front of the keys, or plain attention.

    A sliding window hides positions of the sequence; the prefix stays visible to every query.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    link: PrefixLink | None = module.__dict__.get(PREFIX_LINK)
    if link is None or link.layer.active_prefix is None:  # cross attention has no prefix
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    position_bias = options.get("position_bias")
    refused = ("softcap", "s_aux", "head_mask")
    for name in refused if link.bias else (*refused, "position_bias"):
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__}: passes {name} to its attention, which prefix tuning "
                "does not compute"
            )
    queries, keys = query.shape[2], key.shape[2]
    wish = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(wish) and queries > 1 and attention_mask is None
    if causal and keys > queries:  # an empty static cache: what is behind the queries is unwritten
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    prefix_k, prefix_v = link.layer.keys_and_values(link.index)
    if position_bias is not None:
        # The bias differs from query to query over the prefix too, so that it joins the sequence.
        attention_mask = link.biased_mask(position_bias, attention_mask, causal, prefix_k.shape[1])
        key, prefix_k = _joined(prefix_k, key)
        value, prefix_v = _joined(prefix_v, value)
        causal = False
    out = prefix_attention(
        query,
        key,
        value,
        prefix_k,
        prefix_v,
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scaling,
        dropout_p=dropout,
    )
    return out.transpose(1, 2), None


def _joined(prefix: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence with the prefix in it, and the empty prefix that is left."""
    prefix = prefix.to(own.dtype)
    whole = torch.cat([prefix.expand(own.shape[0], *prefix.shape), own], dim=2)
    return whole, prefix.new_empty((prefix.shape[0], 0, prefix.shape[2]))


class PrefixLink:
    """Which prefix, and which of its layers, an attention module uses.

    Args:
        layer: the model's prefixes.
        index: layer of the prefix.
        bias: the attention module that knows the bias by distance, where the family has one.
    """

    def __init__(self, layer: ModelPrefix, index: int, bias: Any = None) -> None:
        self.layer = layer
        self.index = index
        self.bias = bias

    def biased_mask(self, own: Tensor, visible: Tensor | None, causal: bool, length: int) -> Tensor:
        """The mask over prefix and sequence, [B or 1, H, Lq, P + Lk], to be added to logits.

        The sequence stands ``length`` positions behind the prefix's first; distances within it are
        what they were.
        """
        queries, keys = own.shape[2:]
        past = length + keys - queries
        before = self.bias.compute_bias(queries, length, device=own.device, past_seen_tokens=past)
        if visible is None and causal:
            visible = torch.ones(queries, keys, dtype=torch.bool, device=own.device).tril()
        if visible is not None:
            own = torch.where(visible, own, -torch.inf)
        before = before.to(own.dtype).expand(own.shape[0], -1, -1, -1)
        return torch.cat([before, own.expand(-1, before.shape[1], -1, -1)], dim=-1)


class ModelPrefix(PrefixTuning):
    """The prefixes of a patched model: they choose the attention function and move positions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._configs: list[tuple[Any, str]] = []
        super().__init__(*args, **kwargs)

    def attach(self, backbone: nn.Module, attentions: list[nn.Module]) -> Any:
        """Link attention modules; gives the function that undoes it."""
        register()
        seen: dict[int, Any] = {}
        for module in backbone.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation_internal"):
                seen[id(config)] = config
        self._configs = [(c, c._attn_implementation_internal) for c in seen.values()]
        first: Any = attentions[0]
        bias = first if getattr(first, "has_relative_attention_bias", False) else None
        for index, module in enumerate(attentions):
            # PEFT doubles the table for encoder-decoder models and cuts it by fours: its layer l
            # reads the keys and values of layer 2 l of the table, from its start again at the end.
            place = 2 * index % self.num_layers if bias is not None else index
            module.__dict__[PREFIX_LINK] = PrefixLink(self, place, bias)
        hook = backbone.register_forward_pre_hook(self._before, with_kwargs=True)
        self._changed()

        def detach() -> None:
            hook.remove()
            for module in attentions:
                module.__dict__.pop(PREFIX_LINK, None)
            for config, name in self._configs:
                config._attn_implementation_internal = name
            self._configs = []

        return detach

    def _changed(self) -> None:
        super()._changed()
        active = self.active_prefix is not None
        for config, name in self._configs:
            config._attn_implementation_internal = NAME if active else name

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Draw the prefix, and let the sequence's positions start behind it."""
        if self.active_prefix is None:
            return None
        self.draw()
        named = arguments_by_name(module, args, kwargs)
        if named.get("output_attentions"):
            raise ValueError(
                "output_attentions: prefix attention keeps no probabilities; leave it out"
            )
        if "position_ids" not in inspect.signature(module.forward).parameters:
            return (), named
        positions = named.get("position_ids")
        if positions is None:
            positions = _positions(named)
        named["position_ids"] = positions + self.num_virtual_tokens
        return (), named


def _positions(named: dict[str, Any]) -> Tensor:
    """0, 1, 2, ... behind what the cache holds, [1, L]."""
    source = named.get("input_ids")
    source = named.get("inputs_embeds") if source is None else source
    if source is None:
        raise ValueError("input_ids or inputs_embeds: expected one of them by name")
    cache = named.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(source.shape[1], device=source.device) + past).unsqueeze(0)


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model that has the layers.

    Raises:
        ValueError: it is none of :data:`FAMILIES`, or not one of transformers' models.
    """
    backbone = getattr(model, "base_model", None)
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if not isinstance(backbone, nn.Module) or family is None:
        raise ValueError(
            f"model: prefix tuning needs a transformers model, got {type(model).__name__}"
        )
    if family not in FAMILIES:
        raise ValueError(
            f"model: prefix tuning does not know how {family!r} counts positions or calls its "
            f"attention; it knows {', '.join(FAMILIES)}"
        )
    whole: Any = model
    return whole.get_decoder() if family in BIASED else backbone


def attention_modules(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """Self-attention modules with their paths, by layer.

    Raises:
        ValueError: they cannot be told, or compute attention without the interface.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in backbone.named_modules():
        kind = type(module).__name__
        index = getattr(module, "layer_idx", None)
        if not kind.endswith("Attention") or not isinstance(index, int) or "Cross" in kind:
            continue
        if getattr(module, "is_cross_attention", False) or name.endswith("EncDecAttention"):
            continue
        own = sys.modules[type(module).__module__]
        if not hasattr(own, "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(f"{name}: {kind} does not use transformers' attention interface")
        if getattr(module, "reorder_and_upcast_attn", False):
            raise ValueError(f"{name}: reorder_and_upcast_attn goes round the attention interface")
        if index in found:
            raise ValueError(f"{name}: layer {index} has two self-attention modules")
        found[index] = (name, module)
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"model: found self-attention of layers {sorted(found)}, expected 0, 1, …")
    return [found[index] for index in range(len(found))]


def key_shape(config: Any) -> tuple[int, int]:
    """Heads of keys, and the size of one."""
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(head_dim)
