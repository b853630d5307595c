"""The only dispatch code: how an op is declared, registered with torch, and served.

An op travels one way: ``functional`` -> ``autograd.Function`` -> ``torch.ops.peftkern.<op>`` ->
:func:`select` -> one implementation -> one kernel. A family folder under ``peftkern/ops`` declares
its ops with :func:`define_op` (in ``contract.py``) and its implementations with
:func:`implementation` (in ``cpu.py``, ``cuda.py``, ``triton.py``). No list of ops exists anywhere.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from peftkern import env

_LIBRARY = torch.library.Library("peftkern", "DEF")
# When the interpreter ends torch takes a library's ops out of the dispatcher, and daemon threads
# that are in one of them at that moment end the process with a segmentation fault.
for _finalizer in list(getattr(weakref.finalize, "_registry", ())):
    if (_peeked := _finalizer.peek()) is not None and _peeked[0] is _LIBRARY:
        _finalizer.atexit = False
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """One set of arguments for an op: the unit of the automatic test matrix.

    Args:
        name: what is special about it; part of the test id.
        args: positional arguments of the op, tensors on the CPU.
    """

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class OpSpec:
    """The contract of one op.

    Args:
        name: op name below ``torch.ops.peftkern``.
        schema: argument and return part of the torch schema.
        check: raises ``TypeError``/``ValueError`` for arguments that no implementation may see.
        fake: shape, dtype, stride and device of the results without data.
        reference: plain torch truth; the last implementation on every device. With the keyword
            ``compute=torch.float64`` it returns unrounded fp64 results (only for ops that round).
        samples: ``samples(dtype)`` yields :class:`Sample`; covers size 0, 1, odd sizes, tails.
        dtypes: activation or weight dtypes the samples are made in.
        tolerance: ``"exact"`` (every implementation bit-equal to the reference) or ``"error_rule"``
            (error against fp64 at most ``factor`` times that of ``baseline``, plus 2 ulp).
        baseline: the same maths in eager torch at the op's own dtype; needed for the error rule.
        factor: 1.5 for forward ops, 2.0 for gradients.
        bench: names of benchmark cases; see ``bench/``.
    """

    name: str
    schema: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.dtype], Iterable[Sample]]
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    tolerance: str = "exact"
    baseline: Callable[..., Any] | None = None
    factor: float = 1.5
    bench: tuple[str, ...] = ()


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on one kind of device."""

    op: str
    device: str
    backend: str
    fn: Callable[..., Any]
    can_use: Callable[..., str | None] | None = None

    def refusal(self, args: tuple[Any, ...]) -> str | None:
        """Why this implementation cannot serve ``args``; ``None`` when it can."""
        return self.can_use(*args) if self.can_use is not None else None


@dataclass
class _State:
    forced: str = "auto"
    lock: threading.Lock = field(default_factory=threading.Lock)


_SPECS: dict[str, OpSpec] = {}
_IMPLEMENTATIONS: dict[str, list[Implementation]] = {}
_PROBES: dict[str, Callable[[], str | None]] = {"reference": lambda: None}
# Faster backends stand before slower ones; the reference serves what nobody else can.
_PRIORITY = {"cuda": 0, "triton": 1, "native": 2, "reference": 9}
_STATE = _State()


