"""Dropout whose mask is a pure function of (seed, element index)."""
