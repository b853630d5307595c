"""Stateless differentiable functions: docs, defaults and shape handling; no maths.

Every function takes activations with any leading dimensions, honours autocast as
``torch.nn.functional.linear`` does, and is differentiable in the activations, the adapters and the
biases. Base weights are frozen.
"""

from peftkern.functional.bottleneck import bottleneck_adapter
from peftkern.functional.dora import dora_linear, dora_weight_norm, weight_norm_sq
from peftkern.functional.dropout import dropout
from peftkern.functional.group import (
    LoRAProjection,
    gated_activation,
    lora_linear_group,
    lora_mlp,
)
from peftkern.functional.linear import linear_4bit, linear_8bit
from peftkern.functional.lora import lora_linear
from peftkern.functional.multi_lora import multi_lora_linear
from peftkern.functional.prefix import prefix_attention, prompt_embedding, soft_prompt
from peftkern.functional.sparse import sparse_delta_linear

__all__ = [
    "LoRAProjection",
    "bottleneck_adapter",
    "dora_linear",
    "dora_weight_norm",
    "dropout",
    "gated_activation",
    "linear_4bit",
    "linear_8bit",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "multi_lora_linear",
    "prefix_attention",
    "prompt_embedding",
    "soft_prompt",
    "sparse_delta_linear",
    "weight_norm_sq",
]
