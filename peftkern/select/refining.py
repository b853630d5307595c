"""``refine``: move trainable entries to where the gradient is, while training goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.hf.adapters import adapter_layers_of
from peftkern.nn.sparse_delta import SparseDeltaLinear, SparseEntries
from peftkern.select.batches import to_device
from peftkern.select.scoring import Gradients
from peftkern.select.subset import largest
from peftkern.select.weights import Target

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Refined:
    """What a refinement did.

    Args:
        moved: path of a layer -> how many of its entries moved.
        total: entries in all layers.
    """

    moved: dict[str, int]
    total: int

    def __str__(self) -> str:
        count = sum(self.moved.values())
        return f"{count:,} of {self.total:,} entries moved in {len(self.moved)} layers"


def refine(
    model: nn.Module,
    loader: Iterable[Any],
    fraction: float = 0.2,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: Loss | None = None,
    batches: int | None = None,
    adapter_name: str = "default",
) -> Refined:
    """Drop the entries that changed least and grow as many where the gradient is largest.

    In each layer with a sparse delta, the ``fraction`` of entries with the smallest values goes
    back to the frozen weight, and the same number of entries outside with the largest mean
    gradient starts at zero change. The parameters stay the same objects; the optimizer's state of
    kept entries stays with them, that of new ones is zero. Source: RigL (arXiv 1911.11134).

    Call it every n steps, and stop some steps before the end so that late entries can train.
    Memory: one fp32 gradient of each adapted weight, on the host, for the length of the call.

    Args:
        model: a model patched with :class:`peftkern.SparseDeltaConfig`.
        loader: batches for the gradient, as for :func:`peftkern.importance`.
        fraction: share of each layer's entries to move, in [0, 1].
        optimizer: the optimizer that trains the values.
        loss_fn: ``loss_fn(model, batch)``; default: the output's ``loss``.
        batches: use this many batches; default: all.
        adapter_name: which adapter.

    Returns:
        How many entries moved where.

    Raises:
        ValueError: fraction out of range, no such adapter, or an optimizer state that has no
            entry-wise layout (8-bit and paged states); nothing is changed then.
        RuntimeError: adapters are merged.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: got {fraction}, expected 0 <= fraction <= 1")
    found: dict[str, SparseDeltaLinear] = {
        name: layer
        for name, layer in adapter_layers_of(model)
        if isinstance(layer, SparseDeltaLinear) and adapter_name in layer.sparse_delta
    }
    if not found:
        raise ValueError(f"adapter_name: no layer has a sparse delta named {adapter_name!r}")
    if any(layer.merged for layer in found.values()):
        raise RuntimeError("adapters are merged; call peftkern.unmerge(model) first")
    states = {
        name: _entry_state(optimizer, layer.held(adapter_name).values)
        for name, layer in found.items()
    }
    gradients = _mean_gradients(model, found, loader, loss_fn, batches)
    moved: dict[str, int] = {}
    total = 0
    for name, layer in found.items():
        entries = layer.held(adapter_name)
        total += entries.values.numel()
        count = _move(entries, gradients.pop(name), fraction, states[name])
        if count:
            moved[name] = count
    return Refined(moved, total)


def _entry_state(optimizer: torch.optim.Optimizer | None, values: nn.Parameter) -> list[Tensor]:
    """The tensors of the optimizer's state that have one number an entry."""
    state = {} if optimizer is None else optimizer.state.get(values, {})
    held = []
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1 < values.numel():
            continue
        if value.shape != values.shape or not value.is_floating_point():
            raise ValueError(
                f"optimizer: its state {key!r} ({value.dtype}, {tuple(value.shape)}) has no "
                "entry-wise layout and cannot follow entries that move; use an optimizer with fp32 "
                "states, such as torch.optim.AdamW or peftkern.optim.AdamW"
            )
        if values.numel() > 1 or value.dim():
            held.append(value)
    return held


def _mean_gradients(
    model: nn.Module,
    found: dict[str, SparseDeltaLinear],
    loader: Iterable[Any],
    loss_fn: Loss | None,
    batches: int | None,
) -> dict[str, Tensor]:
    targets = [Target(name, layer, layer.base_layer) for name, layer in found.items()]
    sums = {target.name: torch.zeros(target.shape) for target in targets}

    def add(target: Target, first: int, last: int, gradient: Tensor) -> None:
        sums[target.name][first:last] += gradient.cpu()

    watch = Gradients(targets)
    place = next(model.parameters()).device
    done = 0
    with watch.attached(model):
        for batch in itertools.islice(loader, batches):
            watch.backward(model, to_device(batch, place), loss_fn, add)
            done += 1
        if done == 0:
            raise ValueError("loader: gave no batch")
    return {name: total.div_(done) for name, total in sums.items()}


@torch.no_grad()
def _move(entries: SparseEntries, gradient: Tensor, fraction: float, state: list[Tensor]) -> int:
    values, indices = entries.values, entries.indices.detach()
    k, numel = values.numel(), gradient.numel()
    count = min(round(fraction * k), numel - k)
    if count == 0:
        return 0
    kept = largest({"": values.detach().float().abs().cpu()}, k - count)[""].to(indices.device)
    score = gradient.abs_().view(-1)
    score[indices.cpu()] = -1.0  # every entry of now, dropped ones too: they had their chance
    grown = largest({"": score}, count)[""].to(indices.device)
    positions, order = torch.cat([indices[kept], grown]).sort()
    for tensor in (values, *state):
        old = tensor.detach()[kept.to(tensor.device)]
        fresh = old.new_zeros(count)
        tensor.copy_(torch.cat([old, fresh])[order.to(tensor.device)])
    entries.indices.copy_(positions)
    values.grad = None  # it belonged to other entries
    return count
