"""Which module reads and writes which method in PEFT's layout.

``peftkern/checkpoint/peft_<kind>.py`` defines ``PEFT_TYPE``, ``FIELDS`` and

- ``to_fields(config, model, sites, adapter_name)``: the content of ``adapter_config.json``;
- ``from_fields(fields, where, options)``: the configuration, or an error that names each field
  which means something that is not computed here;
- ``tensors(model, sites, adapter_name)``: the model's own tensors by their keys in the file, into
  which loading copies (keys below ``PREFIX``, ``base_model.model.`` when it is not defined, and
  those of modules trained in full below ``COPIES_PREFIX``, in the same way);
- ``check_same_function(sites, adapter_name, config)``: an error when an existing adapter would
  compute something else with the file's tensors;
- ``summary(fields)``: one line for people;
- optionally ``frozen_tensors(sites, adapter_name)``: weights of the base that a file may hold and
  that must then be the model's own;
- where needed, ``ASCENDING`` (endings of keys of positions, stored as gaps) with
  ``limits(sites, adapter_name)`` (what those of each key must stay below), and ``FLAT_TOO``
  (endings of keys that a compact file encodes although they have one dimension).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from peftkern.checkpoint.peft_common import PEFT_VERSION

_KINDS = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "PEFTKERN_SPARSE_DELTA": "sparse_delta",
}


def codec_of(kind: str) -> ModuleType:
    """The codec of a method of this library.

    Raises:
        ValueError: PEFT's files cannot hold this method.
    """
    if kind not in _KINDS.values():
        raise ValueError(f"format: {kind} adapters cannot be written in PEFT's format")
    return importlib.import_module(f"peftkern.checkpoint.peft_{kind}")


def codec_for(peft_type: object, where: str) -> ModuleType:
    """The codec of a PEFT type.

    Raises:
        ValueError: this type is not computed here.
    """
    if peft_type not in _KINDS:
        known = ", ".join(repr(name) for name in _KINDS)
        raise ValueError(
            f"{where}: peft_type is {peft_type!r}; this version reads {known} "
            f"(as PEFT {PEFT_VERSION} writes them)"
        )
    return codec_of(_KINDS[str(peft_type)])
