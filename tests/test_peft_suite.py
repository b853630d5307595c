"""Behaviours that PEFT's own tests ask of its layers, on ours; and `bench.peft_suite`, offline."""

from __future__ import annotations

import copy
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from bench import peft_suite
from peftkern.hf.accelerate.fused import FusedLora

peft = pytest.importorskip("peft")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]


class Net(nn.Module):
    """Widths that are no multiples of a block, an embedding, a Conv1D, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 10)
        self.conv = conv1d(20, 10)
        self.lin0 = nn.Linear(20, 20, bias=False)
        self.drop = nn.Dropout(0.0)
        self.lin1 = nn.Linear(20, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.emb(ids)))
        return self.lin1(self.drop(torch.relu(self.lin0(torch.tanh(self.lin0(x))))))


IDS = torch.arange(99).view(9, 11) % 11
CASES: dict[str, dict[str, Any]] = {
    "vanilla": {"target_modules": ["lin0"]},
    "all": {"target_modules": ["emb", "conv", "lin0", "lin1"]},
    "saved": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "bias": {"target_modules": ["lin0", "lin1"], "bias": "lora_only"},
    "lora_bias": {"target_modules": ["lin1"], "lora_bias": True},
    "rslora": {"target_modules": ["conv", "lin0"], "use_rslora": True},
    "dora": {"target_modules": ["conv", "lin0"], "use_dora": True},
    "ranks": {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}},
    "pissa": {"target_modules": ["lin0"], "init_lora_weights": "pissa"},
}


def pair(case: str, trained: bool = True) -> tuple[Any, Any]:
    """A model of PEFT's and its accelerated copy, with values in every factor."""
    torch.manual_seed(0)
    plain = peft.get_peft_model(Net(), peft.LoraConfig(r=5, **CASES[case]))
    if trained:
        _fill(plain)
    ours = copy.deepcopy(plain)
    pk.accelerate(ours)
    return ours, plain


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def same(ours: nn.Module, plain: nn.Module) -> Tensor:
    got, want = ours(IDS), plain(IDS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return got.detach()


def fast(model: nn.Module) -> int:
    return pk.accelerate(model).report().fast_calls


@pytest.mark.parametrize("case", CASES)
def test_training_moves_the_same_parameters_the_same_way(case: str) -> None:
    ours, plain = pair(case)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for model in (ours, plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).square().mean().backward()
            optimizer.step()
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(mine, before[name]) != mine.requires_grad, name
    assert fast(ours) >= 3


@pytest.mark.parametrize("case", CASES)
def test_merging_disabling_and_unloading(case: str) -> None:
    ours, plain = pair(case)
    adapted = same(ours.eval(), plain.eval())
    with ours.disable_adapter(), plain.disable_adapter():
        assert torch.equal(ours(IDS), plain(IDS))
    for model in (ours, plain):
        model.merge_adapter(safe_merge=model is ours)
    if case != "lora_bias":
        torch.testing.assert_close(same(ours, plain), adapted, rtol=1e-4, atol=1e-4)
    with ours.disable_adapter(), plain.disable_adapter():  # which unmerges
        torch.testing.assert_close(ours(IDS), plain(IDS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same(ours, plain), adapted, rtol=1e-4, atol=1e-4)
    merged, unloaded = copy.deepcopy(ours).merge_and_unload(), ours.unload()
    torch.testing.assert_close(merged(IDS), adapted, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, FusedLora) for net in (merged, unloaded) for m in net.modules())


@pytest.mark.parametrize("case", ["all", "saved", "dora"])
def test_saving_loading_and_several_adapters(case: str, tmp_path: Path) -> None:
    ours, plain = pair(case)
    want = same(ours, plain)
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    pk.accelerate(again)
    torch.testing.assert_close(again(IDS), want, rtol=1e-5, atol=1e-5)
    for model in (ours, plain):
        torch.manual_seed(5)
        model.load_adapter(tmp_path / "plain", "loaded")
        model.add_adapter("fresh", peft.LoraConfig(r=2, target_modules=["lin0"]))
        model.set_adapter("loaded")
    pk.accelerate(ours)
    torch.testing.assert_close(same(ours, plain), want, rtol=1e-5, atol=1e-5)
    for model in (ours, plain):
        model.delete_adapter("loaded")
        model.set_adapter("fresh")
    same(ours, plain)
    assert fast(ours) > 0


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_adapters(kind: str) -> None:
    ours, plain = pair("vanilla")
    for model in (ours, plain):
        torch.manual_seed(7)
        model.add_adapter("b", peft.LoraConfig(r=5, lora_alpha=3, target_modules=["lin0"]))
        model.set_adapter("b")
        _fill(model)
        model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "both", combination_type=kind)
        model.set_adapter("both")
    same(ours, plain)
    assert fast(ours) == 2  # one layer, called twice


