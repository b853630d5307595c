"""Exact top-k and thresholds over scores of many layers, in memory that does not grow with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.arguments import real
from peftkern.hf.report import _table
from peftkern.select.scores import Scores, checked

_CHUNK = 1 << 22
_BINS = 1 << 16


@dataclass(frozen=True)
class Selection:
    """A subset of the weights; ``str()`` gives a table.

    Args:
        indices: path of a layer -> int64, ascending: flat positions ``row * in + column``
            (granularity entry), rows (row), or [0] for a chosen module.
        mass: path of a layer -> sum of the chosen scores.
        shapes: path of a layer -> (out, in) of its weight.
        granularity: ``"entry"``, ``"row"`` or ``"module"``.
        score: the score that they were chosen by.
    """

    indices: dict[str, Tensor]
    mass: dict[str, float]
    shapes: dict[str, tuple[int, int]]
    granularity: str
    score: str

    @property
    def count(self) -> int:
        """How many weight entries are chosen."""
        return sum(self._count(name) for name in self.indices)

    @property
    def density(self) -> float:
        """The chosen share of all entries of the layers that were scored."""
        everything = sum(rows * columns for rows, columns in self.shapes.values())
        return self.count / everything if everything else 0.0

    def entries(self, name: str) -> Tensor:
        """The chosen flat positions in one layer's weight [out, in].

        Args:
            name: path of the layer.

        Returns:
            int64, ascending; empty when nothing of it is chosen.
        """
        chosen = self.indices.get(name)
        if chosen is None:
            return torch.empty(0, dtype=torch.int64)
        rows, columns = self.shapes[name]
        if self.granularity == "entry":
            return chosen
        if self.granularity == "row":
            return (chosen[:, None] * columns + torch.arange(columns)).reshape(-1)
        return torch.arange(rows * columns if chosen.numel() else 0)

    def target_modules(self, n: int) -> list[str]:
        """The ``n`` layers with the largest chosen importance: targets for another method.

        Args:
            n: how many; fewer come back when fewer were touched.

        Returns:
            Paths, most important first; equals in the model's order.

        Raises:
            ValueError: ``n`` is not positive.
        """
        if n < 1:
            raise ValueError(f"n: got {n}, expected a positive number of modules")
        touched = [name for name, chosen in self.indices.items() if chosen.numel()]
        return sorted(touched, key=lambda name: -self.mass[name])[:n]

    def rank_pattern(self, budget: int, minimum: int = 1) -> dict[str, int]:
        """Ranks for LoRA that share a budget by chosen importance.

        Args:
            budget: sum of all ranks.
            minimum: rank that every touched layer gets at least.

        Returns:
            Pattern of a path -> rank, for ``LoRAConfig(rank_pattern=..., target_modules=...)``;
            layers of which nothing is chosen are left out. Largest remainders are rounded up.

        Raises:
            ValueError: the budget cannot give each touched layer the minimum.

        Example:
            >>> import torch
            >>> from peftkern.select import Scores, top_k
            >>> values = {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}
            >>> scores = Scores(values, {"a": (4, 4), "b": (4, 4)}, "taylor", "module", 1)
            >>> top_k(scores, k=2).rank_pattern(8)
            {'a': 6, 'b': 2}
        """
        touched = [name for name, chosen in self.indices.items() if chosen.numel()]
        if minimum < 1:
            raise ValueError(f"minimum: got {minimum}, expected a positive rank")
        spare = budget - minimum * len(touched)
        if spare < 0:
            raise ValueError(
                f"budget: got {budget}, expected at least {minimum * len(touched)}, which is "
                f"{minimum} for each of {len(touched)} layers"
            )
        whole = sum(self.mass[name] for name in touched)
        share = [
            budget * (self.mass[name] / whole if whole else 1 / len(touched)) - minimum
            for name in touched
        ]
        share = [max(0.0, part) for part in share]
        scale = spare / sum(share) if sum(share) else 0.0
        exact = [part * scale for part in share]
        ranks = [math.floor(part) for part in exact]
        order = sorted(range(len(touched)), key=lambda i: (ranks[i] - exact[i], i))
        for i in order[: spare - sum(ranks)]:
            ranks[i] += 1
        return {re.escape(name): minimum + rank for name, rank in zip(touched, ranks, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: counts and sums by layer, not the positions."""
        layers = {
            name: {
                "shape": list(self.shapes[name]),
                "entries": self._count(name),
                "mass": self.mass[name],
            }
            for name in self.indices
        }
        return {
            "score": self.score,
            "granularity": self.granularity,
            "count": self.count,
            "density": self.density,
            "layers": layers,
        }

    def __str__(self) -> str:
        body = [
            (
                name,
                "x".join(map(str, self.shapes[name])),
                f"{self._count(name):,}",
                f"{self._count(name) / max(1, math.prod(self.shapes[name])):.3%}",
            )
            for name in self.indices
        ]
        lines = _table(("layer", "shape", "entries", "density"), body)
        lines += ["", f"{self.count:,} entries ({self.density:.3%}) by {self.score}"]
        return "\n".join(lines)

    def _count(self, name: str) -> int:
        chosen = self.indices[name].numel()
        rows, columns = self.shapes[name]
        return chosen * {"entry": 1, "row": columns, "module": rows * columns}[self.granularity]


