"""peftkern: the kernel layer for parameter-efficient fine-tuning.

Four ways in, one set of kernels: functions, modules and optimizers (:mod:`peftkern.functional`,
:mod:`peftkern.nn`, :mod:`peftkern.optim`), a patch helper for Hugging Face models
(:func:`peftkern.patch`), benchmarks (``bench/``), and a command line (``python -m peftkern``).
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401 - first: its OpenMP runtime is the one the kernels use

from peftkern import functional, ops
from peftkern._version import __version__
from peftkern.quant import QuantizedTensor, quantize_4bit, quantize_8bit
from peftkern.registry import apply_environment, backends, use_backend

if TYPE_CHECKING:
    from peftkern import hf, nn, optim
    from peftkern.checkpoint import load_adapter, save_adapter
    from peftkern.hf import (
        BottleneckConfig,
        IA3Config,
        LoRAConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        SparseDeltaConfig,
        adapter_rows,
        add_weighted_adapter,
        disable_adapter,
        merge,
        patch,
        set_adapter,
        unmerge,
        unpatch,
    )
    from peftkern.hf.accelerate import accelerate
    from peftkern.hf.quantizer import INT8Config, NF4Config
    from peftkern.hf.trainer import PeftkernCallback
    from peftkern.hf.verify import verify
    from peftkern.hf.watchdog import GradientWatchdog
    from peftkern.memory import plan
    from peftkern.select import importance, refine, threshold, top_k

logging.getLogger("peftkern").addHandler(logging.NullHandler())
ops.load()
apply_environment()

# Loaded when first used, so that `import peftkern` costs little over `import torch`.
_LAZY = {
    "hf": "peftkern.hf",
    "nn": "peftkern.nn",
    "optim": "peftkern.optim",
    "BottleneckConfig": "peftkern.hf",
    "LoRAConfig": "peftkern.hf",
    "PrefixTuningConfig": "peftkern.hf",
    "PromptTuningConfig": "peftkern.hf",
    "IA3Config": "peftkern.hf",
    "adapter_rows": "peftkern.hf",
    "add_weighted_adapter": "peftkern.hf",
    "disable_adapter": "peftkern.hf",
    "accelerate": "peftkern.hf.accelerate",
    "plan": "peftkern.memory",
    "verify": "peftkern.hf.verify",
    "GradientWatchdog": "peftkern.hf.watchdog",
    "INT8Config": "peftkern.hf.quantizer",
    "NF4Config": "peftkern.hf.quantizer",
    "PeftkernCallback": "peftkern.hf.trainer",
    "patch": "peftkern.hf",
    "unpatch": "peftkern.hf",
    "merge": "peftkern.hf",
    "unmerge": "peftkern.hf",
    "set_adapter": "peftkern.hf",
    "save_adapter": "peftkern.checkpoint",
    "importance": "peftkern.select",
    "top_k": "peftkern.select",
    "refine": "peftkern.select",
    "SparseDeltaConfig": "peftkern.hf",
    "threshold": "peftkern.select",
    "load_adapter": "peftkern.checkpoint",
}

__all__ = [
    "BottleneckConfig",
    "GradientWatchdog",
    "IA3Config",
    "INT8Config",
    "LoRAConfig",
    "NF4Config",
    "PeftkernCallback",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "QuantizedTensor",
    "SparseDeltaConfig",
    "__version__",
    "accelerate",
    "adapter_rows",
    "add_weighted_adapter",
    "backends",
    "disable_adapter",
    "functional",
    "hf",
    "importance",
    "load_adapter",
    "merge",
    "nn",
    "optim",
    "patch",
    "plan",
    "quantize_4bit",
    "quantize_8bit",
    "refine",
    "save_adapter",
    "set_adapter",
    "threshold",
    "top_k",
    "unmerge",
    "unpatch",
    "use_backend",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"peftkern.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
