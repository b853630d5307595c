"""Adapter folders from one layout into another, file to file; no model is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.checkpoint import adapterhub, peft_lora
from peftkern.checkpoint.codecs import codec_for
from peftkern.checkpoint.files import (
    current,
    json_bytes,
    read_json,
    safetensors_bytes,
    write_together,
)
from peftkern.checkpoint.peft_common import some
from peftkern.checkpoint.peft_format import (
    _COMPACT,
    _PICKLED_NAME,
    _PREFIX,
    CONFIG_NAME,
    WEIGHTS_NAME,
)
from peftkern.checkpoint.storage import COMPACT, StorageReport, StoredTensors, encode

LAYOUTS = ("peft", "adapterhub", *COMPACT)

# AdapterHub's LoRA says which matrices carry an adapter by their role; roles by the last names of
# a path, as the models that both libraries know call them.
_ROLES = {
    "q": r"(query|q_proj|q_lin|q)$",
    "k": r"(key|k_proj|k_lin|k)$",
    "v": r"(value|v_proj|v_lin|v)$",
    "intermediate": r"(intermediate\.dense|up_proj|fc1|lin1|c_fc|wi)$",
    "output": r"((?<!attention\.)output\.dense|down_proj|fc2|lin2|mlp\.c_proj|wo)$",
}
# Fields of AdapterHub's LoRA that change what it computes, with the value that PEFT's has.
_PLAIN = {"composition_mode": "add", "use_gating": False, "vera_d": None, "vera_b": None}


def convert_adapter(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    prefix: str = "",
    model: str | Path | None = None,
    allow_pickle: bool = False,
) -> StorageReport | None:
    """Write an adapter in another layout; nothing is left behind if it fails.

    Args:
        source: a folder that PEFT, ``adapters`` or this library has written.
        output: folder to make.
        to: ``"peft"``; ``"nf4"`` or ``"int8"`` (PEFT's layout in few bytes, for this library
            alone); ``"adapterhub"`` (LoRA).
        prefix: AdapterHub writes paths from the bare model on; PEFT's begin at the model that is
            adapted, in which the bare one has this name ("bert", "model", ...).
        model: folder with the base model's ``config.json``, for AdapterHub's file.
        allow_pickle: read a pickled ``.bin`` file (``weights_only``).

    Returns:
        What a compact layout lost; ``None`` for the others.

    Raises:
        ValueError: a layout that cannot hold the adapter; the message names the field or tensor.
        OSError: files cannot be read or written.
    """
    folder, target = Path(source), Path(output)
    if to not in LAYOUTS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(LAYOUTS)}")
    if not current(folder, CONFIG_NAME).is_file():
        raise ValueError(f"source: {folder} holds no {CONFIG_NAME}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"output: {target} is a file, expected a directory")
    if target.exists() and target.resolve() == folder.resolve():
        raise ValueError("output: is the source folder; expected another one")
    if adapterhub.is_adapterhub(folder):
        fields, tensors = _from_adapterhub(folder, prefix, allow_pickle)
    else:
        fields, tensors = _read_peft(folder, allow_pickle)
    if to == "adapterhub":
        _write_adapterhub(target, fields, tensors, prefix, model)
        return None
    codec = codec_for(fields["peft_type"], str(folder / CONFIG_NAME))
    endings = (getattr(codec, "FLAT_TOO", ()), getattr(codec, "ASCENDING", ()))
    compact = to if to in COMPACT else None
    stored, metadata, report = encode(tensors, compact, *endings)
    if compact is not None:
        fields = fields | {
            "peft_type": f"{_COMPACT}{codec.PEFT_TYPE}",
            "peftkern_storage": compact,
        }
    target.mkdir(parents=True, exist_ok=True)
    weights = safetensors_bytes(stored, metadata)
    write_together(target, {WEIGHTS_NAME: weights, CONFIG_NAME: json_bytes(fields)})
    return report


def _read_peft(folder: Path, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = read_json(current(folder, CONFIG_NAME))
    kind = str(fields.get("peft_type"))
    if kind.startswith(_COMPACT):
        fields = fields | {"peft_type": kind.removeprefix(_COMPACT)}
    fields.pop("peftkern_storage", None)
    path = current(folder, WEIGHTS_NAME)
    if path.is_file():
        with StoredTensors(path) as stored:
            return fields, {key: stored.get(key) for key in stored.shapes()}
    pickled = folder / _PICKLED_NAME
    if not pickled.is_file():
        raise FileNotFoundError(f"source: {folder} holds no {WEIGHTS_NAME}")
    if not allow_pickle:
        raise ValueError(
            f"source: {pickled.name} is pickled; allow_pickle=True reads it (weights only)"
        )
    tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    return fields, {key: value.contiguous() for key, value in tensors.items()}


# --- AdapterHub's LoRA ---------------------------------------------------------------------------


def _from_adapterhub(
    folder: Path, prefix: str, allow_pickle: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    where = current(folder, CONFIG_NAME)
    fields = read_json(where)
    config = fields["config"]
    if config.get("architecture") != "lora":
        kind = config.get("architecture") or "bottleneck"
        raise ValueError(
            f"{where}: a {kind} adapter, which PEFT's layout cannot hold; load it with "
            "peftkern.load_adapter"
        )
    for name, value in _PLAIN.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{where}: {name}={config[name]!r} has no counterpart in PEFT's layout, which "
                f"means {value!r}"
            )
    if config.get("use_dora"):
        raise ValueError(f"{where}: use_dora=True is not converted; its magnitudes differ")
    r, alpha, name = int(config["r"]), config["alpha"], fields["name"]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    paths = []
    values = adapterhub._read_weights(folder, allow_pickle)
    ending = f".loras.{name}.lora_A"
    for key in sorted(values):
        if not key.endswith(ending):
            if not key.endswith(f".loras.{name}.lora_B"):
                raise ValueError(f"{where}: the tensor {key!r} is not one of a LoRA adapter")
            continue
        path = key.removesuffix(ending)
        a, b = values[key], values[f"{path}.loras.{name}.lora_B"]
        if a.shape[0] != r:  # query, key and value in one matrix
            b = _side_by_side(a, b, r, config["attn_matrices"], path)
            ranks[re.escape(path.split(".", 1)[-1])] = a.shape[0]
        full = ".".join(part for part in (prefix, path) if part)
        tensors[f"{_PREFIX}{full}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{full}.lora_B.weight"] = b.contiguous()
        paths.append(full)
    if not paths:
        raise ValueError(f"{where}: no tensors of the adapter {name!r}")
    plain = dict(peft_lora.FIELDS)
    plain |= {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.get("dropout", 0.0),
        "target_modules": "|".join(re.escape(path) for path in paths),
        "base_model_name_or_path": fields.get("model_name"),
        "rank_pattern": ranks,
        "alpha_pattern": {path: alpha / r * rank for path, rank in ranks.items()},
        "fan_in_fan_out": fields.get("model_type") == "gpt2",
    }
    return plain, tensors


def _side_by_side(a: Tensor, b: Tensor, r: int, matrices: list[str], path: str) -> Tensor:
    """B of one matrix that holds q, k and v, from the parts that have adapters."""
    count = a.shape[0] // r
    if count * r != a.shape[0] or count != len(matrices):
        raise ValueError(f"{path}: A has {a.shape[0]} rows, expected {r} for each of {matrices}")
    width = b.shape[0] // count
    out = b.new_zeros(3 * width, a.shape[0])
    for i, matrix in enumerate(m for m in ("q", "k", "v") if m in matrices):
        row = "qkv".index(matrix) * width
        out[row : row + width, i * r : (i + 1) * r] = b[i * width : (i + 1) * width]
    return out


def _write_adapterhub(
    target: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str,
    model: str | Path | None,
) -> None:
    if fields["peft_type"] != peft_lora.PEFT_TYPE:
        raise ValueError(
            f"to: {fields['peft_type']} adapters are not converted to AdapterHub's layout; LoRA is"
        )
    odd = [n for n in ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "rank_pattern",
                       "alpha_pattern", "layers_to_transform") if fields.get(n)]  # fmt: skip
    if odd:
        raise ValueError(f"to: AdapterHub's LoRA has nothing for {', '.join(odd)}")
    if model is None:
        raise ValueError("model: AdapterHub's file names the base model; give its folder")
    base = read_json(Path(model) / "config.json")
    layers: dict[str, set[str]] = {role: set() for role in _ROLES}
    out: dict[str, Tensor] = {}
    lost = []
    start = f"{_PREFIX}{prefix}." if prefix else _PREFIX
    for key, value in tensors.items():
        found = re.fullmatch(rf"{re.escape(start)}(.+)\.lora_([AB])\.weight", key)
        role = found and next((n for n, p in _ROLES.items() if re.search(p, found[1])), None)
        if found is None or role is None:
            lost.append(key)
            continue
        layers[role].add(re.sub(r"\D*(\d+).*", r"\1", found[1]))
        out[f"{found[1]}.loras.default.lora_{found[2]}"] = value
    if lost:
        raise ValueError(f"to: AdapterHub's LoRA has no place for {some(lost)}")
    used = {role: numbers for role, numbers in layers.items() if numbers}
    if len({frozenset(numbers) for numbers in used.values()}) > 1:
        raise ValueError(f"to: AdapterHub adapts the same matrices in every layer, here {used}")
    adapted = next(iter(used.values()))
    count = base.get("num_hidden_layers") or base.get("n_layer") or len(adapted)
    config = {
        "architecture": "lora",
        "alpha": fields["lora_alpha"],
        "attn_matrices": [role for role in "qkv" if role in used],
        "dropout": fields["lora_dropout"],
        "dtype": None,
        "init_weights": "lora",
        "init_weights_seed": None,
        "intermediate_lora": "intermediate" in used,
        "leave_out": [i for i in range(count) if str(i) not in adapted],
        "output_lora": "output" in used,
        "r": fields["r"],
        "selfattn_lora": bool({"q", "k", "v"} & set(used)),
        "use_dora": False,
        **_PLAIN,
    }
    about = {
        "config": config,
        "hidden_size": base.get("hidden_size") or base.get("n_embd") or base.get("d_model"),
        "model_class": None,
        "model_name": base.get("_name_or_path") or str(Path(model).name),
        "model_type": base.get("model_type"),
        "name": "default",
        "version": "adapters.1.3.0",
    }
    target.mkdir(parents=True, exist_ok=True)
    weights = safetensors_bytes(out)
    write_together(target, {adapterhub.WEIGHTS_NAME: weights, CONFIG_NAME: json_bytes(about)})
