"""A bottleneck adapter: down, activation, up, scale, residual."""
