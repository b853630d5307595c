"""One file a method: its configuration, and ``plan``, which notes what happens to which module.

A new method is a file here with

- a configuration class, derived from :class:`peftkern.hf.config.AdapterConfig`, whose ``kind`` is
  the name of the file;
- ``plan(planning, config) -> list[Site]``: sets ``wrap``, ``extend`` or ``act`` on the steps of
  the modules that it changes, and gives the modules to quantize when the configuration does not
  name them;

and, for files, ``peftkern/checkpoint/peft_<kind>.py``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from peftkern.hf.config import AdapterConfig


def method_of(config: AdapterConfig) -> ModuleType:
    """The module under ``peftkern.hf.methods`` that applies this configuration."""
    return importlib.import_module(f"{__name__}.{config.kind}")
