"""Every method with everything it may meet: the numbers of the plain run, or a refusal by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
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
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
    # Dynamo asks for it while it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def _lora(**changes: Any) -> Callable[[nn.Module], pk.LoRAConfig]:
    return lambda model: pk.LoRAConfig(r=4, lora_alpha=8, **changes)


def _bottleneck(preset: str, **changes: Any) -> Callable[[nn.Module], pk.BottleneckConfig]:
    return lambda model: pk.BottleneckConfig.preset(preset, **changes)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "loftq": _lora(init_lora_weights="loftq"),
    "ia3": lambda model: pk.IA3Config(target_modules="all-linear"),
    "houlsby": _bottleneck("houlsby"),
    "parallel": _bottleneck("parallel", reduction_factor=8),
    "adapter_plus": _bottleneck("adapter_plus", reduction_factor=8, stochastic_depth=0.0),
    "prefix": lambda model: pk.PrefixTuningConfig(num_virtual_tokens=5),
    "prompt": lambda model: pk.PromptTuningConfig(num_virtual_tokens=5),
    "sparse": lambda model: pk.SparseDeltaConfig(density=0.05),
}
BASES = (None, "nf4", "int8")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back


def made(method: str, base: str | None = None, **changes: Any) -> tuple[nn.Module, Any]:
    """A tiny Llama with the method on it, its adapters off zero."""
    model = build("llama").train()
    config = METHODS[method](model)
    if method == "loftq" and base is None:
        base = "nf4"
    torch.manual_seed(5)
    handle = pk.patch(model, replace(config, quantize=base, **changes))
    randomize_adapters(model)
    return model, handle


def gradients(model: nn.Module, **context: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(11)  # dropout
    model.zero_grad()
    loss = model(**batch("llama", 1)).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    return loss.detach(), found


def assert_same_step(got: tuple[Any, Any], want: tuple[Any, Any], tolerance: float) -> None:
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=tolerance, atol=tolerance)
    assert got[1].keys() == want[1].keys()
    whole = torch.cat([g.float().flatten() for g in want[1].values()]).norm()
    for name, grad in want[1].items():
        off = (got[1][name].float() - grad.float()).norm()
        assert off <= tolerance * (grad.float().norm() + 0.1 * whole), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_kernels_agree_with_torch_and_leave_no_trace(method: str, base: str | None) -> None:
    model = build("llama")
    before = snapshot(model)
    config = replace(METHODS[method](model), quantize="nf4" if method == "loftq" else base)
    handle = pk.patch(model, config)
    randomize_adapters(model)
    report = handle.verify(batch("llama", 1))
    assert report.ok, str(report)
    handle.unpatch()
    assert_unchanged(model, before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method: str, base: str | None, reentrant: bool) -> None:
    """The same loss and gradients, dropout drawn again as it was."""
    changes = {"lora_dropout": 0.2} if method in ("lora", "rslora", "pissa", "olora") else {}
    plain, _ = made(method, base, **changes)
    want = gradients(plain)
    model, _ = made(method, base, **changes)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same_step(gradients(model), want, 1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, base: str | None) -> None:
    """bf16 products under autocast stay near the fp32 step; trained tensors keep their dtype."""
    model, _ = made(method, base)
    want = gradients(model)
    torch.manual_seed(11)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch("llama", 1)).loss
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert_same_step((loss.detach(), got), want, 0.06)


# Of methods that share a layer, one: each takes up to twenty seconds.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby", "prefix", "prompt", "sparse"])
def test_compiled_without_a_break(method: str) -> None:
    model, _ = made(method, "nf4" if method in ("lora", "dora", "houlsby") else None)
    want = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(11)
    model.zero_grad()
    loss = compiled(**batch("llama", 1)).loss
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same_step((loss.detach(), got), want, 1e-5)


def _steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(**batch("llama", step)).loss.backward()
        optimizer.step()


def _adam(model: nn.Module) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return pk.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=256)


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_resumed(method: str, base: str | None, tmp_path: Path) -> None:
    """Adapter files and optimizer state in the middle of a run: the same end, bit for bit."""
    whole, _ = made(method, base)
    optimizer = _adam(whole)
    _steps(whole, optimizer, 0, 2)
    style = "adapterhub" if method in ("houlsby", "parallel", "adapter_plus") else "peft"
    pk.save_adapter(whole, tmp_path, format=style)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    _steps(whole, optimizer, 2, 4)

    again = build("llama").train()
    base = "nf4" if method == "loftq" else base
    options = {} if base is None else {"quantize": base}
    pk.load_adapter(again, tmp_path, trainable=True, **options)
    again.train()
    resumed = _adam(again)
    state.seek(0)
    resumed.load_state_dict(torch.load(state, weights_only=True))
    _steps(again, resumed, 2, 4)
    left = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    right = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert list(left) == list(right)
    for name, parameter in left.items():
        assert torch.equal(parameter, right[name]), name
