"""A different adapter for each row of a batch: what the layers of one model share about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BASE = "__base__"  # PEFT's name for a row without an adapter


class RowChoice:
    """Which adapter each row of a batch takes.

    Args:
        names: one a row; ``"__base__"`` for none.
        expand: how often generation repeats each row (beams).
    """

    def __init__(self, names: Sequence[str], expand: int = 1) -> None:
        self.names = tuple(names)
        self.expand = expand
        self.table = tuple(dict.fromkeys(name for name in names if name != BASE))
        self._ids: dict[tuple[tuple[str, ...], int, torch.device], Tensor] = {}

    def for_rows(self, count: int) -> tuple[str, ...]:
        """The names for a batch of ``count`` rows.

        Raises:
            ValueError: the layer's input has another number of rows.
        """
        if count == len(self.names):
            return self.names
        if count == len(self.names) * self.expand:
            return tuple(name for name in self.names for _ in range(self.expand))
        raise ValueError(
            f"adapter_names: {len(self.names)} names, but a layer got an input with {count} in its "
            "first dimension; give one name for each row of the batch"
        )

    def ids(self, present: tuple[str, ...], count: int, device: torch.device) -> Tensor:
        """The number of each row's adapter in ``present``, -1 for none: int64 [count]."""
        key = (present, count, device)
        if key not in self._ids:
            number = {name: i for i, name in enumerate(present)}
            ids = [number.get(name, -1) for name in self.for_rows(count)]
            self._ids[key] = torch.tensor(ids, dtype=torch.int64, device=device)
        return self._ids[key]


class AdapterRows:
    """The choice in force, shared by all adapter layers of a model.

    Args:
        default: choice of the enclosing ``adapter_rows`` block.
    """

    def __init__(self) -> None:
        self.current: RowChoice | None = None
        self.default: RowChoice | None = None
        self.used = False  # some forward had a choice: backward passes must find theirs again
        self.tracked = False  # inside a forward of the patched model itself
        self.untracked = False  # rows were chosen for a part of the model, with gradients

    def choice(self) -> RowChoice | None:
        """The choice for the call that is going on.

        Raises:
            RuntimeError: gradient checkpointing computes a layer again whose choice is unknown.
        """
        current = self.current
        if current is not None:
            if not self.tracked and torch.is_grad_enabled():
                self.untracked = True
        elif self.untracked and not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "gradient checkpointing computes a layer again whose adapter_names are not "
                    "known any more, because a part of the model was called; call the patched "
                    "model itself, or run backward inside the adapter_rows block"
                )
        return current


def by_rows(
    choice: RowChoice, x: Tensor, run: Callable[[str | None, Tensor], Tensor], known: Sequence[str]
) -> Tensor:
    """Run each adapter on its rows of x alone and put the rows together again.

    Args:
        choice: which adapter each row takes.
        x: [rows, ...].
        run: the layer with one adapter, or with none.
        known: the adapters that the layer has; rows of others get none.

    Returns:
        [rows, ...] of the results.
    """
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(choice.for_rows(x.shape[0])):
        groups.setdefault(name if name in known else None, []).append(row)
    if len(groups) == 1:
        return run(next(iter(groups)), x)
    order = [row for rows in groups.values() for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    parts = [run(name, x[torch.tensor(rows, device=x.device)]) for name, rows in groups.items()]
    return torch.cat(parts)[torch.tensor(back, device=x.device)]
