"""How the factors of a low-rank adapter begin, and what some beginnings take out of the base.

The formulas, and the order in which random numbers are drawn, are those of HF PEFT.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.structure import dense_weight, is_conv1d, is_dense_linear
from peftkern.quant import quantize_4bit, quantize_8bit

INITIALISATIONS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "pissa",
    "pissa_niter_<n>",
    "olora",
    "loftq",
)
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}
_PISSA = re.compile(r"pissa(_niter_(?P<n>\d+))?")


def check_initialisation(value: Any, r: int | None = None) -> None:
    """Refuse an unknown beginning, or one that this rank cannot have.

    Raises:
        ValueError: naming it and what there is.
    """
    known = isinstance(value, bool) or (
        isinstance(value, str) and (value in INITIALISATIONS or _PISSA.fullmatch(value) is not None)
    )
    if not known or value == "pissa_niter_<n>":
        shown = ", ".join(repr(name) for name in INITIALISATIONS)
        raise ValueError(f"init_lora_weights: got {value!r}, expected one of {shown}")
    if value == "orthogonal" and r is not None and r % 2:
        raise ValueError(f"init_lora_weights: 'orthogonal' needs an even rank, got r={r}")


def changes_base(value: Any) -> bool:
    """Whether this beginning moves a part of the base weight into the factors."""
    return isinstance(value, str) and (
        value in ("olora", "loftq") or _PISSA.fullmatch(value) is not None
    )


def is_reproducible(value: Any) -> bool:
    """Whether the changed base can be derived again from the original weight alone."""
    found = _PISSA.fullmatch(value) if isinstance(value, str) else None
    return found is None or found["n"] is None


def check_loftq(config: Any) -> dict[str, int]:
    """PEFT's ``loftq_config`` with what it leaves out filled in.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown key, bits other than 4 and 8, or no iteration.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"loftq_config: expected a dict, got {type(config).__name__}")
    unknown = [key for key in config if key not in LOFTQ]
    if unknown:
        raise ValueError(f"loftq_config: unknown key {unknown[0]!r}; expected {', '.join(LOFTQ)}")
    full = {**LOFTQ, **config}
    if full["loftq_bits"] not in (4, 8):
        raise ValueError(f"loftq_config: loftq_bits is {full['loftq_bits']!r}, expected 4 or 8")
    rounds = full["loftq_iter"]
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"loftq_config: loftq_iter is {rounds!r}, expected a positive integer")
    return full


@torch.no_grad()
def draw_factors(
    down: nn.Linear, up: nn.Linear, init: bool | str, r: int, base_dtype: torch.dtype
) -> None:
    """Fill fresh fp32 factors in place; those that change the base are only drawn, as in PEFT."""
    if init is True:
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    elif init == "gaussian":
        nn.init.normal_(down.weight, std=1 / r)
    elif init == "orthogonal":
        _orthogonal(down, up, r, base_dtype)
        return
    if init is True or init == "gaussian":
        nn.init.zeros_(up.weight)
        if up.bias is not None:
            nn.init.zeros_(up.bias)


