"""Bottleneck adapters behind attention and feed-forward, as AdapterHub's ``adapters`` places them.

Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), He et al. 2021
(arXiv 2110.04366), Steitz and Roth 2024 (arXiv 2406.06820).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern.arguments import share
from peftkern.functional.bottleneck import activation_name
from peftkern.hf.blocks import Junction, junctions
from peftkern.hf.config import ALL_LINEAR, AdapterConfig
from peftkern.hf.planning import Planning
from peftkern.hf.targets import Site, choose
from peftkern.hf.undo import UndoLog
from peftkern.nn.bottleneck import (
    BOTTLENECK_INITIALISATIONS,
    BottleneckLayer,
    bottleneck_width,
    check_scaling,
)
from peftkern.nn.structure import default_device

ATTRIBUTE = "bottleneck"  # of the module that carries the layer

_SEQUENTIAL: dict[str, Any] = {
    "original_ln_before": True,
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 16,
}
_DOUBLE: dict[str, Any] = {
    "original_ln_before": False,
    "mh_adapter": True,
    "output_adapter": True,
    "non_linearity": "swish",
    "reduction_factor": 16,
}
_PARALLEL: dict[str, Any] = {
    "original_ln_before": False,
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 2,
    "init_weights": "mam_adapter",
    "is_parallel": True,
    "scaling": 4.0,
}
_PLUS: dict[str, Any] = {
    "original_ln_before": True,
    "original_ln_after": False,
    "residual_before_ln": False,
    "stochastic_depth": 0.1,
    "init_weights": "houlsby",
    "scaling": "channel",
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 96,
    "non_linearity": "gelu",
}
PRESETS: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQUENTIAL,
    "pfeiffer": _SEQUENTIAL,
    "double_seq_bn": _DOUBLE,
    "houlsby": _DOUBLE,
    "par_bn": _PARALLEL,
    "parallel": _PARALLEL,
    "scaled_par_bn": _PARALLEL | {"scaling": "learned"},
    "scaled_parallel": _PARALLEL | {"scaling": "learned"},
    "adapter_plus": _PLUS,
}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Bottleneck adapters, with the field names of AdapterHub's ``BnConfig``.

    Args:
        mh_adapter: adapters behind self-attention.
        output_adapter: adapters behind the feed-forward.
        cross_adapter: adapters behind cross-attention.
        reduction_factor: width of the model over that of the bottleneck; a number, or a mapping
            from the number of a layer (as a string) to one, with an entry ``"default"``.
        non_linearity: activation in the bottleneck; see
            :func:`peftkern.functional.bottleneck_adapter`.
        original_ln_before: the adapter reads the sum with the residual (normalised, where the model
            normalises there) instead of the sub-layer's result.
        original_ln_after: the model's residual connection and normalisation follow the adapter.
        ln_before: a new LayerNorm before the bottleneck.
        ln_after: a new LayerNorm behind it.
        init_weights: ``"bert"``, ``"mam_adapter"`` or ``"houlsby"``.
        init_weights_seed: seed of each adapter's initialisation.
        is_parallel: the adapter reads the residual, beside the sub-layer.
        scaling: a number, ``"learned"`` or ``"channel"``.
        use_gating: a trained gate on the adapter's result.
        residual_before_ln: the adapter's own skip starts at the sub-layer's result (True), at the
            adapter's input (False), or at the sum before the normalisation (``"post_add"``).
        adapter_residual_before_ln: with ln_after: the skip is added before that LayerNorm.
        leave_out: numbers of layers without adapters.
        dropout: dropout on the adapter's result.
        stochastic_depth: probability of dropping the adapter's result of a sample.

    Further fields: :class:`AdapterConfig`. Layers are counted over the whole model, encoder first.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.

    Example:
        >>> BottleneckConfig.preset("houlsby", reduction_factor=8).non_linearity
        'swish'
    """

    kind: ClassVar[str] = "bottleneck"

    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    leave_out: Sequence[int] = ()
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ValueError(
                "mh_adapter, output_adapter and cross_adapter are all False: no adapter anywhere"
            )
        activation_name(self.non_linearity, "non_linearity")
        check_scaling(self.scaling)
        factors = self.reduction_factor
        if isinstance(factors, Mapping):
            factors = {str(key): value for key, value in factors.items()}
            object.__setattr__(self, "reduction_factor", factors)
            for value in factors.values():
                bottleneck_width(1, value)
        else:
            bottleneck_width(1, factors)
        if self.init_weights not in BOTTLENECK_INITIALISATIONS:
            known = ", ".join(BOTTLENECK_INITIALISATIONS)
            raise ValueError(f"init_weights: got {self.init_weights!r}, expected one of {known}")
        if self.residual_before_ln not in (True, False, "post_add"):
            raise ValueError(
                f"residual_before_ln: got {self.residual_before_ln!r}, expected True, False or "
                "'post_add'"
            )
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError("residual_before_ln: 'post_add' needs original_ln_before=True")
        for name in ("dropout", "stochastic_depth"):
            share(name, getattr(self, name))
        object.__setattr__(self, "leave_out", tuple(int(number) for number in self.leave_out))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BottleneckConfig:
        """A configuration by AdapterHub's name, with some fields changed.

        Args:
            name: ``"seq_bn"`` (``"pfeiffer"``), ``"double_seq_bn"`` (``"houlsby"``), ``"par_bn"``
                (``"parallel"``), ``"scaled_par_bn"`` (``"scaled_parallel"``) or ``"adapter_plus"``.
            changes: fields that differ.

        Raises:
            ValueError: there is no preset of this name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(PRESETS)}")
        return replace(cls(**PRESETS[name]), **changes)

    def reduction_at(self, layer: int) -> float | None:
        """The reduction factor of a layer; ``None`` where the mapping has no entry for it."""
        if isinstance(self.reduction_factor, Mapping):
            default = self.reduction_factor.get("default")
            return self.reduction_factor.get(str(layer), default)
        return self.reduction_factor


_SWITCHES = (
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
    "original_ln_before",
    "original_ln_after",
    "ln_before",
    "ln_after",
    "is_parallel",
    "use_gating",
    "adapter_residual_before_ln",
)
_ADAPTER_FIELDS = (
    "non_linearity",
    "ln_before",
    "ln_after",
    "adapter_residual_before_ln",
    "is_parallel",
    "scaling",
    "use_gating",
    "dropout",
    "stochastic_depth",
    "init_weights",
    "init_weights_seed",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
)


def plan(planning: Planning, config: BottleneckConfig) -> list[Site]:
    """Note behind which sub-layers adapters go; gives every linear layer but the heads."""
    places, unknown = junctions(planning.sites)
    for path, reason in unknown.items():
        planning.step(_site(planning, path).module).refuse(f"no place for an adapter: {reason}")
    for place in places:
        if getattr(config, place.kind):
            _plan_place(planning, config, place)
    chosen = choose(planning.model, planning.sites, ALL_LINEAR, config)
    return [choice.site for choice in chosen if choice.wanted]


def _site(planning: Planning, path: str) -> Site:
    return next(site for site in planning.sites if site.name == path)


def _plan_place(planning: Planning, config: BottleneckConfig, place: Junction) -> None:
    step = planning.step(place.site.module)
    if step.copy:
        return
    if place.layer in config.leave_out:
        step.reasons.append(f"layer {place.layer} is in leave_out")
        return
    step.asked = True
    factor = config.reduction_at(place.layer)
    if factor is None:
        raise ValueError(
            f"reduction_factor: no entry for layer {place.layer}, and no entry 'default'"
        )
    if place.width == 0:
        return step.refuse("its normalisation has no weight, so the hidden size is not known")
    if config.residual_before_ln == "post_add" and place.norm is None and not config.is_parallel:
        return step.refuse(
            "residual_before_ln='post_add' needs a model that normalises after its residuals"
        )
    options = {name: getattr(config, name) for name in _ADAPTER_FIELDS}
    options |= {
        "reduction_factor": factor,
        "device": default_device(place.before),
        "dtype": config.adapter_dtype,
    }
    layer = layer_at(place)
    step.r = bottleneck_width(place.width, factor)
    if layer is not None:
        if planning.adapter_name in layer.adapter_names:
            raise ValueError(
                f"adapter_name: {place.site.name} has an adapter {planning.adapter_name!r} "
                "already; choose another name, or unpatch the model first"
            )
        extended = planning.step(layer)
        extended.asked, extended.r = True, step.r
        extended.extend = partial(layer.add_adapter, planning.adapter_name, **options)
        step.asked, step.r = False, 0
        return None
    step.act = partial(_attach, place, planning.adapter_name, options)
    return None


def layer_at(place: Junction) -> BottleneckLayer | None:
    """The layer that stands at a place; ``None`` where there is none yet."""
    layer = getattr(place.site.module, ATTRIBUTE, None)
    return layer if isinstance(layer, BottleneckLayer) else None


def _attach(place: Junction, adapter_name: str, options: dict[str, Any], log: UndoLog) -> None:
    carrier = place.site.module
    layer = BottleneckLayer(place.width, place.norm, replaces=place.shape != "block")
    layer.train(carrier.training)
    layer.add_adapter(adapter_name, **options)
    log.attach(carrier, ATTRIBUTE, layer)
    watch = Watch(layer)
    if place.shape == "closing":
        handles = [carrier.register_forward_pre_hook(watch.take_second)]
    else:
        handles = [place.before.register_forward_pre_hook(watch.take_first)]
    if place.after is None:
        handles.append(place.source.register_forward_hook(watch.join))
    else:
        handles.append(place.source.register_forward_hook(watch.pass_on))
        handles.append(place.after.register_forward_hook(watch.join_passed))
    if place.shape != "block":
        handles.append(carrier.register_forward_hook(watch.finish))
    for handle in handles:
        log.on_rollback(handle.remove)


class Watch:
    """The forward hooks of one place: they catch the residual and put the adapters' result in.

    An object with bound methods, not closures, so that a deep copy of the model has its own.
    """

    def __init__(self, layer: BottleneckLayer) -> None:
        self.layer = layer
        self.residual: Tensor | None = None
        self.finished: Tensor | None = None
        self.passed = False

    def take_first(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The residual is what goes into the normalisation."""
        self.residual = args[0] if self.layer.active_here() else None

    def take_second(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The residual is the second argument of the closing module."""
        self.residual = args[1] if self.layer.active_here() else None

    def pass_on(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The next call of the dropout is the one behind this sub-layer."""
        self.passed = self.residual is not None

    def join_passed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put the adapters behind the dropout, when it is this sub-layer's turn."""
        if not self.passed:
            return None
        self.passed = False
        return self.join(module, args, output)

    def join(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put the adapters behind the sub-layer."""
        residual, self.residual = self.residual, None
        if residual is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        result, done = self.layer.join(hidden, residual)
        if done:
            self.finished = result
            return None
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put the finished result in the place of the module's own."""
        result, self.finished = self.finished, None
        if result is None:
            return None
        return (result, *output[1:]) if isinstance(output, tuple) else result


def places_of(model: nn.Module, sites: Sequence[Site]) -> list[tuple[Junction, BottleneckLayer]]:
    """The places of a model that carry adapters, with their layers."""
    found = [(place, layer_at(place)) for place in junctions(sites)[0]]
    return [(place, layer) for place, layer in found if layer is not None]


@torch.no_grad()
def adapter_state(layer: BottleneckLayer, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter by AdapterHub's names, shared ones under each of them."""
    return dict(layer.adapter(adapter_name).state_dict(keep_vars=True))
