"""What each method adds to a model on the meta device, for planning."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.hf.config import AdapterConfig
from peftkern.memory.shapes import layers_of
from peftkern.memory.trace import attend_to

METHODS = ("lora", "qlora", "bottleneck", "prefix", "prompt", "full", "as-is")

Context = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Method:
    """How a method changes a model that has no bytes.

    Args:
        label: its name in the plan.
        apply: adds what is trained and freezes the rest.
        extra_tokens: positions that it adds to every row.
        context: what surrounds a forward pass.
    """

    label: str
    apply: Callable[[nn.Module], None]
    extra_tokens: int = 0
    context: Context = lambda model: contextlib.nullcontext()


def method_for(
    method: str | AdapterConfig, r: int, target_modules: Any, virtual_tokens: int, reduction: int
) -> Method:
    """The method by name or by configuration.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(method, AdapterConfig):
        return _patched(type(method).__name__, method)
    if method == "full":
        return Method(method, _train_all)
    if method == "as-is":
        return Method(method, lambda model: None)
    if method in ("lora", "qlora"):
        from peftkern.hf.methods.lora import LoRAConfig

        quantize = "nf4" if method == "qlora" else None
        alpha = 2.0 * r
        config = LoRAConfig(r=r, lora_alpha=alpha, target_modules=target_modules, quantize=quantize)
        return _patched(method, config)
    if method == "bottleneck":
        return Method(method, lambda model: _add_bottlenecks(model, reduction))
    if method == "prefix":
        return Method(method, lambda m: _add_prefix(m, virtual_tokens), context=_prefix_context)
    if method == "prompt":
        return Method(method, lambda m: _add_prompt(m, virtual_tokens), virtual_tokens)
    raise ValueError(
        f"method: got {method!r}, expected one of {', '.join(METHODS)}, or a configuration such as "
        "peftkern.LoRAConfig"
    )


def _patched(label: str, config: AdapterConfig) -> Method:
    from peftkern.hf.patching import patch

    if config.quantize is not None:
        config = replace(config, keep_original=False)  # there are no bytes to keep

    def apply(model: nn.Module) -> None:
        patch(model, config)

    return Method(label, apply)


def _train_all(model: nn.Module) -> None:
    model.requires_grad_(True)


class PlannedAdapter(nn.Module):
    """The parameters of one bottleneck adapter (``base_layer``-free, so all of them count)."""

    def __init__(self, width: int, bottleneck: int, like: Tensor) -> None:
        super().__init__()
        made = {"device": like.device, "dtype": torch.float32}
        self.down = nn.Linear(width, bottleneck, **made)  # type: ignore[arg-type]
        self.up = nn.Linear(bottleneck, width, **made)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``x + up(act(down(x)))``."""
        down, up = self.down, self.up
        return functional.bottleneck_adapter(
            x, down.weight, down.bias, up.weight, up.bias, residual=x
        )


def _add_bottlenecks(model: nn.Module, reduction: int) -> None:
    """One adapter behind every layer, as ``seq_bn`` places it behind the feed-forward part."""
    model.requires_grad_(False)
    for layer in layers_of(model):
        like = next(p for p in layer.parameters() if p.dim() == 2)
        width = _width(model)
        layer.planned_adapter = PlannedAdapter(width, max(1, width // reduction), like)

        def adapt(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return module.planned_adapter(output)
            return (module.planned_adapter(output[0]), *output[1:])

        layer.register_forward_hook(adapt)


def _add_prefix(model: nn.Module, tokens: int) -> None:
    """Trainable keys and values for every layer."""
    model.requires_grad_(False)
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or _width(model) // config.num_attention_heads
    for layer in layers_of(model):
        for name in ("planned_prefix_keys", "planned_prefix_values"):
            value = torch.empty(heads, tokens, head, device="meta")
            layer.register_parameter(name, nn.Parameter(value))


def _prefix_context(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    pairs = [(layer.planned_prefix_keys, layer.planned_prefix_values) for layer in layers_of(model)]
    # Which layer gets which pair does not matter for bytes: all have the same shape.
    return attend_to(itertools.cycle(pairs))  # type: ignore[arg-type]


def _add_prompt(model: nn.Module, tokens: int) -> None:
    """A soft prompt before the embedded tokens; the inputs are made that much longer."""
    model.requires_grad_(False)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    prompt = torch.empty(tokens, embedding.embedding_dim, device="meta")
    embedding.register_parameter("planned_prompt", nn.Parameter(prompt))

    def prepend(module: Any, args: Any, output: Tensor) -> Tensor:
        rest = output[:, tokens:]
        first = module.planned_prompt.to(output.dtype).expand(output.shape[0], -1, -1)
        return torch.cat((first, rest), dim=1)

    embedding.register_forward_hook(prepend)


def _width(model: nn.Module) -> int:
    return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]


def planned_parameters(model: nn.Module) -> Iterator[Tensor]:
    """What this file has added to a model."""
    for name, parameter in model.named_parameters():
        if "planned_" in name:
            yield parameter
