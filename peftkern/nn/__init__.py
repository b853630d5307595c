"""Drop-in modules."""

from peftkern.nn.linear4bit import Linear4bit
from peftkern.nn.linear8bit import Linear8bit
from peftkern.nn.lora import LoRALinear
from peftkern.nn.saved import TrainableCopy

__all__ = ["Linear4bit", "Linear8bit", "LoRALinear", "TrainableCopy"]
