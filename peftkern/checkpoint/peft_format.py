"""Adapters in PEFT's file layout, both ways."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.checkpoint.files import (
    open_safetensors,
    read_json,
    write_atomically,
    write_json,
    write_safetensors,
)
from peftkern.checkpoint.peft_config import from_peft, to_peft
from peftkern.hf.config import LoRAConfig
from peftkern.hf.patching import PatchHandle, apply_config, handle_of
from peftkern.hf.targets import Site, by_pattern, survey
from peftkern.nn.adapter import check_adapter_name
from peftkern.nn.lora import LoRALinear
from peftkern.nn.saved import TrainableCopy

logger = logging.getLogger("peftkern")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_OPTIONS = (
    "quantize",
    "blocksize",
    "double_quant",
    "quantize_modules",
    "adapter_dtype",
    "keep_original",
)
_SHOWN = 8  # keys named in an error message before "and n more"


def save_adapter(
    model: nn.Module,
    path: str | Path,
    format: str = "peft",
    adapter_names: str | Sequence[str] | None = None,
) -> None:
    """Save adapters so that PEFT's ``PeftModel.from_pretrained`` reads them.

    Args:
        model: a patched model; the adapters may be merged, active or not.
        path: directory, made if needed. Adapter "default" goes there, every other one into a
            folder of its name below, as in PEFT.
        format: ``"peft"``.
        adapter_names: which adapters; all of them when left out.

    Raises:
        ValueError: unknown format or adapter, or the model is not patched.
        OSError: the directory cannot be written. Files are replaced whole or not at all.

    Example:
        >>> peftkern.save_adapter(model, "out/adapter")  # doctest: +SKIP
    """
    if format != "peft":
        raise ValueError(f"format: got {format!r}, expected 'peft'")
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
    sites = survey(model)
    root = Path(path)
    for name in names:
        folder = root if name == "default" else root / name
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"path: {folder} is a file, expected a directory")
        folder.mkdir(parents=True, exist_ok=True)
        adapted = [(s.name, s.module) for s in sites if _carries(s.module, name)]
        layers = [(path, m) for path, m in adapted if isinstance(m, LoRALinear)]
        fields = to_peft(
            handle.adapters[name].config,
            model,
            sites,
            [path for path, _ in layers],
            any(layer.fan_in_fan_out for _, layer in layers),
        )
        # Weights first: a config without weights is the confusing half of an interrupted save.
        write_safetensors(folder / WEIGHTS_NAME, adapter_tensors(sites, name))
        write_json(folder / CONFIG_NAME, fields)
        if not (folder / "README.md").exists():
            write_atomically(folder / "README.md", _card(fields).encode())


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    trainable: bool = True,
    **options: Any,
) -> PatchHandle:
    """Load an adapter in PEFT's format; strict, and the model is as before if it fails.

    A model that has no adapter of this name is patched from the file's config first; else the
    tensors go into the existing adapter, which must compute the same function.

    Args:
        model: any model that the adapter was made for, patched or not.
        path: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: name to load it under.
        trainable: whether training goes on with it; False freezes it.
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
        if option not in _OPTIONS:
            raise TypeError(f"unknown option {option!r}; expected one of {', '.join(_OPTIONS)}")
    check_adapter_name(adapter_name)
    folder = Path(path)
    _check_files(folder)
    config = from_peft(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME), options)
    handle = handle_of(model)
    exists = handle is not None and adapter_name in handle.adapters
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
            _check_same_function(sites, adapter_name, config)
        _copy_in(folder / WEIGHTS_NAME, sites, adapter_name)
    except BaseException:
        if not exists:
            handle.drop_latest()
        raise
    if not trainable:
        for site in sites:
            if _carries(site.module, adapter_name):
                for module in site.module.adapter_modules(adapter_name):  # type: ignore[operator]
                    module.requires_grad_(False)
    return handle


