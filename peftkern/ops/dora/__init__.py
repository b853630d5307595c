"""A frozen linear with a low-rank term and learned row magnitudes (DoRA)."""