def test_a_trainable_base_is_for_peft_and_for_inference() -> None:
    ours, plain = pair("bias")
    for model in (ours, plain):
        model.requires_grad_(True)
        model(IDS).square().mean().backward()
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert fast(ours) == 0
    assert "trainable" in " ".join(pk.accelerate(ours).report().fallbacks)
    with torch.no_grad():
        same(ours, plain)
    assert fast(ours) == 3


def test_weights_that_fsdp_left_as_plain_views() -> None:
    ours, plain = pair("lora_bias")
    want = same(ours, plain)
    layer = ours.base_model.model.lin1
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                delattr(module, name)
                setattr(module, name, parameter.data.view_as(parameter))
    before = fast(ours)
    assert torch.equal(ours(IDS).detach(), want)
    assert fast(ours) == before + 1


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [pk.nn.Linear4bit, pk.nn.Linear8bit])
def test_peft_merges_into_our_quantized_layers(make: Any, dora: bool, safe: bool) -> None:
    """Without accelerate; PEFT on its own would add to the bytes, for INT8 without an error."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    model = peft.get_peft_model(
        nn.Sequential(make.from_linear(linear)),
        peft.LoraConfig(r=4, target_modules=["0"], use_dora=dora),
    )
    _fill(model)
    layer = model.base_model.model[0]
    assert not isinstance(layer, FusedLora)
    stored = [p.clone() for p in layer.base_layer.parameters()]
    x = torch.randn(5, 64)
    want = model(x).detach()
    with pytest.warns(UserWarning, match=r"requantizing lost \d+\.\d % of the update"):
        model.merge_adapter(safe_merge=safe)
    size = want.norm()
    assert (model(x) - want).norm() < (0.02 if make is pk.nn.Linear8bit else 0.2) * size
    model.unmerge_adapter()
    assert torch.equal(model(x), want)
    assert all(map(torch.equal, stored, layer.base_layer.parameters()))
    with pytest.warns(UserWarning, match="requantizing lost"):
        merged = pickle.loads(pickle.dumps(model)).merge_and_unload(safe_merge=safe)
    assert type(merged[0]) is make
    assert (merged(x) - want).norm() < (0.02 if make is pk.nn.Linear8bit else 0.2) * size


SUITE = """
import pytest, torch
from peft import LoraConfig, get_peft_model
from datasets import load_dataset
from .helpers import make

def test_lora():
    model = get_peft_model(make(), LoraConfig(target_modules=["0"]))
    assert model(torch.ones(2, 4)).shape == (2, 3)

@pytest.mark.skip(reason="to be counted as skipped")
def test_skipped():
    pass

def test_knows_the_class():
    layer = get_peft_model(make(), LoraConfig(target_modules=["0"])).base_model.model[0]
    assert type(layer).__name__ == "Linear"
"""


@pytest.mark.slow
def test_the_script_runs_what_it_unpacks(tmp_path: Path) -> None:
    tests = tmp_path / "peft-0" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_some.py").write_text(SUITE)
    (tests / "helpers.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 3))\n"
    )
    sdist = tmp_path / "peft-0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(tmp_path / "peft-0", "peft-0")
    folder = peft_suite.unpack(sdist, tmp_path / "unpacked")
    process = peft_suite.start(folder, True, "test_some.py", "lora or skipped or class")
    ours = peft_suite.finish(process, folder.parent / "ours", 0.0)
    outcomes = {name.rpartition("::")[2]: result for name, result in ours.results.items()}
    assert outcomes == {
        "test_lora": "passed",
        "test_skipped": "skipped",
        "test_knows_the_class": "failed",
    }
    assert (ours.fast, ours.fallbacks) == (1, {})


def test_what_differs_is_named() -> None:
    plain = peft_suite.Outcome({"a": "passed", "b": "passed"}, 0, {}, 1.0)
    ours = peft_suite.Outcome({"a": "passed", "b": "failed"}, 3, {"because": 2}, 1.0)
    text, right = peft_suite.compare(plain, ours)
    assert not right
    assert "b: passed -> failed" in text
    assert "calls on our kernels: 3; to PEFT's own forward: 2" in text
    same = peft_suite.Outcome(plain.results, 3, {}, 1.0)
    assert peft_suite.compare(plain, same)[1]


def test_a_run_without_fast_calls_shows_nothing() -> None:
    run = peft_suite.Outcome({"a": "passed"}, 0, {}, 1.0)
    text, right = peft_suite.compare(run, run)
    assert not right
    assert "no call took the fast path" in text
