"""What LoRA's relatives compose with: quantized bases, dropout, autocast, checkpointing, files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern import functional
from peftkern.nn.structure import dense_weight
from peftkern.optim import lora_plus_groups

pytest.importorskip("transformers")
from hf_models import (
    PEFT_WARNINGS,
    assert_unchanged,
    batch,
    build,
    randomize_adapters,
    snapshot,
)

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]

METHODS: dict[str, Any] = {
    "dora": lambda **o: pk.LoRAConfig(r=4, use_dora=True, **o),
    "dora-dropout": lambda **o: pk.LoRAConfig(r=4, use_dora=True, lora_dropout=0.2, **o),
    "bias": lambda **o: pk.LoRAConfig(r=4, lora_bias=True, **o),
    "pissa": lambda **o: pk.LoRAConfig(r=4, init_lora_weights="pissa", **o),
    "loftq": lambda **o: pk.LoRAConfig(r=4, init_lora_weights="loftq", **o),
    "embedding": lambda **o: pk.LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"], **o),
    "ia3": lambda **o: pk.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **o
    ),
}
methods = pytest.mark.parametrize("method", METHODS)


def patched(method: str, kind: str = "llama", **options: Any) -> nn.Module:
    model = build(kind).train()
    pk.patch(model, METHODS[method](**options))
    randomize_adapters(model)
    return model


def step(model: nn.Module, seed: int = 0, **data: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch("llama", **data)).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


@methods
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_gradients_over_every_base_and_exact_unpatch(method: str, quantize: str | None) -> None:
    model = build("llama").train()
    before = snapshot(model)
    handle = pk.patch(model, METHODS[method](quantize=quantize))
    randomize_adapters(model)
    dense = copy.deepcopy(model)
    for layer in dense.modules():
        base = getattr(layer, "base_layer", None)
        if hasattr(base, "dequantize"):
            twin = nn.Linear(base.in_features, base.out_features, bias=False)
            twin.weight = nn.Parameter(base.dequantize(torch.float32), requires_grad=False)
            layer.base_layer = twin
    got, want = step(model), step(dense)
    torch.testing.assert_close(got[0], want[0])
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(got[1]) == trainable
    assert_same(got[1], want[1], 1e-4)
    handle.unpatch()
    assert_unchanged(model, before)


@methods
def test_merging_into_quantized_weights_tells_first(method: str) -> None:
    # Only a bias that is there can take up lora_bias.
    model = patched(method, "bert" if method == "bias" else "llama", quantize="nf4").eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    told = pk.merge(model, check_only=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert told == pk.merge(model)
    assert max(told.values()) > 0.01
    pk.unmerge(model)
    with pytest.raises(ValueError, match="nothing was written"):
        pk.merge(model, max_error=1e-6)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@methods
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(method: str, reentrant: bool) -> None:
    model = patched(method)
    plain = step(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = step(model)
    assert torch.equal(plain[0], again[0])
    assert_same(again[1], plain[1])


def eager(method: str) -> nn.Module:
    """HF PEFT's model of the same method; it takes the state of :func:`patched`'s."""
    peft = pytest.importorskip("peft")
    model = build("llama").train()
    if method == "ia3":
        targets = ["k_proj", "v_proj", "down_proj"]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
        return peft.get_peft_model(model, config)
    options = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(method, {})
    targets = ["embed_tokens", "q_proj"] if method == "embedding" else "all-linear"
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))


@methods
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
def test_autocast_errs_no_more_than_eager_peft(method: str) -> None:
    """bf16 against fp32, held against what HF PEFT loses by it in the same steps.

    How much that is depends on the processor and on the gradient: those of q and k are small
    differences, wrong by a tenth with either. One draw of adapters compares luck, so the factor
    for gradients, 2, bounds the geometric mean over six.
    """
    if "dropout" in method:
        pytest.skip("the mask is drawn for another dtype's layout")
    model, peer, prefix = patched(method), eager(method), "base_model.model."
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ratios: dict[str, list[float]] = {}
    for seed in range(6):
        model.load_state_dict(start)
        randomize_adapters(model, seed)
        peer.load_state_dict({prefix + n: tensor for n, tensor in model.state_dict().items()})
        plain = step(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, theirs = step(model), step(peer)
        assert float((low[0] - plain[0]).abs()) < 0.02 * float(plain[0])
        for name, gradient in plain[1].items():
            assert low[1][name].dtype == torch.float32
            error = float((low[1][name] - gradient).norm())
            allowed = float((theirs[1][prefix + name] - gradient).norm())
            ratios.setdefault(name, []).append(error / allowed)
    assert max(math.prod(draws) for draws in ratios.values()) < 2**6, ratios


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora-dropout", "embedding", "ia3"])
def test_compiles_without_breaks(method: str) -> None:
    model = build("llama", num_hidden_layers=1).train()
    pk.patch(model, METHODS[method]())
    randomize_adapters(model)
    plain = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    torch.manual_seed(0)
    loss = compiled(**batch("llama")).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain[0])
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(got, plain[1], 1e-4)


@methods
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_training_goes_on_from_files(method: str, quantize: str | None, tmp_path: Path) -> None:
    def train(model: nn.Module, seeds: range, state: Any = None) -> Any:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state)
        for seed in seeds:
            model.zero_grad()
            torch.manual_seed(seed)
            model(**batch("llama", seed)).loss.backward()
            optimizer.step()
        return optimizer.state_dict()

    straight = patched(method, quantize=quantize)
    resumed = copy.deepcopy(straight)
    train(straight, range(2))
    state = train(resumed, range(1))
    pk.save_adapter(resumed, tmp_path)
    fresh = build("llama").train()
    pk.load_adapter(fresh, tmp_path, quantize=quantize)
    train(fresh, range(1, 2), state)
    for (name, got), want in zip(fresh.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


class _SameMask(nn.Module):
    """PEFT's dropout module with our mask: the seed comes from the same generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.p, self.training)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_interop_gradients_under_dropout(dora: bool, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "up_proj"]
    config = peft.LoraConfig(
        r=4, lora_dropout=0.3, use_dora=dora, target_modules=targets, fan_in_fan_out=kind == "gpt2"
    )
    reference = peft.get_peft_model(build(kind), config)
    randomize_adapters(reference)
    reference.save_pretrained(tmp_path)
    for layer in reference.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = _SameMask(0.3)
    ours = build(kind)
    pk.load_adapter(ours, tmp_path)
    results = []
    for model in (reference, ours):
        torch.manual_seed(4)
        loss = model.train()(**batch(kind)).loss
        loss.backward()
        results.append(
            {
                n.removeprefix("base_model.model."): p.grad
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            | {"loss": loss.detach()}
        )
    assert_same(results[1], results[0], 1e-4)


def _function(layer: pk.nn.LoRALinear) -> Tensor:
    base = layer.base_layer
    if hasattr(base, "dequantize"):
        return base.dequantize(torch.float32) + layer.delta_weight("default")
    return dense_weight(base) + layer.delta_weight("default")


@pytest.mark.parametrize("alpha", [4, 16])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora", "loftq"])
def test_starts_that_change_the_base(init: str, alpha: float) -> None:
    torch.manual_seed(0)
    # A strong low-rank part, which a quantizer's blocks do not like.
    linear = nn.Linear(96, 80)
    with torch.no_grad():
        linear.weight += torch.randn(80, 3) @ torch.randn(3, 96)
    original = linear.weight.detach().clone()
    x = torch.randn(5, 96)

    def made(**options: Any) -> pk.nn.LoRALinear:
        return pk.nn.LoRALinear(linear, r=8, lora_alpha=alpha, init_lora_weights=init, **options)

    if init != "loftq":
        dense = made()
        torch.testing.assert_close(_function(dense), original, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense(x), linear(x), rtol=1e-4, atol=1e-4)
    plain = pk.nn.Linear4bit.from_linear(linear).dequantize(torch.float32)
    errors = []
    for rounds in (1, 5):
        options = {"loftq_config": {"loftq_iter": rounds}} if init == "loftq" else {}
        layer = made(make_base=pk.nn.Linear4bit.from_linear, **options)
        assert isinstance(layer.base_layer, pk.nn.Linear4bit)
        errors.append(float((_function(layer) - original).norm()))
    if init != "olora":  # whose columns are the first ones, not the strongest
        limit = 0.9 if init == "loftq" else 0.5
        assert errors[0] < limit * float((plain - original).norm()), errors
    if init == "loftq":
        assert errors[1] < errors[0]
    assert torch.equal(linear.weight, original)


def test_loftq_takes_pefts_steps() -> None:
    torch.manual_seed(0)
    linear, r = nn.Linear(64, 48, bias=False), 6
    config = {"loftq_bits": 4, "loftq_iter": 3}
    layer = pk.nn.LoRALinear(
        linear, r=r, lora_alpha=r, init_lora_weights="loftq", loftq_config=config
    )
    weight = linear.weight.detach()
    rest = weight
    for _ in range(3):
        rounded = pk.quantize_4bit(rest, double_quant=False).dequantize(torch.float32)
        u, s, vh = torch.linalg.svd(weight - rounded, full_matrices=False)
        low = (u[:, :r] * s[:r]) @ vh[:r]
        rest = weight - low
    torch.testing.assert_close(layer.base_layer.weight, rounded)
    torch.testing.assert_close(layer.delta_weight("default"), low, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_interop_loftq_files_say_how_the_base_is_made(quantize: str | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = pk.LoRAConfig(
        r=4, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}, quantize=quantize
    )
    model = build("llama").eval()
    pk.patch(model, config)
    randomize_adapters(model)
    pk.save_adapter(model, tmp_path)
    read = peft.LoraConfig.from_pretrained(str(tmp_path))  # applying it needs a GPU in PEFT
    bits = 8 if quantize == "int8" else 4
    assert (read.init_lora_weights, read.loftq_config) == (
        "loftq",
        {"loftq_bits": bits, "loftq_iter": 2},
    )
    fresh = build("llama").eval()
    pk.load_adapter(fresh, tmp_path, quantize=quantize)
    assert torch.equal(fresh(**batch("llama")).logits, model(**batch("llama")).logits)
    with pytest.raises(ValueError, match="rounding is not low-rank"):
        pk.save_adapter(model, tmp_path / "plain", plain_lora=True)


@pytest.mark.parametrize("method", ["dora", "embedding", "ia3", "bias"])
def test_meta_models_can_be_patched(method: str) -> None:
    with torch.device("meta"):
        model = build("llama")
    handle = pk.patch(model, METHODS[method]())
    assert all(p.is_meta for p in model.parameters())
    handle.unpatch()


def test_a_changed_base_leaves_tied_weights_alone() -> None:
    model = build("gpt2").eval()
    before = snapshot(model)
    expected = model(**batch("gpt2")).logits
    handle = pk.patch(model, pk.LoRAConfig(target_modules=["lm_head"], init_lora_weights="pissa"))
    torch.testing.assert_close(model(**batch("gpt2")).logits, expected, rtol=1e-4, atol=1e-4)
    handle.unpatch()
    assert_unchanged(model, before)


def test_norms_are_computed_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pk.nn.DoRALinear(nn.Linear(64, 48), r=4)
    calls: list[int] = []
    real = functional.dora_weight_norm
    monkeypatch.setattr(functional, "dora_weight_norm", lambda *a: calls.append(1) or real(*a))
    x = torch.randn(3, 64)
    for _ in range(3):
        layer(x)
    assert len(calls) == 1
    weight = layer.lora_B["default"].weight
    writes = (
        lambda: nn.init.normal_(weight),
        lambda: weight.data.add_(1.0),  # leaves no trace in the version counter
        lambda: setattr(weight, "data", torch.randn(48, 4)),
        lambda: layer.base_layer.weight.copy_(torch.randn(48, 64)),
    )
    for count, write in enumerate(writes, start=2):
        with torch.no_grad():
            write()
        got = layer(x)
        assert len(calls) == count
        w = layer.base_layer.weight + layer.delta_weight("default")
        ratio = layer.lora_magnitude_vector["default"].weight / w.norm(dim=1)
        torch.testing.assert_close(got, ratio * (x @ w.T) + layer.bias, rtol=1e-4, atol=1e-4)


def test_lora_plus_knows_the_new_tensors() -> None:
    model = patched("embedding")
    names = {id(p): n for n, p in model.named_parameters()}
    rest, fast = lora_plus_groups(model, lr=1e-3, ratio=8)
    assert {names[id(p)].split(".")[-2] for p in rest["params"]} <= {"lora_embedding_A", "default"}
    assert any("lora_embedding_B" in names[id(p)] for p in fast["params"])
    assert all("_B." in names[id(p)] for p in fast["params"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "svd"}, "init_lora_weights: got 'svd', expected one of True"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank, got r=3"),
        ({"init_lora_weights": "pissa", "r": 300}, "rank of at most 64, not 300"),
        ({"use_dora": True, "lora_bias": True}, "exclude one another"),
        ({"loftq_config": {"loftq_iter": 2}}, "needs init_lora_weights='loftq'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "unknown key 'bits'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "expected 4 or 8"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pk.patch(model, pk.LoRAConfig(target_modules=["q_proj"], **options))
    assert_unchanged(model, before)


def test_what_a_layer_cannot_have_is_in_the_report() -> None:
    model = build("llama")
    handle = pk.patch(
        model, pk.LoRAConfig(target_modules=["embed_tokens", "q_proj"], use_dora=True)
    )
    (row,) = handle.report().refused
    assert row.name == "model.embed_tokens"
    assert "use_dora is for linear layers" in row.reason
    with pytest.raises(ValueError, match="would change the base under the adapters"):
        pk.patch(
            model,
            pk.LoRAConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
            adapter_name="second",
        )
    handle.unpatch()
    quantized = build("llama")
    pk.patch(quantized, pk.LoRAConfig(target_modules=["q_proj"], quantize="nf4"))
    with pytest.raises(ValueError, match="carries an adapter of another kind"):
        pk.patch(quantized, pk.IA3Config(target_modules=["q_proj"]), adapter_name="second")


def test_dora_trains_after_an_evaluation_in_inference_mode() -> None:
    torch.manual_seed(0)
    layer = pk.nn.LoRALinear(torch.nn.Linear(16, 8), r=2, use_dora=True)
    x = torch.randn(3, 16)
    with torch.inference_mode():
        shown = layer(x)
    y = layer(x)
    torch.testing.assert_close(y, shown)
    y.sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
