"""Adapters in PEFT's file layout, both ways."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.arguments import folder as as_folder
from peftkern.arguments import require_model
from peftkern.checkpoint import adapterhub
from peftkern.checkpoint.codecs import codec_for, codec_of
from peftkern.checkpoint.files import (
    current,
    json_bytes,
    read_json,
    safetensors_bytes,
    write_atomically,
    write_together,
)
from peftkern.checkpoint.peft_common import some
from peftkern.checkpoint.storage import COMPACT, StorageReport, StoredTensors, encode
from peftkern.hf.config import BASE_OPTIONS
from peftkern.hf.patching import PatchHandle, apply_config, handle_of
from peftkern.hf.targets import Site, survey
from peftkern.nn.adapter import AdapterLayer, check_adapter_name
from peftkern.nn.saved import TrainableCopy
from peftkern.nn.sparse_delta import check_positions

logger = logging.getLogger("peftkern")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_COMPACT = "PEFTKERN_COMPACT_"  # before the peft_type, so that PEFT refuses what it cannot read


def save_adapter(
    model: nn.Module,
    path: str | Path,
    format: str = "peft",
    adapter_names: str | Sequence[str] | None = None,
    plain_lora: bool = False,
    compact: str | None = None,
) -> dict[str, StorageReport]:
    """Save adapters so that PEFT, or AdapterHub's ``adapters``, reads them.

    Args:
        model: a patched model; the adapters may be merged, active or not.
        path: directory, made if needed. Adapter "default" goes there, every other one into a
            folder of its name below, as in PEFT.
        format: ``"peft"``; or ``"adapterhub"`` for bottleneck adapters, where a single adapter
            goes into the directory itself, several into folders of their names.
        adapter_names: which adapters; all of them when left out.
        plain_lora: write an adapter that began with PiSSA or OLoRA as a plain one, of twice the
            rank, for the original base. Otherwise ``init_lora_weights`` in the file says how its
            base is derived from the original one, which PEFT and :func:`load_adapter` do.
        compact: ``"nf4"`` or ``"int8"`` stores tensors of at least two dimensions and 256 elements
            in blocks of 64 (4.5 or 8.5 bits an element), for :func:`load_adapter` alone: PEFT
            refuses such a file by its peft_type. ``None`` stores every tensor as it is.

    Returns:
        With ``compact``, adapter name -> the error of each tensor and the bytes; else empty.

    Raises:
        ValueError: unknown format, storage or adapter, the model is not patched, or a tensor to be
            stored compactly is not finite.
        OSError: the directory cannot be written. Files are replaced whole or not at all.

    Example:
        >>> peftkern.save_adapter(model, "out/adapter")  # doctest: +SKIP
    """
    if format not in ("peft", "adapterhub"):
        raise ValueError(f"format: got {format!r}, expected 'peft' or 'adapterhub'")
    if compact is not None and compact not in COMPACT:
        raise ValueError(f"compact: got {compact!r}, expected None, 'nf4' or 'int8'")
    if compact is not None and format != "peft":
        raise ValueError(f"compact: {format} files have no compact form; use format='peft'")
    handle = handle_of(model)
    if handle is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched by peftkern.patch")
    if adapter_names is None:
        names = list(handle.adapters)
    else:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in names:
        if name not in handle.adapters:
            known = ", ".join(handle.adapters)
            raise ValueError(f"adapter_names: no adapter {name!r}; there are: {known}")
    if format == "adapterhub":
        adapterhub.save(model, path, names)
        return {}
    sites = survey(model)
    reports: dict[str, StorageReport] = {}
    root = as_folder("path", path)
    for name in names:
        folder = root if name == "default" else root / name
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"path: {folder} is a file, expected a directory")
        folder.mkdir(parents=True, exist_ok=True)
        config = handle.adapters[name].config
        codec = codec_of(config.kind)
        fields = codec.to_fields(config, model, sites, name)
        held = adapter_tensors(codec, model, sites, name)
        if plain_lora:
            fields, held = _as_plain_lora(codec, fields, held, sites, name)
        endings = (getattr(codec, "FLAT_TOO", ()), getattr(codec, "ASCENDING", ()))
        stored, metadata, report = encode(held, compact, *endings)
        if report is not None:
            reports[name] = report
            fields |= {"peft_type": f"{_COMPACT}{codec.PEFT_TYPE}", "peftkern_storage": compact}
        weights = safetensors_bytes(stored, metadata)
        write_together(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: json_bytes(fields)})
        if not (folder / "README.md").exists():
            write_atomically(folder / "README.md", _card(fields, codec.summary(fields)).encode())
    return reports


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    trainable: bool = True,
    allow_pickle: bool = False,
    **options: Any,
) -> PatchHandle:
    """Load an adapter in PEFT's or AdapterHub's format; strict; a failure leaves no trace.

    A model that has no adapter of this name is patched from the file's config first; else the
    tensors go into the existing adapter, which must compute the same function.

    Args:
        model: any model that the adapter was made for, patched or not.
        path: directory with ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT), or
            ``adapter.safetensors`` or ``pytorch_adapter.bin`` (AdapterHub).
        adapter_name: name to load it under.
        trainable: whether training goes on with it; False freezes it.
        allow_pickle: AdapterHub: read ``pytorch_adapter.bin``, with ``weights_only=True``.
        options: what the file does not speak of: quantize, blocksize, double_quant,
            quantize_modules, adapter_dtype, keep_original; see :class:`LoRAConfig`.

    Returns:
        The model's handle.

    Raises:
        FileNotFoundError: a file is missing; the message says which and what is there.
        ValueError: keys missing, unexpected or mis-shaped, or a config field that means something
            this library does not compute; all of them are named.
        TypeError: an unknown option.

    Example:
        >>> handle = peftkern.load_adapter(model, "out/adapter")  # doctest: +SKIP
    """
    for option in options:
        if option not in BASE_OPTIONS:
            raise TypeError(f"unknown option {option!r}; expected one of {', '.join(BASE_OPTIONS)}")
    check_adapter_name(adapter_name)
    require_model("model", model)
    folder = as_folder("path", path)
    if adapterhub.is_adapterhub(folder):
        return adapterhub.load(model, folder, adapter_name, trainable, allow_pickle, options)
    _check_files(folder)
    fields, where = read_json(current(folder, CONFIG_NAME)), str(folder / CONFIG_NAME)
    if fields.pop("peftkern_storage", None) is not None:
        fields["peft_type"] = str(fields.get("peft_type")).removeprefix(_COMPACT)
    codec = codec_for(fields.get("peft_type"), where)
    config = codec.from_fields(fields, where, options)
    handle = handle_of(model)
    exists = handle is not None and adapter_name in handle.adapters
    if exists and handle is not None and handle.adapters[adapter_name].config.kind != config.kind:
        raise ValueError(
            f"adapter_name: {adapter_name!r} is a {handle.adapters[adapter_name].config.kind} "
            f"adapter, the file holds {config.kind}; load it under another name"
        )
    if exists and options:
        raise ValueError(
            f"options {', '.join(options)} cannot be applied: adapter {adapter_name!r} exists "
            "already; unpatch first or load under another name"
        )
    if not exists:
        handle = apply_config(model, config, adapter_name, every_name=False)
    assert handle is not None
    try:
        sites = survey(model)
        if exists:
            codec.check_same_function(sites, adapter_name, config)
        wanted = adapter_tensors(codec, model, sites, adapter_name)
        beside: dict[str, Tensor] = {}
        if hasattr(codec, "frozen_tensors"):
            beside = codec.frozen_tensors(sites, adapter_name)
        frozen = {f"{_PREFIX}{key}": tensor for key, tensor in beside.items()}
        limits: dict[str, int] = {}
        if hasattr(codec, "limits"):
            prefix = getattr(codec, "PREFIX", _PREFIX)
            limits = {f"{prefix}{k}": n for k, n in codec.limits(sites, adapter_name).items()}
        _copy_in(current(folder, WEIGHTS_NAME), wanted, frozen, limits)
    except BaseException:
        if not exists:
            handle.drop_latest()
        raise
    if not trainable:
        for site in sites:
            if isinstance(site.module, AdapterLayer):
                for module in site.module.adapter_modules(adapter_name):
                    module.requires_grad_(False)
    return handle


def adapter_tensors(
    codec: ModuleType, model: nn.Module, sites: Sequence[Site], adapter_name: str
) -> dict[str, Tensor]:
    """The tensors of one adapter by PEFT's keys: the model's own, not copies.

    Args:
        codec: the method's module under ``peftkern.checkpoint``.
        model: the model.
        sites: its modules.
        adapter_name: which adapter.

    Returns:
        The method's tensors, and for modules trained in full their state under their plain path;
        all below ``base_model.model.`` unless the method's files have no such prefix.
    """
    prefix = getattr(codec, "PREFIX", _PREFIX)
    copies = getattr(codec, "COPIES_PREFIX", _PREFIX)
    own = codec.tensors(model, sites, adapter_name)
    held = {f"{prefix}{key}": tensor for key, tensor in own.items()}
    for site in sites:
        module = site.module
        if isinstance(module, TrainableCopy) and adapter_name in module.adapter_names:
            state = module.modules_to_save[adapter_name].state_dict()
            held.update({f"{copies}{site.name}.{name}": value for name, value in state.items()})
    return held


def _as_plain_lora(
    codec: ModuleType,
    fields: dict[str, Any],
    held: dict[str, Tensor],
    sites: Sequence[Site],
    adapter_name: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not hasattr(codec, "as_plain_lora"):
        raise ValueError(
            f"plain_lora: adapter {adapter_name!r} is a {fields['peft_type']} adapter, not LoRA"
        )
    bare = {key.removeprefix(_PREFIX): tensor for key, tensor in held.items()}
    fields, bare = codec.as_plain_lora(fields, bare, sites, adapter_name)
    return fields, {f"{_PREFIX}{key}": tensor for key, tensor in bare.items()}


def _check_files(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"path: {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"path: {folder} is a file; give the directory that holds {CONFIG_NAME}"
        )
    if not current(folder, CONFIG_NAME).is_file():
        below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; its folders {', '.join(below)} hold adapters" if below else ""
        raise FileNotFoundError(f"path: no {CONFIG_NAME} in {folder}{hint}")
    if not current(folder, WEIGHTS_NAME).is_file():
        if (folder / _PICKLED_NAME).is_file():
            raise ValueError(
                f"{folder / _PICKLED_NAME}: pickled weights can run code when they are loaded and "
                "are not read; load them once with PEFT and save with safe_serialization=True"
            )
        raise FileNotFoundError(f"path: no {WEIGHTS_NAME} in {folder}")


@torch.no_grad()
def _copy_in(
    path: Path, wanted: dict[str, Tensor], frozen: dict[str, Tensor], limits: dict[str, int]
) -> None:
    with StoredTensors(path) as file:
        shapes = file.shapes()
        problems = []
        missing = [key for key in wanted if key not in shapes]
        if missing:
            problems.append(f"missing keys: {some(missing)}")
        unexpected = [key for key in shapes if key not in wanted and key not in frozen]
        if unexpected:
            problems.append(f"unexpected keys: {some(unexpected)}")
        other = [
            key
            for key, tensor in frozen.items()
            if key in shapes and not _same(file.get(key), tensor)
        ]
        if other:
            problems.append(f"made for other base weights than the model's: {some(other)}")
        wrong = [
            f"{key} (file {list(shapes[key])}, model {list(tensor.shape)})"
            for key, tensor in wanted.items()
            if key in shapes and shapes[key] != tuple(tensor.shape)
        ]
        if wrong:
            problems.append(f"shapes differ: {some(wrong)}")
        if problems:
            raise ValueError(
                f"{path} does not fit this model; nothing was loaded. " + "; ".join(problems)
            )
        for key, limit in limits.items():  # before anything is written
            try:
                check_positions(file.get(key), limit)
            except ValueError as error:
                raise ValueError(f"{path}: {key}: {error}") from error
        narrowed = []
        for key, tensor in wanted.items():
            value = file.get(key)
            if torch.promote_types(value.dtype, tensor.dtype) != tensor.dtype:
                narrowed.append(f"{key} ({value.dtype} to {tensor.dtype})")
            tensor.copy_(value)
    if narrowed:
        logger.warning("%s: values were rounded on loading: %s", path, some(narrowed))


def _same(value: Tensor, tensor: Tensor) -> bool:
    return value.shape == tensor.shape and torch.equal(value.to(tensor), tensor)


def _card(fields: dict[str, Any], summary: str) -> str:
    base = fields["base_model_name_or_path"]
    kind = fields["peft_type"].lower()
    lines = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft"]
    lines += ["tags:", f"- {kind}", "---", "", "# Adapter", "", f"{summary} Load it with"]
    if kind.startswith("peftkern"):
        lines.append("`peftkern.load_adapter`; the peft library cannot read it.")
    else:
        lines.append("`peft.PeftModel.from_pretrained` or `peftkern.load_adapter`.")
    return "\n".join(lines) + "\n"
