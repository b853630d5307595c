"""A different adapter for each row of a batch, in training and inference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk

transformers = pytest.importorskip("transformers")
from hf_models import (  # noqa: E402
    PEFT_WARNINGS,
    assert_unchanged,
    batch,
    build,
    randomize_adapters,
    snapshot,
)

pytestmark = [
    pytest.mark.hf,
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
NAMES = [f"a{i}" for i in range(8)]


def with_adapters(
    kind: str, names: list[str], quantize: str | None = None, layers: int = 2, **changes: Any
) -> nn.Module:
    """A patched model whose adapters differ in their values and ranks."""
    model = build(kind, **({"num_hidden_layers": layers} if layers != 2 else {}))
    for i, name in enumerate(names):
        config = pk.LoRAConfig(
            r=2 + i % 3, lora_alpha=4, quantize=None if i else quantize, **changes
        )
        pk.patch(model, config, adapter_name=name)
        torch.manual_seed(100 + i)
        for layer in model.modules():
            if isinstance(layer, pk.nn.LoRALinear):
                nn.init.normal_(layer.lora_B[name].weight, std=0.1)
    pk.set_adapter(model, names)
    return model


def rows(data: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in data.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "quantize"), [("llama", None), ("llama", "nf4"), ("gpt2", None), ("bert", "int8")]
)
def test_a_step_with_eight_adapters_is_eight_steps(kind: str, quantize: str | None) -> None:
    model = with_adapters(kind, NAMES, quantize).train()
    twin = copy.deepcopy(model)
    data = batch(kind, rows=8)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5)
        for m in (model, twin)
    ]
    mixed = model(**data, adapter_names=NAMES)
    # The mean over 8 equally long rows is the mean of their 8 means.
    (mixed.loss * 8).backward()
    for row, name in enumerate(NAMES):
        pk.set_adapter(twin, name)
        alone = twin(**rows(data, row))
        torch.testing.assert_close(mixed.logits[row : row + 1], alone.logits, rtol=1e-4, atol=1e-5)
        alone.loss.backward()
    pk.set_adapter(twin, NAMES)
    got, want = gradients(model), gradients(twin)
    assert got.keys() == want.keys()
    assert len(want) == 16 * sum(isinstance(m, pk.nn.LoRALinear) for m in model.modules())
    for name, gradient in want.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)
    for optimizer in optimizers:
        optimizer.step()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_base_rows_and_missing_adapters() -> None:
    model = with_adapters("llama", ["one"], target_modules=["q_proj", "down_proj"]).eval()
    pk.patch(model, pk.LoRAConfig(r=3, target_modules=["q_proj"]), adapter_name="two")
    data = batch("llama", rows=4)
    names = ["two", "__base__", "one", "two"]
    with torch.no_grad():
        got = model(**data, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with pk.disable_adapter(model):
                    want = model(**rows(data, row)).logits
            else:
                pk.set_adapter(model, name)
                want = model(**rows(data, row)).logits
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_again_with_the_same_rows(reentrant: bool) -> None:
    model = with_adapters("llama", ["one", "two"]).train()
    first, second = batch("llama", 1, rows=2), batch("llama", 2, rows=2)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        # Both forward passes before the backward pass, each with its own rows.
        a = model(**first, adapter_names=["one", "two"]).loss
        with pk.adapter_rows(model, ["two", "__base__"]):
            b = model(**second).loss
        pk.set_adapter(model, ["one", "two"])
        c = model(**first).loss  # every row through the sum of both
        (a + 2 * b + 3 * c).backward()
        return gradients(model)

    plain = step()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = step()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_checkpointing_a_part_of_the_model_is_refused_not_wrong() -> None:
    model = with_adapters("llama", ["one", "two"]).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    ids = batch("llama", rows=2)["input_ids"]
    with pk.adapter_rows(model, ["one", "two"]):
        out = model.model(ids).last_hidden_state
    with pytest.raises(RuntimeError, match="call the patched model itself"):
        out.sum().backward()


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_by_rows(beams: int) -> None:
    model = with_adapters("llama", ["one", "two"]).eval()
    ids = batch("llama", rows=3)["input_ids"]
    names = ["two", "__base__", "one"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    mixed = model.generate(ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with pk.disable_adapter(model):
                want = model.generate(ids[row : row + 1], **options)
        else:
            pk.set_adapter(model, name)
            want = model.generate(ids[row : row + 1], **options)
        assert torch.equal(mixed[row : row + 1, : want.shape[1]], want)


@pytest.mark.parametrize("method", ["dora", "bias", "ia3", "embedding", "copies"])
def test_other_kinds_go_by_rows_too(method: str) -> None:
    model = build("bert").eval()
    made: dict[str, Any] = {
        "dora": lambda: pk.LoRAConfig(r=2, use_dora=True),
        "bias": lambda: pk.LoRAConfig(r=2, lora_bias=True),
        "ia3": lambda: pk.IA3Config(
            feedforward_modules=["output.dense"], target_modules=["output.dense", "key"]
        ),
        "embedding": lambda: pk.LoRAConfig(r=2, target_modules=["word_embeddings", "query"]),
        "copies": lambda: pk.LoRAConfig(r=2, modules_to_save=["classifier"]),
    }
    data = batch("bert", rows=4)
    alone = {}
    for i, name in enumerate(("one", "two")):
        pk.patch(model, made[method](), adapter_name=name)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    with torch.no_grad():
        for name in ("one", "two"):
            pk.set_adapter(model, name)
            alone[name] = model(**data).logits
        with pk.disable_adapter(model):
            alone["__base__"] = model(**data).logits
        names = ["two", "one", "__base__", "two"]
        got = model(**data, adapter_names=names).logits
    assert not torch.equal(alone["one"], alone["two"])
    want = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rows_compile_without_breaks() -> None:
    model = with_adapters("llama", ["one", "two"], layers=1, target_modules=["q_proj"]).train()
    data = batch("llama", rows=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pk.adapter_rows(model, ["two", "one"]):
        compiled(**data).loss.backward()
    got = gradients(model)
    model.zero_grad()
    model(**data, adapter_names=["two", "one"]).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_kinds_that_cannot_differ_by_row_are_named() -> None:
    model = with_adapters("llama", ["one"]).eval()
    pk.patch(model, pk.PrefixTuningConfig(num_virtual_tokens=2), adapter_name="two")
    data = batch("llama", rows=2)
    with pytest.raises(ValueError, match="adapter 'two', which cannot differ from row to row"):
        model(**data, adapter_names=["one", "two"])
    pk.set_adapter(model, "one")
    model(**data, adapter_names=["one", "__base__"])


def test_wrong_rows_are_named_and_nothing_stays() -> None:
    model = build("llama")
    before = snapshot(model)
    handle = pk.patch(model, pk.LoRAConfig(r=2), adapter_name="one")
    data = batch("llama", rows=2)
    with pytest.raises(ValueError, match="no adapter 'two'; there are: one"):
        model(**data, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match="3 names, but a layer got an input with 2"):
        model(**data, adapter_names=["one"] * 3)
    with pytest.raises(TypeError, match="expected a list with one name for each row, got str"):
        model(**data, adapter_names="one")
    pk.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        model(**data, adapter_names=["one", "__base__"])
    pk.unmerge(model)
    plain = model(**data).logits
    assert torch.equal(model(**data, adapter_names=None).logits, plain)
    handle.unpatch()
    assert_unchanged(model, before)
    assert "generate" not in model.__dict__
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(data["input_ids"], adapter_names=["one"], max_new_tokens=1)


def test_interop_rows_are_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    configs = [peft.LoraConfig(r=2 + i, target_modules=targets[: 2 + i]) for i in range(2)]
    reference = peft.get_peft_model(build("llama"), configs[0], adapter_name="one").eval()
    reference.add_adapter("two", configs[1])
    for i, name in enumerate(("one", "two")):
        reference.set_adapter(name)
        randomize_adapters(reference, i)
    reference.save_pretrained(tmp_path)
    ours = build("llama").eval()
    for name in ("one", "two"):
        pk.load_adapter(ours, tmp_path / name, adapter_name=name)
    data = batch("llama", rows=5)
    names = ["two", "__base__", "one", "two", "__base__"]
    with torch.no_grad():
        want = reference(**data, adapter_names=names).logits
        got = ours(**data, adapter_names=names).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
