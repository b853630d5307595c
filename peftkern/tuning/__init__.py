"""Tile shapes and the choice between a fused kernel and a library call. Does not import triton."""
