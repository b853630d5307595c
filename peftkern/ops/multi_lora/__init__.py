"""A frozen linear with a different low-rank term for each row."""
