"""Stateless differentiable functions: docs, defaults and shape handling; no maths.

Every function takes activations with any leading dimensions, honours autocast as
``torch.nn.functional.linear`` does, and is differentiable in the activations, the adapters and the
biases. Base weights are frozen.
"""

from peftkern.functional.bottleneck import bottleneck_adapter
from peftkern.functional.dropout import dropout
from peftkern.functional.linear import linear_4bit, linear_8bit
from peftkern.functional.lora import lora_linear
from peftkern.functional.prefix import prefix_attention, soft_prompt
from peftkern.functional.sparse import sparse_delta_linear

__all__ = [
    "bottleneck_adapter",
    "dropout",
    "linear_4bit",
    "linear_8bit",
    "lora_linear",
    "prefix_attention",
    "soft_prompt",
    "sparse_delta_linear",
]
