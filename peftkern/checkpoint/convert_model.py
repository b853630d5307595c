"""Quantized models from bitsandbytes' files into ours and back, shard by shard."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.checkpoint.files import open_safetensors, read_json, write_json, write_safetensors
from peftkern.quant import QuantizedTensor, _shaped_absmax

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_STATE = ".quant_state.bitsandbytes__"
_OURS, _THEIRS = "peftkern", "bitsandbytes"
_METHODS = (_OURS, _THEIRS)
Progress = Callable[[int, int, str], None]
Tensors = dict[str, Tensor]


def convert_model(
    source: str | Path, output: str | Path, to: str, progress: Progress | None = None
) -> int:
    """Write a quantized model's folder in the other layout; the codes stay as they are.

    Args:
        source: folder of a model that ``save_pretrained`` wrote, quantized by bitsandbytes or with
            :class:`peftkern.NF4Config` or :class:`peftkern.INT8Config`.
        output: folder to make.
        to: ``"peftkern"`` or ``"bitsandbytes"``.
        progress: called as ``progress(done, total, file)`` after each file of weights.

    Returns:
        How many weights were converted.

    Raises:
        ValueError: the source is not quantized by the other one, or uses other code tables.
        ImportError: bitsandbytes is not installed.
        OSError: files cannot be read or written.
    """
    folder, target = Path(source), Path(output)
    if to not in _METHODS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(_METHODS)}")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    wanted = _THEIRS if to == _OURS else _OURS
    if method != wanted:
        have = "not quantized" if method is None else f"quantized by {method}"
        raise ValueError(
            f"source: {folder} is {have}, expected a model quantized by {wanted}"
            + ("; from_pretrained(..., quantization_config=peftkern.NF4Config()) quantizes one"
               if method is None else "")
        )  # fmt: skip
    if target.exists() and target.resolve() == folder.resolve():
        raise ValueError("output: is the source folder; expected another one")
    target.mkdir(parents=True, exist_ok=True)
    places = _places(folder)
    files = sorted(set(places.values()))
    groups = _their_groups(places) if to == _OURS else _our_groups(places)
    claimed = {key for group in groups for key in group.keys}
    written: dict[str, str] = {}
    total = 0
    kinds: set[tuple[str, int, bool]] = set()
    with contextlib.ExitStack() as stack:
        held = {name: stack.enter_context(open_safetensors(folder / name)) for name in files}
        for done, name in enumerate(files, 1):
            here = [key for key, place in places.items() if place == name and key not in claimed]
            tensors = {key: held[name].get_tensor(key) for key in here}
            for group in groups:
                # A layer's statistics may be in another file than its weight.
                if places[f"{group.path}.weight"] == name:
                    parts = {key: held[places[key]].get_tensor(key) for key in group.keys}
                    made, kind = (
                        _to_ours(group, parts)
                        if to == _OURS
                        else _to_theirs(group, parts, quantization)
                    )
                    tensors |= made
                    kinds.add(kind)
            write_safetensors(target / name, tensors, {"format": "pt"})
            written |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            if progress is not None:
                progress(done, len(files), name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": written}
        write_json(target / _INDEX, index)
    if not kinds:
        raise ValueError(f"source: {folder} holds no weight quantized by {wanted}")
    skip = quantization.get("llm_int8_skip_modules" if to == _OURS else "skip_modules")
    made = _our_config(kinds, skip) if to == _OURS else _their_config(kinds, skip, config)
    for path in folder.iterdir():
        if path.is_file() and path.name not in (*files, _INDEX, "config.json"):
            shutil.copyfile(path, target / path.name)
    write_json(target / "config.json", config | {"quantization_config": made})
    return len(groups)


@dataclass(frozen=True)
class _Group:
    """A quantized layer: its path, its format (None: the config says it), and all its keys."""

    path: str
    kind: str | None
    keys: tuple[str, ...]


def _places(folder: Path) -> dict[str, str]:
    """Which file each tensor is in."""
    if (folder / _INDEX).is_file():
        found: dict[str, str] = read_json(folder / _INDEX)["weight_map"]
        return found
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"source: {folder} holds neither {_WEIGHTS} nor {_INDEX}")
    with open_safetensors(folder / _WEIGHTS) as held:
        return dict.fromkeys(held.keys(), _WEIGHTS)


def _paths(places: dict[str, str], ending: str) -> list[str]:
    return sorted(key.removesuffix(ending) for key in places if key.endswith(ending))


def _their_groups(places: dict[str, str]) -> list[_Group]:
    groups = []
    for kind in ("nf4", "fp4"):
        for path in _paths(places, f".weight{_STATE}{kind}"):
            stats = (key for key in places if key.startswith(f"{path}.weight."))
            groups.append(_Group(path, kind, (f"{path}.weight", *sorted(stats))))
    return groups + _rows(places)


def _our_groups(places: dict[str, str]) -> list[_Group]:
    parts = ("weight", "absmax", "nested_absmax", "nested_offset")
    groups = []
    for path in _paths(places, ".absmax"):
        keys = tuple(f"{path}.{part}" for part in parts if f"{path}.{part}" in places)
        groups.append(_Group(path, None, keys))
    return groups + _rows(places)


def _rows(places: dict[str, str]) -> list[_Group]:
    parts = ("weight", "SCB", "weight_format")
    return [
        _Group(path, "int8", tuple(f"{path}.{p}" for p in parts if f"{path}.{p}" in places))
        for path in _paths(places, ".SCB")
    ]


def _to_ours(group: _Group, parts: Tensors) -> tuple[Tensors, tuple[str, int, bool]]:
    path, kind = group.path, group.kind
    start = f"{path}.weight"
    if kind == "int8":
        form = parts.pop(f"{path}.weight_format", None)
        if form is not None and int(form) != 0:
            raise ValueError(f"{path}: weight_format is {int(form)}, expected 0 (rows)")
        return parts, ("int8", 0, False)
    from bitsandbytes.nn import Params4bit

    assert kind is not None
    stats = {k.removeprefix(f"{start}."): v for k, v in parts.items() if k != start}
    parameter = Params4bit.from_prequantized(parts[start], stats, device="cpu")
    q = QuantizedTensor.from_bnb(parameter)
    out = {start: q.weight}
    for part in ("absmax", "nested_absmax", "nested_offset"):
        tensor = getattr(q, part)
        if tensor is not None:
            out[f"{path}.{part}"] = tensor.contiguous()
    return out, (kind, q.blocksize, q.nested_absmax is not None)


def _to_theirs(
    group: _Group, parts: Tensors, settings: dict[str, Any]
) -> tuple[Tensors, tuple[str, int, bool]]:
    path, kind = group.path, settings["quant_type"]
    if group.kind == "int8":
        return parts | {f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8)}, (
            "int8", 0, False,
        )  # fmt: skip
    packed, absmax = parts[f"{path}.weight"], parts[f"{path}.absmax"]
    nested = (parts.get(f"{path}.nested_absmax"), parts.get(f"{path}.nested_offset"))
    if packed.ndim != 2:
        raise ValueError(
            f"{path}: a weight with an odd number of columns, whose shape the file does not say"
        )
    shape, blocksize = torch.Size((packed.shape[0], 2 * packed.shape[1])), settings["blocksize"]
    q = QuantizedTensor(
        packed,
        _shaped_absmax(absmax.reshape(-1), shape, blocksize),
        *nested,
        quant_type=kind,
        blocksize=blocksize,
        shape=shape,
        dtype=torch.bfloat16,
    )
    parameter = q.to_bnb()
    out = {f"{path}.weight": parameter.data}
    for name, tensor in parameter.quant_state.as_dict(packed=True).items():
        out[f"{path}.weight.{name}"] = tensor.contiguous()
    return out, (kind, blocksize, nested[0] is not None)


def _our_config(kinds: set[tuple[str, int, bool]], skip: Any) -> dict[str, Any]:
    if len(kinds) > 1:
        raise ValueError(f"source: weights of several formats ({sorted(kinds)}); expected one")
    kind, blocksize, nested = next(iter(kinds))
    return {
        "quant_method": _OURS,
        "quant_type": kind,
        "blocksize": blocksize or 64,
        "double_quant": nested,
        "skip_modules": skip,
    }


def _their_config(
    kinds: set[tuple[str, int, bool]], skip: Any, config: dict[str, Any]
) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    kind, _, nested = next(iter(kinds))
    if kind == "int8":
        made = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    found: dict[str, Any] = json.loads(json.dumps(made.to_dict()))
    return found
