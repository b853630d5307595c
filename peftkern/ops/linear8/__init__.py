"""Matmul with a row-wise INT8 weight: forward and the gradient of the input."""
