"""Bottleneck adapters in the files of AdapterHub's ``adapters``, both ways.

A directory holds ``adapter_config.json`` and ``adapter.safetensors`` or ``pytorch_adapter.bin``;
the adapter's name is part of every key. The layout is that of ``adapters`` 1.3.0.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.checkpoint.files import (
    current,
    json_bytes,
    open_safetensors,
    read_json,
    safetensors_bytes,
    write_together,
)
from peftkern.checkpoint.peft_common import some
from peftkern.hf.config import BASE_OPTIONS
from peftkern.hf.methods.bottleneck import BottleneckConfig, adapter_state, places_of
from peftkern.hf.patching import PatchHandle, apply_config, handle_of
from peftkern.hf.targets import Site, survey
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.saved import TrainableCopy

logger = logging.getLogger("peftkern")

ADAPTERS_VERSION = "1.3.0"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter.safetensors"
PICKLED_NAME = "pytorch_adapter.bin"
SAVED_NAME = "modules_to_save.safetensors"  # ours: `adapters` does not look at it

# Fields of a bottleneck configuration that are not computed here, with the value that is "not
# used"; None: they mean nothing while phm_layer is off.
_OTHERS: dict[str, Any] = {
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}
_REFUSED = {
    "inv_adapter": "an invertible adapter behind the embeddings",
    "phm_layer": "projections by parametrized hypercomplex multiplication (Compacter)",
}
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
# Files without a version come from adapter-transformers 1, which meant other functions.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# Where transformers 5 moved modules since 4.57, whose paths AdapterHub's keys hold.
_MOVED: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": (
        (r"(^|\.)layers\.(\d+)\.attention_adapters$", r"\1encoder.layer.\2.attention_adapters"),
        (r"(^|\.)layers\.(\d+)\.output_adapters$", r"\1encoder.layer.\2.output.output_adapters"),
    ),
}


def is_adapterhub(folder: Path) -> bool:
    """Whether a directory holds an adapter in this layout."""
    config = current(folder, CONFIG_NAME)
    if not config.is_file():
        return False
    fields = read_json(config)
    return "peft_type" not in fields and isinstance(fields.get("config"), dict)


def save(model: nn.Module, path: str | Path, adapter_names: Sequence[str]) -> None:
    """Save bottleneck adapters so that ``adapters``' ``load_adapter`` reads them.

    Args:
        model: a patched model.
        path: directory, made if needed; with several adapters each gets a folder of its name.
        adapter_names: which adapters.

    Raises:
        ValueError: an adapter is of another kind.
    """
    handle = handle_of(model)
    assert handle is not None
    sites = survey(model)
    for name in adapter_names:
        config = handle.adapters[name].config
        if not isinstance(config, BottleneckConfig):
            raise ValueError(
                f"format: adapter {name!r} is of kind {config.kind!r}; AdapterHub's files are "
                "written for bottleneck adapters only"
            )
        folder = Path(path) if len(adapter_names) == 1 else Path(path) / name
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"path: {folder} is a file, expected a directory")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = adapter_tensors(model, sites, name, name)
        files: dict[str, bytes | None] = {WEIGHTS_NAME: safetensors_bytes(tensors)}
        files[SAVED_NAME] = None
        if copies := _copies(sites, name):
            modules = json.dumps(list(config.saved_names))
            files[SAVED_NAME] = safetensors_bytes(copies, {"modules_to_save": modules})
        files[CONFIG_NAME] = json_bytes(_to_fields(model, config, name))
        write_together(folder, files)


def load(
    model: nn.Module,
    folder: Path,
    adapter_name: str,
    trainable: bool,
    allow_pickle: bool,
    options: dict[str, Any],
) -> PatchHandle:
    """Load a bottleneck adapter; strict, and the model is as before if it fails.

    See :func:`peftkern.load_adapter` for the arguments.
    """
    fields, where = read_json(current(folder, CONFIG_NAME)), str(folder / CONFIG_NAME)
    values = _read_weights(folder, allow_pickle)
    saved, saved_values = _read_saved(folder)
    config = from_fields(fields, where, {**options, "modules_to_save": saved or None})
    if (folder / "head_config.json").is_file():
        logger.warning("%s holds a prediction head, which is not loaded", folder)
    handle = handle_of(model)
    exists = handle is not None and adapter_name in handle.adapters
    if exists and handle is not None:
        _check_same(handle.adapters[adapter_name].config, config, adapter_name)
        if options:
            raise ValueError(
                f"options {', '.join(options)} cannot be applied: adapter {adapter_name!r} exists "
                "already; unpatch first or load under another name"
            )
    else:
        handle = apply_config(model, config, adapter_name, every_name=False)
    try:
        sites = survey(model)
        wanted = adapter_tensors(model, sites, adapter_name, str(fields.get("name")))
        _copy_in(folder, _without_prefix(model, wanted), _without_prefix(model, values))
        _copy_in(folder / SAVED_NAME, _copies(sites, adapter_name), saved_values)
    except BaseException:
        if not exists:
            handle.drop_latest()
        raise
    if not trainable:
        for _, layer in places_of(model, sites):
            layer.adapters[adapter_name].requires_grad_(False)
        for site in sites:
            if isinstance(site.module, AdapterLayer):
                for module in site.module.adapter_modules(adapter_name):
                    module.requires_grad_(False)
    return handle


def adapter_tensors(
    model: nn.Module, sites: Sequence[Site], adapter_name: str, file_name: str
) -> dict[str, Tensor]:
    """The model's own tensors of one adapter by AdapterHub's keys.

    Args:
        model: a patched model.
        sites: its modules.
        adapter_name: which adapter.
        file_name: the name in the keys.
    """
    moved = _MOVED.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    held: dict[str, Tensor] = {}
    for place, layer in places_of(model, sites):
        if adapter_name not in layer.adapters:
            continue
        key = place.key
        for pattern, replacement in moved:
            key = re.sub(pattern, replacement, key)
        for name, tensor in adapter_state(layer, adapter_name).items():
            held[f"{key}.adapters.{file_name}.{name}"] = tensor
    return held


def _copies(sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for site in sites:
        module = site.module
        if isinstance(module, TrainableCopy) and adapter_name in module.adapter_names:
            state = module.modules_to_save[adapter_name].state_dict()
            held.update({f"{site.name}.{name}": value for name, value in state.items()})
    return held


def _to_fields(model: nn.Module, config: BottleneckConfig, name: str) -> dict[str, Any]:
    own = {item.name for item in fields_of(BottleneckConfig)} - _base_fields()
    values = {key: value for key, value in config.to_dict().items() if key in own}
    if not isinstance(values["scaling"], str):
        values["scaling"] = float(values["scaling"])  # `adapters` takes no integer there
    base = getattr(model, "config", None)
    return {
        "config": values | _OTHERS,
        "hidden_size": getattr(base, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(base, "_name_or_path", None) or None,
        "model_type": getattr(base, "model_type", None),
        "name": name,
        "version": f"adapters.{ADAPTERS_VERSION}",
    }


def from_fields(fields: dict[str, Any], where: str, options: dict[str, Any]) -> BottleneckConfig:
    """The configuration in a file.

    Args:
        fields: the content of ``adapter_config.json``.
        where: its path, for errors.
        options: what the file does not speak of.

    Raises:
        ValueError: fields are missing, unknown, or mean something that is not computed here; all
            of them are named.
    """
    inner = dict(fields["config"])
    architecture = inner.pop("architecture", None)
    if architecture is not None:
        raise ValueError(
            f"{where}: architecture is {architecture!r}; of AdapterHub's methods only bottleneck "
            "adapters are read"
        )
    own = {item.name for item in fields_of(BottleneckConfig)} - _base_fields()
    problems = [f"{name} is missing" for name in _REQUIRED if name not in inner]
    for name, value in inner.items():
        if name in _REFUSED and value != _OTHERS[name]:
            problems.append(f"{name}={value!r} ({_REFUSED[name]} is not supported)")
        elif name not in own and name not in _OTHERS:
            problems.append(f"{name}={value!r} is not known")
    if not isinstance(fields.get("name"), str):
        problems.append("name is missing")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    chosen = {name: value for name, value in inner.items() if name in own}
    if "version" not in fields:
        old = chosen["non_linearity"]
        chosen["non_linearity"] = _OLD_ACTIVATIONS.get(old, old)
    try:
        return BottleneckConfig(**chosen, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def _base_fields() -> set[str]:
    return {*BASE_OPTIONS, "modules_to_save", "task_type"}


def _check_same(have: object, wanted: BottleneckConfig, adapter_name: str) -> None:
    if not isinstance(have, BottleneckConfig):
        raise ValueError(
            f"adapter_name: {adapter_name!r} is an adapter of another kind; load the file under "
            "another name"
        )
    own = {item.name for item in fields_of(BottleneckConfig)} - _base_fields()
    own -= {"init_weights", "init_weights_seed"}
    different = [n for n in sorted(own) if getattr(have, n) != getattr(wanted, n)]
    if different:
        detail = "; ".join(
            f"{n}: model {getattr(have, n)!r}, file {getattr(wanted, n)!r}" for n in different
        )
        raise ValueError(
            f"adapter {adapter_name!r} exists and computes something else ({detail}); load the "
            "file under another name"
        )


def _read_weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if current(folder, WEIGHTS_NAME).is_file():
        with open_safetensors(current(folder, WEIGHTS_NAME)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    if not (folder / PICKLED_NAME).is_file():
        raise FileNotFoundError(f"path: no {WEIGHTS_NAME} and no {PICKLED_NAME} in {folder}")
    if not allow_pickle:
        raise ValueError(
            f"{folder / PICKLED_NAME}: pickled weights are read only with allow_pickle=True (then "
            "by torch.load with weights_only=True, which runs no code of the file); `adapters` "
            "writes safetensors with save_adapter(..., use_safetensors=True)"
        )
    values = torch.load(folder / PICKLED_NAME, map_location="cpu", weights_only=True)
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{folder / PICKLED_NAME}: expected a dict of tensors")
    return values


def _read_saved(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    if not current(folder, SAVED_NAME).is_file():
        return [], {}
    with open_safetensors(current(folder, SAVED_NAME)) as file:
        names = json.loads((file.metadata() or {}).get("modules_to_save", "[]"))
        return names, {key: file.get_tensor(key) for key in file.keys()}


def _without_prefix(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys below the base model: files of a model with a head and of its base are alike."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == ".":
        return dict(tensors)
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


@torch.no_grad()
def _copy_in(where: Path, wanted: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    problems = []
    missing = [key for key in wanted if key not in values]
    if missing:
        problems.append(f"missing keys: {some(missing)}")
    unexpected = [key for key in values if key not in wanted]
    if unexpected:
        problems.append(f"unexpected keys: {some(unexpected)}")
    wrong = [
        f"{key} (file {list(values[key].shape)}, model {list(tensor.shape)})"
        for key, tensor in wanted.items()
        if key in values and values[key].shape != tensor.shape
    ]
    if wrong:
        problems.append(f"shapes differ: {some(wrong)}")
    if problems:
        raise ValueError(
            f"{where} does not fit this model; nothing was loaded. " + "; ".join(problems)
        )
    for key, tensor in wanted.items():
        tensor.copy_(values[key])
