"""A frozen linear, dense or quantized, with a trainable low-rank term."""
