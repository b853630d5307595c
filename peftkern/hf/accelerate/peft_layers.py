"""PEFT's LoRA on dense layers, on Conv1D and on peftkern's quantized layers."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from torch import nn

from peftkern.hf.accelerate.fused import FusedLora
from peftkern.hf.accelerate.merging import teach_peft

teach_peft()


class FusedLinear(FusedLora, Linear):
    """``peft.tuners.lora.Linear`` on one kernel; everything else is PEFT's."""

    original_class = Linear


SWAPS: dict[type[nn.Module], type[nn.Module]] = {Linear: FusedLinear}
