"""Adapting Hugging Face models, and any other ``nn.Module``, in place and reversibly."""

from peftkern.hf.accelerate.bnb_ops import BitsandbytesOps, register_bitsandbytes_ops
from peftkern.hf.adapters import disable_adapter, merge, set_adapter, unmerge
from peftkern.hf.config import AdapterConfig, TargetedConfig
from peftkern.hf.methods.bottleneck import BottleneckConfig
from peftkern.hf.methods.ia3 import IA3Config
from peftkern.hf.methods.lora import LoRAConfig
from peftkern.hf.methods.prefix import PrefixTuningConfig
from peftkern.hf.methods.prompt import PromptTuningConfig
from peftkern.hf.methods.sparse_delta import SparseDeltaConfig
from peftkern.hf.patching import PatchHandle, patch, unpatch
from peftkern.hf.report import PatchReport, Row
from peftkern.hf.rows import adapter_rows
from peftkern.hf.weighted import add_weighted_adapter

__all__ = [
    "AdapterConfig",
    "BitsandbytesOps",
    "BottleneckConfig",
    "IA3Config",
    "LoRAConfig",
    "PatchHandle",
    "PatchReport",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Row",
    "SparseDeltaConfig",
    "TargetedConfig",
    "adapter_rows",
    "add_weighted_adapter",
    "disable_adapter",
    "merge",
    "patch",
    "register_bitsandbytes_ops",
    "set_adapter",
    "unmerge",
    "unpatch",
]
