"""Optimizer state as others write it: bitsandbytes' keys, torch's keys, DTensors."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.codebooks import dynamic_map
from peftkern.ops.optimizer import reference

_LOG = logging.getLogger("peftkern")
WRAPPER = "__bnb_optimizer_quant_state__"
TENSORS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")
_TORCH_NAMES = {
    "exp_avg": "state1",
    "exp_avg_sq": "state2",
    "momentum_buffer": "state1",
}


@dataclass
class Sealed:
    """A parameter's saved state; torch's loading code passes it on untouched."""

    content: dict[str, Any]


def fresh_state(
    parameter: Tensor, eight_bit: bool, two: bool, device: torch.device | None = None
) -> dict[str, Any]:
    """Zero state of one parameter, with bitsandbytes' keys (without ``step``).

    It is on ``device``; by default where the parameter is.
    """
    mesh = getattr(parameter, "device_mesh", None)
    shape = getattr(parameter, "_local_tensor", parameter).shape
    device = device or parameter.device
    state: dict[str, Any] = {}
    for i in (1, 2) if two else (1,):
        if not eight_bit:
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            state[f"state{i}"] = zeros if mesh is None else _like_dtensor(zeros, parameter)
            continue
        state[f"state{i}"] = torch.zeros(shape, dtype=torch.uint8, device=device)
        blocks = -(-math.prod(shape) // reference.BLOCK)
        state[f"absmax{i}"] = torch.zeros(blocks, dtype=torch.float32, device=device)
        state[f"qmap{i}"] = _map(i).to(device)
    return state


def _like_dtensor(value: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def spread(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
    """8-bit state of a DTensor as FSDP can gather and cut it again: as DTensors.

    Codes mean nothing without the blocks of the shard that they were made for, so values are handed
    out in fp32, shaped and placed as the parameter. Where all shards have as many elements, the
    statistics go along: loaded at the same world size, they give the same codes back.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = mesh.size() if mesh.ndim == 1 and placements[0].is_shard(0) else 1
    even = parameter._local_tensor.numel() * shards == parameter.numel() and shards > 1
    out = {name: value for name, value in state.items() if name not in TENSORS}
    for i in (1, 2):
        codes = state.get(f"state{i}")
        if codes is None:
            continue
        absmax = state[f"absmax{i}"]
        values = reference.decode(codes.reshape(-1), absmax, i == 1).view(codes.shape)
        out[f"state{i}"] = _like_dtensor(values, parameter)
        if even:
            from torch.distributed.tensor import DTensor

            out[f"absmax{i}"] = DTensor.from_local(absmax, mesh, placements, run_check=False)
    return out


def _map(i: int) -> Tensor:
    return dynamic_map() if i == 1 else reference.unsigned_map()


def wrap(state: dict[str, Any]) -> dict[str, Any]:
    """Move plain tensors under the key that FSDP leaves alone; DTensors stay outside it."""
    inner = {
        name: state[name]
        for name in TENSORS
        if name in state and not hasattr(state[name], "device_mesh")
    }
    outer = {name: value for name, value in state.items() if name not in inner}
    return {**outer, WRAPPER: inner} if inner else outer


def seal(states: dict[Any, Any]) -> dict[Any, Any]:
    """Unwrap bitsandbytes' nesting and put each parameter's state into a :class:`Sealed` box."""
    result = {}
    for key, value in states.items():
        flat = {name: entry for name, entry in value.items() if name != WRAPPER}
        flat.update(value.get(WRAPPER, {}))
        for theirs, ours in _TORCH_NAMES.items():
            if flat.get(theirs) is not None:
                flat[ours] = flat.pop(theirs)
        if "state1" in flat:
            flat.setdefault("step", 1)  # torch's SGD counts no steps
        result[key] = {"sealed": Sealed(flat)}
    return result


def adopt(
    name: str, loaded: dict[str, Any], parameter: Tensor, eight_bit: bool, two: bool
) -> dict[str, Any]:
    """Loaded tensors, checked, copied, and in the precision that this optimizer keeps.

    Raises:
        ValueError: a tensor is missing, has the wrong size, or codes use another table.
    """
    target = fresh_state(parameter, eight_bit, two)
    for i in (1, 2) if two else (1,):
        key, numel = f"state{i}", getattr(parameter, "_local_tensor", parameter).numel()
        value = loaded.get(key)
        if value is None:
            if int(loaded.get("step", 0)) == 0:
                continue
            raise ValueError(f"{name}: has no {key!r}; it holds {sorted(map(str, loaded))}")
        value = getattr(value, "_local_tensor", value)
        if value.numel() != numel:
            raise ValueError(f"{name}: {key} has {value.numel()} elements, expected {numel}")
        flat = value.detach().reshape(-1)
        if value.dtype == torch.uint8:
            absmax = _absmax(name, i, loaded, numel)
            if eight_bit:
                target[key].view(-1).copy_(flat)
                target[f"absmax{i}"].copy_(absmax)
                continue
            flat = reference.decode(flat, absmax, i == 1)
            _LOG.info("%s: %s converted from 8 bits to fp32", name, key)
        stored = getattr(target[key], "_local_tensor", target[key])
        if not eight_bit:
            stored.view(-1).copy_(flat)
            continue
        flat = flat.float().contiguous()
        kept = getattr(loaded.get(f"absmax{i}"), "_local_tensor", None)
        codes, absmax = reference.encode(flat, i == 1, kept)
        if kept is not None and not torch.equal(reference.decode(codes, kept, i == 1), flat):
            codes, absmax = reference.encode(flat, i == 1)  # they were those of other shards
        stored.view(-1).copy_(codes)
        target[f"absmax{i}"].copy_(absmax)
        if kept is not absmax:
            _LOG.info("%s: %s converted from %s to 8 bits", name, key, value.dtype)
    return target


def _absmax(name: str, i: int, loaded: dict[str, Any], numel: int) -> Tensor:
    absmax, qmap = loaded.get(f"absmax{i}"), loaded.get(f"qmap{i}")
    blocks = -(-numel // reference.BLOCK)
    if absmax is None or absmax.numel() != blocks:
        got = "nothing" if absmax is None else f"{absmax.numel()} entries"
        raise ValueError(f"{name}: absmax{i}: got {got}, expected {blocks}")
    if qmap is not None and not torch.equal(qmap.float().cpu(), _map(i)):
        raise ValueError(f"{name}: qmap{i} is not the dynamic map of bitsandbytes")
    return torch.as_tensor(absmax).reshape(-1).float()


def global_norm(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Euclidean norm over all gradients; those of sharded DTensors are summed over the mesh.

    Args:
        pairs: parameter (which knows its placement) and this rank's gradient.
    """
    parts: dict[Any, list[Tensor]] = {}
    for parameter, grad in pairs:
        mesh = getattr(parameter, "device_mesh", None)
        dims = tuple(
            i for i, where in enumerate(getattr(parameter, "placements", ())) if where.is_shard()
        )
        parts.setdefault((mesh, dims, grad.device), []).append(grad)
    total = 0.0
    for (mesh, dims, device), grads in parts.items():
        anchor = torch.empty(0, device=device)
        square = torch.ops.peftkern.optimizer_grad_norm(anchor, grads).double().square()
        for dim in dims:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        total += float(square)
    return math.sqrt(total)