def top_k(
    scores: Scores,
    density: float | None = None,
    k: int | None = None,
    scope: str = "global",
) -> Selection:
    """The k highest scores, exactly; equal ones in the model's order, then by position.

    Found by two histograms of 65,536 bins over the bits of the scores and one pass that collects:
    beside the result, memory for a few million elements, however large the model.

    Args:
        scores: from :func:`peftkern.importance`.
        density: share of the scores to keep, in (0, 1]; at least one is kept.
        k: or how many; of each layer with ``scope="layer"``.
        scope: ``"global"``: all layers compete; ``"layer"``: each keeps its own share.

    Returns:
        The selection.

    Raises:
        ValueError: not exactly one of density and k, out of range, or NaN among the scores.

    Example:
        >>> import torch
        >>> from peftkern.select import Scores
        >>> value = torch.tensor([[3.0, 1.0], [2.0, 3.0]])
        >>> top_k(Scores({"a": value}, {"a": (2, 2)}, "taylor", "entry", 1), k=2).indices["a"]
        tensor([0, 3])
    """
    _require_scores(scores)
    if (density is None) == (k is None):
        raise ValueError("density and k: give exactly one of them")
    if density is not None and not 0.0 < real("density", density) <= 1.0:
        raise ValueError(f"density: got {density}, expected 0 < density <= 1")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k: got {k!r}, expected a positive integer")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope: got {scope!r}, expected 'global' or 'layer'")
    for name, value in scores.values.items():
        checked(name, value)
    groups = [list(scores.values)] if scope == "global" else [[name] for name in scores.values]
    indices: dict[str, Tensor] = {}
    for group in groups:
        values = {name: scores.values[name] for name in group}
        total = sum(value.numel() for value in values.values())
        count = k if density is None else max(1, round(density * total))
        assert count is not None
        if count > total and density is None and scope == "global":
            raise ValueError(f"k: got {k}, but there are only {total} scores")
        indices.update(largest(values, min(count, total)))
    return _selection(scores, indices)


def threshold(scores: Scores, value: float) -> Selection:
    """Every score of at least ``value``.

    Args:
        scores: from :func:`peftkern.importance`.
        value: the smallest score to keep.

    Returns:
        The selection.

    Raises:
        ValueError: NaN among the scores or as the value, or nothing reaches it.
    """
    _require_scores(scores)
    value = real("value", value)
    indices = {}
    for name, tensor in scores.values.items():
        flat = checked(name, tensor).reshape(-1)
        found = [
            (part.float() >= value).nonzero().reshape(-1) + first for first, part in _chunks(flat)
        ]
        indices[name] = torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.int64)
    if not any(chosen.numel() for chosen in indices.values()):
        top = max(float(t.max()) for t in scores.values.values() if t.numel())
        raise ValueError(f"value: got {value}, but the largest score is {top}")
    return _selection(scores, indices)


def _require_scores(scores: Any) -> None:
    if not isinstance(scores, Scores):
        raise TypeError(
            f"scores: got {type(scores).__name__}, expected what peftkern.importance returns"
        )


def _selection(scores: Scores, indices: dict[str, Tensor]) -> Selection:
    mass = {
        name: float(
            scores.values[name].reshape(-1)[at.to(scores.values[name].device)].double().sum()
        )
        for name, at in indices.items()
    }
    return Selection(indices, mass, dict(scores.shapes), scores.granularity, scores.score)


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, flat.numel(), _CHUNK):
        yield first, flat[first : first + _CHUNK]


def _keys(part: Tensor) -> Tensor:
    """int64 0 .. 2^32 - 1 that order like the fp32 values; the two zeros are one."""
    bits = (part.float() + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits + (1 << 31), -1 - (bits & 0x7FFFFFFF) + (1 << 31))


def largest(values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Positions of the ``count`` largest of all tensors together, by tensor."""
    flats = {name: value.reshape(-1) for name, value in values.items()}
    if count == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in flats}
    bound, above = 0, 0  # the key of the last chosen one; how many are larger
    for shift in (16, 0):
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for flat in flats.values():
            for _, part in _chunks(flat):
                keys = _keys(part)
                if shift == 0:
                    keys = keys[(keys >> 16) == (bound >> 16)]
                bins = (keys >> shift) & (_BINS - 1)
                histogram += torch.bincount(bins, minlength=_BINS).cpu()
        from_top = histogram.flip(0).cumsum(0)
        place = int((from_top >= count - above).nonzero()[0])
        bin_ = _BINS - 1 - place
        above += int(from_top[place]) - int(histogram[bin_])
        bound |= bin_ << shift
    ties = count - above
    chosen = {}
    for name, flat in flats.items():
        found = []
        for first, part in _chunks(flat):
            keys = _keys(part)
            keep = keys > bound
            if ties:
                equal = (keys == bound).nonzero().reshape(-1)[:ties]
                keep[equal] = True
                ties -= equal.numel()
            found.append((keep.nonzero().reshape(-1) + first).cpu())
        chosen[name] = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
    return chosen
