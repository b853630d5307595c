"""Benchmarks of peftkern's ops against their peers and against the hardware's floor."""
