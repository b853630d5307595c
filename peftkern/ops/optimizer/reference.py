"""Plain torch truth of the optimizer updates. Never optimised.

Every product and sum is rounded by itself in fp32, so that a kernel can be equal bit for bit.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from peftkern.codebooks import dynamic_map, dynamic_thresholds

BLOCK = 256  # elements that share an absmax, and that are skipped together
COLUMNS = 11  # of `hyper`
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

# The 254 inner values of the unsigned dynamic map, little-endian fp32 (see peftkern.codebooks).
_UNSIGNED_INNER = (
    "aa7bae3498095035389b0e36f6cc9236514cde36d5e514376e128337a071e13768e81f3800184f38"
    "9a477e3899bb96386453ae3831ebc5384b590639ca54413949507c39e4a59b39a223b93963a1d639"
    "221ff43971ce083a508d173a304c263a100b353aefc9433ad088523aaf47613a8e06703a6ec57e3a"
    "0681953a355eba3a643bdf3a4a0c023be17a143b78e9263b1058393ba7c64b3b40355e3bd7a3703b"
    "3789813b82c08a3bcff7933b1a2f9d3b6666a63bb29daf3bfdd4b83b4a0cc23b9543cb3be17ad43b"
    "2eb2dd3b78e9e63bc520f03b0f58f93bae47013c54e3053cf97e0a3ca01a0f3c45b6133ceb51183c"
    "92ed1c3c3789213c2a5c2f3c6766463ca3705d3ce27a743c8fc2853caf47913ccdcc9c3ceb51a83c"
    "0bd7b33c295cbf3c47e1ca3c6766d63c87ebe13ca370ed3cc3f5f83c703d023d0000083d8fc20d3d"
    "1f85133daf47193d3d0a1f3dcdcc243d5c8f2a3deb51303d7b14363d0ad73b3d9a99413d285c473d"
    "b81e4d3d47e1523dd7a3583d67665e3df728643d87eb693d15ae6f3da370753d33337b3de27a803d"
    "2a5c833d713d863db81e893d00008c3d48e18e3d90c2913dd7a3943d1f85973d67669a3daf479d3d"
    "f628a03d3e0aa33d85eba53dcdcca83d15aeab3d5c8fae3da470b13deb51b43d3333b73d7b14ba3d"
    "c3f5bc3d0bd7bf3d52b8c23d9a99c53de27ac83d295ccb3d0000d43d6666e23dcdccf03d3333ff3d"
    "cccc063e00000e3e3433153e66661c3e9a99233ecccc2a3e0000323e3433393e6666403e9a99473e"
    "cccc4e3e0000563e34335d3e6666643e9a996b3ecccc723e00007a3e9999803e3333843ecdcc873e"
    "66668b3e00008f3e9a99923e3333963ecccc993e66669d3e0000a13e9a99a43e3333a83eccccab3e"
    "6666af3e0000b33e9a99b63e3333ba3eccccbd3e6666c13e0000c53e9a99c83e3333cc3ecccccf3e"
    "6666d33e0000d73e9a99da3e3333de3ecccce13e6666e53e0000e93e9a99ec3e3333f03eccccf33e"
    "6666f73e0000fb3e9999fe3e9a19013f66e6023f33b3043f0080063fcc4c083f9a190a3f66e60b3f"
    "34b30d3f00800f3fcd4c113f9a19133f66e6143f34b3163f0080183fcd4c1a3f9a191c3f66e61d3f"
    "34b31f3f0080213fcd4c233f9a19253f66e6263f34b3283f00802a3fcd4c2c3f9a192e3f66e62f3f"
    "34b3313f0080333fcd4c353f9a19373f66e6383f34b33a3f00803c3fcd4c3e3f9a19403f66e6413f"
    "34b3433f0080453fcc4c473f9a19493f66e64a3f34b34c3f00804e3fcc4c503f9a19523f66e6533f"
    "34b3553f0080573fcc4c593f9a195b3f66e65c3f34b35e3f0080603fcc4c623f9a19643f66e6653f"
    "34b3673f0080693fcc4c6b3f9a196d3f66e66e3f34b3703f0080723fcc4c743f9a19763f66e6773f"
    "34b3793f00807b3fcc4c7d3f9a197f3f"
)


@functools.cache
def unsigned_map() -> Tensor:
    """The unsigned dynamic 8-bit map of second moments, fp32 [256], growing from 0 to 1."""
    inner = np.frombuffer(bytes.fromhex(_UNSIGNED_INNER), dtype="<f4")
    return torch.from_numpy(np.concatenate([[0.0], inner, [1.0]]).astype(np.float32))


@functools.cache
def unsigned_thresholds() -> Tensor:
    """Midpoints of :func:`unsigned_map`, fp32 [255], growing."""
    values = unsigned_map().double()
    return ((values[1:] + values[:-1]) / 2).float()


def encode(x: Tensor, signed: bool, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit codes and absmax of a flat fp32 tensor; ties take the lower code.

    Args:
        x: fp32 [n].
        signed: the map of first moments, or that of second moments (x >= 0).
        absmax: fp32 [ceil(n / 256)], if other scales are to be used than the largest values.

    Returns:
        codes uint8 [n], absmax fp32 [ceil(n / 256)].
    """
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = rows.abs().amax(1) if absmax is None else absmax
    # As for 4 bits: a denormal absmax has no finite reciprocal, so both are lifted exactly.
    lift = torch.where(absmax < _SMALLEST_NORMAL, 2.0**64, 1.0)
    inverse = torch.where(absmax == 0, 0.0, 1.0 / (absmax * lift))
    scaled = (rows * lift[:, None]) * inverse[:, None]
    thresholds = dynamic_thresholds() if signed else unsigned_thresholds()
    codes = torch.bucketize(scaled, thresholds.to(x.device)).to(torch.uint8)
    return codes.view(-1)[: x.numel()], absmax


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The fp32 values of :func:`encode`'s codes: map value x absmax."""
    values = (dynamic_map() if signed else unsigned_map()).to(codes.device)
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return values[codes.long()] * scale


