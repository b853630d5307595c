"""Training a patched model is training with PEFT: losses, gradients, checkpointing, autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.nn import LoRALinear
from peftkern.nn.quantized import QuantizedLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from hf_models import (  # noqa: E402
    KINDS,
    PEFT_WARNINGS,
    VOCABULARY,
    batch,
    build,
    randomize_adapters,
    task,
)

pytestmark = [
    pytest.mark.hf,
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def curve(model: nn.Module, kind: str, steps: int = 30) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(**batch(kind, seed=step % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_steps_follow_peft(kind: str) -> None:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    ours, theirs = build(kind), build(kind)
    torch.manual_seed(5)
    pk.patch(ours, pk.LoRAConfig(**settings, task_type=task(kind)))
    torch.manual_seed(5)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type=task(kind), **fan))
    got, expected = curve(ours, kind), curve(wrapped, kind)
    assert expected[-1] < expected[0] - 0.1  # it learns, so there is something to compare
    assert got == pytest.approx(expected, rel=1e-4)


class EagerQLoRA(nn.Module):
    """The plain torch reference: dequantized weight, then the low-rank term."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        base = layer.base_layer
        assert isinstance(base, QuantizedLinear)
        self.register_buffer("frozen", base.dequantize(torch.float32))
        self.bias = base.bias
        down, up = layer.factors("default")
        self.down = nn.Parameter(down.detach().clone())
        self.up = nn.Parameter(up.detach().clone())
        self.scaling = layer.scaling["default"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = x @ self.down.t() @ self.up.t()
        return nn.functional.linear(x, self.frozen, self.bias) + low * self.scaling


def eager_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, EagerQLoRA(module))
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_qlora_equals_the_eager_reference(kind: str, quantize: str) -> None:
    model = build(kind)
    pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=8, quantize=quantize))
    randomize_adapters(model)
    twin = eager_twin(model)
    outputs = [net(**batch(kind)) for net in (model, twin)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            eager = twin.get_submodule(name)
            down, up = module.factors("default")
            torch.testing.assert_close(down.grad, eager.down.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(up.grad, eager.up.grad, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    kind: str, quantize: str | None, reentrant: bool
) -> None:
    model = build(kind)
    # Dropout on: recomputation must draw the same masks.
    pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize, lora_dropout=0.2, task_type=task(kind)))
    randomize_adapters(model)
    model.train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(9)
        loss = model(**batch(kind)).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    (plain_loss, plain), (loss, grads) = results
    assert loss == plain_loss
    assert plain.keys() == grads.keys()
    assert len(grads) == sum(p.requires_grad for p in model.parameters())
    for name, grad in plain.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_bf16_autocast_trains(kind: str, quantize: str | None) -> None:
    model = build(kind)
    pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize, task_type=task(kind)))
    randomize_adapters(model)
    model.train()
    exact = model(**batch(kind)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch(kind)).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_bf16_models_with_fp32_adapters_train(kind: str, quantize: str | None) -> None:
    model = build(kind).to(torch.bfloat16)
    pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=8, quantize=quantize))
    output = model(**batch(kind))
    assert output.logits.dtype == torch.bfloat16
    losses = curve(model, kind, steps=12)
    assert losses[-1] < losses[0]
    down = next(p for n, p in model.named_parameters() if "lora_A" in n)
    assert down.dtype == torch.float32


def test_casting_a_patched_model_keeps_statistics() -> None:
    model = build("llama")
    pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    model.to(torch.bfloat16)
    base = model.model.layers[0].mlp.up_proj.base_layer
    assert base.nested_absmax.dtype == torch.float32
    assert base.absmax.dtype == torch.uint8
    model(**batch("llama")).loss.backward()


@pytest.mark.parametrize(("kind", "quantize"), [("gpt2", None), ("llama", "nf4"), ("bert", "int8")])
def test_a_patched_model_compiles_whole(kind: str, quantize: str | None) -> None:
    model = build(kind)
    model.config.use_cache = False
    pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize, task_type=task(kind)))
    randomize_adapters(model)
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = batch(kind)["input_ids"]
    results = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(input_ids=ids).logits
        logits.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append([logits.detach(), *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def seq2seq(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (2, 8))
    torch.set_num_threads(1)
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return model, {"input_ids": ids, "labels": ids}
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    features = torch.randn(2, 8, 32)
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": features, "labels": ids}


@pytest.mark.parametrize("name", ["t5", "whisper"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_no_adapter_is_left_without_a_gradient(name: str, reentrant: bool) -> None:
    model, inputs = seq2seq(name)
    handle = pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    randomize_adapters(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model(**inputs).loss.backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost
    if name == "t5":  # T5 casts its activations to wo.weight.dtype: packed bytes would ruin it
        kept = {row.name for row in handle.report().refused}
        assert kept == {n for n, _ in adapted(model) if n.endswith(".wo")}


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]


def test_generation_works() -> None:
    model = build("llama").eval()
    pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    randomize_adapters(model)
    ids = batch("llama", rows=1, length=4)["input_ids"]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)
