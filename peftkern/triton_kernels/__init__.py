"""Triton kernels. Importing this package does not import triton; importing a kernel module does.

``launch`` decides whether Triton can be used and launches; ``device`` holds the functions that the
kernels share; the other modules hold the kernels, which the ``triton.py`` of an op family launches.
"""
