"""What the configs of all PEFT methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftkern.hf.config import TASK_HEADS, TASK_TYPES

PEFT_VERSION = "0.21.2"  # whose fields these are

_SHOWN = 8  # items named in an error message before "and n more"


def refuse_unknown(
    fields: Mapping[str, Any], known: Mapping[str, Any], refused: Mapping[str, str]
) -> list[str]:
    """What a config says that this library does not compute.

    Args:
        fields: content of ``adapter_config.json``.
        known: every field of this PEFT version with the value that means "not used".
        refused: of those, the ones that are not supported, and what they are.

    Returns:
        One phrase a problem.
    """
    problems = []
    for name, value in fields.items():
        if name in refused:
            if value not in (known[name], None, False, {}, []):
                problems.append(f"{name}={value!r} ({refused[name]}) is not supported")
        elif name not in known and name != "runtime_config":
            if value not in (None, False, {}, [], ""):
                problems.append(
                    f"{name}={value!r} is unknown (PEFT {PEFT_VERSION} does not have it either); "
                    "it may change what the adapter computes"
                )
    return problems


def task_of(fields: Mapping[str, Any]) -> tuple[str | None, list[str] | None]:
    """task_type and modules_to_save for a configuration that trains what the file says."""
    task = fields.get("task_type")
    saved = list(fields.get("modules_to_save") or ())
    if task not in TASK_TYPES or not set(TASK_HEADS.get(task, ())) <= set(saved):
        task = None  # only modules_to_save itself then says what was trained in full
    return task, saved or None


def base_model_fields(model: nn.Module, task_type: str | None) -> dict[str, Any]:
    """The fields that say which model an adapter belongs to."""
    config = getattr(model, "config", None)
    base = getattr(config, "name_or_path", None) or getattr(model, "name_or_path", None)
    mapping = None
    if task_type is None:
        cls = type(model)
        mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return {
        "auto_mapping": mapping,
        "base_model_name_or_path": base or None,
        "task_type": task_type,
    }


def some(items: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def plain(value: Any) -> Any:
    """A value as JSON has it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value
