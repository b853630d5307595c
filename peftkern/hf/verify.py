"""``verify``: the fused kernels against the reference, on the user's own model, batch and dtype."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftkern.arguments import require_model
from peftkern.hf.report import _table
from peftkern.registry import forced_backend, use_backend

# Share of the norm by which two right results may differ: sums in another order, and one rounding
# of the result, in the coarsest dtype that takes part.
_LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
# Differences pass through every layer after the one that made them.
_WHOLE_MODEL = 10.0
_COUNTS = "_peftkern_counts"
_INFINITE = float("inf")

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Difference:
    """One tensor, computed twice.

    Args:
        module: path of the module; empty for the whole model.
        kind: its class.
        tensor: ``"output"``, ``"gradient of input 0"``, ``"gradient of lora_A.default.weight"``.
        error: norm of the difference over the norm of the reference.
        limit: the largest error that rounding explains.
    """

    module: str
    kind: str
    tensor: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.error <= self.limit


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found; ``str()`` gives a table of the worst, ``ok`` the verdict.

    Args:
        rows: one a tensor of each module, computed alone from the same input and gradient.
        whole: one a trainable parameter: its gradient through the whole model, both ways.
        loss: of the fused run.
        loss_reference: of the reference run.
        no_gradient: trainable parameters that this batch gave no gradient at all.
        skipped: module -> why it was not compared alone.
        against: ``"reference"`` or ``"original"``.
    """

    rows: tuple[Difference, ...]
    whole: tuple[Difference, ...]
    loss: float
    loss_reference: float
    no_gradient: tuple[str, ...]
    skipped: dict[str, str]
    against: str

    @property
    def ok(self) -> bool:
        """Whether something was compared and every difference is explained by rounding."""
        compared = (*self.rows, *self.whole)
        return bool(compared) and all(row.ok for row in compared)

    @property
    def worst(self) -> Difference | None:
        """The row with the largest error in terms of its limit; ``None`` without rows."""
        return max(self.rows, key=lambda row: row.error / row.limit, default=None)

    @property
    def summary(self) -> str:
        """The verdict in one line; the worst module by name."""
        modules = len({row.module for row in self.rows})
        verdict = "agree" if self.ok else "DIFFER"
        line = (
            f"{modules} modules, {len(self.rows)} tensors: fused and {self.against} {verdict}; "
            f"loss {self.loss:.6g} and {self.loss_reference:.6g}"
        )
        if self.worst is not None:
            worst = self.worst
            line += (
                f"; worst: {worst.tensor} of {worst.module} ({worst.error:.2e}, "
                f"limit {worst.limit:.0e})"
            )
        return line

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        out = asdict(self)
        out["ok"] = self.ok
        return out

    def __str__(self) -> str:
        ranked = sorted(self.rows, key=lambda row: row.error / row.limit, reverse=True)
        failing = [row for row in (*ranked, *self.whole) if not row.ok]
        body = [
            (row.module or "(model)", row.kind, row.tensor, f"{row.error:.2e}", f"{row.limit:.0e}")
            for row in (failing or ranked[:10])
        ]
        lines = _table(("module", "class", "tensor", "error", "limit"), body)
        lines += ["", self.summary]
        lines += [f"not compared alone: {name}: {why}" for name, why in self.skipped.items()]
        if self.no_gradient:
            lines.append(f"no gradient from this batch: {', '.join(self.no_gradient)}")
        return "\n".join(lines)


