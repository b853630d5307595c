"""Layers that PEFT and bitsandbytes have wrapped already, run on our kernels in place."""

from peftkern.hf.accelerate.api import AccelerateHandle, accelerate
from peftkern.hf.accelerate.report import AccelerateReport, LayerRow

__all__ = ["AccelerateHandle", "AccelerateReport", "LayerRow", "accelerate"]
