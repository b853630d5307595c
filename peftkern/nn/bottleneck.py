"""``BottleneckAdapter``, and the layer of named ones between a sub-layer and its residual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.arguments import real, whole
from peftkern.functional.bottleneck import activation_name
from peftkern.nn.adapter import AdapterLayer, check_adapter_name
from peftkern.nn.structure import hooks_of
from peftkern.ops.bottleneck.reference import LEAKY_SLOPE

BOTTLENECK_INITIALISATIONS = ("bert", "mam_adapter", "houlsby")
SCALINGS = ("learned", "channel")
_EAGER: dict[str, Any] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda z: nn.functional.leaky_relu(z, LEAKY_SLOPE),
}


class BottleneckAdapter(nn.Module):
    """A bottleneck: down, activation, up, scale, dropout, residual, in one kernel.

    Args:
        width: size of the hidden states.
        bottleneck: size of the bottleneck; ``width // reduction_factor`` (at least 1) when left
            out.
        reduction_factor: as above; below 1 the bottleneck is wider than the model.
        non_linearity: an activation of :func:`peftkern.functional.bottleneck_adapter`.
        ln_before: a trainable LayerNorm before the down projection.
        ln_after: a trainable LayerNorm on the result.
        adapter_residual_before_ln: with ``ln_after``: add the residual before that LayerNorm.
        is_parallel: made to run beside the sub-layer: the residual is added last.
        scaling: a number, ``"learned"`` (one trained number) or ``"channel"`` (one a channel).
        use_gating: multiply by the mean over the sequence of a trained sigmoid gate; the input
            must then be [batch, sequence, width].
        dropout: probability of dropping an element of the scaled result.
        stochastic_depth: probability of dropping the whole result of one sample in training.
        init_weights: ``"bert"`` (N(0, 0.02)), ``"mam_adapter"`` (Kaiming-uniform down, zero up)
            or ``"houlsby"`` (N(0, 0.01) cut at two deviations).
        init_weights_seed: seed of the initialisation; torch's own generator when left out.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Names and order of operations are those of AdapterHub's ``adapters``, so state dicts agree:
    ``adapter_down.0.weight`` [bottleneck, width] (``adapter_down.1`` behind a LayerNorm),
    ``adapter_up.weight`` [width, bottleneck], biases, ``scaling``, ``gate``,
    ``adapter_norm_before``, ``adapter_norm_after``.

    Example:
        >>> adapter = BottleneckAdapter(64, reduction_factor=16, non_linearity="gelu")
        >>> x = torch.randn(2, 5, 64)
        >>> adapter(x, residual=x).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        width: int,
        bottleneck: int | None = None,
        reduction_factor: float = 16,
        non_linearity: str = "relu",
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        is_parallel: bool = False,
        scaling: float | str = 1.0,
        use_gating: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        init_weights: str = "bert",
        init_weights_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.width = whole("width", width)
        self.bottleneck = bottleneck_width(width, reduction_factor, bottleneck)
        self.non_linearity = activation_name(non_linearity, "non_linearity")
        self.adapter_residual_before_ln = adapter_residual_before_ln and not is_parallel
        self.is_parallel = is_parallel
        self.dropout = _share("dropout", dropout)
        self.stochastic_depth = _share("stochastic_depth", stochastic_depth)
        if init_weights not in BOTTLENECK_INITIALISATIONS:
            known = ", ".join(BOTTLENECK_INITIALISATIONS)
            raise ValueError(f"init_weights: got {init_weights!r}, expected one of {known}")
        check_scaling(scaling)
        down: list[nn.Module] = []
        if ln_before:
            self.adapter_norm_before = nn.LayerNorm(width)
            down.append(self.adapter_norm_before)
        down.append(nn.Linear(width, self.bottleneck))
        self.adapter_down = nn.Sequential(*down)
        self.adapter_up = nn.Linear(self.bottleneck, width)
        self.scaling: float | nn.Parameter
        if isinstance(scaling, str):
            self.scaling = nn.Parameter(torch.ones(width if scaling == "channel" else 1))
        else:
            self.scaling = float(scaling)
        self.adapter_norm_after = nn.LayerNorm(width) if ln_after else None
        self.gate = nn.Linear(width, 1) if use_gating else None
        forked = torch.random.fork_rng(devices=[]) if init_weights_seed is not None else None
        with forked or nullcontext():
            if init_weights_seed is not None:
                torch.manual_seed(init_weights_seed)
            self._initialise(init_weights)

    @torch.no_grad()
    def _initialise(self, how: str) -> None:
        down, up = self.down, self.adapter_up
        if how == "bert":
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        elif how == "mam_adapter":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        else:
            for linear in (down, up):
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        if self.gate is not None and how != "houlsby":
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    @property
    def down(self) -> nn.Linear:
        """The down projection."""
        return self.adapter_down[-1]  # type: ignore[return-value]

    def why_not_fused(self) -> str | None:
        """Why the fused kernel does not serve this adapter; ``None`` when it does."""
        for label, module in (("down", self.down), ("up", self.adapter_up)):
            hooks = hooks_of(module)
            if hooks is not None:
                return f"its {label} projection carries {hooks}, which must run"
        return None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The adapter's result, with the residual where there is one; [..., width], x's dtype."""
        z = x if len(self.adapter_down) == 1 else _norm(self.adapter_norm_before, x)
        factor = self._factor(x)
        after = self.adapter_norm_after
        inside = factor is None and (after is None or self.adapter_residual_before_ln)
        y = self._bottleneck(z, residual if inside else None)
        if factor is not None:
            y = y * factor
        if inside:
            return y if after is None else _norm(after, y)
        if self.adapter_residual_before_ln and residual is not None:
            y = y + residual
        if after is not None:
            y = _norm(after, y)
        if not self.adapter_residual_before_ln and residual is not None:
            y = y + residual
        return y

    def _bottleneck(self, z: Tensor, residual: Tensor | None) -> Tensor:
        if self.why_not_fused() is not None:
            # Called, not read: hooks on the projections (sharding, offloading) must run.
            h = _EAGER[self.non_linearity](self.down(z.to(self.down.weight.dtype)))
            y = self.adapter_up(h) * self.scaling
            y = functional.dropout(y, self.dropout, self.training).to(z.dtype)
            return y if residual is None else y + residual
        return functional.bottleneck_adapter(
            z,
            self.down.weight,
            self.down.bias,
            self.adapter_up.weight,
            self.adapter_up.bias,
            self.non_linearity,
            self.scaling,
            residual,
            self.dropout,
            self.training,
        )

    def _factor(self, x: Tensor) -> Tensor | None:
        """What multiplies a whole sample: stochastic depth and the gate."""
        factor = None
        drop = 0.0 if self.is_parallel or not self.training else self.stochastic_depth
        if drop > 0.0:
            shape = (x.shape[0], *(1,) * (x.dim() - 1))
            factor = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - drop)
            factor = factor / (1 - drop)
        if self.gate is not None:
            if x.dim() != 3:
                raise ValueError(
                    f"x: got shape {tuple(x.shape)}, expected [batch, sequence, width]: the gate "
                    "is a mean over the sequence"
                )
            gate = torch.sigmoid(self.gate(x.to(self.gate.weight.dtype)))
            gate = gate.mean(dim=1).unsqueeze(-1).to(x.dtype)
            factor = gate if factor is None else factor * gate
        return factor

    def extra_repr(self) -> str:
        fixed = "" if isinstance(self.scaling, nn.Parameter) else f", scaling={self.scaling}"
        return f"bottleneck={self.bottleneck}, non_linearity={self.non_linearity!r}{fixed}"


class BottleneckLayer(AdapterLayer):
    """Named bottleneck adapters between a sub-layer and the residual connection behind it.

    Args:
        width: size of the hidden states.
        norm: the model's own normalisation of the sum of sub-layer and residual (models that
            normalise after the residual connection), or ``None``.
        replaces: whether the caller can take the finished result from :meth:`join`.

    The model goes on adding its residual to what :meth:`join` returns.
    """

    _adapter_containers = ("adapters",)
    _adapter_tables = ("placement",)

    def __init__(self, width: int, norm: nn.Module | None = None, replaces: bool = True) -> None:
        super().__init__()
        self.width = width
        self.replaces = replaces
        self._norm = (norm,)  # in a tuple: it belongs to the model, not to this layer
        self.adapters = nn.ModuleDict()
        self.placement: dict[str, Placement] = {}

    def add_adapter(
        self,
        adapter_name: str,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        residual_before_ln: bool | str = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        """Add an adapter and make it the active one.

        Args:
            adapter_name: its name.
            original_ln_before: feed it the sum with the residual, normalised as the model does.
            original_ln_after: keep the model's residual and normalisation behind it.
            residual_before_ln: True: its own skip starts at the sub-layer's result; False: at its
                input; ``"post_add"``: at the sum before the normalisation.
            device: where its tensors live.
            dtype: their dtype.
            options: those of :class:`BottleneckAdapter`.

        Raises:
            ValueError: the name is taken or not usable, or an option out of range.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.adapters:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        adapter = BottleneckAdapter(self.width, **options)
        self.adapters[adapter_name] = adapter.to(device=device, dtype=dtype).train(self.training)
        self.placement[adapter_name] = Placement(
            original_ln_before, original_ln_after, residual_before_ln
        )
        self.set_adapter(adapter_name)

    def check(self, names: list[str]) -> None:
        """Refuse several active adapters of which one does more than add to the sub-layer.

        Raises:
            ValueError: naming it.
        """
        here = [name for name in names if name in self.adapters]
        for name in here if len(here) > 1 else ():
            if not self._adds(name):
                raise ValueError(
                    f"adapter {name!r} does not only add to the sub-layer's result (original_ln_"
                    "after, residual_before_ln, ln_after), so it cannot be active beside others"
                )

    def set_adapter(self, names: str | Sequence[str], trainable: bool = True) -> None:
        """Make exactly these adapters active; see :class:`AdapterLayer`.

        Raises:
            ValueError: several of them cannot be active together.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        self.check(chosen)
        super().set_adapter(chosen, trainable)

    def _adds(self, name: str) -> bool:
        adapter, place = self.adapter(name), self.placement[name]
        if adapter.adapter_norm_after is not None and adapter.adapter_residual_before_ln:
            return False
        if adapter.is_parallel or place.residual_before_ln is True:
            return place.original_ln_after
        # The skip starts at the sum with the residual, which the model is about to make itself.
        return (
            not place.original_ln_after
            and place.original_ln_before
            and place.residual_before_ln is False
            and self._norm[0] is None
        )

    def adapter(self, name: str) -> BottleneckAdapter:
        """The adapter of this name."""
        return self.adapters[name]  # type: ignore[return-value]

    def active_here(self) -> list[str]:
        """The adapters that take part in the forward pass of this layer."""
        if self._disable_adapters:
            return []
        return [name for name in self._active_adapter if name in self.adapters]

    def join(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, bool]:
        """Run the active adapters.

        Args:
            hidden: the sub-layer's result [..., width].
            residual: what the model adds to it.

        Returns:
            What takes the result's place; and whether it is the finished output instead, to which
            the model's residual and normalisation must not be applied.
        """
        names = self.active_here()
        result = hidden
        for name in names:
            adapter = self.adapter(name)
            entry, skip = self._entry(name, hidden, residual)
            if self._adds(name):
                result = adapter(entry, result)
                continue
            result = adapter(entry, skip)
            if not self.placement[name].original_ln_after:
                return (result, True) if self.replaces else (result - residual, False)
        return result, False

    def _entry(self, name: str, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into an adapter, and what its own skip connection carries."""
        adapter, place = self.adapter(name), self.placement[name]
        if adapter.is_parallel:
            return residual, hidden
        norm = self._norm[0]
        entry = skip = hidden
        if place.original_ln_before:
            entry = hidden + residual
            if place.residual_before_ln == "post_add":
                skip = entry
            entry = entry if norm is None else norm(entry)
        if place.residual_before_ln is False:
            skip = entry
        return entry, skip

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """The op and its arguments; see :class:`AdapterLayer`."""
        adapter = self.adapter(name)
        reason = adapter.why_not_fused()
        if reason is not None:
            return reason
        down, up = adapter.down, adapter.adapter_up
        scale = adapter.scaling if isinstance(adapter.scaling, Tensor) else None
        x = torch.empty(8, self.width, dtype=down.weight.dtype, device=down.weight.device)
        weights = (down.weight, down.bias, up.weight, up.bias, scale)
        return "bottleneck_adapter", (x, *weights, x, adapter.non_linearity, 0.0, None, False)

    def extra_repr(self) -> str:
        return f"width={self.width}, active={','.join(self._active_adapter)!r}"


