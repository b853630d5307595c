"""What the CUDA C++ implementations of several op families share: which kernel takes a product."""
