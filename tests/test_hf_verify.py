"""verify finds a wrong kernel and names it; the watchdog finds what does not train."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern import registry
from peftkern.hf.watchdog import GradientWatchdog

transformers = pytest.importorskip("transformers")
from hf_models import KINDS, PEFT_WARNINGS, VOCABULARY, batch, build, randomize_adapters  # noqa: E402

pytestmark = [
    pytest.mark.hf,
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def break_kernel(monkeypatch: pytest.MonkeyPatch, op: str, spoil: Any) -> None:
    """The served implementation of ``op`` gives spoilt results; the reference stays right."""
    rows = registry._IMPLEMENTATIONS[op]
    served = next(row for row in rows if row.backend == "native")

    def wrong(*args: Any) -> Any:
        return spoil(args, served.fn(*args))

    bad = registry.Implementation(op, "cpu", "native", wrong)
    monkeypatch.setitem(registry._IMPLEMENTATIONS, op, [bad, rows[-1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_right_kernels_pass(kind: str, quantize: str | None) -> None:
    model = build(kind)
    handle = pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize, lora_dropout=0.1))
    randomize_adapters(model)
    report = handle.verify(batch(kind))
    assert report.ok, str(report)
    assert len({row.module for row in report.rows}) == len(handle.report().adapted)
    assert any(row.tensor == "gradient of lora_A.default.weight" for row in report.rows)
    assert report.loss == pytest.approx(report.loss_reference, rel=1e-5)
    assert report.no_gradient == ()
    assert report.skipped == {}


def test_a_wrong_forward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    handle = pk.patch(model, pk.LoRAConfig(r=4))
    randomize_adapters(model)

    def spoil(args: Any, result: Any) -> Any:
        y, s = result
        return (y * (1.001 if y.shape[1] == 96 else 1.0), s)  # gate_proj and up_proj only

    break_kernel(monkeypatch, "lora_linear", spoil)
    report = handle.verify(batch("llama"))
    assert not report.ok
    wrong = {row.module.rsplit(".")[-1] for row in report.rows if not row.ok}
    assert wrong == {"gate_proj", "up_proj"}
    assert report.worst is not None
    assert report.worst.tensor == "output"
    assert report.worst.error == pytest.approx(1e-3, rel=0.05)
    assert "DIFFER" in str(report)


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    handle = pk.patch(model, pk.LoRAConfig(r=4, target_modules=["query", "value"]))
    randomize_adapters(model)

    def spoil(args: Any, result: Any) -> Any:
        dx, da, db = result
        return dx, da, db.clone().index_fill_(0, torch.tensor([0]), 0.0)

    break_kernel(monkeypatch, "lora_linear_backward", spoil)
    report = handle.verify(batch("bert"))
    wrong = {row.tensor for row in report.rows if not row.ok}
    assert wrong == {"gradient of lora_B.default.weight"}


def test_everything_is_as_before() -> None:
    model = build("gpt2").train()
    handle = pk.patch(model, pk.LoRAConfig(r=4, lora_dropout=0.2))
    model(**batch("gpt2")).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    values = {n: g.clone() for n, g in grads.items()}
    random = torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    handle.verify(batch("gpt2"))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: id(p.grad) for n, p in model.named_parameters() if p.grad is not None} == {
        n: id(g) for n, g in grads.items()
    }
    assert all(torch.equal(grads[n], values[n]) for n in grads)
    assert all(module.training for module in model.modules())
    assert registry.forced_backend() == "auto"


def test_checkpointed_models_and_own_losses() -> None:
    model = build("llama").train()
    handle = pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report = handle.verify(batch("llama"), loss=lambda net, given: net(**given).logits.sum())
    assert report.ok, str(report)
    assert len({row.module for row in report.rows}) == 14


def test_verify_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match=r"no peftkern module to verify"):
        pk.verify(build("llama"), batch("llama"))
    net = nn.Sequential(nn.Linear(8, 8))
    pk.patch(net, pk.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"against: got 'bnb'"):
        pk.verify(net, torch.randn(2, 8), against="bnb")


class Detached(nn.Module):
    """Two branches; the second does not reach the loss, the third is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.cut, self.zeroed = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cut(x)
        return self.used(x) + 0.0 * self.zeroed(x)


def test_the_watchdog_names_what_does_not_train(caplog: pytest.LogCaptureFixture) -> None:
    net = Detached()
    pk.patch(net, pk.LoRAConfig(r=2))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    watchdog = GradientWatchdog(net, steps=3)
    with caplog.at_level(logging.WARNING, "peftkern"):
        for _ in range(3):
            net(torch.randn(4, 8)).square().sum().backward()
            watchdog.observe()
            optimizer.step()
            optimizer.zero_grad()
    found = {silent.name: silent.reason for silent in watchdog.silent}
    assert found == {
        "cut.lora_A.default.weight": "no gradient",
        "cut.lora_B.default.weight": "no gradient",
        "zeroed.lora_A.default.weight": "all zero",
        "zeroed.lora_B.default.weight": "all zero",
    }
    assert "4 trainable tensors did not train in 3 steps" in caplog.text


def test_the_watchdog_is_quiet_when_all_is_well() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    pk.patch(net, pk.LoRAConfig(r=2))
    watchdog = GradientWatchdog(net, steps=2, raises=True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        net(torch.randn(4, 8)).square().sum().backward()
        watchdog.observe()
        optimizer.step()
    assert watchdog.done
    assert watchdog.silent == ()
    with pytest.raises(ValueError, match=r"steps: got 1"):
        GradientWatchdog(net, steps=1)


def test_the_watchdog_raises_and_finds_nan() -> None:
    net = nn.Linear(2, 2)
    watchdog = GradientWatchdog(net, steps=2, raises=True)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    watchdog.observe()
    with pytest.raises(RuntimeError, match=r"weight: not finite"):
        watchdog.observe()


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(1, VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    from peftkern.hf.trainer import PeftkernCallback

    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    model.base_model.model.extra = nn.Parameter(torch.zeros(2))
    callback = PeftkernCallback(watch_steps=2)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        include_num_input_tokens_seen=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    with caplog.at_level(logging.INFO, "peftkern"):
        trainer.train()
    assert "peftkern accelerate: 14 layers accelerated" in caplog.text
    assert "base_model.model.extra: no gradient" in caplog.text
    assert callback.watchdog is not None
    assert [silent.name for silent in callback.watchdog.silent] == ["base_model.model.extra"]
    first = trainer.state.log_history[0]
    assert first["peak_memory_mib"] > 50
    assert first["samples_per_second"] > 0
    assert first["tokens_per_second"] > 0
    assert pk.accelerate(model).report().fast_calls == 14 * 4