class Placement:
    """How one adapter sits between the sub-layer, the residual and the model's normalisation."""

    def __init__(
        self, original_ln_before: bool, original_ln_after: bool, residual_before_ln: bool | str
    ) -> None:
        if residual_before_ln not in (True, False, "post_add"):
            raise ValueError(
                f"residual_before_ln: got {residual_before_ln!r}, expected True, False or "
                "'post_add'"
            )
        self.original_ln_before = original_ln_before
        self.original_ln_after = original_ln_after
        self.residual_before_ln = residual_before_ln


def bottleneck_width(width: int, reduction_factor: float, bottleneck: int | None = None) -> int:
    """Size of the bottleneck: given, or ``int(width // reduction_factor)``, at least 1.

    Raises:
        ValueError: not a positive number.
    """
    if bottleneck is not None:
        if isinstance(bottleneck, bool) or not isinstance(bottleneck, int) or bottleneck < 1:
            raise ValueError(f"bottleneck: expected a positive integer, got {bottleneck!r}")
        return whole("bottleneck", bottleneck)
    if isinstance(reduction_factor, bool) or real("reduction_factor", reduction_factor) <= 0:
        raise ValueError(f"reduction_factor: expected a positive number, got {reduction_factor!r}")
    return max(1, int(width // reduction_factor))


def check_scaling(scaling: float | str) -> None:
    """Raise ``ValueError`` unless ``scaling`` is a number, ``"learned"`` or ``"channel"``."""
    plain = isinstance(scaling, int | float) and not isinstance(scaling, bool)
    if plain:
        real("scaling", scaling)
    elif scaling not in SCALINGS:
        raise ValueError(
            f"scaling: got {scaling!r}, expected a number, {' or '.join(map(repr, SCALINGS))}"
        )


def _share(name: str, value: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In the LayerNorm's own dtype, back in x's."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
