"""A bound step: what a pass over many parameters needs, laid out once and kept on the device.

The op takes lists of tensors, so that a call costs host time for each of them. A step of training
repeats: same parameters, same states, same rule. It is checked and served as the op is
(:func:`bind` asks the registry), then bound: from there on a step is one call whatever the number
of tensors. Numbers that depend on the step (bias corrections, the clipping factor, how many steps
were made) are worked out where the parameters are: on a CUDA device nothing waits for the host, and
a graph can capture it.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern import native, registry
from peftkern.ops.optimizer import cuda
from peftkern.ops.optimizer.reference import BLOCK, COLUMNS
from peftkern.ops.optimizer.table import GROUP_WORDS, RULES, Call, Segment, Table, segments_of

BACKENDS = frozenset({"cuda", "native"})  # that steps can be bound to
_GROUP = struct.Struct("=6dq")
assert _GROUP.size == 8 * GROUP_WORDS


@dataclass(frozen=True)
class Settings:
    """What a group of parameters is set to: ``pk::StepGroup`` of csrc/common/optimizer_call.h."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    seed: int = 0

    def pack(self) -> bytes:
        """As the kernels read it."""
        direction = -1.0 if self.maximize else 1.0
        numbers = (self.lr, *self.betas, self.eps, self.weight_decay, direction)
        return _GROUP.pack(*numbers, self.seed)


class Counts:
    """Steps and skips of an optimizer's parameters on one device, kept there.

    Args:
        steps: made so far, one entry ("slot") a parameter.
        device: where they are kept.
    """

    def __init__(self, steps: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.steps = torch.tensor(steps, dtype=torch.int64).to(device)
        self.last = torch.zeros_like(self.steps)
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)
        flag = torch.zeros(1, dtype=torch.int64)
        # Written by the device where something was skipped, read here without asking it.
        self.flag = flag.pin_memory() if device.type == "cuda" else flag
        self.skipped_blocks = self.flag.numpy()

    def fill(self, call: Call) -> None:
        """Put them into a call."""
        call.slots, call.steps = self.steps.numel(), self.steps.data_ptr()
        call.last, call.totals = self.last.data_ptr(), self.totals.data_ptr()
        call.flag = self.flag.data_ptr()

    def tensors(self) -> list[Tensor]:
        """What kernels reach through them."""
        return [self.steps, self.last, self.totals, self.flag]


@dataclass(frozen=True)
class Row:
    """One parameter of a bound step.

    Args:
        numel: of the parameter.
        group: whose settings hold.
        number: among the optimizer's parameters, which random rounding depends on.
        slot: in :class:`Counts`.
    """

    numel: int
    group: int
    number: int
    slot: int


