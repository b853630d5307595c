"""Layers that share their input compute together: q, k and v of an attention, gate and up.

The model's own code goes on calling one layer after the other. The first that is called with a
tensor computes the others' results as well, in one call of :func:`lora_linear_group`; they wait
until the others are called with that very tensor. So the input is read once, and the gradient of
the input is summed once instead of being added up by autograd.

Whether layers share their input is seen, not assumed: a layer that is called with another tensor
computes alone (with those that are still to be called), and from the next call of the model on the
two no longer go together. Results do not depend on any of this but for the rounding of the input's
gradient, which is summed in fp32.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkern import functional
from peftkern.functional.arguments import autocasts

if TYPE_CHECKING:
    from peftkern.nn.lora import LoRALinear

_STRIKES = 2  # passes that leave results unused before their layers compute alone


class _Waiting:
    """Results for one input that their layers have not asked for yet."""

    def __init__(self, x: Tensor, results: dict[int, Tensor]) -> None:
        self.x, self.results = x, results
        self.facts = _facts(x)
        self.thread = threading.get_ident()

    def take(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        if self.x is not x or self.facts != _facts(x):
            return None
        return self.results.pop(id(layer), None)


def _facts(x: Tensor) -> tuple[Any, ...]:
    """What besides the tensor a result depends on."""
    version = 0 if x.is_inference() else x._version
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if autocasts(x) else None
    return version, cast, torch.is_grad_enabled()


class SharedInput:
    """Layers of one parent that are expected to get the same input.

    Args:
        layers: by name in the parent; of one width of input.

    A layer asks :meth:`output` before it computes on its own.
    """

    def __init__(self, layers: Mapping[str, LoRALinear]) -> None:
        self.names = {id(layer): name for name, layer in layers.items()}
        self._blocks: list[tuple[LoRALinear, ...]] = [tuple(layers.values())]
        self._wrong: set[int] = set()  # layers that did not go with the one called before
        self._strikes = 0
        self._called: set[int] = set()
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies hold other layers: their ids are taken again.
        layers = [layer for block in self._blocks for layer in block]
        names = [self.names[id(layer)] for layer in layers]
        return {"layers": layers, "names": names, "sizes": [len(b) for b in self._blocks]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layers = iter(state["layers"])
        self.__init__(dict(zip(state["names"], state["layers"], strict=True)))  # type: ignore[misc]
        self._blocks = [tuple(next(layers) for _ in range(size)) for size in state["sizes"]]

    def partners(self, layer: LoRALinear) -> list[str]:
        """Names of the layers that compute together with this one."""
        return [self.names[id(other)] for other in self._block(layer) if other is not layer]

    def _block(self, layer: LoRALinear) -> tuple[LoRALinear, ...]:
        return next((b for b in self._blocks if any(layer is other for other in b)), ())

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """``layer(x)``, computed together with others; ``None``: it is to compute on its own."""
        block = self._block(layer)
        if len(block) < 2 or torch.compiler.is_compiling():
            return None
        waiting = self._waiting
        if waiting is not None:
            y = waiting.take(layer, x)
            if y is not None:
                self._called.add(id(layer))
                if not waiting.results:
                    self._waiting = None
                return y
        self._learn(layer, waiting)
        self._waiting = None
        together = [b for b in block if b is layer or id(b) not in self._called]
        self._called.add(id(layer))
        projections = [b.projection(alone=b is not layer) for b in together]
        if len(together) < 2 or any(p is None for p in projections):
            return None
        ys = functional.lora_linear_group(x, [p for p in projections if p is not None])
        results = {id(b): y for b, y in zip(together, ys, strict=True)}
        own = results.pop(id(layer))
        self._waiting = _Waiting(x, results)
        return own

    def _learn(self, layer: LoRALinear, waiting: _Waiting | None) -> None:
        again = id(layer) in self._called  # another pass has begun
        if waiting is not None and waiting.thread == threading.get_ident():
            if not again:
                self._wrong.add(id(layer))
            elif waiting.results:
                self._strikes += 1
                if self._strikes >= _STRIKES:
                    self._wrong.update(waiting.results)
        if again:
            self._called.clear()

    def settle(self) -> None:
        """Part the layers that turned out not to share their input.

        Between two calls of the model only: checkpointed layers must compute again what they did.
        """
        self._waiting = None
        self._called.clear()
        if not self._wrong:
            return
        blocks: list[tuple[LoRALinear, ...]] = []
        for block in self._blocks:
            start = 0
            for i, layer in enumerate(block):
                if i > start and id(layer) in self._wrong:
                    blocks.append(block[start:i])
                    start = i
            blocks.append(block[start:])
        self._blocks, self._wrong, self._strikes = blocks, set(), 0


def share_input(layers: Mapping[str, LoRALinear]) -> SharedInput | None:
    """Have layers of one parent compute together where they are called with the same tensor.

    Args:
        layers: by name, in the order in which they are called.

    Returns:
        What they share; ``None`` for fewer than two. ``layer.shared = None`` ends it.
    """
    if len(layers) < 2:
        return None
    shared = SharedInput(layers)
    for layer in layers.values():
        layer.shared = shared
    return shared


def settle(groups: Sequence[SharedInput]) -> None:
    """:meth:`SharedInput.settle` for each."""
    for group in groups:
        group.settle()
