"""A different adapter for each row of a batch, in training and in inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftkern.hf.adapters import adapter_layers_of, known_adapters
from peftkern.hf.undo import UndoLog
from peftkern.nn.adapter import adapter_layers
from peftkern.nn.rows import BASE, AdapterRows, RowChoice

_ATTRIBUTE = "_peftkern_rows"
_KEYWORD = "adapter_names"


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block each row of a batch goes through the adapter that is named for it.

    The same as the keyword ``adapter_names=`` of the patched model's forward and ``generate``, and
    the way to do it under ``torch.compile``. Unlike PEFT's keyword it also works in training: each
    adapter gets the gradients of its own rows. Adapters train that are active, so activate them
    with ``peftkern.set_adapter(model, [...])``. The backward pass may come after the block, with
    gradient checkpointing too, when the patched model itself was called.

    Args:
        model: a patched model.
        names: one adapter name for each row; ``"__base__"`` for none. All adapters must be LoRA,
            (IA)^3 or trained copies.

    Raises:
        TypeError: not a list of names.
        ValueError: an unknown name, or adapters of a kind that cannot differ by row.
        RuntimeError: adapters are merged into the weights.

    Example:
        >>> with peftkern.adapter_rows(model, ["poetry", "law", "__base__"]):  # doctest: +SKIP
        ...     model(**batch_of_three).loss.backward()
    """
    choice = checked_choice(model, names)
    state = _state_of(model)
    before = state.default, state.current
    state.default = state.current = choice
    state.used = True
    try:
        yield
    finally:
        state.default, state.current = before


def checked_choice(model: nn.Module, names: Sequence[str], expand: int = 1) -> RowChoice:
    """The choice that names make, or what is wrong with it.

    Raises:
        TypeError: not a list of names.
        ValueError: an unknown name, or adapters of a kind that cannot differ by row.
        RuntimeError: adapters are merged into the weights.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"{_KEYWORD}: expected a list with one name for each row, got {type(names).__name__}"
        )
    layers = adapter_layers_of(model)
    known = known_adapters(model)
    for name in names:
        if name != BASE and name not in known:
            raise ValueError(
                f"{_KEYWORD}: no adapter {name!r}; there are: {', '.join(known)}, and {BASE!r} "
                "for none"
            )
    for path, layer in layers:
        if layer.merged:
            raise RuntimeError(
                f"{_KEYWORD}: adapters are merged into the weights ({path}, ...); call "
                "peftkern.unmerge(model) first"
            )
        here = {*layer.active_adapters, *names} & set(layer.adapter_names)
        if here and not layer.serves_rows and not layer.disable_adapters:
            raise ValueError(
                f"{_KEYWORD}: {path} is a {type(layer).__name__} with adapter "
                f"{sorted(here)[0]!r}, which cannot differ from row to row"
            )
    return RowChoice(names, expand)


def _state_of(model: nn.Module) -> AdapterRows:
    state = model.__dict__.get(_ATTRIBUTE)
    if state is None:
        state = model.__dict__[_ATTRIBUTE] = AdapterRows()
    for _, layer in adapter_layers(model.named_modules()):
        layer._rows = state
    return state


class _BeforeForward:
    """Forward pre-hook of a patched model: takes ``adapter_names`` out of its arguments."""

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = kwargs.get(_KEYWORD)
        state: AdapterRows | None = model.__dict__.get(_ATTRIBUTE)
        if given is None and (state is None or not state.used):
            if _KEYWORD not in kwargs:
                return None
            return args, {key: value for key, value in kwargs.items() if key != _KEYWORD}
        if torch.compiler.is_compiling():
            if given is not None:
                raise ValueError(
                    f"{_KEYWORD}: under torch.compile use "
                    "`with peftkern.adapter_rows(model, names):` around the call"
                )
            return None
        state = _state_of(model)
        choice = state.default if given is None else checked_choice(model, given)
        state.used = state.tracked = True
        state.current = choice
        handles: list[Any] = []
        after = partial(_after_forward, state, choice, handles)
        handles.append(model.register_forward_hook(after, always_call=True))
        return args, {key: value for key, value in kwargs.items() if key != _KEYWORD}


def _after_forward(
    state: AdapterRows,
    choice: RowChoice | None,
    handles: list[Any],
    model: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    for handle in handles:
        handle.remove()
    state.tracked = False
    state.current = state.default
    if not torch.is_grad_enabled():
        return
    # Checkpointing computes layers again inside the backward pass: the gradient's arrival at an
    # output of this forward pass brings back the choice that it was made with.
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(partial(_on_backward, state, choice))


def _on_backward(state: AdapterRows, choice: RowChoice | None, gradient: Tensor) -> None:
    state.current, state.tracked = choice, True
    torch.autograd.Variable._execution_engine.queue_callback(partial(_end_of_backward, state))


def _end_of_backward(state: AdapterRows) -> None:
    state.current, state.tracked = state.default, False


class _Generate:
    """``generate`` of a patched model, with the keyword ``adapter_names``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        generate = type(self.model).generate  # type: ignore[attr-defined]
        if adapter_names is None:
            return generate(self.model, *args, **kwargs)
        choice = checked_choice(self.model, adapter_names, self._copies(args, kwargs))
        state = _state_of(self.model)
        before = state.default, state.current
        state.default = state.current = choice
        state.used = True
        try:
            return generate(self.model, *args, **kwargs)
        finally:
            state.default, state.current = before

    def _copies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many rows generation makes of one: beams, or returned sequences."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        own = getattr(self.model, "generation_config", None)
        counts = [1]
        for key in ("num_beams", "num_return_sequences"):
            for source in (kwargs.get(key), getattr(given, key, None), getattr(own, key, None)):
                if source is not None:
                    counts.append(int(source))
                    break
        return max(counts)


def accept_rows(model: nn.Module, log: UndoLog) -> None:
    """Have a model's forward and ``generate`` take ``adapter_names`` until the patch is undone."""
    handle = model.register_forward_pre_hook(_BeforeForward(), with_kwargs=True)
    log.on_rollback(handle.remove)
    log.on_rollback(partial(model.__dict__.pop, _ATTRIBUTE, None))
    if callable(getattr(type(model), "generate", None)) and "generate" not in model.__dict__:
        model.__dict__["generate"] = _Generate(model)
        log.on_rollback(partial(model.__dict__.pop, "generate", None))
