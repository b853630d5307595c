"""Steps that are planned once: no loop over parameters, on CUDA devices no wait either.

A plan holds the addresses of parameters, states and gradients. Each step first asks whether they
are what they were; new addresses of gradients are sent along, anything else makes a new plan.
"""

from __future__ import annotations

import math
import operator
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftkern import native, registry
from peftkern.ops.optimizer import bound
from peftkern.ops.optimizer.bound import BoundStep, Counts, Row, Settings
from peftkern.ops.optimizer.reference import COLUMNS
from peftkern.ops.optimizer.table import Segment, Table

_SAME, _MOVED, _CHANGED = 0, 1, 2
_KEYS = ("state1", "state2", "absmax1", "absmax2")
DEVICES = frozenset({"cpu", "cuda"})  # types of devices that steps are planned on


@dataclass(frozen=True)
class Item:
    """A parameter that a plan may cover: its place among all, its group, and its state."""

    parameter: Tensor
    number: int
    group: int
    state: dict[str, Any]


@dataclass
class Part:
    """The parameters of one device."""

    items: list[Item]
    step: BoundStep
    parameters: list[Tensor] = field(init=False)
    states: list[dict[str, Any]] = field(init=False)
    #: What each state must hold, in its order; tensors by weak reference: a plan keeps no memory.
    kept: list[tuple[Any, ...]] = field(init=False)
    #: [n, 4]: addresses of the parameter and its state, bytes and address of its gradient.
    facts: array[int] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [item.parameter for item in self.items]
        self.states = [item.state for item in self.items]
        self.kept = [tuple(map(_weak, state.values())) for state in self.states]
        self.facts = array("q")
        for item in self.items:
            grad, state = _grad(item), item.state.get("state1")
            address = 0 if state is None else state.data_ptr()
            self.facts.extend((item.parameter.data_ptr(), address, grad.nbytes, grad.data_ptr()))

    def grads(self) -> array[int]:
        """Addresses of the gradients."""
        return self.facts[3::4]

    def go(self, clip: int, limit: float) -> None:
        """The step, everything being uploaded; ``clip`` as :meth:`BoundStep.launch` takes it."""
        self.step.launch(clip=clip, limit=limit)

    def scan(self) -> int:
        """Whether everything is as it was planned; brings the gradients' addresses up to date."""
        if native.available():
            kernels = native.kernels()
            facts = self.facts.buffer_info()[0]
            return int(kernels.scan_parameters(self.parameters, self.states, self.kept, facts))
        return scan_parameters(self.parameters, self.states, self.kept, self.facts)


def scan_parameters(
    parameters: list[Tensor],
    states: list[dict[str, Any]],
    kept: list[tuple[Any, ...]],
    facts: array[int],
) -> int:
    """What ``scan_parameters`` of csrc/bind_optimizer.cpp does, without the native module."""
    moved = False
    for i, (p, state, values) in enumerate(zip(parameters, states, kept, strict=True)):
        g = p.grad
        if (
            g is None
            or p.data_ptr() != facts[4 * i]
            or g.nbytes != facts[4 * i + 2]
            or not g.is_contiguous()
            or len(state) != len(values)
            or not all(map(operator.is_, state.values(), map(_behind, values)))
            or (facts[4 * i + 1] and state["state1"].data_ptr() != facts[4 * i + 1])
        ):
            return _CHANGED
        address = g.data_ptr()
        moved |= address != facts[4 * i + 3]
        facts[4 * i + 3] = address
    return _MOVED if moved else _SAME


def _weak(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, Tensor) else value


def _behind(value: Any) -> Any:
    return value() if isinstance(value, weakref.ref) else value


