"""LLM.int8(): INT8 weights, activations rounded row by row, columns with large values apart."""
