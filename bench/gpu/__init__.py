"""What is checked of the GPU kernels without a GPU, and measured with one."""
