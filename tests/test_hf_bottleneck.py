"""Bottleneck adapters in real model classes: placement, training, and how they compose."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import assert_unchanged, randomize_adapters, snapshot
from torch import Tensor, nn

import peftkern as pk
from peftkern.nn import BottleneckAdapter, BottleneckLayer
from peftkern.testing import assert_same_bits

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "golden"))

from make_adapterhub import ARCHITECTURES, CASES, cases_of, inputs_of, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PRESETS = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back


def patched(architecture: str, preset: str = "double_seq_bn", **changes: Any) -> nn.Module:
    model = tiny(architecture)
    pk.patch(model, pk.BottleneckConfig.preset(preset, **changes))
    randomize_adapters(model)
    return model


def forward(model: nn.Module, architecture: str) -> Tensor:
    return model(**inputs_of(architecture)).last_hidden_state


@torch.no_grad()
def result(model: nn.Module, architecture: str) -> Tensor:
    """Without gradients: with them, torch's attention may choose other kernels."""
    return forward(model, architecture)


def step(model: nn.Module, architecture: str, seed: int = 0) -> list[Tensor]:
    """The output, and the gradient of each trainable tensor."""
    torch.manual_seed(seed)
    model.zero_grad()
    y = forward(model, architecture)
    weight = torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)
    (y * weight).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    gradients = []
    for parameter in trained:
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
    return [y.detach(), *gradients]


def make_eager(model: nn.Module) -> nn.Module:
    """Hooks on the projections must run, so torch computes the adapters op by op."""
    for module in model.modules():
        if isinstance(module, BottleneckAdapter):
            for projection in (module.down, module.adapter_up):
                projection.register_forward_hook(lambda *_: None)
            assert module.why_not_fused() is not None
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_every_trainable_tensor(architecture: str) -> None:
    for case in cases_of(architecture):
        preset, changes = CASES[case]
        model = patched(architecture, preset, **changes).train()
        got = step(model, architecture)
        want = step(make_eager(model), architecture)
        # A sum that cancels is held to the rounding of its terms, not to that of its small value.
        terms = max(float(w.abs().max()) for w in want)
        for g, w in zip(got, want, strict=True):
            error = float((g - w).abs().max())
            assert error <= 1e-4 * float(w.abs().max()) + 2e-6 * terms, (case, g.shape, error)
            if w.numel() > 1:
                assert torch.cosine_similarity(g.flatten(), w.flatten(), dim=0) > 0.9999, case
        assert all(float(g.abs().max()) > 0 for g in got), case


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("preset", PRESETS)
def test_unpatch_is_exact(architecture: str, preset: str) -> None:
    model = tiny(architecture)
    before, plain = snapshot(model), result(model, architecture)
    handle = pk.patch(model, pk.BottleneckConfig.preset(preset))
    randomize_adapters(model)
    assert (result(model, architecture) - plain).abs().max() > 1e-3
    with pk.disable_adapter(model):
        assert_same_bits(result(model, architecture), plain)
    rows = [row for row in handle.report().rows if row.now]
    expected = {"t5": 4}.get(architecture, 2) * (2 if preset == "double_seq_bn" else 1)
    assert len(rows) == expected
    assert all(row.kernel.startswith("bottleneck_adapter") and row.r > 0 for row in rows)
    handle.unpatch()
    assert_unchanged(model, before)
    assert_same_bits(result(model, architecture), plain)


