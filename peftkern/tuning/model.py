"""The time model behind every choice between a fused kernel and "dequantize, then cuBLAS".

All constants stand here. They are ceilings and estimates for one H100 (SXM), in picoseconds a
weight or activation element; what is compared are ratios, which move little between GPUs from
Ampere on. No timing of these kernels stands behind them yet: a measured table replaces the model.
"""

from __future__ import annotations

_BYTES_PER_PS = 2.7  # 90 % of the device's copy rate, 3.0 TB/s
_FLOP_PER_PS = 650.0  # cuBLAS, 16 bit, on real shapes
_FUSED_SHARE = 0.6  # of cuBLAS' rate, what a Triton loop with a decode in it reaches at best
_DENSE_SHARE = 0.9  # the same without a decode
_SLOTS_PER_PS = 132 * 64 * 1.755e-3  # integer and select lanes: SMs x 64 x clock
_DECODE_SLOTS = {"nf4": 7.0, "fp4": 7.0, "int8": 2.5}  # instructions a weight, see the AOT report
STORED_BYTES = {"dense": 2.0, "nf4": 0.516, "fp4": 0.516, "int8": 1.0}
_DENSE_BYTES = 2.0


def fused_quantized_wins(m: int, block_m: int, format: str) -> bool:
    """Whether the matmul that decodes its tiles beats dequantizing the whole base first.

    Per weight, M rows: the fused kernel reads the stored bytes once and decodes once per tile of
    ``block_m`` rows, overlapped with at most ``_FUSED_SHARE`` of the multiply rate. The other way
    reads the stored bytes, writes 16-bit weights, reads them again, and multiplies at full rate.
    """
    flop = 2.0 * m
    tiles = -(-m // block_m)
    stored = STORED_BYTES[format] / _BYTES_PER_PS
    decode = tiles * _DECODE_SLOTS[format] / _SLOTS_PER_PS
    fused = max(stored, decode, flop / (_FLOP_PER_PS * _FUSED_SHARE))
    dense = _DENSE_BYTES / _BYTES_PER_PS
    library = stored + dense + max(dense, flop / _FLOP_PER_PS)
    return fused < library


def fused_low_rank_wins(contracted: int) -> bool:
    """Whether a dense matmul with the low-rank term in its epilogue beats cuBLAS and one more pass.

    Per output element: cuBLAS leaves a pass that reads and writes 2 bytes each; the fused kernel
    loses ``1 / _DENSE_SHARE - 1`` of the multiply time, which grows with the contracted length.
    """
    extra_pass = 4.0 / _BYTES_PER_PS
    slower = 2.0 * contracted / _FLOP_PER_PS * (1.0 / _DENSE_SHARE - 1.0)
    return slower < extra_pass
