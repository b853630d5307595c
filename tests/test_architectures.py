"""Every family of transformers: patched, trained, held against eager PEFT, and put back."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.nn import LoRALinear

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from architectures import FAMILIES, batch, build
from hf_models import PEFT_WARNINGS, assert_unchanged, snapshot

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]
STEPS, RATE = 3, 0.05


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back


def with_peft(model: nn.Module, names: list[str]) -> nn.Module:
    """The model with PEFT's LoRA on these layers."""
    targets = "|".join(re.escape(name) for name in names)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the name that it has here."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n.removeprefix("base_model.model."): p for n, p in found.items()}


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Random factors in ``source``, and the same in ``target``."""
    generator = torch.Generator().manual_seed(5)
    ours, theirs = adapters(target), adapters(source)
    assert list(ours) == list(theirs)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            ours[name].copy_(parameter)


def train(model: nn.Module, name: str, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    """Losses of a few steps of SGD, and all adapters' gradients of each, as one vector a step."""
    losses, gradients = [], []
    for step in range(STEPS):
        loss = model(**batch(name, step, dtype)).loss
        loss.backward()
        losses.append(loss.item())
        found = [p for p in adapters(model).values()]
        assert all(p.grad is not None for p in found), "an adapter without a gradient"
        gradients.append(torch.cat([p.grad.flatten().double() for p in found]))  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter in found:
                parameter -= RATE * parameter.grad  # type: ignore[operator]
                parameter.grad = None
    return losses, gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_train_as_with_peft(name: str) -> None:
    model = build(name)
    original = copy.deepcopy(model)  # for PEFT, which changes it
    before, plain = snapshot(model), outputs(model, name)
    targets = FAMILIES[name].targets
    handle = pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=8, target_modules=targets))
    theirs = with_peft(original, [row.name for row in handle.report().adapted])
    copy_adapters(theirs, model)
    truth = copy.deepcopy(theirs).double()
    assert not handle.report().refused
    together = FAMILIES[name].together
    partners = {row.reason for row in handle.report().rows if row.name.endswith(together)}
    assert not together or any(together[-1] in reason for reason in partners)

    exact_losses, exact = train(truth, name, torch.float64)
    eager_losses, eager = train(theirs, name, torch.float32)
    got_losses, got = train(model, name, torch.float32)
    # Rounding differs, so errors against fp64 are compared, of gradients as a whole: those of
    # later steps start from weights that have come apart.
    for step in range(STEPS):
        scale = exact[step].norm()
        error, allowed = (got[step] - exact[step]).norm(), (eager[step] - exact[step]).norm()
        assert error <= 2 * allowed + 1e-6 * scale, f"step {step}"
        assert abs(got_losses[step] - exact_losses[step]) <= (
            2 * abs(eager_losses[step] - exact_losses[step]) + 1e-6 * abs(exact_losses[step])
        )
    assert exact_losses[0] != exact_losses[-1]
    assert handle.unpatch() is model
    assert_unchanged(model, before)
    for before_, after in zip(plain, outputs(model, name), strict=True):
        assert torch.equal(before_, after)


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    with torch.no_grad():
        out: Any = model(**batch(name, 0))
    tensors = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [t for t in tensors if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5", "vit"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_architectures_over_quantized_bases(name: str, quantize: str) -> None:
    model = build(name)
    before, plain = snapshot(model), outputs(model, name)
    config = pk.LoRAConfig(r=4, quantize=quantize, init_lora_weights=False, keep_original="ram")
    handle = pk.patch(model, config)
    assert any(isinstance(m, LoRALinear) and m.format == quantize for m in model.modules())
    losses, _ = train(model, name, torch.float32)
    assert len(set(losses)) == STEPS
    handle.unpatch()
    assert_unchanged(model, before)
    for before_, after in zip(plain, outputs(model, name), strict=True):
        assert torch.equal(before_, after)
