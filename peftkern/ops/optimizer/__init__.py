"""One multi-tensor pass of an optimizer, with fp32 or blockwise 8-bit state."""
