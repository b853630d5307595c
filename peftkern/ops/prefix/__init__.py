"""Attention with trainable keys and values in front of the sequence."""
