"""Plain torch truth of counter-based dropout. Never optimised.

Philox-4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, so the bits are all there."""
    product = word * factor
    return (product >> 32) & _LOW, product & _LOW


def philox_words(seed: Tensor, numel: int) -> Tensor:
    """One 32-bit random word per element, int64 [numel] holding 0 .. 2^32 - 1.

    Element ``i`` is word ``i % 4`` of the block whose counter is ``(i // 4, 0)``; the key is the
    seed's low and high 32 bits.
    """
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device)
    words = [block & _LOW, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    key_0, key_1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_0, low_0 = _multiply(_MULTIPLIER_0, words[0])
        high_1, low_1 = _multiply(_MULTIPLIER_1, words[2])
        words = [high_1 ^ words[1] ^ key_0, low_1, high_0 ^ words[3] ^ key_1, low_0]
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW, (key_1 + _WEYL_1) & _LOW
    return torch.stack(words, dim=1).view(-1)[:numel]


def keep_mask(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """True where an element survives dropout with probability ``1 - p``."""
    return (philox_words(seed, shape.numel()) >= int(p * 2**32)).view(shape)


def philox_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Survivors times ``1 / (1 - p)`` in fp32, rounded to x.dtype; the others zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32, device=x.device).to(wide)
    return torch.where(keep_mask(x.shape, p, seed), (x.to(wide) * scale).to(x.dtype), 0.0)
