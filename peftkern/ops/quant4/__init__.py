"""4-bit blockwise quantization: NF4 and FP4, with double quantization of the statistics."""
