"""Switching, merging and disabling the adapters of a patched model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from peftkern.arguments import require_model
from peftkern.nn.adapter import AdapterLayer, adapter_layers
from peftkern.nn.saved import TrainableCopy

logger = logging.getLogger("peftkern")

_LOSSY = 0.1  # share of an update that rounding may take before a merge says so


def adapter_layers_of(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """The model's adapter layers with their paths.

    Raises:
        ValueError: it has none.
    """
    require_model("model", model)
    layers = adapter_layers(model.named_modules())
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} has no peftkern adapters; call peftkern.patch or "
            "peftkern.load_adapter first"
        )
    return layers


def known_adapters(model: nn.Module) -> list[str]:
    """Names of all adapters in the model, in the order they were added."""
    layers = adapter_layers(model.named_modules())
    return list(dict.fromkeys(name for _, layer in layers for name in layer.adapter_names))


def set_adapter(model: nn.Module, names: str | Sequence[str], trainable: bool = True) -> None:
    """Make exactly these adapters active; the others stay loaded and frozen.

    Args:
        model: a patched model.
        names: one adapter name, or several whose updates add up.
        trainable: whether the active adapters require gradients.

    Raises:
        ValueError: an unknown name; or several adapters with a trained copy of one module.
        RuntimeError: adapters are merged into the weights.

    Example:
        >>> peftkern.set_adapter(model, "poetry")  # doctest: +SKIP
    """
    layers = adapter_layers_of(model)
    if not isinstance(names, Iterable):
        raise TypeError(f"names: got {type(names).__name__}, expected a name or several")
    chosen = [names] if isinstance(names, str) else list(names)
    known = known_adapters(model)
    for name in chosen:
        if name not in known:
            raise ValueError(f"names: no adapter {name!r}; there are: {', '.join(known)}")
    merged = [path for path, layer in layers if layer.merged]
    if merged:
        raise RuntimeError(
            f"adapters are merged into {len(merged)} layers ({merged[0]}, ...); call "
            "peftkern.unmerge(model) first"
        )
    for _, layer in layers:  # these can refuse, so ask before anything changes elsewhere
        layer.check(chosen)
    for _, layer in layers:
        layer.set_adapter(chosen, trainable)


def merge(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    max_error: float | None = None,
    check_only: bool = False,
) -> dict[str, float]:
    """Write adapters into the base weights: no cost at inference, and exactly undone by unmerge.

    Args:
        model: a patched model.
        adapter_names: which adapters; the active ones when left out.
        max_error: refuse when rounding would lose more than this share of an update. Rounding to a
            quantized base often loses a large share of a small update.
        check_only: find the errors and leave every weight as it is.

    Returns:
        For each layer's path: ||written - (base + update)|| / ||update||.

    Raises:
        ValueError: unknown adapter, non-finite update, or an error above ``max_error``; the model
            is then as before the call.
        RuntimeError: adapters are merged already.
    """
    layers = adapter_layers_of(model)
    known = known_adapters(model)
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Iterable | None):
        raise TypeError(f"adapter_names: got {adapter_names!r}, expected a list of names")
    for name in adapter_names or ():
        if name not in known:
            raise ValueError(f"adapter_names: no adapter {name!r}; there are: {', '.join(known)}")
    already = [path for path, layer in layers if layer.merged]
    if already:
        raise RuntimeError(f"adapters are merged already ({already[0]}, ...); unmerge first")
    errors: dict[str, float] = {}
    done: list[AdapterLayer] = []
    try:
        for path, layer in layers:
            names = layer.active_adapters if adapter_names is None else adapter_names
            here = [name for name in names if name in layer.adapter_names]
            if not here or isinstance(layer, TrainableCopy):
                continue
            try:
                errors[path] = layer.merge(here, max_error)
            except (ValueError, RuntimeError) as error:
                error.add_note(f"while merging {path}; no layer of the model was changed")
                raise
            if check_only:
                layer.unmerge()
            else:
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    worst = max(errors, key=errors.__getitem__, default=None)
    if done and worst is not None and max_error is None and errors[worst] > _LOSSY:
        logger.warning(
            "merging lost up to %.0f%% of an update to rounding (%s); peftkern.unmerge brings the "
            "weights back, and merge(model, check_only=True) tells the errors beforehand",
            100 * errors[worst],
            worst,
        )
    return errors


def unmerge(model: nn.Module) -> None:
    """Put the base weights back exactly as they were before :func:`merge`.

    Args:
        model: a patched model; layers without a merge are left alone.
    """
    for _, layer in adapter_layers_of(model):
        layer.unmerge()


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what it did before it was patched.

    Under adapters that began with PiSSA, OLoRA or LoftQ it computes what their changed base does.

    Args:
        model: a patched model; merged adapters are taken out for the block and merged again after.

    Example:
        >>> with disable_adapter(model):  # doctest: +SKIP
        ...     reference = model(**batch)
    """
    layers = [layer for _, layer in adapter_layers_of(model)]
    before = [layer.disable_adapters for layer in layers]
    merged = [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged]
    try:
        for linear, _ in merged:
            linear.unmerge()
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer.enable_adapters(not was_disabled)
        for linear, names in merged:
            linear.merge(names)
