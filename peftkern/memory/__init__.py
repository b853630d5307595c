"""How much memory training takes: predicted before the run, counted in it."""

from peftkern.memory.planner import MemoryPlan, parse_bytes, plan
from peftkern.memory.trace import saved_activations

__all__ = ["MemoryPlan", "parse_bytes", "plan", "saved_activations"]
