"""What every configuration says: which modules, what is trained beside them, how the base is kept.

A method's own configuration derives from :class:`AdapterConfig`, or from :class:`TargetedConfig`
where the method sits on chosen linear layers, and lives in ``peftkern/hf/methods/<kind>.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from peftkern.arguments import whole

ALL_LINEAR = "all-linear"
QUANT_TYPES = ("nf4", "fp4", "int8")
KEEP_ORIGINAL = ("disk", "ram", False)

# Heads that PEFT trains in full for a task type, by attribute name.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
TASK_TYPES = (*TASK_HEADS, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

# Fields that say how the model keeps the base; no adapter file speaks of them.
BASE_OPTIONS = (
    "quantize",
    "blocksize",
    "double_quant",
    "quantize_modules",
    "adapter_dtype",
    "keep_original",
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the configuration of every method has.

    Args:
        modules_to_save: names of modules to train in full beside the adapters.
        task_type: PEFT's task type; classification types add their head to modules_to_save.
        quantize: ``None``, ``"nf4"``, ``"fp4"`` or ``"int8"``: format of the frozen base.
        blocksize: 4-bit weights that share one absmax.
        double_quant: 4-bit: quantize the absmax values as well.
        quantize_modules: what to quantize: ``"all-linear"`` (stacked experts included), a list of
            names, or one regular expression on the whole path; the method's own choice when left
            out.
        adapter_dtype: dtype of the trained tensors.
        keep_original: where the original weights of quantized layers wait for ``unpatch``:
            ``"disk"`` (an unnamed temporary file), ``"ram"``, or False (they are given up).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.
    """

    kind: ClassVar[str]  # the method: peftkern/hf/methods/<kind>.py

    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    quantize: str | None = None
    blocksize: int = 64
    double_quant: bool = True
    quantize_modules: str | Sequence[str] | None = None
    adapter_dtype: torch.dtype = torch.float32
    keep_original: str | bool = "disk"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "quantize_modules", names("quantize_modules", self.quantize_modules)
        )
        saved = names("modules_to_save", self.modules_to_save)
        if isinstance(saved, str):
            raise TypeError(
                f"modules_to_save: expected a list of names, got the string {saved!r}; "
                f"write [{saved!r}]"
            )
        object.__setattr__(self, "modules_to_save", saved)
        self._check_quantization()
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(
                f"task_type: got {self.task_type!r}, expected one of {', '.join(TASK_TYPES)}"
            )
        if self.adapter_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"adapter_dtype: got {self.adapter_dtype}, expected float32, bfloat16 or float16"
            )

    def _check_quantization(self) -> None:
        if self.quantize is not None and self.quantize not in QUANT_TYPES:
            raise ValueError(
                f"quantize: got {self.quantize!r}, expected None, 'nf4', 'fp4' or 'int8'"
            )
        if self.quantize_modules is not None and self.quantize is None:
            raise ValueError("quantize_modules: needs quantize='nf4', 'fp4' or 'int8'")
        size = self.blocksize
        if not isinstance(size, int) or not (32 <= size <= 4096 and size & (size - 1) == 0):
            raise ValueError(f"blocksize: got {size!r}, expected a power of two in 32..4096")
        if self.keep_original not in KEEP_ORIGINAL:
            raise ValueError(
                f"keep_original: got {self.keep_original!r}, expected 'disk', 'ram' or False"
            )

    @property
    def saved_names(self) -> tuple[str, ...]:
        """modules_to_save together with the heads that task_type adds."""
        heads = TASK_HEADS.get(self.task_type or "", ())
        return tuple(dict.fromkeys((*(self.modules_to_save or ()), *heads)))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values (dtypes as their names)."""
        out: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            out[item.name] = list(value) if isinstance(value, tuple) else value
        return out


@dataclass(frozen=True, kw_only=True)
class TargetedConfig(AdapterConfig):
    """Configuration of a method that sits on chosen linear layers.

    Args:
        target_modules: ``"all-linear"`` (every linear layer but the output embedding or head), a
            list of names (whole path, or its last parts), or one regular expression that must
            match the whole path.
        exclude_modules: names or a regular expression of what to leave alone.
        layers_to_transform: only layers with these numbers (with a list of target names).
        layers_pattern: name of the list that holds the layers, where the number is ambiguous.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, names(name, getattr(self, name)))
        if not self.target_modules and not getattr(self, "target_parameters", None):
            raise ValueError(
                "target_modules: empty; give names, a regular expression, or 'all-linear'"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: works with a list of target_modules; put the layer numbers "
                "into the regular expression instead"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform")
        layers = self.layers_to_transform
        if layers is not None and not isinstance(layers, int):
            object.__setattr__(self, "layers_to_transform", tuple(int(n) for n in layers))


def names(label: str, value: Any) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value != ALL_LINEAR:
            compiles(label, value)
        return value
    if not isinstance(value, Sequence | set | frozenset):
        raise TypeError(
            f"{label}: expected a list of names or a regular expression, got {type(value).__name__}"
        )
    names = tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{label}: expected names (strings), got {name!r}")
    return names


def compiles(label: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{label}: expected a string, got {type(pattern).__name__}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{label}: {pattern!r} is not a regular expression ({error}); for plain names give a "
            "list"
        ) from error


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def positive(label: str, value: Any) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{label}: expected a positive number, got {value!r}")


def positive_int(label: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{label}: expected a positive integer, got {value!r}")
    whole(label, value)


def check_patterns(label: str, patterns: Any, check: Callable[[str, Any], None]) -> dict[str, Any]:
    """A dict from regular expressions to values that ``check(label, value)`` accepts."""
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{label}: expected a dict, got {type(patterns).__name__}")
    for key, value in patterns.items():
        compiles(f"{label} key", key)
        check(f"{label}[{key!r}]", value)
    return dict(patterns)
