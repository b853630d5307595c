"""``plan``: the bytes of a training run before it starts."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.arguments import whole
from peftkern.hf.config import AdapterConfig
from peftkern.hf.report import _table
from peftkern.memory.methods import Method, method_for
from peftkern.memory.shapes import (
    Group,
    example_inputs,
    layer_groups,
    meta_model,
    only_layers,
)
from peftkern.memory.trace import KernelsOf, trace_step
from peftkern.nn.adapter import AdapterLayer
from peftkern.nn.quantized import QuantizedLinear

logger = logging.getLogger("peftkern")

# Bytes a trainable parameter costs, and where they lie. 8-bit states have two fp32 scales (one for
# Lion) for each 256 parameters.
_OPTIMIZERS: dict[str, tuple[float, str]] = {
    "adamw": (8.0, "device"),
    "adamw8bit": (2.0 + 8.0 / 256, "device"),
    "paged_adamw": (8.0, "host"),
    "paged_adamw8bit": (2.0 + 8.0 / 256, "host"),
    "lion8bit": (1.0 + 4.0 / 256, "device"),
    "sgd": (0.0, "device"),
}
_SMALL = 4096  # smaller tensors keep fp32 state under the 8-bit optimizers
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one training step; ``str()`` gives a table.

    Args:
        method: what is trained.
        batch: rows of a batch.
        seq: tokens of a row.
        weights: frozen and trainable weights of the model, by format.
        adapters: parameters that the method adds.
        gradients: of all trainable parameters.
        optimizer: state of the optimizer by tier: ``device`` or ``host``.
        activations: bytes kept for the backward pass, by class of module.
        step_peak: most bytes of activations, gradients and temporaries alive at once.
        trainable: trainable parameters.
        total: parameters, quantized ones counted by what they stand for.
        gpu_memory: the budget, if one was given.
        largest_batch: the largest batch that fits into it, if one was given.
        measured: bytes measured in a run, set by :meth:`beside`.
    """

    method: str
    batch: int
    seq: int
    weights: dict[str, int]
    adapters: int
    gradients: int
    optimizer: dict[str, int]
    activations: dict[str, int]
    step_peak: int
    trainable: int
    total: int
    gpu_memory: int | None = None
    largest_batch: int | None = None
    measured: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """Everything that lies on the device at the peak of a step.

        Less than the sum of the kinds where gradients come while activations go.
        """
        resident = sum(self.weights.values()) + self.adapters + self.optimizer.get("device", 0)
        return resident + self.step_peak

    @property
    def workspace(self) -> int:
        """What a step needs for a moment beyond activations and gradients."""
        return max(0, self.step_peak - sum(self.activations.values()) - self.gradients)

    @property
    def host_bytes(self) -> int:
        """What the optimizer keeps in host memory."""
        return self.optimizer.get("host", 0)

    @property
    def fits(self) -> bool | None:
        """Whether the batch fits into the budget; ``None`` without one."""
        return None if self.gpu_memory is None else self.device_bytes <= self.gpu_memory

    def beside(self, **measured: int) -> MemoryPlan:
        """The plan with measured bytes beside it.

        Args:
            measured: by kind: ``device_bytes``, ``activations``, ``weights``, ...

        Returns:
            A copy whose table shows both.
        """
        return replace(self, measured={**self.measured, **measured})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        out = dict(self.__dict__)
        out |= {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes}
        out["workspace"] = self.workspace
        return out | {"fits": self.fits}

    def __str__(self) -> str:
        ranked = sorted(self.activations.items(), key=lambda item: -item[1])
        rows: list[tuple[str, str, int]] = []
        rows += [("weights", name, size) for name, size in self.weights.items()]
        rows.append(("adapters", "", self.adapters))
        rows.append(("gradients", "", self.gradients))
        rows += [("optimizer", tier, size) for tier, size in self.optimizer.items()]
        rows += [("activations", name, size) for name, size in ranked]
        rows.append(("workspace", "", self.workspace))
        body = [
            (kind, what, _readable(size), self._beside(kind, what)) for kind, what, size in rows
        ]
        body.append(
            ("device", "peak", _readable(self.device_bytes), self._beside("device_bytes", ""))
        )
        if self.host_bytes:
            body.append(("host", "", _readable(self.host_bytes), ""))
        head = ("kind", "of what", "bytes", "measured")
        columns = slice(0, 4 if self.measured else 3)
        lines = _table(head[columns], [row[columns] for row in body])
        lines += ["", self.summary]
        return "\n".join(lines)

    def _beside(self, kind: str, what: str) -> str:
        value = self.measured.get(f"{kind}.{what}" if what else kind)
        return "" if value is None else _readable(value)

    @property
    def summary(self) -> str:
        """Method, sizes, and what fits, in one line."""
        line = (
            f"{self.method}: {self.trainable:,} of {self.total:,} parameters train; "
            f"{_readable(self.device_bytes)} at batch {self.batch} x {self.seq} tokens"
        )
        if self.gpu_memory is not None:
            line += f"; of {_readable(self.gpu_memory)} the largest batch is {self.largest_batch}"
        return line


