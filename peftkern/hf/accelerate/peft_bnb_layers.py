"""PEFT's LoRA on bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn

from peftkern.hf.accelerate.fused import FusedLora


class FusedLinear4bit(FusedLora, Linear4bit):
    """``peft.tuners.lora.Linear4bit`` on one kernel over bitsandbytes' own bytes."""

    original_class = Linear4bit


class FusedLinear8bitLt(FusedLora, Linear8bitLt):
    """``peft.tuners.lora.Linear8bitLt`` on one kernel over bitsandbytes' own bytes."""

    original_class = Linear8bitLt


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: FusedLinear4bit,
    Linear8bitLt: FusedLinear8bitLt,
}
