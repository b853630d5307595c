"""Activations and their derivatives in fp32, by name; the same formulas as the references'.

``exp`` and ``erf`` are the only functions taken from Triton: the interpreter has no others. EXACT
is for results that stay fp32: without it, exponentials and quotients are off by a few ulp.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import math

import triton
import triton.language as tl

from peftkern.triton_kernels.device import exp

NAMES = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu")
_LEAKY_SLOPE: tl.constexpr = tl.constexpr(0.01)
_ROOT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_DENSITY: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))
_ROOT_2_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _exp(z, EXACT: tl.constexpr):
    if EXACT:
        return exp(z)
    else:
        return tl.exp(z)


@triton.jit
def _quotient(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def sigmoid(z, EXACT: tl.constexpr = False):
    """1 / (1 + exp(-z))."""
    below = 1.0 + _exp(-z, EXACT)
    return _quotient(tl.full(below.shape, 1.0, tl.float32), below, EXACT)


@triton.jit
def tanh(z, EXACT: tl.constexpr = False):
    """A series near 0, where the quotient of exponentials would cancel."""
    e = _exp(-2.0 * tl.abs(z), EXACT)
    far = _quotient(1.0 - e, 1.0 + e, EXACT)
    far = tl.where(z < 0.0, -far, far)
    q = z * z
    series = -17.0 / 315 + q * (62.0 / 2835)
    near = z * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * series)))
    return tl.where(q < 0.0625, near, far)


@triton.jit
def activate(z, ACT: tl.constexpr, EXACT: tl.constexpr = False):
    """ACT(z), fp32."""
    if ACT == "relu":
        return tl.where(z < 0.0, 0.0, z)  # NaN stays
    elif ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * _ROOT_HALF))
    elif ACT == "gelu_tanh":
        return 0.5 * z * (1.0 + tanh(_ROOT_2_PI * (z + _CUBIC * z * z * z), EXACT))
    elif ACT == "silu":
        return z * sigmoid(z, EXACT)
    elif ACT == "tanh":
        return tanh(z, EXACT)
    elif ACT == "sigmoid":
        return sigmoid(z, EXACT)
    elif ACT == "leaky_relu":
        return tl.where(z > 0.0, z, _LEAKY_SLOPE * z)
    else:
        return z


@triton.jit
def slope(z, ACT: tl.constexpr, EXACT: tl.constexpr = False):
    """The derivative of ACT at z, fp32."""
    if ACT == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _ROOT_HALF)) + z * _DENSITY * _exp(-0.5 * z * z, EXACT)
    elif ACT == "gelu_tanh":
        t = tanh(_ROOT_2_PI * (z + _CUBIC * z * z * z), EXACT)
        inner = _ROOT_2_PI * (1.0 + 3.0 * _CUBIC * z * z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACT == "silu":
        s = sigmoid(z, EXACT)
        return s * (1.0 + z * (1.0 - s))
    elif ACT == "tanh":
        t = tanh(z, EXACT)
        return 1.0 - t * t
    elif ACT == "sigmoid":
        s = sigmoid(z, EXACT)
        return s * (1.0 - s)
    elif ACT == "leaky_relu":
        return tl.where(z > 0.0, 1.0, _LEAKY_SLOPE)
    else:
        return tl.full(z.shape, 1.0, tl.float32)
