"""Adapters on bare parameters: experts, dense and quantized, by PEFT's target_parameters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.nn import LoRALinear, LoRAParameters
from peftkern.nn.experts import QuantizedExperts, is_experts

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from architectures import batch, build
from hf_models import PEFT_WARNINGS, assert_unchanged, snapshot

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]
MOE = ("mixtral", "qwen3_moe", "deepseek_v3")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back


def settings(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict(r=3, lora_alpha=6, target_modules=["o_proj"])
    return plain | dict(target_parameters=EXPERTS) | changes


def with_peft(model: nn.Module, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**settings(init_lora_weights=False, **changes))
        return peft.get_peft_model(model, config).eval()


def loss_and_gradients(model: nn.Module, name: str) -> tuple[Tensor, list[Tensor]]:
    loss = model(**batch(name, 1)).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("name", MOE)
def test_files_of_peft_give_its_outputs_and_gradients(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = snapshot(model)
    theirs = with_peft(copy.deepcopy(model), rank_pattern={r".*gate_up_proj": 5})
    theirs.save_pretrained(tmp_path)
    pk.load_adapter(model, tmp_path, trainable=True)
    layers = [m for m in model.modules() if isinstance(m, LoRAParameters)]
    assert layers
    assert all(layer.why_not_fused() is None for layer in layers)
    assert layers[0].r["default"] == {"gate_up_proj": 5, "down_proj": 3}
    want, want_grads = loss_and_gradients(theirs, name)
    got, got_grads = loss_and_gradients(model, name)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # PEFT holds the outermost adapter first, we hold the parameters in the module's order.
    norm = torch.cat([g.flatten() for g in want_grads]).norm()
    for shape in {g.shape for g in want_grads}:
        ours = sorted((g for g in got_grads if g.shape == shape), key=lambda g: g.norm())
        other = sorted((g for g in want_grads if g.shape == shape), key=lambda g: g.norm())
        assert len(ours) == len(other)
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(norm))
    pk.unpatch(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_our_files_open_in_peft(name: str, tmp_path: Path) -> None:
    model = build(name)
    plain = copy.deepcopy(model)
    pk.patch(model, pk.LoRAConfig(**settings(init_lora_weights=False)))
    pk.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        want, got = theirs(**batch(name, 2)).logits, model(**batch(name, 2)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got - theirs.unload()(**batch(name, 2)).logits).abs().max() > 1e-3


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_quantized_experts(name: str, quantize: str) -> None:
    model = build(name)
    before, dense = snapshot(model), copy.deepcopy(model)
    config = pk.LoRAConfig(**settings(init_lora_weights=False, quantize=quantize))
    handle = pk.patch(model, config)
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}
    assert stacks
    row = next(r for r in handle.report().rows if r.name.endswith("experts"))
    assert (row.now, row.format, row.r) == ("LoRAParameters", quantize, 3)
    # The same with the weights that the bytes stand for, through the modules' own forward.
    pk.patch(dense, pk.LoRAConfig(**settings()))
    for path, stack in stacks.items():
        target: Any = dense.get_submodule(path)
        for parameter in ("gate_up_proj", "down_proj"):
            weights = [layer.dequantize() for layer in stack.layers(parameter)]
            getattr(target, parameter).data.copy_(torch.stack(weights))
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            base: Any = dense.get_submodule(path)
            base.base_layer.weight.data.copy_(module.base_layer.dequantize())
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for n, p in dense.named_parameters():
        if p.requires_grad:
            p.data.copy_(ours[n])
    want, want_grads = loss_and_gradients(dense, name)
    got, got_grads = loss_and_gradients(model, name)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    handle.unpatch()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", MOE)
def test_all_linear_quantizes_experts_without_adapting_them(name: str) -> None:
    model = build(name)
    before = snapshot(model)
    paths = [n for n, m in model.named_modules() if is_experts(m)]
    handle = pk.patch(model, pk.LoRAConfig(r=2, quantize="nf4"))
    rows = {r.name: r for r in handle.report().rows}
    assert {(rows[p].now, rows[p].format, rows[p].kernel) for p in paths} == {
        ("QuantizedExperts", "nf4", "linear_4bit: native")
    }
    report = handle.verify(batch(name, 1))
    assert report.ok, str(report)
    _, grads = loss_and_gradients(model, name)
    assert all(torch.isfinite(g).all() for g in grads)
    handle.unpatch()
    assert_unchanged(model, before)
    # Named targets mean what they name.
    for changes in (
        dict(target_modules=["o_proj"]),
        dict(exclude_modules=["experts"]),
        dict(quantize_modules=["o_proj"]),
    ):
        handle = pk.patch(model, pk.LoRAConfig(r=2, quantize="nf4", **changes))  # type: ignore[arg-type]
        assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
        handle.unpatch()


def test_one_parameter_and_the_router(tmp_path: Path) -> None:
    """A matrix without a layer: the module's own forward with the sum in its place."""
    model = build("mixtral")
    changes: dict[str, Any] = dict(
        target_modules=[], target_parameters=["gate.weight", "experts.down_proj"]
    )
    theirs = with_peft(copy.deepcopy(model), **changes)
    theirs.save_pretrained(tmp_path)
    pk.load_adapter(model, tmp_path)
    kinds = {m.why_not_fused() is None for m in model.modules() if isinstance(m, LoRAParameters)}
    assert kinds == {True, False}
    with torch.no_grad():
        got, want = model(**batch("mixtral", 3)).logits, theirs(**batch("mixtral", 3)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_merge_is_undone_exactly(quantize: str | None) -> None:
    model = build("mixtral")
    pk.patch(model, pk.LoRAConfig(**settings(init_lora_weights=False, quantize=quantize)))
    inputs = batch("mixtral", 0)
    with torch.no_grad():
        adapted = model(**inputs).logits
        with pk.disable_adapter(model):
            plain = model(**inputs).logits
        errors = pk.merge(model)
        merged = model(**inputs).logits
        assert any(path.endswith("experts") for path in errors)
        pk.unmerge(model)
        assert torch.equal(model(**inputs).logits, adapted)
        with pk.disable_adapter(model):
            assert torch.equal(model(**inputs).logits, plain)
    assert (adapted - plain).abs().max() > 1e-3
    limit = 1e-4 if quantize is None else 0.1 * float((adapted - plain).abs().max()) + 0.05
    assert (merged - adapted).abs().max() < limit
    if quantize is not None:  # sums of fp32 lose nothing that fp32 can tell
        with pytest.raises(ValueError, match="would lose"):
            pk.merge(model, max_error=1e-6)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, adapted), "nothing was written"


