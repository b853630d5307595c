"""Adapter files."""

from peftkern.checkpoint.peft_format import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
