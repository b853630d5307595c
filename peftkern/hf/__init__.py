"""Adapting Hugging Face models, and any other ``nn.Module``, in place and reversibly."""

from peftkern.hf.adapters import disable_adapter, merge, set_adapter, unmerge
from peftkern.hf.config import AdapterConfig, TargetedConfig
from peftkern.hf.methods.lora import LoRAConfig
from peftkern.hf.patching import PatchHandle, patch, unpatch
from peftkern.hf.report import PatchReport, Row

__all__ = [
    "AdapterConfig",
    "LoRAConfig",
    "PatchHandle",
    "PatchReport",
    "Row",
    "TargetedConfig",
    "disable_adapter",
    "merge",
    "patch",
    "set_adapter",
    "unmerge",
    "unpatch",
]
