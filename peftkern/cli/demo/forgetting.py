"""What fine-tuning costs the base model: its own task, measured before and after.

The demo's encoder was trained to place texts that belong together near each other. So the base
task is retrieval: the first sentence of each text must find, among all the others, how that text
goes on. Besides, the order in which the model ranks all pairs by similarity is compared with the
order before training.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.cli.demo.model import TextClassifier, Tokenized, frozen_features


def similarities(model: TextClassifier, firsts: Tokenized, rests: Tokenized) -> torch.Tensor:
    """Cosine similarity of every beginning to every continuation: [pairs, pairs]."""
    a = torch.nn.functional.normalize(frozen_features(model, firsts), dim=-1)
    b = torch.nn.functional.normalize(frozen_features(model, rests), dim=-1)
    return a @ b.T


def measure(before: torch.Tensor | None, after: torch.Tensor) -> dict[str, Any]:
    """Figures of the base task.

    Args:
        before: similarities of the frozen model [n, n]; None when `after` is the frozen model's.
        after: similarities of the model in question [n, n].

    Returns:
        `retrieval`: share of beginnings whose own continuation ranks first; `pairs`: n; and
        `order`: Spearman's rank correlation with the similarities before (1: nothing moved).
    """
    own = after.diagonal().unsqueeze(1)
    found = (after >= own).sum(1) == 1
    return {
        "retrieval": float(found.float().mean()) if len(after) else 0.0,
        "pairs": len(after),
        "order": 1.0 if before is None else spearman(before.flatten(), after.flatten()),
    }


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors of equal length; 0 when one of them is constant."""
    ranks = [torch.argsort(torch.argsort(v)).double() for v in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else 0.0
