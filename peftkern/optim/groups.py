"""Parameter groups for adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkern.arguments import real, require_model


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+: the B matrices learn ``ratio`` times faster than the rest.

    Hayou et al. 2024, arXiv 2402.12354. B matrices are the parameters below a module named
    ``lora_B`` or ``lora_embedding_B``, as in PEFT and in :mod:`peftkern.nn`.

    Args:
        model: frozen model with adapters; only parameters that require gradients are listed.
        lr: learning rate of everything but the B matrices.
        ratio: factor for the B matrices, 2 to 16 in practice.
        weight_decay: put into both groups; None leaves it to the optimizer's default.

    Returns:
        Two groups, ``"lora_plus_rest"`` and ``"lora_plus_b"`` by their key ``group_name``.

    Raises:
        ValueError: a number is out of range, or no trainable B matrix was found.

    Example:
        >>> import torch, peftkern as pk
        >>> from peftkern.optim import AdamW, lora_plus_groups
        >>> layer = pk.nn.LoRALinear(torch.nn.Linear(8, 8), r=2)
        >>> optimizer = AdamW(lora_plus_groups(layer, lr=1e-4, ratio=16))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    require_model("model", model)
    if not real("lr", lr) > 0:
        raise ValueError(f"lr: got {lr}, expected a positive number")
    if not real("ratio", ratio) > 0:
        raise ValueError(f"ratio: got {ratio}, expected a positive number")
    rest: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            is_b = "lora_B" in parts or "lora_embedding_B" in parts
            (fast if is_b else rest).append(parameter)
    if not fast:
        raise ValueError(
            "model: found no trainable parameter below a module named lora_B or "
            "lora_embedding_B; add adapters first"
        )
    extra = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": rest, "lr": lr, "group_name": "lora_plus_rest", **extra},
        {"params": fast, "lr": lr * ratio, "group_name": "lora_plus_b", **extra},
    ]
