"""All adapters of a multi-LoRA linear as one wide one, on a GPU.

Rows are zero in the columns of the others. Nothing is sorted and the host never learns the ids: the
call can be captured in a CUDA graph. The price is the sum of all ranks instead of one in the thin
products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.triton_kernels.launch import constant


@dataclass(frozen=True)
class Group:
    """Adapters with the same dropout probability, side by side.

    Args:
        members: their numbers.
        a: [R, in], b: [out, R].
        p: dropout probability.
        first: column of the first in the wide S of all groups.
    """

    members: list[int]
    a: Tensor
    b: Tensor
    p: float
    first: int


@dataclass(frozen=True)
class Adapters:
    """All adapters as one, in the order of their groups; ``columns`` holds each one's first."""

    groups: list[Group]
    ranks: list[int]
    columns: list[int]
    scalings: list[float]

    @property
    def total(self) -> int:
        """Columns of the wide S."""
        return sum(self.ranks)

    @property
    def order(self) -> list[int]:
        """The adapters' numbers as they stand in the wide S."""
        return [i for group in self.groups for i in group.members]

    def owner(self, device: torch.device) -> Tensor:
        """Whose each column is."""
        return constant([i for i in self.order for _ in range(self.ranks[i])], torch.int64, device)

    def place(self, device: torch.device) -> Tensor:
        """Which of its adapter's ranks each column is."""
        places = [j for i in self.order for j in range(self.ranks[i])]
        return constant(places, torch.int64, device)

    def factor(self, device: torch.device) -> Tensor:
        """The scaling of each column."""
        values = [self.scalings[i] for i in self.order for _ in range(self.ranks[i])]
        return constant(values, torch.float32, device)


def gathered(
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
) -> Adapters:
    """Adapters of one dtype as one; those of rank 0 are left out."""
    ranks = [a.shape[0] for a in lora_A]
    groups: list[Group] = []
    columns, first = [0] * len(ranks), 0
    for p in dict.fromkeys(dropout_p):
        members = [i for i, own in enumerate(dropout_p) if own == p and ranks[i]]
        if not members:
            continue
        a = torch.cat([lora_A[i] for i in members])
        b = torch.cat([lora_B[i] for i in members], dim=1)
        groups.append(Group(members, a, b, p, first))
        for i in members:
            columns[i] = first
            first += ranks[i]
    return Adapters(groups, ranks, columns, scalings)


def hand_out(
    group: Group,
    adapters: Adapters,
    da: Tensor,
    db: Tensor,
    das: list[Tensor],
    dbs: list[Tensor],
) -> None:
    """Hand each adapter of a group its rows of dA and its columns of dB."""
    for i in group.members:
        start, rank = adapters.columns[i], adapters.ranks[i]
        within = start - group.first
        das[i] = da[within : within + rank].clone()
        dbs[i] = db[:, start : start + rank].contiguous()
