"""transformers' Trainer with our layers: compiled as not compiled, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern.hf.accelerate.fused import FusedLora

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
from hf_models import PEFT_WARNINGS, batch, build, randomize_adapters  # noqa: E402

pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def model_of(kind: str) -> Any:
    model = build("llama")
    if kind == "patched nf4":
        pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4", keep_original=False))
    else:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora="dora" in kind)
        model = peft.get_peft_model(model, config)
        pk.accelerate(model)
    randomize_adapters(model)
    return model


def trainer(model: Any, folder: Path, **settings: Any) -> Any:
    ids = batch("llama", rows=8)["input_ids"]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(model=model, args=arguments, train_dataset=data)


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["patched nf4", "peft dora"])
def test_torch_compile_breaks_no_graph_and_changes_no_result(kind: str, tmp_path: Path) -> None:
    eager, compiled = model_of(kind), model_of(kind)
    before = trained(eager)
    trainer(eager, tmp_path / "eager", save_strategy="no").train()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    trainer(
        compiled,
        tmp_path / "compiled",
        save_strategy="no",
        torch_compile=True,
        torch_compile_backend="aot_eager",
    ).train()
    assert counters["stats"]["unique_graphs"] >= 1
    assert counters["graph_break"] == {}
    want, got = trained(eager), trained(compiled)
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(value, before[name]), name
    if kind != "patched nf4":  # calls are counted in eager mode only: all of them were compiled
        layers = [m for m in eager.modules() if isinstance(m, FusedLora)]
        assert pk.accelerate(eager).report().fast_calls == 4 * len(layers)
        assert pk.accelerate(compiled).report().fast_calls == 0


@pytest.mark.parametrize("kind", ["patched nf4", "peft"])
def test_resuming_gives_the_run_that_was_not_stopped(kind: str, tmp_path: Path) -> None:
    whole = model_of(kind)
    trainer(whole, tmp_path / "whole", save_steps=2).train()
    saved = sorted(path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir())
    name = "model.safetensors" if kind == "patched nf4" else "adapter_model.safetensors"
    assert name in saved
    resumed = model_of(kind)
    again = trainer(resumed, tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(resumed)[name]), name
