"""Matmul with a 4-bit weight: forward and the gradient of the input."""
