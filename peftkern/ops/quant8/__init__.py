"""Row-wise INT8 quantization, compatible with the SCB layout of LLM.int8."""
