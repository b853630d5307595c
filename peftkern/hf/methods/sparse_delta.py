"""Sparse delta: k chosen entries of each frozen weight train, and nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern.arguments import whole
from peftkern.hf.config import ALL_LINEAR, TargetedConfig, is_number, positive_int
from peftkern.hf.planning import Planning
from peftkern.hf.targets import Choice, Site
from peftkern.nn.sparse_delta import SparseDeltaLinear
from peftkern.nn.structure import features

if TYPE_CHECKING:
    from peftkern.select import Selection

PATTERNS = ("random", "magnitude", "first")


@dataclass(frozen=True, kw_only=True)
class SparseDeltaConfig(TargetedConfig):
    """A few entries of each frozen weight train; they start at zero change.

    Args:
        selection: which entries, from :func:`peftkern.top_k` or :func:`peftkern.threshold`; layers
            of which it holds none are left alone.
        density: without a selection, the share of each weight to train, in (0, 1].
        pattern: without a selection, which entries: ``"random"``, ``"magnitude"`` (the largest
            weights of each layer) or ``"first"`` (the first ones; for files, which bring their
            own positions).
        seed: of the random pattern.
        entries: path of a layer -> number of entries there, instead of ``density``; only these
            layers are adapted.

    Further fields: :class:`TargetedConfig` (which modules) and :class:`AdapterConfig` (what is
    trained in full, how the base is kept).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range, or both selection and entries.

    Example:
        >>> SparseDeltaConfig(density=0.005, target_modules=["q_proj", "v_proj"]).pattern
        'random'
    """

    kind = "sparse_delta"

    selection: Selection | None = None
    density: float = 0.01
    pattern: str = "random"
    seed: int = 0
    entries: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.density) or not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: expected a number in (0, 1], got {self.density!r}")
        whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern: got {self.pattern!r}, expected one of {PATTERNS}")
        if self.selection is not None and not hasattr(self.selection, "indices"):
            raise TypeError(
                "selection: expected what peftkern.top_k or peftkern.threshold returns, got "
                f"{type(self.selection).__name__}"
            )
        if self.entries is not None:
            if self.selection is not None:
                raise ValueError("entries: a selection says already how many")
            for name, count in self.entries.items():
                positive_int(f"entries[{name!r}]", count)
            object.__setattr__(self, "entries", dict(self.entries))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; of a selection its counts, not its positions."""
        out = super().to_dict()
        if self.selection is not None:
            out["selection"] = self.selection.to_dict()
        return out


def plan(planning: Planning, config: SparseDeltaConfig) -> list[Site]:
    """Note at each target which entries train, or why none do; gives the targets."""
    targets = _targets(planning, config)
    for choice in targets:
        step = planning.adaptable(choice, SparseDeltaLinear)
        if step is None:
            continue
        module = step.site.module
        inner = module.base_layer if isinstance(module, SparseDeltaLinear) else module
        rows, columns = _out_in(inner)
        step.r = _count(config, choice, rows * columns)
        choose = partial(positions, config, step.site.name, step.r)
        name, dtype = planning.adapter_name, config.adapter_dtype
        step.wrap = partial(_wrap, choose, inner, name, dtype)
        if isinstance(module, SparseDeltaLinear):
            step.extend = partial(_extend, choose, module, name, dtype)
    return [choice.site for choice in targets if choice.wanted]


def _targets(planning: Planning, config: SparseDeltaConfig) -> list[Choice]:
    chosen: list[str] | None = None
    if config.selection is not None:
        held = config.selection.indices
        chosen = [name for name in held if config.selection.entries(name).numel()]
    elif config.entries is not None:
        chosen = list(config.entries)
    if chosen is None:
        return planning.targets(config)
    sites = {name: site for site in planning.sites for name in site.names}
    lost = [name for name in chosen if name not in sites]
    if lost:
        label = "entries" if config.selection is None else "selection"
        raise ValueError(
            f"{label}: the model has no module {lost[0]!r} ({len(lost)} of {len(chosen)} paths "
            "are not in it); paths are those of the model that is patched"
        )
    exact = replace(config, target_modules=tuple(chosen), selection=None, entries=None)
    if config.target_modules != ALL_LINEAR:
        exact = replace(config, selection=None, entries=None)
    return [c for c in planning.targets(exact) if set(c.site.names) & set(chosen)]


def _out_in(module: nn.Module) -> tuple[int, int]:
    columns, rows = features(module)
    return rows, columns


def _count(config: SparseDeltaConfig, choice: Choice, numel: int) -> int:
    for name in choice.site.names:
        if config.selection is not None and name in config.selection.indices:
            return config.selection.entries(name).numel()
        if config.entries is not None and name in config.entries:
            if config.entries[name] > numel:
                raise ValueError(
                    f"entries[{name!r}]: got {config.entries[name]}, but the weight has {numel}"
                )
            return config.entries[name]
    return max(1, round(config.density * numel))


def positions(config: SparseDeltaConfig, path: str, count: int, module: nn.Module) -> Tensor:
    """The flat positions that train in the layer ``path``, ascending.

    Args:
        config: the configuration.
        path: of the layer.
        count: how many.
        module: the original layer, whose weight the magnitude pattern reads.
    """
    rows, columns = _out_in(module)
    numel = rows * columns
    if config.selection is not None:
        found = config.selection.entries(path)
        if config.selection.shapes.get(path) != (rows, columns):
            raise ValueError(
                f"selection: {path} was scored with shape {config.selection.shapes.get(path)}, the "
                f"model's weight is {(rows, columns)}"
            )
        return found
    if config.pattern == "first":
        return torch.arange(count)
    if config.pattern == "magnitude":
        from peftkern.select.subset import largest
        from peftkern.select.weights import Target, row_blocks, rows_of

        target = Target(path, module, module)
        parts = [rows_of(target, first, last).abs() for first, last in row_blocks(target)]
        return largest({path: torch.cat(parts)}, count)[path]
    # The path is part of the seed: no layer's positions depend on which others are adapted.
    generator = torch.Generator().manual_seed(config.seed ^ zlib.crc32(path.encode()))
    if 2 * count > numel:
        return torch.randperm(numel, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        draw = torch.randint(numel, (count + count // 2 + 64,), generator=generator)
        found = torch.unique(torch.cat([found, draw]))
    keep = torch.randperm(found.numel(), generator=generator)[:count]
    return found[keep].sort().values


def _wrap(choose: Any, original: nn.Module, name: str, dtype: Any, base: nn.Module) -> nn.Module:
    return SparseDeltaLinear(base, choose(original), name, dtype)


def _extend(choose: Any, layer: SparseDeltaLinear, name: str, dtype: Any) -> None:
    layer.add_adapter(choose(layer.base_layer), name, dtype)
