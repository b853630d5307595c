"""``TrainableCopy``: a module trained in full beside the adapters (PEFT's ``modules_to_save``)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from peftkern.arguments import require_model
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.rows import by_rows


class TrainableCopy(AdapterLayer):
    """Trains a copy of a module, one copy an adapter; the original stays untouched.

    Args:
        original: the module to copy.
        adapter_name: name of the first copy.

    Attribute names are PEFT's: ``original_module`` and ``modules_to_save[name]``. Attributes that
    the wrapper does not have are those of the module in use, so that ``model.classifier.weight``
    and the like go on working.
    """

    _adapter_containers = ("modules_to_save",)
    serves_rows = True

    def __init__(self, original: nn.Module, adapter_name: str = "default") -> None:
        require_model("original", original)
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.training = original.training
        self.add_adapter(adapter_name)

    def add_adapter(self, adapter_name: str) -> None:
        """Make another trainable copy and make it the active one.

        Raises:
            ValueError: a copy of this name exists.
        """
        if adapter_name in self.modules_to_save:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        twin = copy.deepcopy(self.original_module)
        twin.requires_grad_(True)
        self.modules_to_save[adapter_name] = twin
        self.original_module.requires_grad_(False)
        self.set_adapter(adapter_name)

    @property
    def in_use(self) -> nn.Module:
        """The module that the forward pass calls."""
        if not self._disable_adapters:
            for name in self._active_adapter:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def check(self, names: list[str]) -> None:
        """Refuse several names that have a copy here: copies cannot be added up.

        Raises:
            ValueError: naming them.
        """
        here = [name for name in names if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"adapters {', '.join(here)} each have a trained copy of the same module "
                f"({type(self.original_module).__name__}); activate one of them at a time"
            )

    def set_adapter(self, names: Any, trainable: bool = True) -> None:
        """Make one copy active; with names that have no copy here, the original is used.

        Raises:
            ValueError: several of the names have a copy.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        self.check(chosen)
        super().set_adapter(chosen, trainable)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module in use; with rows chosen, each row's own copy (one tensor in, one out).

        Raises:
            ValueError: rows are chosen, and the module takes more than one tensor.
        """
        choice = None if self._disable_adapters else self.row_choice()
        if choice is None:
            return self.in_use(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ValueError(
                f"adapter_names: the trained copies of {type(self.original_module).__name__} take "
                "more than one tensor, which cannot be split by rows"
            )
        return by_rows(choice, args[0], self._one, self.adapter_names)

    def _one(self, name: str | None, x: Tensor) -> Tensor:
        module = self.original_module if name is None else self.modules_to_save[name]
        y: Tensor = module(x)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.in_use, name)
