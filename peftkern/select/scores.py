"""``Scores``: how much each weight matters, one tensor a layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.checkpoint.files import open_safetensors, write_safetensors
from peftkern.hf.report import _table

SCORES = ("magnitude", "gradient", "taylor", "fisher", "activation")
GRANULARITIES = ("entry", "row", "module")
_FORMAT = "peftkern-scores-1"


@dataclass(frozen=True)
class Scores:
    """Importance of weights by layer; ``str()`` gives a table.

    Args:
        values: path of a layer -> its scores, never negative: [out, in] for entries, [out] for
            rows (the sum over a row), [] for modules (the sum over all).
        shapes: path of a layer -> (out, in) of its weight.
        score: which score.
        granularity: ``"entry"``, ``"row"`` or ``"module"``.
        batches: how many batches they were averaged over; 0 where none were needed.
    """

    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    score: str
    granularity: str
    batches: int

    def module_totals(self) -> dict[str, float]:
        """The sum of each layer's scores."""
        return {name: float(value.double().sum()) for name, value in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: totals, means and largest scores, not the tensors."""
        totals = self.module_totals()
        layers = {
            name: {
                "shape": list(self.shapes[name]),
                "total": totals[name],
                "mean": totals[name] / max(1, value.numel()),
                "max": float(value.max()) if value.numel() else 0.0,
            }
            for name, value in self.values.items()
        }
        return {
            "score": self.score,
            "granularity": self.granularity,
            "batches": self.batches,
            "layers": layers,
        }

    def __str__(self) -> str:
        layers = self.to_dict()["layers"]
        everything = sum(row["total"] for row in layers.values()) or 1.0
        body = [
            (
                name,
                "x".join(map(str, row["shape"])),
                f"{row['total'] / everything:.2%}",
                f"{row['mean']:.3e}",
                f"{row['max']:.3e}",
            )
            for name, row in layers.items()
        ]
        lines = _table(("layer", "shape", "share", "mean", "max"), body)
        count = sum(value.numel() for value in self.values.values())
        over = f" over {self.batches} batches" if self.batches else ""
        lines += ["", f"{self.score} by {self.granularity}{over}: {count:,} scores"]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        about = {
            "format": _FORMAT,
            "score": self.score,
            "granularity": self.granularity,
            "batches": self.batches,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        write_safetensors(Path(path), dict(self.values), {"peftkern": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        path = Path(path)
        with open_safetensors(path) as file:
            about = json.loads((file.metadata() or {}).get("peftkern", "{}"))
            if about.get("format") != _FORMAT:
                raise ValueError(f"{path}: holds no scores of peftkern ({_FORMAT})")
            shapes = {name: (int(r), int(c)) for name, (r, c) in about["shapes"].items()}
            if set(shapes) != set(file.keys()):
                raise ValueError(f"{path}: its tensors and its table of layers differ")
            values = {name: file.get_tensor(name) for name in shapes}
        for name, value in values.items():
            want = {"entry": shapes[name], "row": shapes[name][:1], "module": ()}
            if tuple(value.shape) != want[about["granularity"]]:
                raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, which is wrong")
        return cls(values, shapes, about["score"], about["granularity"], int(about["batches"]))


def checked(name: str, value: Tensor) -> Tensor:
    """The scores as they are, if they can be ranked.

    Raises:
        ValueError: NaN among them.
    """
    for part in value.reshape(-1).split(1 << 22):
        if bool(torch.isnan(part).any()):
            raise ValueError(
                f"scores: {name} holds NaN; the loss or a gradient was not finite. Look for the "
                "batch that gives it, or score in a wider dtype"
            )
    return value
