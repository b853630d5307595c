"""A frozen linear with trainable entries, and the gradient of just those entries."""
