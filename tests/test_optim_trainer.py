"""The optimizers inside the Hugging Face Trainer, and resuming there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern import optim
from peftkern.testing import assert_same_bits

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
PAGED = {"ram_budget": 1 << 15, "bucket_bytes": 1 << 12}


def _trainer(folder: Path, steps: int, how: str, cls: Any, **kwargs: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (16, 12), generator=make)
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.01,
        save_steps=2,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    extra: dict[str, Any] = {}
    if how == "optimizers":
        optimizer = cls(model.parameters(), lr=1e-3, **kwargs)
        extra["optimizers"] = (optimizer, None)
    else:
        extra["optimizer_cls_and_kwargs"] = (cls, {"lr": 1e-3, **kwargs})
    return transformers.Trainer(model=model, args=args, train_dataset=data, **extra)


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("paged", [False, True], ids=["memory", "paged"])
def test_trainer_trains_and_resumes(how: str, paged: bool, tmp_path: Path) -> None:
    cls: Any = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    kwargs: dict[str, Any] = {"min_8bit_size": 1024, **(PAGED if paged else {})}
    # One schedule for both runs: the first is stopped by its files, not by its length.
    whole = _trainer(tmp_path / "a", 4, how, cls, **kwargs)
    before = [p.detach().clone() for p in whole.model.parameters()]
    whole.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))
    resumed = _trainer(tmp_path / "b", 4, how, cls, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
    if paged:
        inner = getattr(resumed.optimizer, "optimizer", resumed.optimizer)
        assert inner.paging_report()["misses"] > 0


def test_paging_changes_no_bit_of_a_trainer_run(tmp_path: Path) -> None:
    results = []
    for cls, kwargs in ((optim.PagedAdamW, PAGED), (optim.AdamW, {})):
        trainer = _trainer(tmp_path / cls.__name__, 3, "optimizers", cls, **kwargs)
        trainer.train()
        results.append([p.detach() for p in trainer.model.parameters()])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