class BoundStep:
    """A step of many parameters on one device.

    Args:
        backend: whose kernels make it, one of :data:`BACKENDS`.
        rule: ``"adamw"``, ``"lion"`` or ``"momentum"``.
        rows: the parameters.
        groups: how many groups of settings there are.
        counts: where their steps are counted.
        rounding: whether updated bf16 parameters are rounded at random.
    """

    def __init__(
        self,
        backend: str,
        rule: str,
        rows: Sequence[Row],
        groups: int,
        counts: Counts,
        rounding: bool,
    ) -> None:
        self._backend = backend
        self.device, self.counts, n = counts.device, counts, len(rows)
        device = self.device

        def words(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        facts = [(r.group, r.number, -(-r.numel // BLOCK), r.slot) for r in rows]
        self._parameters = torch.tensor(facts, dtype=torch.int64).view(-1, 4).to(device)
        self._grads, self.skipped, self.groups = words(n), words(n), words(GROUP_WORDS * groups)
        self.hyper = torch.zeros(n, COLUMNS, device=device)
        self._rounding = words(4 * n) if rounding else None
        self.norm = torch.zeros(1, device=device)
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._own: list[Tensor] = []
        self._reaches: list[weakref.ref[Tensor]] = []  # a step keeps no memory of others
        self._uploaded = b""
        self._held: tuple[object, ...] = ()
        self.call = Call(
            rows=n,
            group_words=GROUP_WORDS * groups,
            grads=self._grads.data_ptr(),
            groups=self.groups.data_ptr(),
            parameters=self._parameters.data_ptr(),
            hyper=self.hyper.data_ptr(),
            rounding=0 if self._rounding is None else self._rounding.data_ptr(),
            skipped=self.skipped.data_ptr(),
            norm=self.norm.data_ptr(),
            rule=RULES[rule],
            blocks=cuda.thread_blocks(device) if backend == "cuda" else 0,
        )
        counts.fill(self.call)

    def cover(self, table: Table, reaches: Sequence[Tensor], *, norm: bool) -> None:
        """Make a table the one that launches go over.

        Args:
            table: of segments of the rows.
            reaches: every tensor that the table holds the address of, but gradients.
            norm: whether the norm of the gradients will be asked for.
        """
        self._reaches = [weakref.ref(tensor) for tensor in reaches]
        if norm and self._sums.numel() < table.chunks:
            self._sums = self._sums.new_zeros(table.chunks)
        self._own = [self._parameters, self._grads, self.skipped, self.groups, self.hyper]
        self._own += [self.norm, self._sums, *self.counts.tensors(), *table.tensors()]
        self._own += [] if self._rounding is None else [self._rounding]
        self.call.sums = self._sums.data_ptr()
        table.fill(self.call)
        self.call.state = 0

    def go_over(
        self,
        table: Table,
        reaches: Sequence[Tensor],
        *,
        name: str = "step",
        state: int = 0,
        clip: int = 0,
        limit: float = float("inf"),
    ) -> None:
        """:meth:`launch` over another table.

        Args:
            table: of segments of the rows.
            reaches: the states that it covers.
            name: what to launch.
            state: address that those of the table are relative to.
            clip: as for :meth:`launch`, but that a norm is only worked out over the covered table.
            limit: of the norm.
        """
        table.fill(self.call)
        self.call.state, self.call.clip, self.call.limit = state, clip, limit
        self._run(name, [*table.tensors(), *reaches])

    def _run(self, name: str, more: Sequence[Tensor]) -> None:
        if self._backend == "cuda":
            cuda.run(f"optimizer_{name}", self.device, self.call, self._all(more))
        else:
            address = ctypes.addressof(self.call)
            native.kernels().optimizer_call(name, address, torch.get_num_threads())

    def _all(self, more: Sequence[Tensor]) -> Iterator[Tensor]:
        """What kernels reach; only the executor of the tests asks."""
        yield from self._own
        yield from more
        for reference in self._reaches:
            if (tensor := reference()) is not None:
                yield tensor

    def upload(self, grads: array[int] | None, groups: bytes) -> None:
        """Note what the next launch takes along: addresses of gradients, and settings.

        Args:
            grads: int64, one address a row; None where they have not changed.
            groups: all groups' :meth:`Settings.pack`; skipped where they have not changed.
        """
        settings = None
        if groups != self._uploaded:
            settings, self._uploaded = array("q", groups), groups
        self.call.new_grads = grads.buffer_info()[0] if grads is not None else None
        self.call.new_groups = settings.buffer_info()[0] if settings is not None else None
        self._held = (grads, settings)  # read while the launch is being made

    def set_rate(self, group: int, rate: Tensor) -> None:
        """Take a group's learning rate from a tensor on the device."""
        self.groups.view(torch.float64)[GROUP_WORDS * group].copy_(rate.detach().reshape(()))

    def launch(self, name: str = "run", *, clip: int = 0, limit: float = float("inf")) -> None:
        """One of ``pk_cuda_optimizer_<name>``; ``"run"`` is a whole step.

        Args:
            name: ``upload``, ``norm``, ``prepare``, ``step``, ``finish``, or ``run``.
            clip: 0: gradients as they are; 1: clipped by :attr:`norm`; 2: by their own norm,
                which is worked out first. A norm that is not finite skips the whole step.
            limit: of the norm.
        """
        self.call.clip, self.call.limit = clip, limit
        self._run(name, ())
        if name in ("run", "upload"):
            self.call.new_grads = self.call.new_groups = None
            self._held = ()


def bind(
    rule: str,
    hyper: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    states: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
) -> tuple[str, list[Segment]] | None:
    """The backend of a step and its segments, if the one that serves these arguments can be bound.

    Args:
        rule: as the op names it.
        hyper: fp32 [n, 11] on the device, for the op's checks; its content does not matter.
        params: contiguous parameters of one device.
        grads: their gradients.
        states: the op's ``state1, state2, absmax1, absmax2``.

    Raises:
        TypeError, ValueError: what the op's contract raises for such arguments.
    """
    args = (hyper, params, grads, *states, rule, None)
    registry.specs()["optimizer_step"].check(*args)
    backend = registry.select("optimizer_step", args).backend
    return (backend, segments_of(params, grads, *states)) if backend in BACKENDS else None
