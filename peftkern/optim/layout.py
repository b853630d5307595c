"""Where a paged optimizer puts state: planes of a segment in a bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.ops.optimizer.reference import BLOCK


@dataclass(frozen=True)
class Plane:
    """One tensor of a segment, by its place in the bucket."""

    name: str
    offset: int
    dtype: torch.dtype
    count: int

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + self.count * self.dtype.itemsize

    def of(self, bucket: Tensor) -> Tensor:
        """The tensor, a view of the bucket's bytes."""
        return bucket[self.offset : self.end].view(self.dtype)


@dataclass(frozen=True)
class Segment:
    """A run of elements of one parameter, in one bucket; starts at a multiple of 256."""

    parameter: int
    start: int
    length: int
    bucket: int
    planes: tuple[Plane, ...]

    def part(self, whole: Tensor) -> Tensor:
        """What this run covers of a contiguous parameter or gradient."""
        return whole.view(-1)[self.start : self.start + self.length]

    def offsets(self) -> tuple[int, int, int, int]:
        """Of ``state1, state2, absmax1, absmax2`` in the bucket; 0 for what is absent."""
        found = {plane.name: plane.offset for plane in self.planes}
        return (
            found["state1"],
            found.get("state2", 0),
            found.get("absmax1", 0),
            found.get("absmax2", 0),
        )

    def tensor(self, name: str, bucket: Tensor) -> Tensor | None:
        """One of ``state1``, ``state2``, ``absmax1``, ``absmax2``, ``param``; None if absent."""
        for plane in self.planes:
            if plane.name == name:
                return plane.of(bucket)
        return None


@dataclass(frozen=True)
class Share:
    """What a step does in one bucket."""

    bucket: int
    segments: list[Segment]
    rows: list[int]  # of each segment's parameter in the list of work
    index: Tensor  # the same, int64
    partial: list[tuple[int, Segment]]  # those that are not a whole parameter, with their place


def copy_segment(
    segment: Segment, bucket: Tensor, whole: dict[str, Any], *, into_bucket: bool
) -> None:
    first = segment.start // BLOCK
    for plane in segment.planes:
        if plane.name == "param":
            continue
        start = first if plane.name.startswith("absmax") else segment.start
        outside = whole[plane.name].view(-1)[start : start + plane.count]
        inside = plane.of(bucket)
        if into_bucket:
            inside.copy_(outside)
        else:
            outside.copy_(inside)
