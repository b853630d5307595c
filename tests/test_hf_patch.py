"""patch and unpatch: in place, complete, exact, and honest about what was not done."""

from __future__ import annotations

import copy
import logging
import os
import pickle

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.hf import disable_adapter
from peftkern.nn import Linear4bit, LoRALinear, TrainableCopy
from peftkern.nn.stash import DiskStore

pytest.importorskip("transformers")
from hf_models import (
    KINDS,
    PEFT_WARNINGS,
    assert_unchanged,
    batch,
    build,
    randomize_adapters,
    snapshot,
    task,
)

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]


class Net(nn.Module):
    """Two linear layers, one of them reached by two names, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.first = nn.Linear(64, 64)
        self.block = nn.ModuleList([nn.Linear(64, 64), self.first])
        self.out = nn.Linear(64, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(ids))
        for layer in self.block:
            x = layer(x).tanh()
        return self.out(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4", "fp4", "int8"])
@pytest.mark.parametrize("keep", ["disk", "ram"])
def test_unpatch_is_bit_identical(kind: str, quantize: str | None, keep: str) -> None:
    model = build(kind)
    model.eval()
    inputs = batch(kind)
    before, logits = snapshot(model), model(**inputs).logits
    config = pk.LoRAConfig(
        r=4, quantize=quantize, keep_original=keep, task_type=task(kind), lora_dropout=0.1
    )
    handle = pk.patch(model, config)
    model.train()
    randomize_adapters(model)
    loss = model(**inputs).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.optim.SGD(trained, lr=0.1).step()
    model.eval()
    assert not torch.equal(model(**inputs).logits, logits)
    assert handle.unpatch() is model
    assert_unchanged(model, before)
    assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(RuntimeError, match="not patched"):
        pk.unpatch(model)
    with pytest.raises(RuntimeError, match="spent"):
        handle.unpatch()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    model = build(kind).eval()
    inputs = batch(kind)
    expected = model(**inputs).logits
    pk.patch(model, pk.LoRAConfig(r=4, task_type=task(kind)))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_original_weights_wait_on_disk_not_in_memory() -> None:
    model = build("llama")
    handle = pk.patch(model, pk.LoRAConfig(quantize="nf4"))
    log = handle.adapters["default"].log
    assert log.parked
    assert all(entry.parameter.numel() == 0 for entry in log.parked)
    assert all(entry.data.store is log.store for entry in log.parked)
    report = handle.report()
    assert report.bytes_after < report.bytes_before
    fd = log.store._fd
    assert os.fstat(fd).st_nlink == 0  # the file has no name: a crash leaves nothing behind
    del log
    handle.unpatch()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_no_room_on_disk_is_an_error_and_rolls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = snapshot(model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="set TMPDIR to a larger disk"):
        pk.patch(model, pk.LoRAConfig(quantize="nf4"))
    assert_unchanged(model, before)


def test_store_keeps_every_dtype() -> None:
    store = DiskStore()
    tensors = [
        torch.randn(3, 5).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
    ] + [torch.randn(0, 4), torch.randn(())]
    slips = [store.put(t) for t in tensors]
    for slip, tensor in zip(slips, tensors, strict=True):
        for copied in (
            slip.fetch(),
            copy.deepcopy(slip).fetch(),
            pickle.loads(pickle.dumps(slip)).fetch(),
        ):
            assert copied.dtype == tensor.dtype
            assert torch.equal(copied, tensor)


def test_giving_up_the_originals() -> None:
    model = build("llama")
    handle = pk.patch(model, pk.LoRAConfig(quantize="int8", keep_original=False))
    with pytest.raises(RuntimeError, match="keep_original=False"):
        handle.unpatch()
    assert handle.report().adapted
    model(**batch("llama")).loss.backward()


def test_modes_changed_meanwhile_reach_the_originals() -> None:
    model = build("llama").train()
    handle = pk.patch(model, pk.LoRAConfig(quantize="nf4"))
    model.eval()
    handle.unpatch()
    assert not any(m.training for m in model.modules())


def test_partly_frozen_models_get_their_flags_back() -> None:
    model = build("bert")
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = snapshot(model)
    pk.patch(model, pk.LoRAConfig(task_type="SEQ_CLS", quantize="nf4"))
    assert_unchanged(pk.unpatch(model), before)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_shared_modules_get_one_adapter(quantize: str | None) -> None:
    net = Net()
    before = snapshot(net)
    handle = pk.patch(net, pk.LoRAConfig(target_modules=["first", "block.0"], quantize=quantize))
    assert isinstance(net.first, LoRALinear)
    assert net.first is net.block[1]
    row = next(r for r in handle.report().rows if r.name == "first")
    assert "block.1" in row.reason
    net(torch.arange(5)).sum().backward()
    assert_unchanged(pk.unpatch(net), before)


def test_tied_weights_stay_tied_and_are_not_quantized(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    before = snapshot(net)
    config = pk.LoRAConfig(target_modules=["out", "first"], quantize="nf4")
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        handle = pk.patch(net, config)
    assert "tied to embed" in caplog.text
    assert isinstance(net.out, LoRALinear)
    assert net.out.base_layer.weight is net.embed.weight
    (refused,) = handle.report().refused
    assert refused.name == "out"
    assert refused.format == "dense"
    assert_unchanged(pk.unpatch(net), before)
    with pytest.raises(ValueError, match=r"strict: 1 modules.*\n  out: not quantized: its weight"):
        pk.patch(net, config, strict=True)
    assert_unchanged(net, before)


def test_hooks_are_kept_or_the_layer_is_not_quantized() -> None:
    net = Net()
    calls: list[str] = []
    net.first.register_forward_hook(lambda m, a, o: calls.append("first"))
    before = snapshot(net)
    handle = pk.patch(net, pk.LoRAConfig(target_modules=["first", "block.0"], quantize="nf4"))
    row = next(r for r in handle.report().rows if r.name == "first")
    assert "forward hooks" in row.reason
    assert "not fused" in row.kernel
    assert row.format == "dense"
    net(torch.arange(3))
    assert calls == ["first", "first"]
    assert_unchanged(pk.unpatch(net), before)


def test_failure_half_way_leaves_no_trace() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"finite|NaN") as caught:
        pk.patch(model, pk.LoRAConfig(quantize="nf4", task_type="CAUSAL_LM"))
    assert any("layers.1.mlp.down_proj" in note for note in caught.value.__notes__)
    assert_unchanged(model, before)

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pk.patch(model, pk.LoRAConfig(), progress=interrupt)
    assert_unchanged(model, before)


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int, str]] = []
    pk.patch(build("bert"), pk.LoRAConfig(), progress=lambda *args: seen.append(args))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert seen[0][2].startswith("bert.encoder.layer.0")


def test_a_second_adapter_and_switching() -> None:
    model = build("llama").eval()
    before, inputs = snapshot(model), batch("llama")
    plain = model(**inputs).logits
    pk.patch(model, pk.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="one")
    randomize_adapters(model, 1)
    first = model(**inputs).logits
    handle = pk.patch(model, pk.LoRAConfig(r=2, target_modules=["v_proj", "up_proj"]), "two")
    randomize_adapters(model, 2)
    second = model(**inputs).logits
    assert not torch.equal(first, second)
    pk.set_adapter(model, "one")
    assert torch.equal(model(**inputs).logits, first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"one"}
    pk.set_adapter(model, ["one", "two"])
    both = model(**inputs).logits
    assert not torch.equal(both, first)
    pk.set_adapter(model, "two")
    assert torch.equal(model(**inputs).logits, second)
    with disable_adapter(model):
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, second)
    with pytest.raises(ValueError, match="no adapter 'three'; there are: one, two"):
        pk.set_adapter(model, "three")
    with pytest.raises(ValueError, match="exists already"):
        pk.patch(model, pk.LoRAConfig(), "two")
    assert handle.report("one").adapted[0].r == 4
    assert_unchanged(pk.unpatch(model), before)


def test_a_failing_second_adapter_leaves_the_first_as_it_was() -> None:
    model = build("llama").eval()
    pk.patch(model, pk.LoRAConfig(r=4, target_modules=["q_proj"]), "one")
    randomize_adapters(model)
    before, expected = snapshot(model), model(**batch("llama")).logits

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pk.patch(model, pk.LoRAConfig(), "two", progress=interrupt)
    assert_unchanged(model, before)
    assert torch.equal(model(**batch("llama")).logits, expected)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merging_a_model(kind: str, quantize: str | None) -> None:
    model = build(kind).eval()
    before, inputs = snapshot(model), batch(kind)
    pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=16, quantize=quantize))
    randomize_adapters(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = model(**inputs).logits
    errors = pk.merge(model)
    assert len(errors) == sum(isinstance(m, LoRALinear) for m in model.modules())
    if quantize is None:
        torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-4, atol=1e-5)
        assert max(errors.values()) < 1e-4
    else:
        assert all(0 < e < 2 for e in errors.values())
    with pytest.raises(RuntimeError, match="merged"):
        pk.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        pk.patch(model, pk.LoRAConfig(), "two")
    with disable_adapter(model):
        off = model(**inputs).logits
    pk.unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, adapted)
    with disable_adapter(model):
        assert torch.equal(model(**inputs).logits, off)
    pk.merge(model)
    assert_unchanged(pk.unpatch(model), before)


def test_a_merge_that_loses_too_much_changes_nothing() -> None:
    model = build("llama").eval()
    pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    randomize_adapters(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="max_error") as caught:
        pk.merge(model, max_error=1e-3)
    assert "while merging model.layers.0" in caught.value.__notes__[0]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_copies_of_a_patched_model_are_independent(quantize: str | None) -> None:
    model = build("bert").eval()
    before, inputs = snapshot(model), batch("bert")
    plain = model(**inputs).logits
    pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize, task_type="SEQ_CLS"))
    randomize_adapters(model)
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, expected)
        pk.unpatch(twin)
        assert not any(m._forward_hooks for m in twin.modules())
        assert torch.equal(twin(**inputs).logits, plain)
        assert list(twin.state_dict()) == list(before["state"])
        with torch.no_grad():
            twin.bert.pooler.dense.weight.zero_()
    assert torch.equal(model(**inputs).logits, expected)
    assert_unchanged(pk.unpatch(model), before)


def test_quantize_modules_beside_the_targets() -> None:
    model = build("llama")
    before = snapshot(model)
    config = pk.LoRAConfig(target_modules=["q_proj"], quantize="nf4", quantize_modules="all-linear")
    handle = pk.patch(model, config)
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, Linear4bit)
    assert isinstance(layer.self_attn.q_proj.base_layer, Linear4bit)
    assert type(model.lm_head) is nn.Linear
    row = next(r for r in handle.report().rows if r.name.endswith("0.mlp.up_proj"))
    assert row.now == "Linear4bit"
    assert row.kernel.startswith("linear_4bit: ")
    model(**batch("llama")).loss.backward()
    assert_unchanged(pk.unpatch(model), before)
    with pytest.raises(ValueError, match="quantize_modules: no module matches"):
        pk.patch(model, pk.LoRAConfig(quantize="nf4", quantize_modules=["nope"]))


def test_modules_the_model_keeps_wide_are_not_quantized() -> None:
    net = Net()
    net._keep_in_fp32_modules = ["first"]
    handle = pk.patch(net, pk.LoRAConfig(target_modules=["first", "block.0"], quantize="int8"))
    (row,) = handle.report().refused
    assert "_keep_in_fp32_modules" in row.reason


def test_multihead_attention_is_refused_with_the_reason() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 4)})
    handle = pk.patch(net, pk.LoRAConfig())
    rows = {r.name: r for r in handle.report().rows}
    assert "nn.MultiheadAttention reads this weight" in rows["attention.out_proj"].reason
    assert isinstance(net["out"], LoRALinear)


def test_report_tells_everything() -> None:
    model = build("bert")
    handle = pk.patch(model, pk.LoRAConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    report = handle.report()
    rows = {row.name: row for row in report.rows}
    linears = {n for n, m in build("bert").named_modules() if isinstance(m, nn.Linear)}
    assert set(rows) == linears
    query = rows["bert.encoder.layer.0.attention.self.query"]
    assert (query.was, query.now, query.r, query.done) == ("Linear", "LoRALinear", 8, True)
    assert query.kernel.startswith("lora_linear: ")
    assert rows["bert.encoder.layer.0.attention.self.key"].reason == "not among target_modules"
    assert rows["classifier"].now == "TrainableCopy"
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not report.refused
    text = str(report)
    assert "not among target_modules" in text
    assert f"trainable {report.trainable:,} of" in report.summary
    assert report.summary in text
    plain = report.to_dict()
    assert plain["trainable"] == report.trainable
    assert len(plain["rows"]) == len(report.rows)


def test_report_names_the_forced_backend() -> None:
    handle = pk.patch(build("llama"), pk.LoRAConfig(quantize="nf4"))
    with pk.use_backend("reference"):
        assert handle.report().rows[0].kernel == "lora_linear: reference"


def test_logical_parameters_are_counted_under_quantization() -> None:
    model = build("llama")
    total = sum(p.numel() for p in model.parameters())
    handle = pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    report = handle.report()
    assert report.total == total + report.trainable


def test_wrong_arguments_are_named() -> None:
    model = build("bert")
    with pytest.raises(TypeError, match=r"config: expected peftkern.LoRAConfig"):
        pk.patch(model, {"r": 4})
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        pk.patch("bert", pk.LoRAConfig())
    with pytest.raises(ValueError, match="no submodules"):
        pk.patch(nn.Linear(4, 4), pk.LoRAConfig())
    with pytest.raises(ValueError, match="adapter_name"):
        pk.patch(model, pk.LoRAConfig(), adapter_name="a.b")
    pk.patch(model.bert, pk.LoRAConfig())
    with pytest.raises(ValueError, match="part 'bert' is patched already"):
        pk.patch(model, pk.LoRAConfig())
    with pytest.raises(RuntimeError, match="its part 'bert' is: unpatch that"):
        pk.unpatch(model)
    pk.unpatch(model.bert)
    with pytest.raises(ValueError, match="no peftkern adapters"):
        pk.set_adapter(model, "default")


def test_meta_models_can_be_patched() -> None:
    with torch.device("meta"):
        model = build("llama")
    handle = pk.patch(model, pk.LoRAConfig(r=4, quantize="nf4"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    report = handle.report()
    assert report.trainable > 0
    assert report.bytes_after < report.bytes_before
    handle.unpatch()


def test_peft_layers_are_refused_with_the_reason() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"]))
    handle = pk.patch(wrapped, pk.LoRAConfig(target_modules=["query", "value"]))
    refused = handle.report().refused
    assert len(refused) == 2
    assert "peft.tuners.lora" in refused[0].reason


def test_bitsandbytes_models_are_taken_over() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"), nn.ReLU()
    ).to("cpu")
    original = net[0]
    handle = pk.patch(net, pk.LoRAConfig(r=4))
    assert isinstance(net[0].base_layer, Linear4bit)
    assert net[0].base_layer.weight.data_ptr() == original.weight.data_ptr()
    net(torch.randn(2, 64)).sum().backward()
    handle.unpatch()
    assert net[0] is original


def test_modules_to_save_train_and_the_original_survives() -> None:
    model = build("bert")
    original = model.classifier
    weight = original.weight.clone()
    pk.patch(model, pk.LoRAConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert isinstance(model.classifier, TrainableCopy)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch("bert")).loss.backward()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, weight)
    pk.unpatch(model)
    assert model.classifier is original
    assert torch.equal(original.weight, weight)
