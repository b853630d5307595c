"""Soft prompts in Hugging Face models: hooks that put them in front of what a call was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.prompt import PromptTuning

_IGNORED_LABEL = -100
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class ModelPrompt(PromptTuning):
    """The prompts of a patched model; the model's own forward pass stays what it is.

    Args:
        labels_by_token: whether labels stand at positions, and so move behind the prompt.
        arguments: those of :class:`peftkern.nn.PromptTuning`.
    """

    def __init__(self, *, labels_by_token: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.labels_by_token = labels_by_token
        self._inside = False

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Hook the model, and the encoder that ``generate`` calls by itself; gives the undoing."""
        hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        whole: Any = model
        if getattr(whole.config, "is_encoder_decoder", False):
            encoder = whole.get_encoder()
            hooks.append(encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True))

        def detach() -> None:
            for hook in hooks:
                hook.remove()

        return detach

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        prompt = self.active_prompt
        if prompt is None:
            return None
        self._inside = True
        named = arguments_by_name(module, args, kwargs)
        length = prompt.shape[0]
        for name in ("start_positions", "end_positions"):
            if named.get(name) is not None:
                raise ValueError(f"{name}: prompt tuning does not move positions of answers")
        if named.get("encoder_outputs") is not None:  # from the encoder, prompt included
            mask, states = named.get("attention_mask"), named["encoder_outputs"][0]
            if mask is not None and mask.shape[1] + length == states.shape[1]:
                named["attention_mask"] = _in_front(mask, length, 1)
            return (), named
        self._extend(module, named, length)
        return (), named

    def _before_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        prompt = self.active_prompt
        if prompt is None or self._inside:
            return None
        named = arguments_by_name(module, args, kwargs)
        self._extend(module, named, prompt.shape[0])
        return (), named

    def _extend(self, module: Any, named: dict[str, Any], length: int) -> None:
        mask = named.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    f"attention_mask: got shape {tuple(mask.shape)}, expected [B, L]: prompt "
                    "tuning lengthens the sequence"
                )
            named["attention_mask"] = _in_front(mask, length, 1)
        cache = named.get("past_key_values")
        first = cache is None or cache.get_seq_length() == 0 or _encodes(module)
        positions = named.get("position_ids")
        if positions is not None:
            named["position_ids"] = _positions(positions, length, first)
        if named.get("cache_position") is not None:  # of a sequence without the prompt
            named["cache_position"] = None
        if not first:
            return  # the cache holds the prompt
        tokens, embeds = named.pop("input_ids", None), named.get("inputs_embeds")
        if (tokens is None) == (embeds is None):
            raise ValueError("input_ids or inputs_embeds: expected one of them, and by name")
        if embeds is not None:
            named["inputs_embeds"] = self(embeds)
        else:
            named["inputs_embeds"] = self.embed(module.get_input_embeddings(), tokens)
        if named.get("token_type_ids") is not None:
            named["token_type_ids"] = _in_front(named["token_type_ids"], length, 0)
        labels = named.get("labels")
        if labels is not None and self.labels_by_token:
            named["labels"] = _in_front(labels, length, _IGNORED_LABEL)


def _encodes(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _in_front(values: Tensor, length: int, fill: int) -> Tensor:
    """``length`` columns of ``fill`` before [B, L]."""
    return torch.cat([values.new_full((values.shape[0], length), fill), values], dim=1)


def _positions(given: Tensor, length: int, first: bool) -> Tensor:
    """The given positions behind the prompt's own 0 .. P - 1."""
    behind = given + length
    if not first:
        return behind
    own = torch.arange(length, device=given.device, dtype=given.dtype)
    return torch.cat([own.expand(*given.shape[:-1], length), behind], dim=-1)


def arguments_by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What a forward pass was called with, every argument by its name."""
    signature = inspect.signature(module.forward)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
