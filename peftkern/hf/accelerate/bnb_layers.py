"""bitsandbytes' own layers, where no adapter of PEFT wraps them or where it calls them."""

from __future__ import annotations

import bitsandbytes.nn as bnb
from torch import nn

from peftkern.hf.accelerate.fused import FusedQuantized


class Linear4bit(FusedQuantized, bnb.Linear4bit):
    """``bitsandbytes.nn.Linear4bit`` on our kernel; the name stays, since PEFT goes by it."""

    original_class = bnb.Linear4bit

    def _get_name(self) -> str:
        return "peftkern.Linear4bit"


class LinearNF4(FusedQuantized, bnb.LinearNF4):
    """``bitsandbytes.nn.LinearNF4`` on our kernel."""

    original_class = bnb.LinearNF4

    def _get_name(self) -> str:
        return "peftkern.LinearNF4"


class LinearFP4(FusedQuantized, bnb.LinearFP4):
    """``bitsandbytes.nn.LinearFP4`` on our kernel."""

    original_class = bnb.LinearFP4

    def _get_name(self) -> str:
        return "peftkern.LinearFP4"


class Linear8bitLt(FusedQuantized, bnb.Linear8bitLt):
    """``bitsandbytes.nn.Linear8bitLt`` on our kernel: activations are not rounded to 8 bits."""

    original_class = bnb.Linear8bitLt

    def _get_name(self) -> str:
        return "peftkern.Linear8bitLt"


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    cls.original_class: cls for cls in (Linear4bit, LinearNF4, LinearFP4, Linear8bitLt)
}