def verify(
    model: nn.Module, batch: Any, loss: Loss | None = None, against: str = "reference"
) -> VerifyReport:
    """Compare the kernels in use with the reference: outputs and every gradient, module by module.

    One step runs as the model is (dtype, autocast, training mode); each module of ours is then
    computed once more alone, from the input and the output gradient that it met, by the kernels
    and by the reference. Another step runs unwatched, and one on the reference alone. Gradients,
    buffers, training modes, random states and call counters are what they were afterwards.

    Args:
        model: a patched or accelerated model.
        batch: a mapping (keyword arguments), a tuple or list (positional), or one tensor.
        loss: called with the model and the batch, returns a scalar; left out, the ``loss`` of the
            model's output is taken, or else the mean square of its first float tensor.
        against: ``"reference"`` (plain torch, the same maths) or ``"original"`` (the forward of
            PEFT or bitsandbytes that an accelerated layer replaces).

    Returns:
        The report: ``report.ok``, ``report.worst``, and ``print(report)``.

    Raises:
        ValueError: the model has no module of ours, or ``against`` is unknown.

    Example:
        >>> import peftkern as pk
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> handle = pk.patch(net, pk.LoRAConfig(r=4, target_modules=["0"]))
        >>> pk.verify(net, torch.randn(8, 64)).ok
        True
    """
    if against not in ("reference", "original"):
        raise ValueError(f"against: got {against!r}, expected 'reference' or 'original'")
    require_model("model", model)
    if loss is not None and (isinstance(loss, nn.Module) or not callable(loss)):
        raise TypeError(f"loss: got {type(loss).__name__}, expected loss(model, batch)")
    modules = _outermost(model)
    if not modules:
        raise ValueError(
            f"model: this {type(model).__name__} has no peftkern module to verify; call "
            "peftkern.patch or peftkern.accelerate first"
        )
    compute = loss if loss is not None else default_loss
    with _kept(model):
        state = _random_state(model)
        watcher = _Watcher(modules, against)
        _step(model, batch, compute, watcher.watching())
        _restore_random_state(state)
        # Once more unwatched: layers that share their input then compute together.
        value, gradients = _step(model, batch, compute, contextlib.nullcontext())
        _restore_random_state(state)
        other = _originals(model) if against == "original" else use_backend("reference")
        value_reference, expected = _step(model, batch, compute, other)
    # Adapters that hooks drive, and prefixes, are not called alone: the weights' dtypes decide.
    coarsest = max((_LIMITS.get(p.dtype, 0.0) for p in model.parameters()), default=0.0)
    limit = _WHOLE_MODEL * max((row.limit for row in watcher.rows), default=coarsest)
    pairs = {
        f"gradient of {name}": (got, want)
        for name, got in gradients.items()
        if got is not None and (want := expected[name]) is not None
    }
    whole = _differences("", type(model).__name__, pairs, limit)
    silent = tuple(name for name, gradient in gradients.items() if gradient is None)
    return VerifyReport(
        tuple(watcher.rows),
        tuple(whole),
        value,
        value_reference,
        silent,
        watcher.reasons(),
        against,
    )


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The ``loss`` of the model's output, or the mean square of its first float tensor.

    Raises:
        ValueError: the output holds no float tensor.
    """
    output = _call(model, batch)
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.float().square().mean()
    raise ValueError(f"loss: the model returned {type(output).__name__} without a float tensor")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence):
        return model(*batch)
    return model(batch)


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """Our modules that lie in no other of ours: hooks further inside would keep kernels off."""
    found: dict[str, nn.Module] = {}

    def walk(prefix: str, module: nn.Module) -> None:
        if type(module).__module__.startswith("peftkern."):
            found[prefix] = module
            return
        for name, child in module.named_children():
            walk(f"{prefix}.{name}" if prefix else name, child)

    walk("", model)
    return found


def _step(
    model: nn.Module, batch: Any, loss: Loss, context: contextlib.AbstractContextManager[Any]
) -> tuple[float, dict[str, Tensor | None]]:
    """One forward and backward pass; the loss and every trainable parameter's gradient."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in wanted.values():
        parameter.grad = None
    with context:
        value = loss(model, batch)
        if value.requires_grad:
            value.backward()
    gradients = {name: p.grad for name, p in wanted.items()}
    for parameter in wanted.values():
        parameter.grad = None
    return value.item(), gradients


class _Watcher:
    """Computes each module again, alone, when the gradient of its output is known."""

    def __init__(self, modules: dict[str, nn.Module], against: str) -> None:
        self.modules = modules
        self.against = against
        self.rows: list[Difference] = []
        self._skipped: dict[str, str] = {}
        self._seen: set[str] = set()
        self._busy = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            hook
            for name, module in self.modules.items()
            for hook in (
                module.register_forward_pre_hook(self._before(name)),
                module.register_forward_hook(self._after(name), with_kwargs=True),
            )
        ]
        self._states: dict[str, Any] = {}
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def reasons(self) -> dict[str, str]:
        missing = {n: "not called on its own" for n in self.modules if n not in self._seen}
        return {**missing, **self._skipped}

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._busy:
                self._states[name] = (_random_state(module), _autocast_state(module))

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._busy or (name in self._seen and not torch.is_grad_enabled()):
                return
            self._seen.add(name)
            if not isinstance(output, Tensor):
                self._skipped[name] = f"it returns a {type(output).__name__}, not one tensor"
                return
            if self.against == "original" and (reason := _why_no_original(module)) is not None:
                self._skipped[name] = reason
                return
            call = (args, kwargs, *self._states[name])
            if not output.requires_grad:
                if torch.is_grad_enabled():
                    self._compare(name, module, call, output, None)
                return
            shown = output.detach()
            output.register_hook(lambda dy: self._compare(name, module, call, shown, dy))

        return hook

    def _compare(
        self, name: str, module: nn.Module, call: Any, shown: Tensor, dy: Tensor | None
    ) -> None:
        self._busy = True
        try:
            got = _replay(module, call, dy, contextlib.nullcontext())
            if not torch.equal(got["output"], shown.to(got["output"].dtype)):
                # Its result depends on more than its arguments: it can be judged in the whole only.
                self._skipped[name] = "computing it again alone gives another output"
                return
            other = _originals(module) if self.against == "original" else use_backend("reference")
            want = _replay(module, call, dy, other)
        finally:
            self._busy = False
        pairs = {label: (value, want[label]) for label, value in got.items()}
        limit = max(_LIMITS.get(value.dtype, 2e-2) for value in (*got.values(), shown))
        self.rows.extend(_differences(name, type(module).__name__, pairs, limit))


