"""The optimizers under accelerate: prepare, clipping, accumulation, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkern import optim
from peftkern.testing import assert_same_bits

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
CLASSES: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW8bit, {"min_8bit_size": 1024}),
    (optim.PagedAdamW8bit, {"min_8bit_size": 1024, "ram_budget": 8192, "bucket_bytes": 4096}),
]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 128), nn.Tanh(), nn.Linear(128, 48))


def _train(accelerator: Any, model: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 48, generator=torch.Generator().manual_seed(step))
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("cls", "kwargs"), CLASSES, ids=lambda v: getattr(v, "__name__", ""))
def test_prepare_clip_accumulate_save_and_load(
    cls: Any, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    def prepared() -> tuple[Any, Any]:
        model = _model()
        return accelerator.prepare(model, cls(model.parameters(), lr=1e-2, **kwargs))  # type: ignore[no-any-return]

    model, optimizer = prepared()
    _train(accelerator, model, optimizer, 0, 4)
    accelerator.save_state(str(tmp_path / "state"))
    _train(accelerator, model, optimizer, 4, 8)

    # Without accelerate, the same numbers.
    plain = _model()
    base: Any = optim.AdamW if cls is optim.AdamW else optim.AdamW8bit
    other = base(plain.parameters(), lr=1e-2, **{k: v for k, v in kwargs.items() if "min" in k})
    for step in range(8):
        x = torch.randn(8, 48, generator=torch.Generator().manual_seed(step))
        ((plain(x) - x).square().mean() / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
            other.step()
            other.zero_grad()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())

    accelerator.free_memory()
    again, resumed = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    _train(accelerator, again, resumed, 4, 8)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_grad_scaler_of_accelerate_skips_what_overflows() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    p = nn.Parameter(torch.ones(5000))
    inner = optim.AdamW8bit([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    skipped = []
    for value in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [False, True, False]
    assert inner.state[p]["step"] == 2
    assert p.detach().isfinite().all()
