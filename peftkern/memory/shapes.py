"""Models without their bytes, and which of their layers are worth running."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Shapes that the command line knows by name: the published configurations, no download needed.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    "llama-3-70b": (
        "LlamaConfig",
        dict(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
}


def meta_model(source: Any, dtype: torch.dtype) -> nn.Module:
    """A model on the meta device, from a model, a configuration, a folder or a known name.

    Args:
        source: ``nn.Module`` (copied without its bytes), a transformers configuration, the path of
            a folder with ``config.json``, or a name from :data:`NAMED`.
        dtype: of the weights where ``source`` is not a model.

    Raises:
        TypeError: ``source`` is none of these.
        ValueError: no such folder or name.
    """
    if isinstance(source, nn.Module):
        return _without_bytes(source)
    if isinstance(source, str | Path):
        source = _config_of(str(source))
    if not hasattr(source, "model_type"):
        raise TypeError(
            "model_or_config: expected an nn.Module, a transformers configuration, a folder, or "
            f"one of {', '.join(NAMED)}; got {type(source).__name__}"
        )
    from transformers import initialization

    kind = _model_class(source)
    with torch.device("meta"), initialization.no_init_weights():
        return kind._from_config(copy.deepcopy(source), dtype=dtype)


def _config_of(name: str) -> Any:
    import transformers

    if name in NAMED:
        kind, fields = NAMED[name]
        return getattr(transformers, kind)(**fields)
    if not Path(name).is_dir():
        raise ValueError(
            f"model_or_config: {name!r} is neither a folder nor one of {', '.join(NAMED)}"
        )
    return transformers.AutoConfig.from_pretrained(name)


def _model_class(config: Any) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"model_or_config: transformers has no model for {type(config).__name__}")


def _without_bytes(model: nn.Module) -> nn.Module:
    theirs = ("Params4bit", "Int8Params")
    bnb = [name for name, p in model.named_parameters() if type(p).__name__ in theirs]
    if bnb:
        raise ValueError(
            f"model_or_config: {len(bnb)} weights are bitsandbytes' ({bnb[0]}, ...), which cannot "
            "be copied without their bytes; plan from the model's config with method='qlora'"
        )
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                empty = torch.empty_like(parameter.data, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        for value in module.__dict__.values():  # plain tensors kept as attributes
            if isinstance(value, Tensor):
                memo.setdefault(id(value), torch.empty_like(value, device="meta"))
    return copy.deepcopy(model, memo)


@dataclass
class Group:
    """Layers of one list that are alike.

    Args:
        path: path of the list in the model.
        members: their indices.
    """

    path: str
    members: list[int]


def layer_groups(model: nn.Module, smallest: int = 2) -> list[Group]:
    """The layers of the outermost lists, grouped by their shapes and classes.

    Args:
        model: the model.
        smallest: length from which a list counts as one of layers.
    """
    groups: list[Group] = []
    for path, layers in _outermost_lists("", model, smallest):
        alike: dict[Any, Group] = {}
        for index, layer in enumerate(layers):
            alike.setdefault(_signature(layer), Group(path, [])).members.append(index)
        groups.extend(alike.values())
    return groups


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the outermost lists."""
    return [
        model.get_submodule(f"{group.path}.{index}")
        for group in layer_groups(model, smallest=1)
        for index in group.members
    ]


@contextlib.contextmanager
def only_layers(
    model: nn.Module, groups: Sequence[Group], extra: Group | None
) -> Iterator[nn.Module]:
    """The model with every list cut to two layers of each kind, and three of the kind ``extra``.

    Every layer is back in its place at the end.
    """
    wanted: dict[str, list[int]] = {}
    for group in groups:
        count = 3 if group is extra else 2
        wanted.setdefault(group.path, []).extend(group.members[:count])
    whole: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, indices in wanted.items():
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            layers = owner._modules[name]
            assert isinstance(layers, nn.ModuleList)
            whole.append((owner, name, layers))
            owner._modules[name] = nn.ModuleList(layers[i] for i in sorted(indices))
        yield model
    finally:
        for owner, name, layers in whole:
            owner._modules[name] = layers


def _outermost_lists(
    path: str, module: nn.Module, smallest: int
) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and len(child) >= smallest:
            yield inner, child
        else:
            yield from _outermost_lists(inner, child, smallest)


def _signature(layer: nn.Module) -> Any:
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    return shapes, tuple(type(module).__name__ for module in layer.modules())


def example_inputs(model: nn.Module, batch: int, seq: int) -> dict[str, Tensor]:
    """Inputs on the meta device for one training step, labels included where there is a head.

    Raises:
        ValueError: the model takes neither tokens nor pictures.
    """
    main = getattr(model, "main_input_name", "input_ids")
    config = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        pixels = torch.empty(batch, channels, height, width, device="meta", dtype=_float(model))
        inputs = {"pixel_values": pixels}
    elif main in ("input_ids",):
        inputs = {"input_ids": torch.zeros(batch, seq, dtype=torch.long, device="meta")}
    else:
        raise ValueError(
            f"model_or_config: {type(model).__name__} takes {main!r}; plan knows models that take "
            "input_ids or pixel_values"
        )
    if "labels" in accepted:
        per_row = "SequenceClassification" in type(model).__name__ or main == "pixel_values"
        shape = (batch,) if per_row else (batch, seq)
        inputs["labels"] = torch.zeros(shape, dtype=torch.long, device="meta")
    elif getattr(config, "is_encoder_decoder", False):
        ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
        inputs["decoder_input_ids"] = ids
    return inputs


def _float(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)