def _words(rounding: Tensor, numel: int) -> Tensor:
    """Philox-4x32-10 words, int64 [numel]: key = seed, counter = (quad low, high, step, tensor)."""
    seed, step, tensor, first = (int(v) for v in rounding.tolist())
    index = torch.arange(first, first + numel, dtype=torch.int64).numpy().astype(np.uint64)
    quad, low = index >> np.uint64(2), np.uint64(0xFFFFFFFF)
    c = [quad & low, quad >> np.uint64(32), np.full_like(quad, step), np.full_like(quad, tensor)]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.choose((index & np.uint64(3)).astype(np.int64), c)
    return torch.from_numpy(words.astype(np.int64))


def _round(p: Tensor, dtype: torch.dtype, rounding: Tensor | None) -> Tensor:
    if rounding is None or dtype != torch.bfloat16:
        return p.to(dtype)
    bits = p.view(torch.int32).long() & 0xFFFFFFFF
    up = (bits + (_words(rounding, p.numel()).to(p.device) >> 16)) >> 16
    low = torch.where(up >= 1 << 15, up - (1 << 16), up).to(torch.int16)
    return torch.where(p.isfinite(), low.view(torch.bfloat16), p.to(dtype))


def _update(rule: str, h: Tensor, g: Tensor, p: Tensor, m: Tensor, v: Tensor) -> None:
    (_, decay, beta1, rest1, beta2, rest2, step_size, correction, eps, weight_decay, first) = h
    if rule == "adamw":
        m.copy_(m * beta1 + g * rest1)
        v.copy_(v * beta2 + (g * g) * rest2)
        # torch's fp32 root is not always the nearest; by way of fp64 it is.
        denominator = v.double().sqrt().float() * correction + eps
        p.copy_(p * decay - step_size * (m / denominator))
    elif rule == "lion":
        direction = m * beta1 + g * rest1
        p.copy_(p * decay - step_size * direction.sign())
        m.copy_(m * beta2 + g * rest2)
    else:
        change = g + weight_decay * p
        m.copy_(change if bool(first) else m * beta1 + change)
        p.copy_(p - step_size * m)


def optimizer_step(
    hyper: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    rule: str,
    rounding: Tensor | None,
) -> Tensor:
    """See the contract. Blocks of 256 with a gradient that is not finite stay as they are."""
    skipped = torch.zeros(len(params), dtype=torch.int64, device=hyper.device)
    for i, param in enumerate(params):
        n, h = param.numel(), hyper[i]
        if n == 0:
            continue
        g = grads[i].reshape(-1).float() * h[0]
        square = torch.nn.functional.pad(g * g, (0, -n % BLOCK)).view(-1, BLOCK)
        usable_blocks = square.isfinite().all(1)
        usable = usable_blocks.repeat_interleave(BLOCK)[:n]
        skipped[i] = (~usable_blocks).sum()
        two, eight = rule == "adamw", state1[i].dtype == torch.uint8
        s1, s2 = state1[i].view(-1), state2[i].view(-1) if two else state1[i].view(-1)
        m = decode(s1, absmax1[i], True) if eight else s1.clone()
        v = m
        if two:
            v = decode(s2, absmax2[i], False) if eight else s2.clone()
        flat = param.view(-1)
        p = flat.float().clone()
        _update(rule, h, g, p, m, v)
        flat.copy_(
            torch.where(
                usable, _round(p, param.dtype, None if rounding is None else rounding[i]), flat
            )
        )
        moments = [(m, s1, absmax1[i], True)] + ([(v, s2, absmax2[i], False)] if two else [])
        for value, stored, absmax, signed in moments:
            if eight:
                codes, scale = encode(torch.where(usable, value, 0.0), signed)
                stored.copy_(torch.where(usable, codes, stored))
                absmax.copy_(torch.where(usable_blocks, scale, absmax))
            else:
                stored.copy_(torch.where(usable, value, stored))
    return skipped


def optimizer_grad_norm(
    anchor: Tensor, grads: list[Tensor], compute: torch.dtype | None = None
) -> Tensor:
    """Euclidean norm of all gradients together, summed in fp64."""
    total = torch.zeros(1, dtype=torch.float64, device=anchor.device)
    for grad in grads:
        total += grad.reshape(-1).double().square().sum()
    return total.sqrt().to(compute or torch.float32)


def grad_norm_baseline(anchor: Tensor, grads: list[Tensor]) -> Tensor:
    """The same in eager fp32."""
    norms = [torch.linalg.vector_norm(grad.float()) for grad in grads]
    return torch.linalg.vector_norm(torch.stack([anchor.new_zeros(()), *norms])).view(1)
