"""``DoRALinear``: a low-rank adapter that also learns the length of each row of the weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkern.nn.lora import LoRALinear


class DoRALinear(LoRALinear):
    """:class:`LoRALinear` with ``use_dora=True``: ``m / ||W + sBA|| * (x W^T + s x A^T B^T) + b``.

    DoRA, arXiv 2402.09353: the norms are taken as constants. With active dropout the base sees the
    dropped input a second time, as in PEFT.

    Args:
        base_layer: the linear layer, dense or quantized.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of the adapter.
        options: further arguments of :class:`LoRALinear`.

    Raises:
        TypeError: the base layer is not a linear layer.
        ValueError: a number out of range, or ``lora_bias``.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = DoRALinear(linear, r=4)
        >>> x = torch.randn(2, 64)
        >>> torch.allclose(layer(x), linear(x), atol=1e-5)  # a fresh adapter changes nothing
        True
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_dora=True, **options)