@dataclass
class _Costs:
    """Everything about one cut-down model that is a sum over layers."""

    numbers: Counter[tuple[str, str]]

    def plus(self, other: _Costs, factor: int) -> _Costs:
        total = Counter(self.numbers)
        for key, value in other.numbers.items():
            total[key] += factor * value
        return _Costs(total)

    def minus(self, other: _Costs) -> _Costs:
        return self.plus(other, -1)

    def part(self, kind: str) -> dict[str, int]:
        found = {what: value for (k, what), value in self.numbers.items() if k == kind}
        return {what: value for what, value in found.items() if value > 0}


def plan(
    model_or_config: Any,
    method: str | AdapterConfig = "qlora",
    batch: int = 1,
    seq: int = 2048,
    gpu_memory: int | str | None = None,
    *,
    optimizer: str = "adamw",
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = False,
    device: str = "cuda",
    r: int = 16,
    target_modules: Any = "all-linear",
    virtual_tokens: int = 32,
    reduction: int = 16,
) -> MemoryPlan:
    """Predict the bytes of a training step by kind, without weights and without a GPU.

    The model is built on the meta device and one step of it is run there, two layers of each kind:
    what autograd keeps is counted as it happens, on the layers and kernels that would run. Within
    10 % of what is measured; not counted are the CUDA context (some 0.5 GB), fragmentation, and
    the input pipeline.

    Args:
        model_or_config: a model (nothing is changed), a transformers configuration, a folder with
            ``config.json``, or a known name such as ``"llama-3-8b"``.
        method: ``"lora"``, ``"qlora"``, ``"bottleneck"`` (AdapterHub's ``seq_bn``), ``"prefix"``,
            ``"prompt"``, ``"full"``, ``"as-is"`` (a model that is patched or wrapped already), or
            a configuration for :func:`peftkern.patch`.
        batch: rows of a batch.
        seq: tokens of a row.
        gpu_memory: budget in bytes, or as ``"24GB"``, ``"80GiB"``.
        optimizer: ``"adamw"``, ``"adamw8bit"``, ``"paged_adamw"``, ``"paged_adamw8bit"``,
            ``"lion8bit"`` or ``"sgd"``.
        dtype: of the weights, where no model gives it.
        gradient_checkpointing: keep the inputs of the layers only.
        device: ``"cuda"`` or ``"cpu"``: whose attention and dropout kernels to assume.
        r: rank, for ``"lora"`` and ``"qlora"``.
        target_modules: which layers, for ``"lora"`` and ``"qlora"``.
        virtual_tokens: length, for ``"prefix"`` and ``"prompt"``.
        reduction: width over bottleneck, for ``"bottleneck"``.

    Returns:
        The plan; ``print`` it for a table.

    Raises:
        ValueError: an unknown method, optimizer, device or size.
        TypeError: ``model_or_config`` is not something to plan for.

    Example:
        >>> import peftkern as pk
        >>> found = pk.plan("llama-3-8b", "qlora", batch=1, seq=512, gpu_memory="24GB")
        >>> found.fits
        True
    """
    if not isinstance(optimizer, str) or optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer: got {optimizer!r}, expected one of {', '.join(_OPTIMIZERS)}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: got {device!r}, expected 'cuda' or 'cpu'")
    for name, value in (("batch", batch), ("seq", seq)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        whole(name, value)
    budget = None if gpu_memory is None else parse_bytes(gpu_memory)
    way = method_for(method, r, target_modules, virtual_tokens, reduction)
    model = meta_model(model_or_config, dtype)
    simulate = _Simulation(model, way, optimizer, gradient_checkpointing, device)
    found = simulate.costs(batch, seq)
    label = way.label
    planned = _as_plan(label, batch, seq, found)
    if budget is None:
        return planned
    rows = 2 if batch == 1 else batch // 2
    second = _as_plan(label, rows, seq, simulate.costs(rows, seq))
    smaller, other = sorted((planned, second), key=lambda p: p.batch)
    rows = other.batch - smaller.batch
    slope = max(1.0, (other.device_bytes - smaller.device_bytes) / rows)
    fixed = smaller.device_bytes - slope * smaller.batch
    largest = max(0, int((budget - fixed) // slope))
    return replace(planned, gpu_memory=budget, largest_batch=largest)


def parse_bytes(size: int | str) -> int:
    """``24_000_000_000``, ``"24GB"`` or ``"22.5GiB"`` as a number of bytes.

    Raises:
        ValueError: not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]i?)?b?\s*", str(size).lower())
    if match is None:
        raise ValueError(f"gpu_memory: got {size!r}, expected bytes or a size such as '24GB'")
    unit = match[2] or ""
    return int(float(match[1]) * (_BINARY[unit] if unit in _BINARY else _UNITS[unit]))


class _Simulation:
    """Costs of a model as sums over its layer kinds: two of each run, and three of one in turn."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: str,
        checkpointing: bool,
        device: str,
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.checkpointing = checkpointing
        self.device = device
        groups = layer_groups(model)
        self.base = self._cut(model, groups, None)
        repeated = [group for group in groups if len(group.members) > 2]
        self.more = [(self._cut(model, groups, g), len(g.members) - 2) for g in repeated]

    def _cut(self, model: nn.Module, groups: list[Group], extra: Group | None) -> nn.Module:
        with only_layers(model, groups, extra):
            twin = copy.deepcopy(model)
        self.method.apply(twin)
        twin.train()
        if self.checkpointing:
            checkpoint = {
                "use_reentrant": False,
                "preserve_rng_state": False,
                # Backward passes run without function modes; the recomputation needs this one.
                "context_fn": lambda: (contextlib.nullcontext(), KernelsOf(self.device)),
            }
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable: Any = next((getattr(twin, n) for n in names if hasattr(twin, n)), None)
            if enable is None:
                raise ValueError(
                    f"gradient_checkpointing: {type(twin).__name__} has no method to enable it; "
                    "plan without"
                )
            enable(checkpoint)
        return twin

    def costs(self, batch: int, seq: int) -> _Costs:
        """Bytes by kind for one batch."""
        base = self._measure(self.base, batch, seq)
        total = base
        for twin, count in self.more:
            total = total.plus(self._measure(twin, batch, seq).minus(base), count)
        return total

    def _measure(self, model: nn.Module, batch: int, seq: int) -> _Costs:
        numbers = _parameter_costs(model, self.optimizer)
        inputs = example_inputs(model, batch, seq)
        if "use_cache" in _arguments(model):
            inputs["use_cache"] = False  # type: ignore[assignment]
        trace = trace_step(model, lambda: _loss(model(**inputs)), self.device)
        for name, size in trace.saved.items():
            numbers["activations", name] += size
        numbers["step", "first"] = trace.first_peak
        numbers["step", "last"] = trace.last_peak
        return _Costs(numbers)


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    values = output.values() if hasattr(output, "values") else [output]
    first = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return first.float().square().mean()


def _parameter_costs(model: nn.Module, optimizer: str) -> Counter[tuple[str, str]]:
    numbers: Counter[tuple[str, str]] = Counter()
    formats: dict[int, str] = {}
    logical: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for tensor in module._stored_tensors().values():
                formats[id(tensor)] = module.quantized.quant_type
                logical[id(tensor)] = 0
            logical[id(module.weight)] = module.in_features * module.out_features
    adapters = _adapter_parameters(model)
    for parameter in model.parameters():
        key = id(parameter)
        size = parameter.numel() * parameter.element_size()
        if key in adapters:
            numbers["adapters", ""] += size
        else:
            kind = formats.get(key, str(parameter.dtype).removeprefix("torch."))
            numbers["weights", kind] += size
        numbers["count", "total"] += logical.get(key, parameter.numel())
        if parameter.requires_grad:
            numbers["count", "trainable"] += parameter.numel()
            numbers["gradients", ""] += size
            state, tier = _OPTIMIZERS[optimizer]
            if optimizer.endswith("8bit") and parameter.numel() < _SMALL:
                state = 4.0 if "lion" in optimizer else 8.0
            numbers["optimizer", tier] += int(state * parameter.numel())
    for buffer in {id(b): b for b in model.buffers()}.values():
        numbers["weights", "buffers"] += buffer.numel() * buffer.element_size()
    return numbers


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Parameters that an adapter layer adds: trainable ones below it, outside its base."""
    found: set[int] = set()
    for module in model.modules():
        theirs = hasattr(module, "base_layer") and hasattr(module, "active_adapters")
        if isinstance(module, AdapterLayer) or theirs:
            for name, parameter in module.named_parameters():
                if "base_layer" not in name and "original_module" not in name:
                    found.add(id(parameter))
    return found


def _as_plan(label: str, batch: int, seq: int, costs: _Costs) -> MemoryPlan:
    return MemoryPlan(
        method=label,
        batch=batch,
        seq=seq,
        weights=costs.part("weights"),
        adapters=costs.numbers["adapters", ""],
        gradients=costs.numbers["gradients", ""],
        optimizer=costs.part("optimizer"),
        activations=costs.part("activations"),
        # Going backwards, activations leave as gradients come: the most is alive at either end.
        step_peak=max(
            costs.numbers["step", "first"],
            costs.numbers["step", "last"],
            costs.numbers["gradients", ""],
        ),
        trainable=costs.numbers["count", "trainable"],
        total=costs.numbers["count", "total"],
    )


def _readable(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    raise AssertionError("unreachable")
