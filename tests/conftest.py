"""Set-up for every test: fixed seeds, few threads, and uninitialised memory full of NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(1234)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert torch.is_grad_enabled()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN (largest integers): a value that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
