"""Frozen linears with low-rank terms that share their input."""
