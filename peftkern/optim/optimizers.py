"""The optimizers by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkern.arguments import real
from peftkern.optim.base import BlockOptimizer, Options, Params
from peftkern.optim.paged import PagedOptimizer


def _options(rule: str, bits: int, kwargs: dict[str, Any]) -> Options:
    return Options(rule=rule, bits=bits, **kwargs)


class AdamW(BlockOptimizer):
    """AdamW with fp32 state, all parameters in one pass.

    Args:
        params: parameters or groups, fp32, bf16 or fp16.
        lr: learning rate; a float or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        maximize: ascend instead.
        max_grad_norm: clip the global gradient norm inside the step.
        skip_nonfinite_step: leave the whole step out when any gradient is NaN or Inf (else only
            the blocks of 256 elements that hold one).
        stochastic_rounding: round updated bf16 parameters at random, keeping the mean.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter has another dtype.

    Example:
        >>> import torch
        >>> from peftkern.optim import AdamW
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamW([w], lr=0.1)
        >>> w.sum().backward(); optimizer.step()
        >>> bool((w < 1).all())
        True
    """

    _bits = 32

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, _options("adamw", self._bits, options))


class AdamW8bit(AdamW):
    """AdamW with blockwise 8-bit state (Dettmers 2022, arXiv 2110.02861), as in bitsandbytes.

    Takes the arguments of :class:`AdamW`, and ``min_8bit_size``: parameters with fewer elements
    (default 4096) keep fp32 state.
    """

    _bits = 8


class Lion(BlockOptimizer):
    """Lion with fp32 state (Chen et al. 2023, arXiv 2302.06675).

    Takes the arguments of :class:`AdamW` except ``eps``; use a 3 to 10 times smaller ``lr``.
    """

    _bits = 32

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        # bitsandbytes reads eps of every group, whatever the rule.
        defaults["eps"] = 1e-8
        super().__init__(params, defaults, _options("lion", self._bits, options))


class Lion8bit(Lion):
    """Lion with blockwise 8-bit state; takes ``min_8bit_size`` too."""

    _bits = 8


class SGD8bit(BlockOptimizer):
    """Gradient descent with momentum in blockwise 8-bit state, as in bitsandbytes.

    Args:
        params: parameters or groups, fp32, bf16 or fp16.
        lr: learning rate.
        momentum: decay of the momentum, above 0; kept in the groups as ``betas[0]``.
        weight_decay: added to the gradient.
        maximize: ascend instead.
        options: as in :class:`AdamW8bit`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if not 0.0 < real("momentum", momentum) < 1.0:
            raise ValueError(
                f"momentum: got {momentum}, expected 0 < momentum < 1; "
                "without momentum use torch.optim.SGD, which keeps no state"
            )
        defaults = {
            "lr": lr,
            "betas": (momentum, 0.0),
            "eps": 0.0,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, _options("momentum", 8, options))


class PagedAdamW(PagedOptimizer, AdamW):
    """AdamW whose fp32 state lives in RAM up to a budget and on disk beyond it.

    Takes the arguments of :class:`AdamW` and those of
    :class:`~peftkern.optim.paged.PagedOptimizer`.
    """


class PagedAdamW8bit(PagedOptimizer, AdamW8bit):
    """:class:`PagedAdamW` with blockwise 8-bit state."""
