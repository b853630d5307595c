"""``LoRAParameters``: low-rank adapters on bare parameters, such as stacked experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.arguments import real, whole
from peftkern.nn.adapter import TORCH, AdapterLayer, check_adapter_name
from peftkern.nn.experts import STACKED, Product, QuantizedExperts, run_experts, why_not_fused
from peftkern.nn.lora_init import draw_factors
from peftkern.nn.merging import Merged, merge_into, relative_error, unmerge_from
from peftkern.quant import QuantizedTensor

_INITS = (True, False, "gaussian")


class LoRAParameters(AdapterLayer):
    """``W_e + scaling * B_e A_e`` for chosen 2-D or 3-D parameters of a module.

    For experts stacked as transformers 5 stacks them, dense or quantized, each expert's rows go
    through its fused product, and no weight is changed or copied. Any other module computes its
    own forward with the sums in place of its parameters.

    Args:
        base_layer: the module that has the parameters; they are frozen in place.
        parameters: their names.
        r: rank for each expert; one for all, or by name.
        lora_alpha: numerator of the scaling; one for all, or by name.
        use_rslora: scaling lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_name: name of the first adapter.
        init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` or False (both random).
        lora_dtype: dtype of A and B, float32 when left out.

    Raises:
        ValueError: no such parameter, one of another number of dimensions, or a number out of
            range.

    Names and layouts are PEFT's (``target_parameters``): ``lora_A[name][parameter]`` [r * E, in],
    rank by rank of the first expert, then of the second; ``lora_B[name][parameter]`` [out, r * E],
    expert by expert of the first rank, then of the second.

    Example:
        >>> layer = LoRAParameters(torch.nn.Linear(8, 4, bias=False), ["weight"], r=2)
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 4])
    """

    _adapter_containers = ("lora_A", "lora_B")
    _adapter_tables = ("r", "lora_alpha", "scaling", "use_rslora")

    def __init__(
        self,
        base_layer: nn.Module,
        parameters: Sequence[str],
        r: int | Mapping[str, int] = 8,
        lora_alpha: float | Mapping[str, float] = 8,
        use_rslora: bool = False,
        adapter_name: str = "default",
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.parameter_names = tuple(parameters)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, dict[str, int]] = {}
        self.lora_alpha: dict[str, dict[str, float]] = {}
        self.scaling: dict[str, dict[str, float]] = {}
        self.use_rslora: dict[str, bool] = {}
        self._merges: dict[str, list[Merged] | nn.Parameter] = {}
        self.training = base_layer.training
        if not self.parameter_names:
            raise ValueError("parameters: got none, expected names of parameters of base_layer")
        for name in self.parameter_names:
            self.shape(name)
        options = (use_rslora, init_lora_weights, lora_dtype)
        self.add_adapter(adapter_name, r, lora_alpha, *options)

    def add_adapter(
        self,
        adapter_name: str,
        r: int | Mapping[str, int] = 8,
        lora_alpha: float | Mapping[str, float] = 8,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter and make it the active one; arguments as for the class.

        Raises:
            ValueError: the name is taken or not usable, or a number is out of range.
            RuntimeError: adapters are merged.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        if self.merged:
            raise RuntimeError("adapters are merged into the base; unmerge before adding another")
        if init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights: got {init_lora_weights!r}; parameters take True, 'gaussian' "
                "or False"
            )
        ranks = {n: r[n] if isinstance(r, Mapping) else r for n in self.parameter_names}
        alphas = {
            n: lora_alpha[n] if isinstance(lora_alpha, Mapping) else lora_alpha
            for n in self.parameter_names
        }
        downs, ups = nn.ModuleDict(), nn.ModuleDict()
        for name in self.parameter_names:
            rank = ranks[name]
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"r: expected a positive integer, got {rank!r}")
            whole("r", rank)
            real("lora_alpha", alphas[name])
            count, outputs, inputs = self.shape(name)
            device = next(self.base_layer.parameters()).device
            where = device if device.type == "meta" else torch.device("cpu")
            # Drawn on the CPU in PEFT's order, as for linear layers.
            down = nn.Linear(inputs, rank * count, bias=False, device=where)
            up = nn.Linear(rank * count, outputs, bias=False, device=where)
            draw_factors(down, up, init_lora_weights, rank, torch.float32)
            dtype = lora_dtype if lora_dtype is not None else torch.float32
            downs[name] = down.to(device=device, dtype=dtype)
            ups[name] = up.to(device=device, dtype=dtype)
        self.lora_A[adapter_name] = downs.train(self.training)
        self.lora_B[adapter_name] = ups.train(self.training)
        self.r[adapter_name] = ranks
        self.lora_alpha[adapter_name] = alphas
        self.use_rslora[adapter_name] = bool(use_rslora)
        self.scaling[adapter_name] = {
            n: alphas[n] / (math.sqrt(ranks[n]) if use_rslora else ranks[n]) for n in ranks
        }
        self.set_adapter(adapter_name)

    def shape(self, parameter: str) -> tuple[int, int, int]:
        """(experts, out, in) of a parameter.

        Raises:
            ValueError: there is none of this name, or it is neither a matrix nor a stack of them.
        """
        base = self.base_layer
        if isinstance(base, QuantizedExperts) and parameter in STACKED:
            first = base.layers(parameter)[0]
            return base.num_experts, first.out_features, first.in_features
        value = base._parameters.get(parameter)
        if value is None:
            known = ", ".join(base._parameters) or "none"
            raise ValueError(
                f"parameters: {type(base).__name__} has no parameter {parameter!r}; it has {known}"
            )
        if value.ndim == 2:
            return 1, value.shape[0], value.shape[1]
        if value.ndim != 3:
            raise ValueError(
                f"parameters: {parameter!r} has shape {tuple(value.shape)}, expected a matrix or a "
                "stack of matrices"
            )
        count, outputs, inputs = value.shape
        return (count, inputs, outputs) if self._turned else (count, outputs, inputs)

    @property
    def _turned(self) -> bool:
        """Whether stacks are stored as [experts, in, out]."""
        return bool(getattr(self.base_layer, "is_transposed", False))

    def factors(self, name: str, parameter: str) -> tuple[Tensor, Tensor]:
        """A [r * E, in] and B [out, r * E] of one adapter, as the file holds them."""
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        return down[parameter].weight, up[parameter].weight

    def stacks(self, name: str, parameter: str) -> tuple[Tensor, Tensor]:
        """The same by expert: A [E, r, in] and B [E, out, r]."""
        a, b = self.factors(name, parameter)
        count = self.shape(parameter)[0]
        up = b.reshape(b.shape[0], -1, count).permute(2, 0, 1).contiguous()
        return a.reshape(count, -1, a.shape[1]), up

    def why_not_fused(self) -> str | None:
        """Why the base computes its own forward, with summed parameters; ``None`` if not."""
        if any(name not in STACKED for name in self.parameter_names):
            return f"{type(self.base_layer).__name__} is not a stack of gated experts"
        return why_not_fused(self.base_layer)

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """The op and arguments for 8 rows of the first expert, or why it does not serve."""
        reason = self.why_not_fused()
        if reason is not None:
            return f"{TORCH}: {reason}"
        parameter = self.parameter_names[0]
        weight = self._weight(parameter, 0)
        if isinstance(weight, QuantizedTensor):
            stored: tuple[Any, ...] = (
                weight.weight, *weight.statistics(), weight.quant_type, weight.blocksize,
            )  # fmt: skip
            dtype = weight.dtype
        else:
            stored, dtype = (weight, None, None, None, "dense", 0), weight.dtype
        _, outputs, inputs = self.shape(parameter)
        x = torch.empty(8, inputs, dtype=dtype, device=stored[0].device)
        a, b = (stack[0] for stack in self.stacks(name, parameter))
        scaling = self.scaling[name][parameter]
        return "lora_linear", (x, *stored, outputs, None, a, b, scaling, 0.0, None)

    def _weight(self, parameter: str, expert: int) -> Tensor | QuantizedTensor:
        base: Any = self.base_layer
        if isinstance(base, QuantizedExperts):
            return base.layers(parameter)[expert].quantized
        weight: Tensor = getattr(base, parameter)[expert]
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, with the adapted parameters."""
        names = [name for name in self._active_adapter if name in self.lora_A]
        if self._disable_adapters or self.merged_adapters or not names:
            return self.base_layer(*args, **kwargs)
        if self.row_choice() is not None:
            raise ValueError("adapter_names: adapters on parameters cannot differ by row")
        if self.why_not_fused() is None:
            return self._by_expert(names, *args, **kwargs)
        base: Any = self.base_layer
        sums = {p: getattr(base, p) + self._update(names, p) for p in self.parameter_names}
        return torch.func.functional_call(base, sums, args, kwargs)

    def _by_expert(
        self, names: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        products = (self._product(names, parameter) for parameter in STACKED)
        routing = (hidden_states, top_k_index, top_k_weights)
        return run_experts(self.base_layer, *routing, *products)

    def _product(self, names: list[str], parameter: str) -> Product:
        base: Any = self.base_layer
        if parameter not in self.parameter_names:
            if isinstance(base, QuantizedExperts):
                return base.product(parameter)
            stack = getattr(base, parameter)
            return lambda expert, x: nn.functional.linear(x, stack[expert])
        stacks = [(*self.stacks(n, parameter), self.scaling[n][parameter]) for n in names]

        def product(expert: int, x: Tensor) -> Tensor:
            a, b, scaling = stacks[0]
            weight = self._weight(parameter, expert)
            y = functional.lora_linear(x, weight, a[expert], b[expert], scaling)
            for a, b, scaling in stacks[1:]:
                low = nn.functional.linear(x.to(a.dtype), a[expert])
                y = y + (nn.functional.linear(low, b[expert]) * scaling).to(y.dtype)
            return y

        return product

    def _update(self, names: Sequence[str], parameter: str) -> Tensor:
        """What these adapters add to a parameter, in its shape and dtype."""
        weight: Any = getattr(self.base_layer, parameter)
        total: Tensor | None = None
        for name in names:
            one = self.delta_weight(name, parameter)
            total = one if total is None else total + one
        assert total is not None
        return (total[0] if weight.ndim == 2 else total).to(weight.dtype)

    def delta_weight(self, name: str, parameter: str) -> Tensor:
        """The update of one adapter: scaling * B A for each expert, as the parameter is stored."""
        a, b = self.stacks(name, parameter)
        delta = torch.bmm(b, a) * self.scaling[name][parameter]
        return delta.mT if self._turned else delta

    @torch.no_grad()
    def merge(
        self, adapter_names: list[str] | None = None, max_error: float | None = None
    ) -> float:
        """Write adapters into the parameters; see :meth:`LoRALinear.merge`.

        Returns:
            The largest relative error of any parameter or expert.

        Raises:
            ValueError: an unknown adapter, a non-finite update, or an error above ``max_error``;
                nothing has been written then.
            RuntimeError: adapters are merged already.
        """
        names = self._names_to_merge(adapter_names)
        if not names:
            return 0.0
        worst = 0.0
        try:
            for parameter in self.parameter_names:
                worst = max(worst, self._merge_one(names, parameter, max_error))
        except Exception:
            self.unmerge()
            raise
        self.merged_adapters = names
        return worst

    def _merge_one(self, names: Sequence[str], parameter: str, max_error: float | None) -> float:
        deltas = [self.delta_weight(name, parameter).float() for name in names]
        delta = torch.stack(deltas).sum(0)
        base: Any = self.base_layer
        if isinstance(base, QuantizedExperts):
            done: list[Merged] = []
            self._merges[parameter] = done
            for layer, one in zip(base.layers(parameter), delta, strict=True):
                done.append(merge_into(layer, one, max_error))
            return max(merged.error for merged in done)
        if not bool(torch.isfinite(delta).all()):
            raise ValueError("the update to merge contains NaN or infinity; nothing was written")
        weight = getattr(base, parameter)
        update = delta[0] if weight.ndim == 2 else delta
        written = (weight.float() + update).to(weight.dtype)
        error = relative_error(written, weight, update)
        if max_error is not None and error > max_error:
            raise ValueError(
                f"max_error: rounding {parameter} to {weight.dtype} would lose {error:.3g} of the "
                f"update, more than {max_error:g}; nothing was written"
            )
        self._merges[parameter] = weight
        base._parameters[parameter] = nn.Parameter(written, requires_grad=False)
        return error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the parameters back exactly as they were; does nothing when nothing is merged."""
        base: Any = self.base_layer
        for parameter, kept in self._merges.items():
            if isinstance(kept, nn.Parameter):
                base._parameters[parameter] = kept
                continue
            for layer, merged in zip(base.layers(parameter), kept, strict=False):
                unmerge_from(layer, merged)
        self._merges = {}
        self.merged_adapters = []

    def extra_repr(self) -> str:
        state = ", disabled" if self._disable_adapters else ", merged" if self.merged else ""
        return f"parameters={self.parameter_names}, r={self.r}{state}"
