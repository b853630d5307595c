"""Adapting Hugging Face models, and any other ``nn.Module``, in place and reversibly."""

from peftkern.hf.adapters import disable_adapter, merge, set_adapter, unmerge
from peftkern.hf.config import LoRAConfig
from peftkern.hf.patching import PatchHandle, patch, unpatch
from peftkern.hf.report import PatchReport, Row

__all__ = [
    "LoRAConfig",
    "PatchHandle",
    "PatchReport",
    "Row",
    "disable_adapter",
    "merge",
    "patch",
    "set_adapter",
    "unmerge",
    "unpatch",
]