def _replay(
    module: nn.Module, call: Any, dy: Tensor | None, context: contextlib.AbstractContextManager[Any]
) -> dict[str, Tensor]:
    """Output and gradients of one module, from the arguments and random state of its call."""
    args, kwargs, state, autocast = call
    now = _random_state(module)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    fresh = [
        leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    again, named = pytree.tree_unflatten(fresh, spec)
    wanted = {
        f"gradient of input {i}": leaf
        for i, leaf in enumerate(fresh)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }
    trainable = {f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    wanted |= trainable
    _restore_random_state(state)
    try:
        with context:
            with torch.enable_grad(), torch.autocast(**autocast):
                y = module.forward(*again, **named)
            results = {"output": y.detach()}
            if dy is not None and wanted:
                found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
                pairs = zip(wanted, found, strict=True)
                results |= {label: grad for label, grad in pairs if grad is not None}
        return results
    finally:
        _restore_random_state(now)


def _differences(
    module: str, kind: str, pairs: dict[str, tuple[Tensor, Tensor]], limit: float
) -> list[Difference]:
    """Norm of each difference over the norm of the reference.

    A gradient a thousand times smaller than the others of its module is measured by theirs: some
    are zero but for rounding (the bias of an attention key, which softmax does not see).
    """
    sizes = {label: _rms(want) for label, (_, want) in pairs.items()}
    floor = 1e-3 * max((s for label, s in sizes.items() if label != "output"), default=0.0)
    rows = []
    for label, (got, want) in pairs.items():
        error = _rms(got.double() - want.double())
        scale = sizes[label] if label == "output" else max(sizes[label], floor)
        if error != 0.0:
            error = error / scale if scale > 0.0 else _INFINITE
        rows.append(Difference(module, kind, label, error if error == error else _INFINITE, limit))
    return rows


def _rms(value: Tensor) -> float:
    if value.numel() == 0:
        return 0.0
    return (torch.linalg.vector_norm(value.double()) / value.numel() ** 0.5).item()


def _why_no_original(module: nn.Module) -> str | None:
    from peftkern.hf.accelerate.fused import Accelerated

    if not isinstance(module, Accelerated):
        return "peftkern's own module: there is no original to compare with"
    drops = (m for m in module.modules() if isinstance(m, nn.Dropout))
    if any(m.training and m.p > 0 for m in drops):
        return "its dropout draws other random numbers than the original's"
    return None


@contextlib.contextmanager
def _originals(model: nn.Module) -> Iterator[None]:
    """The original classes of accelerated layers, for a while."""
    from peftkern.hf.accelerate.fused import Accelerated

    swapped: list[tuple[Any, Any]] = [
        (m, type(m)) for m in model.modules() if isinstance(m, Accelerated)
    ]
    for module, _ in swapped:
        module.__class__ = module.original_class
    try:
        yield
    finally:
        for module, kind in swapped:
            module.__class__ = kind


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, training modes, counters, random states, backend: as before."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    counters = [(m, copy.deepcopy(m.__dict__.get(_COUNTS))) for m in model.modules()]
    state, backend = _random_state(model), forced_backend()
    try:
        yield
    finally:
        use_backend(backend)
        _restore_random_state(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        for module, counts in counters:
            module.__dict__.pop(_COUNTS, None)
            if counts is not None:
                module.__dict__[_COUNTS] = counts


def _random_state(module: nn.Module) -> tuple[Tensor, dict[int, Tensor]]:
    """States of torch's generators: the CPU's, and those of the GPUs that hold the module."""
    indices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in sorted(indices)}


def _restore_random_state(state: tuple[Tensor, dict[int, Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for index, value in state[1].items():
        torch.cuda.set_rng_state(value, index)


def _autocast_state(module: nn.Module) -> dict[str, Any]:
    first = next(module.parameters(), None)
    device = "cpu" if first is None else first.device.type
    enabled = torch.is_autocast_enabled(device)
    return {
        "device_type": device,
        "enabled": enabled,
        "dtype": torch.get_autocast_dtype(device) if enabled else None,
    }
