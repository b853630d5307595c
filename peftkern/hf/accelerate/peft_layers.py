"""PEFT's LoRA on dense layers, on Conv1D and on peftkern's quantized layers."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from peftkern.hf.accelerate import merging
from peftkern.hf.accelerate.fused import NORMS, FusedLora
from peftkern.nn.quantized import QuantizedLinear


class FusedLinear(FusedLora, Linear):
    """``peft.tuners.lora.Linear`` on one kernel; everything else is PEFT's."""

    original_class = Linear

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; a base that peftkern quantized is dequantized, added to and requantized."""
        base: nn.Module = self.base_layer
        if not isinstance(base, QuantizedLinear):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        here = [name for name in names if name in self.lora_A]
        self.__dict__.pop(NORMS, None)
        if here:
            merging.merge(self, base, here)

    def unmerge(self) -> None:
        """As PEFT's; a base that peftkern quantized gets its bytes back exactly."""
        base: nn.Module = self.base_layer
        if not isinstance(base, QuantizedLinear) or not self.merged:
            super().unmerge()
            return
        merging.unmerge(self, base)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {Linear: FusedLinear}
