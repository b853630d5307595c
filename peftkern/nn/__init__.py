"""Drop-in modules."""

from peftkern.nn.bottleneck import BottleneckAdapter, BottleneckLayer
from peftkern.nn.dora import DoRALinear
from peftkern.nn.embedding import LoRAEmbedding
from peftkern.nn.ia3 import IA3Linear
from peftkern.nn.linear4bit import Linear4bit
from peftkern.nn.linear8bit import Linear8bit
from peftkern.nn.lora import LoRALinear
from peftkern.nn.parameter_lora import LoRAParameters
from peftkern.nn.prefix import PrefixTuning
from peftkern.nn.prompt import PromptTuning
from peftkern.nn.saved import TrainableCopy
from peftkern.nn.sparse_delta import SparseDeltaLinear

__all__ = [
    "BottleneckAdapter",
    "BottleneckLayer",
    "DoRALinear",
    "IA3Linear",
    "Linear4bit",
    "Linear8bit",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAParameters",
    "PrefixTuning",
    "PromptTuning",
    "SparseDeltaLinear",
    "TrainableCopy",
]
