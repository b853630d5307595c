"""``SparseDeltaLinear``: a frozen linear layer of which k entries train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.arguments import require_tensor
from peftkern.nn.adapter import check_adapter_name
from peftkern.nn.quantized import QuantizedLinear
from peftkern.nn.rows import by_rows
from peftkern.nn.structure import (
    default_device,
    dense_weight,
    features,
    hooks_of,
    is_conv1d,
    is_dense_linear,
    own_forward,
)
from peftkern.nn.weight_adapter import WeightAdapter

_SPAN = 1 << 20  # products that the path beside a foreign forward holds at a time


class SparseEntries(nn.Module):
    """One adapter's positions (frozen, int64 [k]) and values (trained, [k])."""

    indices: nn.Parameter
    values: nn.Parameter

    def __init__(self, indices: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        # A frozen parameter, not a buffer: DDP broadcasts buffers in every forward pass.
        self.indices = nn.Parameter(indices.to(device), requires_grad=False)
        self.values = nn.Parameter(torch.zeros(indices.numel(), dtype=dtype, device=device))

    def requires_grad_(self, requires_grad: bool = True) -> SparseEntries:
        """Switch the gradient of the values; positions have none."""
        self.values.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        return f"entries={self.values.numel()}"


class SparseDeltaLinear(WeightAdapter):
    """``y = x (W + scatter(values))ᵀ + bias`` over a frozen layer, for every active adapter.

    Only ``values`` [k] has a gradient and optimizer state; the gradient of W is sampled at the k
    positions and never formed. The weight itself is not written while training: it may be tied,
    sharded or quantized, and small values would be lost in 16 bits. :meth:`merge` writes it.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, ``Linear4bit`` or ``Linear8bit``; it is
            frozen in place and not copied.
        indices: int64 [k], ascending flat positions ``row * in + column`` in the weight [out, in].
        adapter_name: name of the first adapter.
        values_dtype: dtype of the values, float32 when left out.

    Raises:
        TypeError: the base layer is not a linear layer, or indices are no int64 tensor.
        ValueError: positions out of range, unsorted or repeated.

    Example:
        >>> layer = SparseDeltaLinear(torch.nn.Linear(64, 32), torch.tensor([0, 65, 2047]))
        >>> layer(torch.randn(2, 64)).shape, layer.sparse_delta["default"].values.shape
        (torch.Size([2, 32]), torch.Size([3]))
    """

    _adapter_containers = ("sparse_delta",)
    serves_rows = True
    on_linear = True

    def __init__(
        self,
        base_layer: nn.Module,
        indices: Tensor,
        adapter_name: str = "default",
        values_dtype: torch.dtype | None = None,
    ) -> None:
        if not (isinstance(base_layer, QuantizedLinear) or is_dense_linear(base_layer)):
            raise TypeError(
                "base_layer: expected nn.Linear, Conv1D, Linear4bit or Linear8bit, got "
                f"{type(base_layer).__name__}"
            )
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.sparse_delta = nn.ModuleDict()
        self._reads_weight = isinstance(base_layer, QuantizedLinear) or not own_forward(base_layer)
        self.training = base_layer.training
        self.add_adapter(indices, adapter_name, values_dtype)

    def add_adapter(
        self,
        indices: Tensor,
        adapter_name: str = "default",
        values_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter and make it the active one; arguments as for the class.

        Raises:
            ValueError: the name is taken or not usable, or positions do not fit.
            RuntimeError: adapters are merged into the base.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.sparse_delta:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        if self.merged:
            raise RuntimeError("adapters are merged into the base; unmerge before adding another")
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise TypeError("indices: expected an int64 tensor of one dimension")
        require_tensor("indices", indices)
        if indices.device.type == "meta":
            raise ValueError("indices: is on meta, expected positions")
        check_positions(indices, self.in_features * self.out_features)
        dtype = torch.float32 if values_dtype is None else values_dtype
        entries = SparseEntries(indices, dtype, default_device(self.base_layer))
        self.sparse_delta[adapter_name] = entries.train(self.training)
        self.set_adapter(adapter_name)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return features(self.base_layer)[1]

    @property
    def fan_in_fan_out(self) -> bool:
        """True when the base layer stores its weight as [in, out]."""
        return is_conv1d(self.base_layer)

    def entries(self, *names: str) -> tuple[Tensor, Tensor]:
        """Positions and values of the adapters together; where they share one, values add up."""
        held = [self.held(name) for name in names]
        if len(held) == 1:
            return held[0].indices, held[0].values
        positions = torch.cat([entries.indices.detach() for entries in held])
        merged, place = torch.unique(positions, sorted=True, return_inverse=True)
        dtype = held[0].values.dtype
        values = torch.cat([entries.values.to(dtype) for entries in held])
        return merged, values.new_zeros(merged.shape).index_add(0, place, values)

    def held(self, name: str) -> SparseEntries:
        """The tensors of one adapter."""
        entries = self.sparse_delta[name]
        assert isinstance(entries, SparseEntries)
        return entries

    def why_not_fused(self) -> str | None:
        """Why the kernel does not serve this layer; ``None`` when it does."""
        if not self._reads_weight:
            return f"{type(self.base_layer).__name__} computes a forward of its own"
        hooks = hooks_of(self.base_layer)
        return None if hooks is None else f"its base layer carries {hooks}, which must run"

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """``sparse_delta_linear`` and arguments for 8 rows, or why it does not serve the layer."""
        reason = self.why_not_fused()
        if reason is not None:
            return f"not fused: {reason}"
        base = self.base_layer
        frozen: tuple[Any, ...]
        if isinstance(base, QuantizedLinear):
            q = base.quantized
            frozen, dtype = (q.weight, *q.statistics(), q.quant_type, q.blocksize), q.dtype
        else:
            weight = dense_weight(base)
            frozen, dtype = (weight, None, None, None, "dense", 0), weight.dtype
        x = torch.empty(8, self.in_features, dtype=dtype, device=frozen[0].device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return "sparse_delta_linear", (x, *frozen, self.out_features, bias, *self.entries(name))

    def forward(self, x: Tensor) -> Tensor:
        """The adapted linear map; x [..., in] -> [..., out] in the dtype of x (autocast obeyed)."""
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(x)
        choice = self.row_choice()
        if choice is None:
            return self._with(x, self._active_adapter)
        known = self.adapter_names
        return by_rows(choice, x, lambda name, part: self._with(part, (name,)), known)

    def _with(self, x: Tensor, adapters: Sequence[str | None]) -> Tensor:
        names = [name for name in adapters if name is not None and name in self.sparse_delta]
        if not names:
            return self.base_layer(x)
        indices, values = self.entries(*names)
        if self.why_not_fused() is not None:
            y = self.base_layer(x)
            return (y + self._term(x, indices, values)).to(y.dtype)
        base = self.base_layer
        frozen = base.quantized if isinstance(base, QuantizedLinear) else dense_weight(base)
        return functional.sparse_delta_linear(x, frozen, indices, values, self.bias)

    def _term(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """What the entries add to y, in fp32, without the weight."""
        rows, columns = indices // self.in_features, indices % self.in_features
        flat = x.reshape(-1, self.in_features)
        out = torch.zeros(flat.shape[0], self.out_features, device=x.device)
        step = max(1, _SPAN // max(1, flat.shape[0]))
        for first in range(0, indices.numel(), step):
            part = slice(first, first + step)
            out = out.index_add(1, rows[part], flat[:, columns[part]].float() * values[part])
        return out.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """The update of one adapter, fp32 [out, in], zero but for its entries."""
        indices, values = self.entries(name)
        delta = torch.zeros(self.out_features * self.in_features, device=values.device)
        delta[indices] = values.float()
        return delta.view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        state = ", disabled" if self._disable_adapters else ", merged" if self.merged else ""
        return f"active={','.join(self._active_adapter)!r}{state}"


def check_positions(indices: Tensor, numel: int) -> None:
    """Refuse positions that the kernels refuse, where they are made rather than where used.

    Raises:
        ValueError: out of range, unsorted or repeated.
    """
    if indices.numel() == 0 or indices.device.type == "meta":
        return
    if int(indices[0]) < 0 or int(indices[-1]) >= numel:
        raise ValueError(
            f"indices: got {int(indices[0])} to {int(indices[-1])}, expected positions in "
            f"[0, {numel})"
        )
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError("indices: expected ascending positions without repeats")