def adapter_tensors(sites: Sequence[Site], adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter by PEFT's keys: the model's own, not copies.

    Args:
        sites: the model's modules.
        adapter_name: which adapter.

    Returns:
        ``base_model.model.<path>.lora_A.weight`` [r, in], ``...lora_B.weight`` [out, r], and for
        modules trained in full their state under their plain path.
    """
    tensors: dict[str, Tensor] = {}
    for site in sites:
        module, key = site.module, f"{_PREFIX}{site.name}"
        if not _carries(module, adapter_name):
            continue
        if isinstance(module, LoRALinear):
            down, up = module.factors(adapter_name)
            tensors[f"{key}.lora_A.weight"] = down
            tensors[f"{key}.lora_B.weight"] = up
        else:
            state = module.modules_to_save[adapter_name].state_dict()  # type: ignore[index, union-attr]
            tensors.update({f"{key}.{name}": tensor for name, tensor in state.items()})
    return tensors


def _carries(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoRALinear | TrainableCopy) and adapter_name in module.adapter_names


def _check_files(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"path: {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"path: {folder} is a file; give the directory that holds {CONFIG_NAME}"
        )
    if not (folder / CONFIG_NAME).is_file():
        below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; its folders {', '.join(below)} hold adapters" if below else ""
        raise FileNotFoundError(f"path: no {CONFIG_NAME} in {folder}{hint}")
    if not (folder / WEIGHTS_NAME).is_file():
        if (folder / _PICKLED_NAME).is_file():
            raise ValueError(
                f"{folder / _PICKLED_NAME}: pickled weights can run code when they are loaded and "
                "are not read; load them once with PEFT and save with safe_serialization=True"
            )
        raise FileNotFoundError(f"path: no {WEIGHTS_NAME} in {folder}")


def _check_same_function(sites: Sequence[Site], name: str, config: LoRAConfig) -> None:
    problems = []
    for site in sites:
        module = site.module
        if not (isinstance(module, LoRALinear) and name in module.lora_A):
            continue
        r = by_pattern(config.rank_pattern, site.name, config.r)
        alpha = by_pattern(config.alpha_pattern, site.name, config.lora_alpha)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        if r == module.r[name] and not math.isclose(scaling, module.scaling[name], rel_tol=1e-9):
            problems.append(f"{site.name}: file {scaling:g}, model {module.scaling[name]:g}")
    if problems:
        raise ValueError(
            "the file's lora_alpha or use_rslora differs from the existing adapter's, so the "
            f"scaling would be wrong ({_some(problems)}); unpatch first, or load under another name"
        )


@torch.no_grad()
def _copy_in(path: Path, sites: Sequence[Site], adapter_name: str) -> None:
    wanted = adapter_tensors(sites, adapter_name)
    with open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        problems = []
        missing = [key for key in wanted if key not in shapes]
        if missing:
            problems.append(f"missing keys: {_some(missing)}")
        unexpected = [key for key in shapes if key not in wanted]
        if unexpected:
            problems.append(f"unexpected keys: {_some(unexpected)}")
        wrong = [
            f"{key} (file {list(shapes[key])}, model {list(tensor.shape)})"
            for key, tensor in wanted.items()
            if key in shapes and shapes[key] != tuple(tensor.shape)
        ]
        if wrong:
            problems.append(f"shapes differ: {_some(wrong)}")
        if problems:
            raise ValueError(
                f"{path} does not fit this model; nothing was loaded. " + "; ".join(problems)
            )
        narrowed = []
        for key, tensor in wanted.items():
            value = file.get_tensor(key)
            if torch.promote_types(value.dtype, tensor.dtype) != tensor.dtype:
                narrowed.append(f"{key} ({value.dtype} to {tensor.dtype})")
            tensor.copy_(value)
    if narrowed:
        logger.warning("%s: values were rounded on loading: %s", path, _some(narrowed))


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _card(fields: dict[str, Any]) -> str:
    base = fields["base_model_name_or_path"]
    lines = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft"]
    lines += ["tags:", "- lora", "---", "", "# LoRA adapter", ""]
    lines.append(f"Rank {fields['r']}, alpha {fields['lora_alpha']}. Load it with")
    lines.append("`peft.PeftModel.from_pretrained` or `peftkern.load_adapter`.")
    return "\n".join(lines) + "\n"
