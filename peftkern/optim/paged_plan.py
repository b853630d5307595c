"""Planned steps of paged optimizers; planned.py has those without paging.

What stays in its place is updated by one launch over all of it, every bucket that passes through by
a launch of its own, over a table whose states are offsets into the bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from peftkern import registry
from peftkern.ops.optimizer.bound import BACKENDS, BoundStep
from peftkern.ops.optimizer.contract import PARAM_DTYPES
from peftkern.ops.optimizer.reference import COLUMNS
from peftkern.ops.optimizer.table import Segment, Table
from peftkern.optim.planned import Item, Part, Planner

Held = list[tuple[int, Tensor]]  # buckets by number, and their bytes


class Piece(Protocol):
    """A run of elements of a parameter, in a bucket."""

    @property
    def parameter(self) -> int:
        """Its number."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def length(self) -> int:
        """Elements."""

    def offsets(self) -> tuple[int, int, int, int]:
        """Of ``state1, state2, absmax1, absmax2`` in the bucket; 0 for what is absent."""


class Buckets(Protocol):
    """What a step asks of the paged optimizer."""

    def ensure_layout(self, numbers: list[int]) -> None:
        """Give parameters their places."""

    def pieces(self) -> list[list[Piece]]:
        """What lies in each bucket."""

    def pass_through(
        self,
        buckets: list[int],
        resident: Callable[[Held], None],
        update: Callable[[int, Tensor], None],
    ) -> None:
        """Call ``resident`` with those that stay in place, ``update`` with each of the others."""

    def settled(self, buckets: list[int]) -> Held | None:
        """The bytes of buckets that the last pass left in place; None where it may be otherwise."""


class PagedPart(Part):
    """The parameters of a paged optimizer.

    Args:
        items: the parameters.
        step: bound to them.
        buckets: the optimizer.
        norm: whether steps look at the norm of the gradients.
    """

    def __init__(self, items: list[Item], step: BoundStep, buckets: Buckets, norm: bool) -> None:
        super().__init__(items, step)
        self._buckets = buckets
        rows = {item.number: row for row, item in enumerate(items)}
        self._segments: dict[int, list[Segment]] = {}
        for number, pieces in enumerate(buckets.pieces()):
            mine = [self._segment(p, rows[p.parameter]) for p in pieces if p.parameter in rows]
            if mine:
                self._segments[number] = mine
        self._tables: dict[int, Table] = {}
        self._resident: tuple[tuple[int, ...], Table] = ((), Table([], step.device))
        whole = []
        for row, p in enumerate(self.parameters):
            dtypes = self._dtypes(row)
            whole.append(Segment(p.data_ptr(), (0, 0, 0, 0), 0, p.numel(), row, dtypes))
        self._whole = Table(whole, step.device)
        step.cover(self._whole, self.parameters, norm=norm)

    def _dtypes(self, row: int) -> tuple[torch.dtype, torch.dtype]:
        grad = self.parameters[row].grad
        assert grad is not None
        return self.parameters[row].dtype, grad.dtype

    def _segment(self, piece: Piece, row: int) -> Segment:
        address = self.parameters[row].data_ptr()
        dtypes = self._dtypes(row)
        return Segment(address, piece.offsets(), piece.start, piece.length, row, dtypes)

    def go(self, clip: int, limit: float) -> None:
        """As in :class:`Part`."""
        step, buckets = self.step, list(self._segments)
        step.launch("upload")
        if clip == 2:  # over whole parameters: the same sum however they are cut
            step.go_over(self._whole, (), name="norm")
        clip = min(clip, 1)
        if (held := self._buckets.settled(buckets)) is not None:
            where = [bucket for _, bucket in held]
            step.go_over(self._table_of(held), where, name="run", clip=clip, limit=limit)
            return
        step.launch("prepare", clip=clip, limit=limit)
        self._buckets.pass_through(buckets, self._update_resident, self._update)
        step.launch("finish", clip=clip, limit=limit)

    def _table_of(self, held: Held) -> Table:
        addresses = tuple(bucket.data_ptr() for _, bucket in held)
        if addresses != self._resident[0]:
            segments = []
            for number, bucket in held:
                base = bucket.data_ptr()
                for s in self._segments[number]:
                    first, second, scale1, scale2 = s.states
                    if scale1:  # absent ones stay 0
                        scale1, scale2 = scale1 + base, scale2 + base
                    states = (first + base, second + base, scale1, scale2)
                    segments.append(replace(s, states=states))
            self._resident = (addresses, Table(segments, self.step.device))
        return self._resident[1]

    def _update_resident(self, held: Held) -> None:
        self.step.go_over(self._table_of(held), [bucket for _, bucket in held])

    def _update(self, number: int, bucket: Tensor) -> None:
        table = self._tables.get(number)
        if table is None:
            table = self._tables[number] = Table(self._segments[number], self.step.device)
        self.step.go_over(table, [bucket], state=bucket.data_ptr())


class PagedPlanner(Planner):
    """Makes the plans of a paged optimizer.

    Args:
        buckets: the optimizer.
        rule: as the op names it.
        rounding: whether updated bf16 parameters are rounded at random.
        norm: whether steps look at the norm of the gradients.
    """

    def __init__(self, buckets: Buckets, rule: str, rounding: bool, norm: bool) -> None:
        super().__init__(rule, rounding, norm)
        self._buckets = buckets

    def _bind(self, device: torch.device, part: list[Item]) -> tuple[str, list[Segment]] | None:
        hyper = torch.empty(len(part), COLUMNS, device=device)
        params = [item.parameter.detach() for item in part]
        grads = [item.parameter.grad for item in part]
        if any(g is None or g.dtype not in PARAM_DTYPES for g in grads):
            return None
        # The states are wherever they are: the kernels meet them aligned in buckets.
        args: tuple[Any, ...] = (hyper, params, grads, [], [], [], [], self._rule, None)
        backend = registry.select("optimizer_step", args).backend
        if backend not in BACKENDS:
            return None
        self._buckets.ensure_layout([item.number for item in part])
        return backend, []

    def _part(self, items: list[Item], step: BoundStep, segments: list[Segment]) -> Part:
        return PagedPart(items, step, self._buckets, self._norm)
