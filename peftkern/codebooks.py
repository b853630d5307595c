"""Code tables and rounding thresholds of the storage formats: the Python truth.

``csrc/common`` holds the same numbers for the kernels; ``tests/test_formats.py`` ties the two
together and to the tables of bitsandbytes. All values are exact fp32 numbers.

Sources: NF4 and double quantization, Dettmers et al. 2023 (QLoRA, arXiv 2305.14314); dynamic map,
Dettmers 2016 (arXiv 1511.04561); byte order and FP4 values, bitsandbytes 0.50.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

NESTED_BLOCKSIZE = 256
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INT8_STEP = float(np.float32(1.0 / 127.0))

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Bit 3 of an FP4 code is the sign, the low three bits pick the magnitude, in this order.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)  # codes by growing magnitude

# The 127 positive values of the dynamic map below 1, little-endian fp32. Kept as bytes because the
# formula in dynamic_map() leaves the last bit to the rounding of an fp32 grid.
_DYNAMIC_POSITIVE = (
    "b7a31335941a5a36ff0502370642b23734803738b3ef8a384b1fba380bd7233905e78c3983e2c739"
    "016f013ac1ec1e3a806a3c3a3ee8593aff65773a9defa73afca9f13a2db21d3b5c8f423b8a6c673b"
    "dd24863b7493983b0d02ab3ba470bd3b3bdfcf3bd34de23b6abcf43b8195033ccdcc0c3c1804163c"
    "643b1f3c48e13a3cc3f5683c1f858b3c5d8fa23c9a99b93cd7a3d03c15aee73c52b8fe3c48e10a3d"
    "6766163d85eb213da3702d3dc3f5383de17a443d0000503d1f855b3d3d0a673d5d8f723d7b147e3d"
    "cdcc843d5d8f8a3deb51903d7b14963d0ad79b3d9a99a13d2a5ca73db81ead3d48e1b23dd7a3b83d"
    "6766be3df728c43d85ebc93d3433db3d0000f83d66660a3ecdcc183e3333273e9a99353e0000443e"
    "6666523ecdcc603e33336f3e99997d3e0000863e34338d3e6666943e9a999b3ecccca23e0000aa3e"
    "3333b13e6666b83e9a99bf3eccccc63e0000ce3e3333d53e6666dc3e9a99e33eccccea3e0000f23e"
    "3233f93e3333003fcccc033f6666073f00000b3f9a990e3f3433123fcdcc153f6666193f00001d3f"
    "9a99203f3433243fcdcc273f66662b3f00002f3f9a99323f3433363fcdcc393f66663d3f0000413f"
    "9a99443f3333483fcdcc4b3f66664f3f0000533f9a99563f33335a3fcdcc5d3f6666613f0000653f"
    "9a99683f33336c3fcdcc6f3f6666733f0000773f9a997a3f33337e3f"
)

ZERO_CODE = {"nf4": 7, "fp4": 0}


@functools.cache
def table_4bit(quant_type: str) -> torch.Tensor:
    """The 16 code values of ``"nf4"`` or ``"fp4"``, fp32 [16]; entry i belongs to code i."""
    if quant_type == "nf4":
        return torch.tensor(NF4, dtype=torch.float32)
    magnitudes = np.array(_FP4_TWELFTHS, dtype=np.float64) / 12.0
    signed = np.concatenate([magnitudes, -magnitudes])  # code 8 is -0, as bitsandbytes decodes it
    return torch.from_numpy(signed.astype(np.float32))


@functools.cache
def ladder_4bit(quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds (fp32, growing) and the code that each count of passed thresholds means (int64).

    NF4 compares the scaled value itself, FP4 its magnitude (the sign is bit 3). A value passes a
    threshold when it is strictly above it, so a tie takes the lower rung.
    """
    order = range(16) if quant_type == "nf4" else _FP4_ORDER
    codes = torch.tensor(list(order))
    values = table_4bit(quant_type)[codes].double()
    return ((values[1:] + values[:-1]) / 2).float(), codes


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The signed dynamic 8-bit map, fp32 [256], growing.

    Seven decades 10^-6 .. 10^0; decade i holds the 2^i means of neighbouring points of an even
    grid over [0.1, 1], for either sign; plus 0 and 1.
    """
    positive = np.frombuffer(bytes.fromhex(_DYNAMIC_POSITIVE), dtype="<f4")
    values = np.concatenate([-positive[::-1], [0.0], positive, [1.0]])
    return torch.from_numpy(values.astype(np.float32))


@functools.cache
def dynamic_thresholds() -> torch.Tensor:
    """Midpoints of :func:`dynamic_map`, fp32 [255], growing."""
    values = dynamic_map().double()
    return ((values[1:] + values[:-1]) / 2).float()
