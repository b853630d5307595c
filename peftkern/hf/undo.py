"""The log of what a patch changed, from which the model comes back exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from peftkern.hf.targets import Slot
from peftkern.nn.adapter import AdapterLayer, adapter_layers
from peftkern.nn.experts import is_experts, stacked
from peftkern.nn.stash import DiskStore, Stashed


@dataclass
class Replacement:
    """A module that gave up its places in the model to another one."""

    original: nn.Module
    current: nn.Module
    slots: list[Slot]


@dataclass
class Parked:
    """An original parameter of a layer that is quantized for now.

    Args:
        parameter: the original weight.
        data: where its values wait; ``None`` when the parameter still holds them.
        stand_in: the quantized layer; it knows to which device the model was moved meanwhile.
    """

    parameter: nn.Parameter
    data: Stashed | None
    stand_in: nn.Module


@dataclass
class Added:
    """An adapter added to a layer that had others already."""

    layer: AdapterLayer
    name: str


@dataclass
class UndoLog:
    """Everything needed to bring the model back; entries are undone newest first."""

    replacements: list[Replacement] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    added: list[Added] = field(default_factory=list)
    active: list[tuple[AdapterLayer, list[str]]] = field(default_factory=list)
    flags: dict[int, tuple[nn.Parameter, bool]] = field(default_factory=dict)
    undo: list[Callable[[], object]] = field(default_factory=list)
    store: DiskStore | None = None
    lost: list[str] = field(default_factory=list)

    def __getstate__(self) -> dict[str, object]:
        # ids do not survive a copy; the parameters do.
        state = dict(self.__dict__)
        state["flags"] = list(self.flags.values())
        state["store"] = None
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.flags = {id(p): (p, flag) for p, flag in state["flags"]}  # type: ignore[attr-defined]

    def remember(self, model: nn.Module) -> None:
        """Note requires_grad of every parameter, and which adapters are active where."""
        for parameter in model.parameters():
            self.flags[id(parameter)] = (parameter, parameter.requires_grad)
        layers = adapter_layers(model.named_modules())
        self.active = [(layer, layer.active_adapters) for _, layer in layers]

    def replace(self, original: nn.Module, current: nn.Module, slots: list[Slot]) -> None:
        """Put ``current`` where ``original`` hangs."""
        self.replacements.append(Replacement(original, current, slots))
        for slot in slots:
            slot.parent._modules[slot.attribute] = current

    def on_rollback(self, step: Callable[[], object]) -> None:
        """Have ``step`` called when the patch is undone, before modules go back."""
        self.undo.append(step)

    def attach(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """Give ``parent`` one more submodule.

        Raises:
            ValueError: it has an attribute of this name.
        """
        if hasattr(parent, name):
            raise ValueError(f"{type(parent).__name__} has an attribute {name!r} already")
        parent.add_module(name, child)
        self.on_rollback(lambda: parent._modules.pop(name, None))

    def park(self, original: nn.Module, stand_in: nn.Module, keep: str | bool, name: str) -> None:
        """Set aside the weights of a module that ``stand_in`` holds quantized."""
        if is_experts(original):
            for stack in stacked(original).values():
                self._park(stack, stand_in, keep, name)
            return
        weight = original._parameters["weight"]
        assert isinstance(weight, nn.Parameter)
        self._park(weight, stand_in, keep, name)

    def _park(self, weight: nn.Parameter, stand_in: nn.Module, keep: str | bool, name: str) -> None:
        data: Stashed | None = None
        if weight.device.type != "meta":
            if keep is False:
                self.lost.append(name)
                weight.data = weight.data.new_empty(0)
                return
            # Odd strides would not survive the file; such weights are rare and stay in RAM.
            if keep == "disk" and weight.is_contiguous():
                if self.store is None:
                    self.store = DiskStore()
                data = self.store.put(weight)
                weight.data = weight.data.new_empty(0)
        self.parked.append(Parked(weight, data, stand_in))

    @torch.no_grad()
    def rollback(self) -> None:
        """Undo everything."""
        for step in reversed(self.undo):
            step()
        for entry in self.parked:
            data = entry.parameter.data if entry.data is None else entry.data.fetch()
            entry.parameter.data = data.to(next(entry.stand_in.parameters()).device)
        for addition in reversed(self.added):
            addition.layer.delete_adapter(addition.name)
        for layer, names in self.active:
            layer.set_adapter(names)
        for item in reversed(self.replacements):
            # Mode changes made meanwhile (model.eval()) reached the replacement only.
            if item.original.training != item.current.training:
                item.original.train(item.current.training)
            for slot in item.slots:
                slot.parent._modules[slot.attribute] = item.original
        for parameter, flag in self.flags.values():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        self.__init__()  # type: ignore[misc]
