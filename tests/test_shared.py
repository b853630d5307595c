"""Layers that share their input compute together, and nothing but time depends on it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern import functional
from peftkern.hf.shared import share_inputs
from peftkern.hf.undo import UndoLog
from peftkern.nn import LoRALinear
from peftkern.nn.shared import settle, share_input
from peftkern.testing import assert_error_rule, assert_same_bits

pytest.importorskip("transformers")
from hf_models import PEFT_WARNINGS, batch, build, randomize_adapters

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]


def layers(p: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, LoRALinear]:
    torch.manual_seed(3)
    made = {}
    for name, out in (("q", 32), ("k", 16), ("v", 16)):
        base = nn.Linear(64, out, bias=name == "q").to(dtype)
        made[name] = LoRALinear(base, r=4, lora_dropout=p, init_lora_weights=False)
    return made


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """How many projections each call of the group's function had."""
    counts: list[int] = []
    plain = functional.lora_linear_group

    def counted(x: Tensor, projections: Any, **options: Any) -> tuple[Tensor, ...]:
        counts.append(len(projections))
        return plain(x, projections, **options)

    with mock.patch.object(functional, "lora_linear_group", counted):
        yield counts


def step(made: dict[str, LoRALinear], x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    ys = [layer(x) for layer in made.values()]
    loss = torch.cat([y.float().tanh() for y in ys], -1).square().sum()
    weights = {f"{n}.{i}": w for n, m in made.items() for i, w in enumerate(m.factors("default"))}
    grads = torch.autograd.grad(loss, [x, *weights.values()])
    results = {f"y.{n}": y.detach() for n, y in zip(made, ys, strict=True)}
    return results | dict(zip(["x", *weights], grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_together_as_alone(calls: list[int], p: float, dtype: torch.dtype) -> None:
    made, x = layers(p, dtype), torch.randn(5, 7, 64).to(dtype)
    alone = step(made, x)
    wide = {name: copy.deepcopy(layer).double() for name, layer in made.items()}
    assert share_input(made) is not None
    together = step(made, x)
    assert calls == [3]
    for name, value in alone.items():
        if name.startswith("y"):  # the masks too
            assert_same_bits(together[name], value, name)
    if p == 0.0:
        truth = step(wide, x.double())
        for name, value in alone.items():
            assert_error_rule(together[name], truth[name], value, 2.0, name)


def test_other_inputs_part_them_from_the_next_call_on(calls: list[int]) -> None:
    made = layers()
    shared = share_input(made)
    assert shared is not None
    x, z = torch.randn(3, 64), torch.randn(4, 64)
    for groups in ([3, 2], [2], [2]):
        calls.clear()
        for name, value in (("q", x), ("k", z), ("v", z)):
            expected = made[name]._sum(value, ["default"])
            assert_same_bits(made[name](value), expected, name)
        assert calls == groups
        settle([shared])
    assert shared.partners(made["q"]) == []
    assert shared.partners(made["k"]) == ["v"]


def test_results_nobody_asks_for_end_it(calls: list[int]) -> None:
    made, x = layers(), torch.randn(3, 64)
    shared = share_input(made)
    assert shared is not None
    for _ in range(4):
        made["q"](x)
        settle([shared]) if len(calls) > 2 else None
    assert len(calls) == 3
    made["q"](x)
    assert len(calls) == 3
    assert_same_bits(made["k"](x), made["k"]._sum(x, ["default"]), "k")


def test_a_changed_input_is_another_input(calls: list[int]) -> None:
    made, x = layers(), torch.randn(3, 64)
    assert share_input(made) is not None
    with torch.no_grad():
        made["q"](x)
        x.mul_(2.0)
        assert_same_bits(made["k"](x), made["k"]._sum(x, ["default"]), "changed in place")
    assert made["v"](x).requires_grad, "computed without a graph, asked for with one"


@pytest.mark.parametrize("change", ["disable", "merge", "second", "hook"])
def test_what_a_group_does_not_compute_is_left_alone(calls: list[int], change: str) -> None:
    made, x = layers(), torch.randn(3, 64)
    assert share_input(made) is not None
    seen: list[str] = []
    if change == "disable":
        made["k"].enable_adapters(False)
    elif change == "merge":
        made["k"].merge()
    elif change == "second":
        made["k"].add_adapter("other", r=2, init_lora_weights=False)
        made["k"].set_adapter(["default", "other"])
    else:
        made["k"].register_forward_pre_hook(lambda *_: seen.append("k"))
    for name, layer in made.items():
        want = layer.base_layer(x) if name == "k" and change in ("disable", "merge") else None
        names = layer.active_adapters
        torch.testing.assert_close(layer(x), layer._sum(x, names) if want is None else want)
    assert 3 not in calls
    assert seen == (["k"] if change == "hook" else [])


def test_threads_get_their_own_results() -> None:
    made = layers()
    assert share_input(made) is not None
    wrong: list[str] = []

    def work(seed: int) -> None:
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
        for _ in range(40):
            for name, layer in made.items():
                if not torch.equal(layer(x), layer._sum(x, ["default"])):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_model_trains_as_without(calls: list[int], reentrant: bool | None) -> None:
    inputs = batch("llama")
    grads = []
    for shares in (False, True):
        model = build("llama")
        handle = pk.patch(model, pk.LoRAConfig(r=4, lora_dropout=0.1))
        assert "computes together with k_proj, v_proj" in str(handle.report())
        if not shares:
            for module in model.modules():
                if isinstance(module, LoRALinear):
                    module.shared = None
        randomize_adapters(model)
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for seed in (1, 2):
            torch.manual_seed(seed)
            model(**inputs).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert bool(calls) is shares
    assert set(calls) == {2, 3}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=2e-4, atol=1e-6)


def test_cross_attention_shares_keys_and_values_only(calls: list[int]) -> None:
    import transformers

    torch.manual_seed(0)
    settings = dict(vocab_size=40, d_model=32, d_kv=16, d_ff=40, num_layers=1, num_heads=2)
    model = transformers.T5Model(
        transformers.T5Config(**settings, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    )
    plain = copy.deepcopy(model)
    pk.patch(model, pk.LoRAConfig(r=4, init_lora_weights=False))
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoRALinear):
            module.shared = None
    ids = torch.randint(0, 40, (2, 5))
    got = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    # Self-attention twice, cross-attention, and two gated feed-forwards; none in vain.
    assert sorted(calls) == [2, 2, 2, 3, 3]
    want = twin(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    assert_same_bits(got, want, "the same results")
    pk.unpatch(model)
    after = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    assert_same_bits(after, plain(input_ids=ids, decoder_input_ids=ids).last_hidden_state, "back")


def test_only_layers_of_one_width_are_candidates() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = LoRALinear(nn.Linear(64, 8), r=2)
            self.k_proj = LoRALinear(nn.Linear(32, 8), r=2)
            self.gate_proj = LoRALinear(nn.Linear(64, 8), r=2)

    model, log = Odd(), UndoLog()
    share_inputs(model, log)
    assert model.q_proj.shared is None
    assert model.gate_proj.shared is None
    assert log.undo == []