def test_leave_out_and_reduction_of_layers() -> None:
    model = patched("t5", "seq_bn", leave_out=[2], reduction_factor={"0": 4, "default": 16})
    widths = [m.bottleneck for m in model.modules() if isinstance(m, BottleneckAdapter)]
    assert widths == [8, 2, 2]  # layers 0, 1 of the encoder, 3: the decoder's second


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_over_nf4(architecture: str) -> None:
    model = tiny(architecture)
    before = snapshot(model)
    handle = pk.patch(model, pk.BottleneckConfig.preset("double_seq_bn", quantize="nf4"))
    randomize_adapters(model)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("Linear4bit") >= 12
    assert kinds.count("BottleneckLayer") == 4
    got = step(model, architecture)
    want = step(make_eager(model), architecture)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * float(w.abs().max()))
    handle.unpatch()
    assert_unchanged(model, before)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(architecture: str, reentrant: bool) -> None:
    model = patched(architecture, dropout=0.3).train()
    model.config.use_cache = False  # checkpointing switches the cache off, and attention with it
    plain = step(model, architecture)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = step(model, architecture)
    for a, b in zip(again, plain, strict=True):
        assert_same_bits(a, b)


def test_autocast() -> None:
    model = patched("llama", "seq_bn")
    exact = step(model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        half = step(model, "llama")
    for h, e in zip(half, exact, strict=True):
        assert h.dtype == e.dtype or h is half[0]
        similarity = torch.cosine_similarity(h.float().flatten(), e.flatten(), dim=0)
        assert similarity > 0.98


def test_bf16_base_with_fp32_adapters() -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    pk.patch(model, pk.BottleneckConfig.preset("double_seq_bn", ln_before=True, use_gating=True))
    randomize_adapters(model)
    gradients = step(model, "gpt2")
    assert gradients[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients[1:])


def test_dropout_and_stochastic_depth_follow_the_seed() -> None:
    model = patched("bert", "adapter_plus", stochastic_depth=0.5, dropout=0.2)
    quiet = [step(model, "bert", seed)[0] for seed in (1, 2)]
    assert_same_bits(*quiet)
    model.train()
    first, same, other = (step(model, "bert", seed)[0] for seed in (1, 1, 2))
    assert_same_bits(first, same)
    assert not torch.equal(first, other)


def test_stochastic_depth_drops_whole_samples() -> None:
    adapter = BottleneckAdapter(16, 4, stochastic_depth=0.5).train()
    torch.nn.init.ones_(adapter.adapter_up.bias)
    x = torch.randn(64, 3, 16)
    parts = (adapter(x, x) - x).abs().amax(dim=(1, 2))
    dropped = int((parts < 1e-6).sum())
    assert 16 < dropped < 48
    kept = adapter.eval()(x) * 2
    torch.testing.assert_close(parts[parts > 1e-6], kept.abs().amax(dim=(1, 2))[parts > 1e-6])


def test_several_adapters() -> None:
    model = patched("bert", "par_bn")
    one = result(model, "bert")
    pk.patch(model, pk.BottleneckConfig.preset("double_seq_bn"), "second")
    randomize_adapters(model, seed=9)
    two = result(model, "bert")
    pk.set_adapter(model, "default")
    assert_same_bits(result(model, "bert"), one)
    names = {
        n.split(".adapters.")[1].split(".")[0]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == {"default"}
    pk.set_adapter(model, "second")
    assert_same_bits(result(model, "bert"), two)
    pk.set_adapter(model, ["default", "second"])
    both = result(model, "bert")
    assert (both - one).abs().max() > 1e-3
    assert (both - two).abs().max() > 1e-3
    layer = model.encoder.layer[1].output.bottleneck
    h, r = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    f = [layer.adapters["default"](r), layer.adapters["second"](h)]
    torch.testing.assert_close(layer.join(h, r)[0], h + f[0] + f[1])
    pk.patch(model, pk.BottleneckConfig.preset("adapter_plus"), "third")
    with pytest.raises(ValueError, match="does not only add"):
        pk.set_adapter(model, ["default", "third"])
    with pytest.raises(ValueError, match="exists already"):
        pk.patch(model, pk.BottleneckConfig.preset("par_bn"), "second")
    with pytest.raises(ValueError, match="cannot be merged"):
        pk.merge(model)


def test_beside_low_rank_adapters() -> None:
    model = tiny("llama")
    before = snapshot(model)
    pk.patch(model, pk.LoRAConfig(r=2), "low")
    pk.patch(model, pk.BottleneckConfig.preset("seq_bn"), "wide")
    randomize_adapters(model)
    pk.set_adapter(model, ["low", "wide"])
    assert len(step(model, "llama")) > 20
    pk.unpatch(model)
    assert_unchanged(model, before)


def test_a_copy_is_independent() -> None:
    model = patched("gpt2")
    expected = result(model, "gpt2")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert_same_bits(result(twin, "gpt2"), expected)


def test_training_lowers_the_loss() -> None:
    model = patched("llama", "seq_bn", reduction_factor=4).train()
    goal = result(tiny("llama"), "llama").flip(-1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (forward(model, "llama") - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_refusals() -> None:
    import transformers

    config = pk.BottleneckConfig.preset("seq_bn")
    phi = transformers.PhiConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match="in an order that is not understood"):
        pk.patch(transformers.PhiModel(phi), config)
    with pytest.raises(ValueError, match="leaves nothing to adapt"):
        pk.patch(nn.Sequential(nn.Linear(4, 4)), config)
    post = pk.BottleneckConfig.preset("seq_bn", residual_before_ln="post_add")
    with pytest.raises(ValueError, match="normalises after its residuals"):
        pk.patch(tiny("llama"), post)
    with pytest.raises(ValueError, match="no entry for layer 1"):
        pk.patch(tiny("llama"), pk.BottleneckConfig(reduction_factor={"0": 4}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor: expected a positive number"),
        ({"non_linearity": "softmax"}, "non_linearity: got 'softmax'"),
        ({"scaling": "big"}, "scaling: got 'big'"),
        ({"init_weights": "zeros"}, "init_weights: got 'zeros'"),
        ({"dropout": 1.0}, "dropout: expected a number"),
        ({"output_adapter": False}, "no adapter anywhere"),
        ({"residual_before_ln": "late"}, "residual_before_ln: got 'late'"),
        ({"residual_before_ln": "post_add"}, "needs original_ln_before=True"),
        ({"ln_before": 1}, "ln_before: expected True or False"),
    ],
)
def test_configuration_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pk.BottleneckConfig(**change)
    with pytest.raises(ValueError, match="expected one of seq_bn"):
        pk.BottleneckConfig.preset("bert")


@pytest.mark.parametrize("init", ["bert", "mam_adapter", "houlsby"])
def test_initialisations(init: str) -> None:
    build: Callable[[], BottleneckAdapter] = lambda: BottleneckAdapter(  # noqa: E731
        256, 64, init_weights=init, init_weights_seed=3, use_gating=init != "houlsby"
    )
    torch.manual_seed(0)
    adapter, after = build(), torch.rand(1)
    deviation = {"bert": 0.02, "houlsby": 0.0088}.get(init)
    if deviation is None:
        assert float(adapter.down.weight.detach().abs().max()) <= 1 / 16
        assert not adapter.adapter_up.weight.any()
    else:
        for weight in (adapter.down.weight, adapter.adapter_up.weight):
            assert abs(float(weight.detach().std()) - deviation) < 0.05 * deviation
    assert not adapter.down.bias.any()
    assert not adapter.adapter_up.bias.any()
    for a, b in zip(adapter.parameters(), build().parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
    assert not torch.equal(after, torch.rand(1))


def test_layer_keeps_its_books() -> None:
    layer = BottleneckLayer(16)
    layer.add_adapter("a", reduction_factor=4)
    layer.add_adapter("b", reduction_factor=8)
    assert layer.adapter_names == ["a", "b"]
    assert layer.active_adapters == ["b"]
    assert not any(p.requires_grad for p in layer.adapters["a"].parameters())
    layer.delete_adapter("b")
    assert layer.adapter_names == ["a"]
    assert "b" not in layer.placement
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("a")
