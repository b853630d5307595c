"""Set-up for every test: fixed seeds, few threads, and uninitialised memory full of NaN."""

from __future__ import annotations

import contextlib
import os
import warnings
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Modules with ``EVERY_DEVICE = True`` run once more with CUDA as the default device."""
    if getattr(metafunc.module, "EVERY_DEVICE", False) and torch.cuda.is_available():
        metafunc.fixturenames.append("default_device")
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("default_device", devices, indirect=True)


@pytest.fixture
def default_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made that name no device."""
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """On a GPU: an operation in the block that makes the host wait for the device is an error."""
    with warnings.catch_warnings():  # torch says that the mode is a prototype
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN (largest integers): a value that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