def test_two_adapters_and_switching() -> None:
    model, inputs = build("qwen3_moe"), batch("qwen3_moe", 0)
    config = pk.LoRAConfig(**settings(init_lora_weights=False))
    pk.patch(model, config, "one")
    with torch.no_grad():
        first = model(**inputs).logits
        pk.patch(model, config, "two")
        second = model(**inputs).logits
        pk.set_adapter(model, ["one", "two"])
        both = model(**inputs).logits
        layer = next(m for m in model.modules() if isinstance(m, LoRAParameters))
        routed = (torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5))
        got = layer(*routed)
        base: Any = layer.base_layer
        sums = {p: getattr(base, p) + layer._update(["one", "two"], p)
                for p in layer.parameter_names}  # fmt: skip
        want = torch.func.functional_call(base, sums, routed)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        pk.set_adapter(model, "one")
        assert torch.equal(model(**inputs).logits, first)
    assert (both - first).abs().max() > 1e-4
    assert (both - second).abs().max() > 1e-4


def test_what_is_no_stack_of_experts() -> None:
    experts: Any = next(m for m in build("mixtral").modules() if is_experts(m))
    assert not is_experts(nn.Linear(4, 4))
    turned = copy.deepcopy(experts)
    turned.is_transposed = True
    assert not is_experts(turned)
    odd = copy.deepcopy(experts)
    odd.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 96))
    assert not is_experts(odd)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["experts.none"]}, "no parameter matches 'experts.none'"),
        ({"target_parameters": "experts.down_proj"}, "expected a list of names"),
        ({"target_modules": [], "target_parameters": None}, "target_modules: empty"),
    ],
)
def test_wrong_settings_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pk.patch(build("mixtral"), pk.LoRAConfig(**settings(**changes)))


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_options_of_linear_layers_are_refused(changes: dict[str, Any]) -> None:
    handle = pk.patch(build("mixtral"), pk.LoRAConfig(**settings(**changes)))
    refused = [row for row in handle.report().refused if row.name.endswith("experts")]
    assert len(refused) == 2
    assert "bare parameters" in refused[0].reason
