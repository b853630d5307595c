"""One training step, run for its allocations: on the meta device, or for real to compare."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkern.memory.shapes import layers_of


@dataclass
class StepTrace:
    """What one step allocates beyond the parameters and buffers.

    Args:
        saved: bytes kept for the backward pass, by the class of the module that kept them.
        first_peak: most bytes alive at once, gradients included, until the backward pass is
            through the first layer that it meets; grows with the activations of every layer.
        last_peak: the same in the last layer that it meets and after; grows with the gradients of
            every layer.
        middle_peak: the same in between, which with equal layers is never more than either.
    """

    saved: Counter[str] = field(default_factory=Counter)
    first_peak: int = 0
    last_peak: int = 0
    middle_peak: int = 0

    @property
    def peak(self) -> int:
        """Most bytes alive at once during the step."""
        return max(self.first_peak, self.last_peak, self.middle_peak)


def saved_activations(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """Bytes that autograd keeps between forward and backward, by class of module.

    Works on a real model as on one on the meta device; a storage that several operations keep
    counts once, parameters and buffers do not count.

    Args:
        model: the model that ``run`` calls.
        run: one forward pass; its result is held until everything is counted.

    Returns:
        Class name of the innermost module that was running -> bytes.
    """
    return _count_saved(model, run)[0]


def _count_saved(model: nn.Module, run: Callable[[], Any]) -> tuple[Counter[str], dict[int, int]]:
    """Saved bytes by class; and by storage, of those that layers of a list keep."""
    owned = _storages(model)
    kept: set[int] = set()  # no references: the backward pass must be able to free them
    saved: Counter[str] = Counter()
    inside: dict[int, int] = {}
    stack: list[tuple[str, bool]] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in owned and key not in kept:
            kept.add(key)
            name, in_layer = stack[-1] if stack else ("loss", False)
            saved[name] += storage.nbytes()
            if in_layer:
                inside[key] = storage.nbytes()
        return tensor

    with _module_stack(model, stack), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return saved, inside


def trace_step(model: nn.Module, loss: Callable[[], Tensor], device: str | None) -> StepTrace:
    """Run forward and backward of a model and follow every allocation.

    Args:
        model: the model; on the meta device nothing is computed.
        loss: one forward pass; returns the scalar to differentiate.
        device: ``"cpu"`` or ``"cuda"``: whose attention and dropout kernels to assume; ``None``
            for a real model, whose kernels are those that run.

    Returns:
        The bytes. Gradients of the parameters are gone afterwards.
    """
    live = _Live(_storages(model))
    result: dict[str, Tensor] = {}

    def run() -> Tensor:
        result["loss"] = loss()
        return result["loss"]

    with contextlib.nullcontext() if device is None else KernelsOf(device), live:
        saved, sizes = _count_saved(model, run)
        live.watch(sizes, len(layers_of(model)))
        value = result.pop("loss")
        if value.requires_grad:
            value.backward()
        del value
    for parameter in model.parameters():
        parameter.grad = None
    first, middle, last = live.peaks
    return StepTrace(saved, first, last, middle)


def _storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}


@contextlib.contextmanager
def _module_stack(model: nn.Module, stack: list[tuple[str, bool]]) -> Iterator[None]:
    """Keep the classes of the modules that are running, and whether they are part of a layer."""
    layers = {id(layer) for layer in layers_of(model)}

    watched = {id(module) for module in _watched(model)}

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in watched:
            below = bool(stack) and stack[-1][1]
            stack.append((type(module).__name__, below or id(module) in layers))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in watched:
            stack.pop()

    # For all modules at once: hooks on our layers would keep the fused kernels off.
    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watched(model: nn.Module) -> Iterator[nn.Module]:
    """The model's modules; of ours, without what is inside."""
    yield model
    if type(model).__module__.startswith("peftkern."):
        return
    for child in model.children():
        yield from _watched(child)


class _Live(TorchDispatchMode):
    """Adds up the storages that are alive, and remembers the most."""

    def __init__(self, owned: set[int]) -> None:
        super().__init__()
        self._owned = owned
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._saved: dict[int, int] = {}
        self._bounds = (-1.0, -1.0)
        self._left = 0
        self.now = 0
        self.peaks = [0, 0, 0]

    def watch(self, saved: dict[int, int], layers: int) -> None:
        """Tell which storages of layers the backward pass will consume."""
        self._saved = dict(saved)
        self._left = sum(saved.values())
        share = self._left / max(layers, 1)
        self._bounds = (self._left - share + 1, share + 1)  # a byte for rounding

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            # Models ask whether masks are all ones and sequences unpacked, to skip the mask: yes.
            return True if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._owned or key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)
            self._left -= self._saved.pop(key, 0)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        upper, lower = self._bounds
        phase = 0 if self._left > upper else 2 if self._left <= lower else 1
        self.peaks[phase] = max(self.peaks[phase], self.now)


class _Attention(torch.autograd.Function):
    """Allocations of a fused attention kernel: keeps q, k, v, the result and a row statistic."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty((*q.shape[:-2], q.shape[-2], v.shape[-1])).transpose(-2, -3)
        out = out.contiguous().transpose(-2, -3)
        statistic = q.new_empty(q.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else mask.to(q.dtype) if mask.dtype == torch.bool else mask
        ctx.save_for_backward(q, k, v, bias, out, statistic)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class KernelsOf(TorchFunctionMode):
    """On meta torch decomposes attention and dropout; a device with fused kernels does not."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda = device == "cuda"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_functional.scaled_dot_product_attention:
            q, k, v, *rest = args
            mask = rest[0] if rest else kwargs.get("attn_mask")
            p = rest[1] if len(rest) > 1 else kwargs.get("dropout_p", 0.0)
            # The CPU has no fused kernel with dropout: torch falls back to the decomposition.
            if p == 0.0 or self._cuda:
                return _Attention.apply(q, k, v, mask)
        if func is torch_functional.dropout and self._cuda:
            x = args[0]
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            training = args[2] if len(args) > 2 else kwargs.get("training", True)
            if training and p > 0.0:
                return torch.native_dropout(x, p, True)[0]
        return func(*args, **kwargs)