def define_op(spec: OpSpec) -> OpSpec:
    """Declare an op: its torch schema, its fake, and the reference on every device.

    Raises:
        ValueError: an op of this name exists, or the error rule has no baseline.
    """
    if spec.name in _SPECS:
        raise ValueError(f"op {spec.name!r} is declared twice")
    if spec.tolerance not in ("exact", "error_rule"):
        raise ValueError(f"op {spec.name!r}: tolerance {spec.tolerance!r} is not known")
    if spec.tolerance == "error_rule" and spec.baseline is None:
        raise ValueError(f"op {spec.name!r}: the error rule needs a baseline")
    _SPECS[spec.name] = spec
    _IMPLEMENTATIONS[spec.name] = [
        Implementation(spec.name, "any", "reference", spec.reference),
    ]

    name, check = spec.name, spec.check

    def kernel(*args: Any) -> Any:
        check(*args)
        device = _device_of(args)
        run = _row(name, device, args).fn
        # Gradients are the autograd.Function's business and dtypes the caller's: torch calls inside
        # an implementation see neither a graph nor autocast. The guards are set by hand: as context
        # managers they cost more than a small kernel.
        autocast, gradients = torch.is_autocast_enabled(device), torch.is_grad_enabled()
        if not (autocast or gradients):
            return run(*args)
        try:
            torch._C._set_grad_enabled(False)
            if autocast:
                torch.set_autocast_enabled(device, False)
            return run(*args)
        finally:
            torch._C._set_grad_enabled(gradients)
            if autocast:
                torch.set_autocast_enabled(device, True)

    def fake(*args: Any) -> Any:
        spec.check(*args)
        return spec.fake(*args)

    _LIBRARY.define(spec.name + spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(spec.name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{spec.name}", fake, lib=_LIBRARY)
    return spec


def implementation(
    op: str,
    *,
    device: str,
    backend: str,
    can_use: Callable[..., str | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an implementation of ``op``.

    Args:
        op: name of a declared op.
        device: torch device type it serves (``"cpu"``, ``"cuda"``).
        backend: ``"native"``, ``"triton"`` or ``"cuda"``.
        can_use: called with the op's arguments; ``None`` means yes, a string says why not.

    Raises:
        ValueError: unknown op or backend, or a second implementation for the same place.
    """
    if op not in _SPECS:
        raise ValueError(f"op {op!r} is not declared; known: {', '.join(sorted(_SPECS))}")
    if backend not in _PRIORITY:
        raise ValueError(f"backend {backend!r} is not known; known: {', '.join(_PRIORITY)}")

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        rows = _IMPLEMENTATIONS[op]
        if any(row.device == device and row.backend == backend for row in rows):
            raise ValueError(f"op {op!r} has two {backend!r} implementations for {device!r}")
        rows.append(Implementation(op, device, backend, fn, can_use))
        rows.sort(key=lambda row: _PRIORITY[row.backend])
        return fn

    return register


def register_backend(name: str, probe: Callable[[], str | None]) -> None:
    """Tell how to find out whether backend ``name`` is present: ``None``, or why it is not."""
    _PROBES[name] = probe


def specs() -> dict[str, OpSpec]:
    """All declared ops by name."""
    return dict(_SPECS)


def implementations(op: str, device: str = "cpu") -> list[Implementation]:
    """The implementations of ``op`` for a device type, in the order they are tried."""
    return [row for row in _IMPLEMENTATIONS[op] if row.device in (device, "any")]


def select(op: str, args: tuple[Any, ...]) -> Implementation:
    """The implementation that serves ``args``; see :func:`use_backend` for forcing one.

    Raises:
        RuntimeError: the forced backend has no implementation for this op and device, or it
            refuses these arguments; the message gives the reason.
    """
    return _row(op, _device_of(args), args)


def _row(op: str, device: str, args: tuple[Any, ...]) -> Implementation:
    forced = _STATE.forced
    for row in _IMPLEMENTATIONS[op]:
        if row.device != device and row.device != "any":
            continue
        if forced == "auto":
            if row.can_use is None or row.can_use(*args) is None:
                return row
        elif row.backend == forced:
            reason = row.refusal(args)
            if reason is None:
                return row
            raise RuntimeError(f"peftkern::{op}: backend {forced!r} is forced but {reason}")
    have = ", ".join(row.backend for row in implementations(op, device))
    raise RuntimeError(
        f"peftkern::{op}: backend {forced!r} is forced but has no implementation for device "
        f"{device!r}; present: {have}. Use peftkern.use_backend('auto')."
    )


def explain(
    op: str, device: str = "cpu", args: tuple[Any, ...] | None = None
) -> list[tuple[str, str | None]]:
    """For each implementation of ``op`` on ``device``: its backend, and why it is refused or None.

    Without ``args`` only the presence of the backend is judged, not the shapes and dtypes.
    """
    rows = []
    for row in implementations(op, device):
        reason = _PROBES[row.backend]() if row.backend in _PROBES else None
        if reason is None and args is not None:
            reason = row.refusal(args)
        if reason is None and _STATE.forced not in ("auto", row.backend):
            reason = f"backend {_STATE.forced!r} is forced"
        rows.append((row.backend, reason))
    return rows


def backends() -> dict[str, str]:
    """Which backends are present, and the reason for each that is not.

    Returns:
        backend name -> ``"ok"`` or the reason why it cannot be used on this machine.

    Example:
        >>> import peftkern as pk
        >>> pk.backends()["reference"]
        'ok'
    """
    return {name: _PROBES[name]() or "ok" for name in sorted(_PROBES, key=lambda n: _PRIORITY[n])}


class use_backend:
    """Force every op to one backend, at once; as a context manager, until the block ends.

    Args:
        name: ``"auto"`` (best that can serve the call), ``"reference"``, ``"native"``, ...

    Raises:
        ValueError: the name is not a backend.
        RuntimeError: the backend is not present on this machine; the message says why.

    The setting belongs to the process, not to a thread: autograd runs backward passes on threads
    of its own.

    Example:
        >>> import peftkern as pk
        >>> with pk.use_backend("reference"):
        ...     pass
    """

    def __init__(self, name: str) -> None:
        known = ("auto", *sorted(_PROBES))
        if name not in known:
            raise ValueError(f"name: got {name!r}, expected one of the backends {', '.join(known)}")
        if name != "auto" and (reason := _PROBES[name]()) is not None:
            raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
        with _STATE.lock:
            self._before, _STATE.forced = _STATE.forced, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _STATE.lock:
            _STATE.forced = self._before


def forced_backend() -> str:
    """The backend set by :func:`use_backend` or ``PEFTKERN_BACKEND``; ``"auto"`` if none is."""
    return _STATE.forced


def apply_environment() -> None:
    """Honour ``PEFTKERN_BACKEND``; called once, after every backend has registered."""
    name = env.backend()
    if name != "auto":
        try:
            use_backend(name)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"PEFTKERN_BACKEND={name!r}: {error}") from error


def _device_of(args: tuple[Any, ...]) -> str:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            # Asking for the name makes a new string each time.
            return "cuda" if arg.is_cuda else "cpu" if arg.is_cpu else arg.device.type
    raise TypeError("a peftkern op needs at least one tensor argument")
