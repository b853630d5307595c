"""What every adapter layer has: named adapters, some active, all of them possibly disabled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peftkern.nn.rows import AdapterRows, RowChoice


def check_adapter_name(name: str, argument: str = "adapter_name") -> None:
    """Refuse names that PEFT's files cannot carry.

    Raises:
        TypeError: not a string.
        ValueError: empty, or contains ``.`` or ``lora``.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a string, got {type(name).__name__}")
    if not name or "." in name or "lora" in name or "/" in name:
        raise ValueError(
            f"{argument}: got {name!r}; it must not be empty nor contain '.', '/' or 'lora', "
            "because PEFT's file format builds keys from it"
        )


TORCH = "computed by torch"


class AdapterLayer(nn.Module):
    """Bookkeeping of named adapters; subclasses hold their tensors in ``_adapter_containers``.

    Plain facts about an adapter stand in dicts that ``_adapter_tables`` names.

    A subclass over a frozen linear layer keeps it as ``base_layer`` and sets ``on_linear``. One
    whose adapters can become part of the base overrides :meth:`merge` and :meth:`unmerge`. One
    that obeys :meth:`row_choice` sets ``serves_rows``.
    """

    _adapter_containers: tuple[str, ...] = ()
    _adapter_tables: tuple[str, ...] = ()  # dicts by adapter name
    on_linear = False
    serves_rows = False
    _rows: AdapterRows | None = None

    def __init__(self) -> None:
        super().__init__()
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def adapter_names(self) -> list[str]:
        """All adapters of this layer, in the order they were added."""
        return list(getattr(self, self._adapter_containers[0]).keys())

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that take part in the forward pass."""
        return list(self._active_adapter)

    @property
    def disable_adapters(self) -> bool:
        """True while the layer computes its original function only."""
        return self._disable_adapters

    def row_choice(self) -> RowChoice | None:
        """Which adapter each row of the input takes; ``None``: all rows take the active ones."""
        return None if self._rows is None else self._rows.choice()

    def adapter_modules(self, name: str) -> list[nn.Module | nn.Parameter]:
        """The modules, or bare parameters, of adapter ``name``; empty when it has none here."""
        held = (getattr(self, container) for container in self._adapter_containers)
        return [modules[name] for modules in held if name in modules]

    def set_adapter(self, names: str | Sequence[str], trainable: bool = True) -> None:
        """Make exactly these adapters active; only active ones get gradients.

        Args:
            names: one name or several (their contributions add up).
            trainable: whether the active adapters require gradients.

        Raises:
            RuntimeError: adapters are merged into the base.
        """
        if self.merged:
            raise RuntimeError(
                f"adapters {', '.join(self.merged_adapters)} are merged into the base; unmerge "
                "before activating others"
            )
        chosen = [names] if isinstance(names, str) else list(names)
        self._active_adapter = chosen
        for name in self.adapter_names:
            for module in self.adapter_modules(name):
                module.requires_grad_(trainable and name in chosen)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter and its tensors; unknown names are ignored.

        Raises:
            RuntimeError: it is merged into the base.
        """
        if name in self.merged_adapters:
            raise RuntimeError(f"adapter {name!r} is merged into the base; unmerge first")
        for container in self._adapter_containers:
            modules = getattr(self, container)
            if name in modules:
                del modules[name]
        self._active_adapter = [active for active in self._active_adapter if active != name]
        for table in self._adapter_tables:
            getattr(self, table).pop(name, None)

    def check(self, names: list[str]) -> None:
        """Refuse names that cannot be active together here; every combination is fine by default.

        Raises:
            ValueError: naming them.
        """

    def example_call(self, name: str) -> tuple[str, tuple[Any, ...]] | str:
        """An op and arguments as a forward pass gives them (8 rows), or why none serves it."""
        return TORCH

    @property
    def merged(self) -> bool:
        """True while adapters are part of the base weight."""
        return bool(self.merged_adapters)

    def merge(
        self, adapter_names: list[str] | None = None, max_error: float | None = None
    ) -> float:
        """Write adapters into the base; see :func:`peftkern.merge`.

        Raises:
            ValueError: this kind of adapter is no change of a weight.
        """
        raise ValueError(f"{type(self).__name__} adapters cannot be merged into the base weights")

    def _names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """The adapters that :meth:`merge` is asked for: the active ones that are here, or these.

        Raises:
            ValueError: one is not here.
            RuntimeError: adapters are merged already.
        """
        if self.merged:
            raise RuntimeError(
                f"adapters {', '.join(self.merged_adapters)} are merged already; unmerge first"
            )
        known = self.adapter_names
        if adapter_names is None:
            return [name for name in self._active_adapter if name in known]
        for name in adapter_names:
            if name not in known:
                raise ValueError(
                    f"adapter_names: no adapter {name!r} here; there are: {', '.join(known)}"
                )
        return list(adapter_names)

    def unmerge(self) -> None:
        """Put the base weight back exactly as it was; does nothing when nothing is merged."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of this layer on or off."""
        self._disable_adapters = not enabled


def adapter_layers(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, AdapterLayer]]:
    """The adapter layers among named modules."""
    return [(name, module) for name, module in modules if isinstance(module, AdapterLayer)]
