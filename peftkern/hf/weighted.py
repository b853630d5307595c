"""New LoRA adapters as weighted combinations of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftkern.hf.adapters import adapter_layers_of
from peftkern.hf.config import is_number
from peftkern.hf.methods.lora import LoRAConfig
from peftkern.hf.patching import PatchHandle, apply_config, handle_of
from peftkern.hf.targets import explicit_targets, survey
from peftkern.nn.adapter import check_adapter_name
from peftkern.nn.embedding import LoRAEmbedding
from peftkern.nn.lora import LoRALinear

_COMBINATIONS = ("linear", "cat", "svd")
_Part = tuple[Tensor, Tensor, float]  # A, B, weight times scaling


def add_weighted_adapter(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> PatchHandle:
    """Add an adapter that is a weighted combination of others; the active ones stay active.

    The numbers are those of PEFT's ``add_weighted_adapter``. The new adapter has scaling 1 and does
    not require gradients before it is made active.

    Args:
        model: a patched model.
        names: LoRA adapters of it.
        weights: one for each; they may be negative.
        new_name: name of the new adapter.
        combination_type: ``"svd"``: the best approximation of the sum of the updates at
            ``svd_rank``; ``"cat"``: the sum itself, at the sum of the ranks; ``"linear"``: the
            factors are added one by one (cheap and rough; the ranks must be equal).
        svd_rank: rank for ``"svd"``; the largest of the ranks when left out.

    Returns:
        The model's handle.

    Raises:
        ValueError: unknown adapters or combination, ranks that differ, DoRA or biased adapters, or
            trained copies of modules, which cannot be combined.

    Example:
        >>> pk.add_weighted_adapter(model, ["a", "b"], [0.7, 0.3], "both")  # doctest: +SKIP
    """
    handle = handle_of(model)
    if handle is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched by peftkern.patch")
    check_adapter_name(new_name, "new_name")
    configs = _checked(handle, names, weights, combination_type, svd_rank)
    # One adapter needs no decomposition; PEFT does the same.
    kind = "linear" if len(names) == 1 else combination_type
    rank = _new_rank(configs, kind, svd_rank)
    layers = {
        path: layer
        for path, layer in adapter_layers_of(model)
        if isinstance(layer, LoRALinear | LoRAEmbedding)
        and any(name in layer.adapter_names for name in names)
    }
    for path, layer in layers.items():
        if kind == "linear" and len({layer.r[n] for n in names if n in layer.adapter_names}) > 1:
            raise ValueError(
                f"combination_type: 'linear' adds factors of equal rank, but those at {path} "
                "differ; use 'svd' or 'cat'"
            )
    plain = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights=True,
        loftq_config={},
        quantize=None,
        quantize_modules=None,
        modules_to_save=None,
        task_type=None if configs[0].saved_names else configs[0].task_type,
    )
    new = explicit_targets(plain, survey(model), list(layers), rewrite=True)
    active = {id(layer): layer.active_adapters for _, layer in adapter_layers_of(model)}
    wanted_grad = {id(p) for p in model.parameters() if p.requires_grad}
    combined = {
        path: _combine(_parts(layer, names, weights), kind, rank) for path, layer in layers.items()
    }
    apply_config(model, new, new_name)
    with torch.no_grad():
        for path, (a, b) in combined.items():
            down, up = layers[path].factors(new_name)
            # Below the new rank, where patterns gave fewer: the rest stays zero.
            down.zero_()[: a.shape[0]] = a
            up.zero_()[:, : b.shape[1]] = b
    for _, restored in adapter_layers_of(model):
        restored.set_adapter(active.get(id(restored), []))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted_grad)
    return handle


def _checked(
    handle: PatchHandle,
    names: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
) -> list[LoRAConfig]:
    for label, value in (("names", names), ("weights", weights)):
        if not isinstance(value, Sequence):
            raise TypeError(f"{label}: got {type(value).__name__}, expected a list")
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a list of adapter names, got {names!r}")
    if len(weights) != len(names) or not all(is_number(w) and math.isfinite(w) for w in weights):
        raise ValueError(
            f"weights: expected {len(names)} finite numbers, one for each name, got {weights!r}"
        )
    if combination_type not in _COMBINATIONS:
        raise ValueError(
            f"combination_type: got {combination_type!r}, expected 'linear', 'cat' or 'svd'"
        )
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(f"svd_rank: got {svd_rank!r}; a positive rank, for 'svd' only")
    configs = []
    for name in names:
        if name not in handle.adapters:
            known = ", ".join(handle.adapters)
            raise ValueError(f"names: no adapter {name!r}; there are: {known}")
        config = handle.adapters[name].config
        if not isinstance(config, LoRAConfig):
            raise ValueError(f"names: {name!r} is a {config.kind} adapter, not LoRA")
        for option in ("use_dora", "lora_bias"):
            if getattr(config, option):
                raise ValueError(f"names: {name!r} has {option}, which has no weighted sum")
        if config.saved_names:
            raise ValueError(
                f"names: {name!r} has trained copies of {', '.join(config.saved_names)}, which "
                "cannot be combined"
            )
        configs.append(config)
    return configs


def _new_rank(configs: Sequence[LoRAConfig], kind: str, svd_rank: int | None) -> int:
    ranks = [
        max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
        for config in configs
    ]
    if kind == "cat":
        return sum(ranks)
    if kind == "svd":
        return svd_rank if svd_rank is not None else max(ranks)
    if len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type: 'linear' needs adapters of one rank, these have "
            f"{', '.join(str(r) for r in ranks)}; use 'svd' or 'cat'"
        )
    return ranks[0]


def _parts(
    layer: LoRALinear | LoRAEmbedding, names: Sequence[str], weights: Sequence[float]
) -> list[_Part]:
    parts = []
    for name, weight in zip(names, weights, strict=True):
        if name in layer.adapter_names:
            a, b = (factor.detach().float() for factor in layer.factors(name))
            parts.append((a, b, weight * layer.scaling[name]))
    return parts


def _combine(parts: Sequence[_Part], kind: str, rank: int) -> tuple[Tensor, Tensor]:
    if kind == "cat":
        return torch.cat([a * w for a, _, w in parts]), torch.cat([b for _, b, _ in parts], dim=1)
    if kind == "svd":
        delta = (
            sum((b @ a) * w for a, b, w in parts[1:]) + (parts[0][1] @ parts[0][0]) * parts[0][2]
        )
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return vh[:rank], u[:, :rank] * s[:rank]
    # The root of each weight goes to either factor, its sign to A alone.
    roots = [math.sqrt(abs(w)) for _, _, w in parts]
    down = [a * math.copysign(root, w) for (a, _, w), root in zip(parts, roots, strict=True)]
    up = [b * root for (_, b, _), root in zip(parts, roots, strict=True)]
    return torch.stack(down).sum(0), torch.stack(up).sum(0)