class Plan:
    """A step of the parameters that have a gradient now.

    Args:
        rule: as the op names it.
        parts: one a device.
        others: parameters without a gradient; one that gets a gradient ends the plan.
        state: the optimizer's dict of states.
    """

    def __init__(
        self,
        rule: str,
        parts: list[Part],
        others: list[Tensor],
        state: dict[Tensor, dict[str, Any]],
    ) -> None:
        self.rule, self._parts, self._others = rule, parts, others
        self._state, self._states = state, list(state.values())
        self._backend = registry.forced_backend()
        self._moved: list[bool] = []
        self._parameters = [p for part in parts for p in part.parameters]

    def current(self, state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether the plan still holds."""
        if state is not self._state or registry.forced_backend() != self._backend:
            return False
        states = list(state.values())
        if len(states) != len(self._states) or not all(map(operator.is_, states, self._states)):
            return False
        if any(p.grad is not None for p in self._others):
            return False
        found = [part.scan() for part in self._parts]
        # A part that was looked at has its addresses noted, whatever comes of the others.
        self._moved = [a or b != _SAME for a, b in zip(self._waiting(), found, strict=True)]
        return _CHANGED not in found

    def _waiting(self) -> list[bool]:
        return self._moved or [False] * len(self._parts)

    def run(self, groups: list[dict[str, Any]], limit: float | None) -> Tensor | None:
        """One step.

        Args:
            groups: the optimizer's, whose numbers may have changed.
            limit: of the gradients' global norm; ``inf`` only skips steps whose norm is not
                finite; None looks at no norm.

        Returns:
            The norm as a tensor on a device, if there was a limit.
        """
        packed, rates = _settings(groups)
        several = limit is not None and len(self._parts) > 1
        for i, part in enumerate(self._parts):
            moved = self._waiting()[i]
            part.step.upload(part.grads() if moved else None, packed)
            if rates or several:
                part.step.launch("upload")
                for number, rate in rates:
                    part.step.set_rate(number, rate)
        self._moved = [False] * len(self._parts)
        if several:
            self._join_norms()
        for part in self._parts:
            clip = 0 if limit is None else 1 if several else 2
            part.go(clip, math.inf if limit is None else limit)
        torch.autograd.graph.increment_version(self._parameters)
        return None if limit is None else self._parts[0].step.norm

    def _join_norms(self) -> None:
        """The norm of all devices' gradients together, on each of them."""
        for part in self._parts:
            part.step.launch("norm")
        first = self._parts[0].step.norm
        squares = [part.step.norm.to(first.device).double().square() for part in self._parts]
        total = torch.stack(squares).sum(0).sqrt().float()
        for part in self._parts:
            part.step.norm.copy_(total)


def _settings(groups: list[dict[str, Any]]) -> tuple[bytes, list[tuple[int, Tensor]]]:
    """All groups' settings, and the learning rates that are on a device: groups and tensors."""
    packed, rates = [], []
    for number, group in enumerate(groups):
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.device.type in DEVICES:
            rates.append((number, rate))
            rate = 0.0
        packed.append(
            Settings(
                float(rate),
                (float(group["betas"][0]), float(group["betas"][1])),
                float(group.get("eps", 0.0)),
                float(group["weight_decay"]),
                bool(group.get("maximize")),
                group.get("rounding_seed", 0),
            ).pack()
        )
    return b"".join(packed), rates


class Planner:
    """Makes plans for one optimizer and keeps the last few, with the counts that they share.

    Args:
        rule: as the op names it.
        rounding: whether updated bf16 parameters are rounded at random.
        norm: whether steps look at the norm of the gradients.
    """

    _MOST = 4  # plans: parameters that take turns having gradients

    def __init__(self, rule: str, rounding: bool, norm: bool) -> None:
        self._rule, self._rounding, self._norm = rule, rounding, norm
        self._plans: list[Plan] = []
        self._counts: dict[torch.device, Counts] = {}
        self._slots: dict[int, tuple[Tensor, int]] = {}  # by number: the view, and its slot
        self._seen = 0
        # Passes and blocks skipped, and the last one's, as told by counts that are gone.
        self._before = (0, 0)
        self._last: dict[int, int] = {}

    def find(self, items: Iterator[Item], state: dict[Tensor, dict[str, Any]]) -> Plan | None:
        """A plan that holds; None where steps cannot be planned.

        Args:
            items: all parameters of the optimizer, looked at only if no known plan holds. Those
                with a gradient have their state.
            state: the optimizer's.
        """
        for i, plan in enumerate(self._plans):
            if plan.current(state):
                if i:
                    self._plans.insert(0, self._plans.pop(i))
                return plan
        made = self._make(list(items), state)
        if made is not None:
            self._plans = [made, *self._plans[: self._MOST - 1]]
        return made

    def _make(self, items: list[Item], state: dict[Tensor, dict[str, Any]]) -> Plan | None:
        by_device: dict[torch.device, list[Item]] = {}
        for item in items:
            if item.parameter.grad is not None:
                if not _plain(item):
                    return None
                by_device.setdefault(item.parameter.device, []).append(item)
        if not by_device:
            return None
        bindings: dict[torch.device, tuple[str, list[Segment]]] = {}
        for device, part in by_device.items():
            found = self._bind(device, part)
            if found is None:
                return None
            bindings[device] = found
        if not all(self._counted(item) for part in by_device.values() for item in part):
            self._count(items)
        groups = 1 + max(item.group for item in items)
        parts = []
        for device, part in by_device.items():
            rows = [
                Row(i.parameter.numel(), i.group, i.number, self._slots[i.number][1]) for i in part
            ]
            backend, segments = bindings[device]
            counts = self._counts[device]
            step = BoundStep(backend, self._rule, rows, groups, counts, self._rounding)
            made = self._part(part, step, segments)
            step.upload(made.grads(), b"")
            step.launch("upload")
            parts.append(made)
        others = [item.parameter for item in items if item.parameter.grad is None]
        return Plan(self._rule, parts, others, state)

    def _bind(self, device: torch.device, part: list[Item]) -> tuple[str, list[Segment]] | None:
        two, nothing = self._rule == "adamw", torch.empty(0, device=device)
        states = [item.state for item in part]
        return bound.bind(
            self._rule,
            torch.empty(len(part), COLUMNS, device=device),
            [item.parameter.detach() for item in part],
            [_grad(item) for item in part],
            (
                [s["state1"] for s in states],
                [s["state2"] for s in states] if two else [],
                [s.get("absmax1", nothing) for s in states],
                [s.get("absmax2", nothing) for s in states] if two else [],
            ),
        )

    def _part(self, items: list[Item], step: BoundStep, segments: list[Segment]) -> Part:
        reaches = [item.parameter for item in items]
        for item in items:
            reaches += [item.state[key] for key in _KEYS if key in item.state]
        step.cover(Table(segments, step.device), reaches, norm=self._norm)
        return Part(items, step)

    # -- counts -----------------------------------------------------------------------------------

    def _counted(self, item: Item) -> bool:
        known = self._slots.get(item.number)
        return known is not None and item.state.get("step") is known[0]

    def _count(self, items: Sequence[Item]) -> None:
        """Count the steps of all parameters on the devices, going on from where they are."""
        self.forget()
        by_device: dict[torch.device, list[Item]] = {}
        for item in items:
            if item.state or item.parameter.grad is not None:
                by_device.setdefault(item.parameter.device, []).append(item)
        for device, part in by_device.items():
            counts = Counts(steps_of([item.state for item in part]), device)
            self._counts[device] = counts
            for slot, item in enumerate(part):
                view = counts.steps[slot]
                item.state["step"] = view
                self._slots[item.number] = (view, slot)

    def forget(self) -> None:
        """Drop all plans; the steps they counted stay in the states."""
        passes, blocks, self._last = self.skips()
        self._before = (passes, blocks)
        self._plans.clear()
        self._counts.clear()
        self._slots.clear()
        self._seen = 0

    def news(self) -> bool:
        """Whether blocks were skipped since the last question, as far as the host knows by now."""
        skipped = sum(int(c.skipped_blocks[0]) for c in self._counts.values())
        seen, self._seen = self._seen, skipped
        return skipped != seen

    def skips(self) -> tuple[int, int, dict[int, int]]:
        """Passes that skipped any, blocks skipped, and the last one's by number; waits for them."""
        passes, blocks = 0, self._before[1]
        last: dict[int, int] = {}
        for device, counts in self._counts.items():
            totals = counts.totals.tolist()
            passes, blocks = max(passes, totals[0]), blocks + totals[1]
            found = counts.last.tolist()
            for number, (view, slot) in self._slots.items():
                if view.device == device and found[slot]:
                    last[number] = found[slot]
        return self._before[0] + passes, blocks, last or self._last


def steps_of(states: Sequence[dict[str, Any]]) -> list[int]:
    """The steps that states tell of, those on a device asked for all at once."""
    steps = [state.get("step", 0) for state in states]
    by_device: dict[torch.device, list[int]] = {}
    for i, step in enumerate(steps):
        if isinstance(step, Tensor):
            by_device.setdefault(step.device, []).append(i)
    for places in by_device.values():
        values = torch.stack([steps[i].reshape(()) for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            steps[i] = value
    return [int(step) for step in steps]


def _grad(item: Item) -> Tensor:
    grad = item.parameter.grad
    assert grad is not None
    return grad.detach()


def _plain(item: Item) -> bool:
    p, g = item.parameter, item.parameter.grad
    assert g is not None
    return (
        p.device.type in DEVICES
        and not hasattr(p, "device_mesh")
        and not g.is_sparse
        and g.device == p.device
        and p.is_contiguous()
        and g.is_contiguous()
    )
