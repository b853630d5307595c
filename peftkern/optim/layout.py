"""Where a paged optimizer puts state: planes of a segment in a bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.ops.optimizer.reference import BLOCK

ALIGN = 64
_BUCKET = 32 << 20
_SMALLEST_BUCKET = 64 << 10


def bucket_size(ram_budget: int | None, device_budget: int | None) -> int:
    """Bytes of a bucket where the user does not say: 32 MiB, less for small budgets."""
    parts = [_BUCKET]
    parts += [] if ram_budget is None else [ram_budget // 16]
    parts += [] if device_budget is None else [device_budget // 8]
    return max(_SMALLEST_BUCKET, min(parts) // 4096 * 4096)


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


def planes_of(
    states: int, eight_bit: bool, kept: torch.dtype | None, length: int, offset: int
) -> tuple[Plane, ...]:
    """The tensors of a run of ``length`` elements, from byte ``offset`` of a bucket on.

    Args:
        states: how many the rule has, one or two.
        eight_bit: codes with an absmax a block, instead of fp32.
        kept: dtype of the parameter where it is kept too.
        length: elements.
        offset: first byte, a multiple of 64.
    """
    wanted = []
    for i in range(1, states + 1):
        wanted.append((f"state{i}", torch.uint8 if eight_bit else torch.float32, length))
        if eight_bit:
            wanted.append((f"absmax{i}", torch.float32, -(-length // BLOCK)))
    if kept is not None:
        wanted.append(("param", kept, length))
    planes = []
    for name, dtype, count in wanted:
        plane = Plane(name, offset, dtype, count)
        offset = -(-plane.end // ALIGN) * ALIGN
        planes.append(plane)
    return tuple(planes)


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


def layout_hash(
    about: tuple[Any, ...], parameters: Sequence[Tensor], segments: Mapping[int, list[Segment]]
) -> str:
    """SHA-256 over the rule, what is stored, and the places of all runs: what a commit is for."""
    facts = [
        (i, str(parameters[i].dtype), [(s.start, s.length, s.bucket) for s in runs])
        for i, runs in sorted(segments.items())
    ]
    return hashlib.sha256(json.dumps([*about, facts]).encode()).hexdigest()


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