def _orthogonal(down: nn.Linear, up: nn.Linear, r: int, base_dtype: torch.dtype) -> None:
    # Rows of A and columns of B come from two orthogonal halves of one basis, so that B A = 0
    # although neither factor is zero.
    inner, outer, device = down.in_features, up.out_features, down.weight.device
    basis, _ = torch.linalg.qr(torch.randn(r, r, device=device))
    a = torch.randn(inner, r // 2, device=device).mm(basis[0::2]).T / 10.0
    b = torch.randn(r // 2, outer, device=device).T.mm(basis[1::2]) / 10.0
    down.weight.copy_(a.to(base_dtype))
    up.weight.copy_(b.to(base_dtype))


@dataclass(frozen=True)
class Beginning:
    """Factors that hold a part of the base weight, and the base without it.

    Args:
        base: a new layer; the one that it was made from is left alone.
        lora_A: fp32 [r, in].
        lora_B: fp32 [out, r].
    """

    base: nn.Module
    lora_A: Tensor
    lora_B: Tensor


@torch.no_grad()
def split_base(
    layer: nn.Module,
    init: str,
    r: int,
    scaling: float,
    loftq_config: Mapping[str, int] | None = None,
    make_base: Callable[[nn.Module], nn.Module] | None = None,
) -> Beginning:
    """Move the part of a weight that rank r holds best from the base into the factors.

    PiSSA (arXiv 2404.02948): the largest singular vectors; OLoRA (arXiv 2406.01775): the first
    columns of a QR decomposition; LoftQ (arXiv 2310.08659): what quantizing the rest loses,
    alternating. LoftQ's factors are divided by ``scaling``, so that base and adapter together give
    the weight; PEFT leaves that out, which is the same where lora_alpha equals r.

    Args:
        layer: ``nn.Linear`` or ``Conv1D`` with a dense weight; left alone.
        init: ``"pissa"``, ``"pissa_niter_<n>"``, ``"olora"`` or ``"loftq"``.
        r: rank.
        scaling: of the adapter.
        loftq_config: ``loftq_bits`` (used where make_base does not quantize) and ``loftq_iter``.
        make_base: makes the final base, a quantized one say, from a layer with the new weight.

    Returns:
        The new base and the factors.

    Raises:
        TypeError: the layer is quantized already.
        ValueError: the rank is larger than the weight's smaller side.
    """
    if isinstance(layer, QuantizedLinear) or not is_dense_linear(layer):
        raise TypeError(
            f"init_lora_weights={init!r} takes its start from the dense weight; "
            f"{type(layer).__name__} has none any more. Give the layer as it was before it was "
            "quantized"
        )
    stored = dense_weight(layer)
    if r > min(stored.shape):
        raise ValueError(
            f"r: init_lora_weights={init!r} needs r <= {min(stored.shape)}, the smaller side of "
            f"the weight {tuple(stored.shape)}, got {r}"
        )
    make = make_base if make_base is not None else _unchanged
    weight = stored.detach().to(torch.float32)
    if init == "loftq":
        return _loftq(layer, weight, r, scaling, check_loftq(loftq_config or {}), make)
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        a, b = upper[:r].contiguous(), q[:, :r].contiguous()
    else:
        a, b = _principal(weight, init, r, scaling)
    base = make(_with_weight(layer, weight - scaling * (b @ a)))
    return Beginning(base, a, b)


def _principal(weight: Tensor, init: str, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    found = _PISSA.fullmatch(init)
    assert found is not None
    if found["n"] is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(found["n"]))
        vh = v.t()
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def _loftq(
    layer: nn.Module,
    weight: Tensor,
    r: int,
    scaling: float,
    config: Mapping[str, int],
    make: Callable[[nn.Module], nn.Module],
) -> Beginning:
    rest = weight
    for left in reversed(range(config["loftq_iter"])):
        base = make(_with_weight(layer, rest))
        if isinstance(base, QuantizedLinear):
            rounded = base.dequantize(torch.float32)
        else:
            four = config["loftq_bits"] == 4
            q = quantize_4bit(rest, double_quant=False) if four else quantize_8bit(rest)
            rounded = q.dequantize(torch.float32)
            base = _with_weight(layer, rounded)
        u, s, vh = torch.linalg.svd(weight - rounded, full_matrices=False)
        root = s[:r].sqrt()
        a, b = root[:, None] * vh[:r], u[:, :r] * root
        if left:
            rest = weight - b @ a
    factor = math.sqrt(scaling)
    return Beginning(base, a / factor, b / factor)


def _unchanged(layer: nn.Module) -> nn.Module:
    return layer


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer with another weight [out, in]; everything else is shared."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)  # copy.copy shares the table itself
    stored = weight.t() if is_conv1d(layer) else weight
    stored = stored.to(dense_weight(layer).dtype).contiguous()
    twin._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
    return twin
