"""Sparse deltas on models: patch, train, merge, files, refinement, compact checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hf_models import assert_unchanged, batch, build, randomize_adapters, snapshot
from torch import Tensor, nn

import peftkern as pk
from peftkern.checkpoint import storage
from peftkern.nn import SparseDeltaLinear
from peftkern.nn.sparse_delta import SparseEntries
from peftkern.testing import assert_same_bits

KINDS = ["llama", "gpt2", "bert"]
TRAIN_WARNINGS = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def _layers(model: nn.Module) -> dict[str, SparseDeltaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseDeltaLinear)}


def _dense_twin(model: nn.Module, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A plain model whose weights hold the sparse values, all of them trainable."""
    twin = build(kind)
    weights = {}
    for name, layer in _layers(model).items():
        weight = twin.get_submodule(name).weight
        delta = layer.delta_weight("default")
        base = layer.base_layer
        wide = base.dequantize(torch.float32) if hasattr(base, "dequantize") else None
        with torch.no_grad():
            if wide is None:
                weight.add_(delta.t() if layer.fan_in_fan_out else delta)
            else:
                full = wide + delta
                weight.copy_(full.t() if kind == "gpt2" else full)
        weights[name] = weight
    return twin, weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_loss_and_gradients_equal_the_dense_model(kind: str, quantize: str | None) -> None:
    model = build(kind)
    before = snapshot(model)
    config = pk.SparseDeltaConfig(density=0.03, quantize=quantize)
    handle = pk.patch(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dim() == 1 for p in trainable)
    randomize_adapters(model)
    twin, weights = _dense_twin(model, kind)
    data = batch(kind)
    loss = model(**data).loss
    want = twin(**data).loss
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    loss.backward()
    want.backward()
    for name, layer in _layers(model).items():
        entries = layer.held("default")
        dense = weights[name].grad
        dense = dense.t() if kind == "gpt2" else dense
        picked = dense.reshape(-1)[entries.indices]
        assert entries.values.grad is not None
        torch.testing.assert_close(entries.values.grad, picked, rtol=1e-3, atol=1e-6)
    if quantize is None:
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    handle.unpatch()
    assert_unchanged(model, before)


@TRAIN_WARNINGS
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_with_checkpointing_and_autocast(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = build("llama").train()
        pk.patch(model, pk.SparseDeltaConfig(density=0.02, quantize="nf4"))
        randomize_adapters(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch("llama")).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 for g in grads)
        results.append(grads)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_selection_decides_where(tmp_path: Path) -> None:
    model = build("bert")
    scores = pk.importance(model, [batch("bert")], "taylor")
    chosen = pk.top_k(scores, density=0.01)
    handle = pk.patch(model, pk.SparseDeltaConfig(selection=chosen))
    layers = _layers(model)
    touched = [name for name in chosen.indices if chosen.entries(name).numel()]
    assert set(layers) == set(touched)
    for name, layer in layers.items():
        assert torch.equal(layer.held("default").indices, chosen.entries(name))
    assert sum(row.r for row in handle.report().adapted) == chosen.count
    assert handle.report().trainable == chosen.count
    assert "sparse_delta_linear" in str(handle.report())
    json.dumps(handle.adapters["default"].config.to_dict())
    handle.unpatch()
    with pytest.raises(ValueError, match="was scored with shape"):
        pk.patch(build("bert", hidden_size=32), pk.SparseDeltaConfig(selection=chosen))
    with pytest.raises(ValueError, match="the model has no module"):
        pk.patch(build("llama"), pk.SparseDeltaConfig(selection=chosen))


def test_patterns() -> None:
    net = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30))
    for pattern in ("random", "magnitude", "first"):
        config = pk.SparseDeltaConfig(density=0.1, pattern=pattern, seed=3)
        first, second = copy.deepcopy(net), copy.deepcopy(net)
        pk.patch(first, config)
        pk.patch(second, config)
        for name, layer in _layers(first).items():
            at = layer.held("default").indices
            assert at.numel() == round(0.1 * net[int(name)].weight.numel())
            assert torch.equal(at, _layers(second)[name].held("default").indices)
            if pattern == "magnitude":
                weight = net[int(name)].weight.detach().abs().flatten()
                assert float(weight[at].min()) >= float(weight.index_fill(0, at, 0.0).max())
    dense = copy.deepcopy(net)
    pk.patch(dense, pk.SparseDeltaConfig(density=1.0))
    assert torch.equal(_layers(dense)["0"].held("default").indices, torch.arange(2000))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_is_exact_both_ways(quantize: str | None) -> None:
    model = build("gpt2")
    pk.patch(model, pk.SparseDeltaConfig(density=0.02, quantize=quantize))
    randomize_adapters(model)
    data = batch("gpt2")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    before = model(**data).logits
    errors = pk.merge(model)
    assert len(errors) == len(_layers(model))
    if quantize is None:
        assert max(errors.values()) < 1e-5
        torch.testing.assert_close(model(**data).logits, before, rtol=1e-4, atol=1e-5)
    pk.unmerge(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, state[name], name)
    assert_same_bits(model(**data).logits, before)


def test_several_adapters_add_up() -> None:
    layer = SparseDeltaLinear(nn.Linear(16, 8), torch.tensor([1, 20, 100]), "one")
    layer.add_adapter(torch.tensor([0, 20, 127]), "two")
    for name in ("one", "two"):
        layer.held(name).values.data.normal_()
    layer.set_adapter(["one", "two"])
    x = torch.randn(5, 16)
    w = layer.base_layer.weight + layer.delta_weight("one") + layer.delta_weight("two")
    want = nn.functional.linear(x, w, layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    assert all(layer.held(n).values.grad is not None for n in ("one", "two"))
    layer.enable_adapters(False)
    assert_same_bits(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter(torch.tensor([1]), "one")
    for bad in ([5, 2], [2, 2], [-1], [128]):
        with pytest.raises(ValueError, match="indices: "):
            SparseDeltaLinear(nn.Linear(16, 8), torch.tensor(bad))


def test_rows_take_their_own_adapter() -> None:
    model = build("bert").eval()
    for seed, name in enumerate(("one", "two")):
        pk.patch(model, pk.SparseDeltaConfig(density=0.05, seed=seed), name)
        randomize_adapters(model, seed)
    data = batch("bert", rows=3)
    data.pop("labels")
    apart = []
    for i, name in enumerate(("two", None, "one")):
        pk.set_adapter(model, name or "one")
        row = {key: value[i : i + 1] for key, value in data.items()}
        if name is None:
            with pk.disable_adapter(model):
                apart.append(model(**row).logits)
        else:
            apart.append(model(**row).logits)
    together = model(**data, adapter_names=["two", "__base__", "one"]).logits
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_compiled_layer_equals_the_plain_one() -> None:
    layer = SparseDeltaLinear(nn.Linear(32, 16), torch.arange(0, 512, 7))
    layer.held("default").values.data.normal_()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32)
    assert_same_bits(compiled(x), layer(x))
    values = layer.held("default").values
    (got,) = torch.autograd.grad(compiled(x).sin().sum(), values)
    (want,) = torch.autograd.grad(layer(x).sin().sum(), values)
    assert_same_bits(got, want)


def test_hooks_on_the_base_layer_still_run() -> None:
    base = nn.Linear(16, 8)
    layer = SparseDeltaLinear(base, torch.tensor([1, 20, 100]))
    layer.held("default").values.data.normal_()
    x = torch.randn(5, 16)
    fused = layer(x)
    (want,) = torch.autograd.grad(fused.sin().sum(), layer.held("default").values)
    calls: list[int] = []
    base.register_forward_hook(lambda *_: calls.append(1))
    y = layer(x)
    torch.testing.assert_close(y, fused)
    (got,) = torch.autograd.grad(y.sin().sum(), layer.held("default").values)
    torch.testing.assert_close(got, want)
    assert calls
    assert str(layer.example_call("default")).startswith("not fused")


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    pk.patch(model, pk.SparseDeltaConfig(density=0.02, seed=5))
    randomize_adapters(model)
    want = model(**batch(kind)).logits
    pk.save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "PEFTKERN_SPARSE_DELTA"
    k = sum(fields["entries"].values())
    # 4 bytes a value and at most 2 a position, beside the header.
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 6 * k + 20_000
    fresh = build(kind)
    before = snapshot(fresh)
    handle = pk.load_adapter(fresh, tmp_path)
    assert_same_bits(fresh(**batch(kind)).logits, want)
    pk.load_adapter(fresh, tmp_path)  # into the existing one
    assert_same_bits(fresh(**batch(kind)).logits, want)
    handle.unpatch()
    assert_unchanged(fresh, before)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = build("bert")
    pk.patch(model, pk.SparseDeltaConfig(density=0.02))
    pk.save_adapter(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    good = weights.read_bytes()
    with storage.StoredTensors(weights) as file:
        tensors = {key: file.get(key) for key in file.shapes()}
    key = next(k for k in tensors if k.endswith("indices"))
    fresh = build("bert")
    before = snapshot(fresh)
    for spoil in (
        lambda at: at + 10**6,  # beyond the weight
        lambda at: at.flip(0),  # not ascending
    ):
        bad = tensors | {key: spoil(tensors[key])}
        pk.checkpoint.files.write_safetensors(weights, bad)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="indices"):
            pk.load_adapter(fresh, tmp_path)
        assert_unchanged(fresh, before)
    weights.write_bytes(good[:-40])
    with pytest.raises(ValueError, match="safetensors"):
        pk.load_adapter(fresh, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields["entries"] = dict.fromkeys(fields["entries"], 3)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    weights.write_bytes(good)
    with pytest.raises(ValueError, match="shapes differ"):
        pk.load_adapter(fresh, tmp_path)
    assert_unchanged(fresh, before)


@pytest.mark.parametrize("compact", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "sparse", "prompt"])
def test_compact_checkpoints(compact: str, method: str, tmp_path: Path) -> None:
    model = build("bert")
    if method == "lora":
        pk.patch(model, pk.LoRAConfig(r=8, modules_to_save=["classifier"]))
    elif method == "prompt":
        pk.patch(model, pk.PromptTuningConfig(num_virtual_tokens=10))
    else:
        pk.patch(model, pk.SparseDeltaConfig(density=0.1))
    randomize_adapters(model)
    report = pk.save_adapter(model, tmp_path, compact=compact)["default"]
    limit = {"nf4": 0.13, "int8": 0.012}[compact]
    assert 0 < report.max_error < limit
    share = {"nf4": 0.25, "int8": 0.4}[compact]
    assert report.bytes_after < share * report.bytes_before + 4000
    json.dumps(report.to_dict())
    assert compact in str(report)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peftkern_storage"] == compact
    assert fields["peft_type"].startswith("PEFTKERN_COMPACT_")
    fresh = build("bert")
    pk.load_adapter(fresh, tmp_path)
    ours, theirs = dict(model.named_parameters()), dict(fresh.named_parameters())
    worst = 0.0
    for name, parameter in ours.items():
        if not parameter.requires_grad:
            continue
        got, want = theirs[name].detach(), parameter.detach()
        error = float((got - want).norm() / want.norm())
        worst = max(worst, error)
        if parameter.numel() < storage.SMALL or (method == "lora" and parameter.dim() < 2):
            assert_same_bits(got, want, name)
    assert worst == pytest.approx(report.max_error, rel=1e-4)
    # What was loaded is stored again without a further loss.
    again = pk.save_adapter(fresh, tmp_path / "again", compact=compact)["default"]
    assert again.max_error < 1e-3


def test_compact_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    model = build("bert")
    pk.patch(model, pk.LoRAConfig(r=8))
    with pytest.raises(ValueError, match="compact: got 'fp4'"):
        pk.save_adapter(model, tmp_path, compact="fp4")
    first = next(p for p in model.parameters() if p.requires_grad and p.numel() >= 256)
    first.data.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pk.save_adapter(model, tmp_path, compact="nf4")


def test_a_compact_file_is_refused_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build("bert")
    pk.patch(model, pk.LoRAConfig(r=8))
    pk.save_adapter(model, tmp_path, compact="nf4")
    with pytest.raises(Exception, match=r"(?i)COMPACT"):
        peft.PeftModel.from_pretrained(build("bert"), str(tmp_path))


def test_refine_moves_entries_and_keeps_their_state() -> None:
    model = build("llama")
    handle = pk.patch(
        model, pk.SparseDeltaConfig(density=0.02, target_modules=["q_proj", "up_proj"])
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (
        torch.optim.AdamW(parameters, lr=1e-2),
        pk.optim.AdamW(parameters, lr=1e-2),
    ):
        for seed in range(3):
            model(**batch("llama", seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        before = {}
        for name, layer in _layers(model).items():
            held = layer.held("default")
            state = [
                v.clone()
                for v in optimizer.state[held.values].values()
                if isinstance(v, Tensor) and v.shape == held.values.shape
            ]
            assert len(state) == 2
            before[name] = (held.indices.clone(), held.values.detach().clone(), state)
        twin = copy.deepcopy(model)
        report = handle.refine([batch("llama", 9)], fraction=0.25, optimizer=optimizer)
        assert [p for p in model.parameters() if p.requires_grad] == parameters
        gradients = {}
        for name in _layers(twin):
            module = twin.get_submodule(name)
            full = nn.Linear(module.in_features, module.out_features, bias=False)
            full.weight.data = module.base_layer.weight + module.delta_weight("default")
            parent, last = name.rsplit(".", 1)
            setattr(twin.get_submodule(parent), last, full)
            gradients[name] = full.weight
        twin(**batch("llama", 9)).loss.backward()
        for name, layer in _layers(model).items():
            held = layer.held("default")
            old, values, state = before[name]
            k = old.numel()
            count = round(0.25 * k)
            assert report.moved[name] == count
            kept = set(old[values.abs().argsort(descending=True)[: k - count]].tolist())
            now = set(held.indices.tolist())
            assert kept <= now
            assert held.indices.diff().min() > 0
            grown = now - set(old.tolist())
            assert len(grown) == count
            score = gradients[name].grad.abs().flatten()
            outside = torch.ones_like(score, dtype=torch.bool).index_fill(0, old, False)
            best = score[outside].topk(count).values.min()
            assert min(float(score[i]) for i in grown) >= float(best) * 0.999
            place = {int(i): j for j, i in enumerate(old)}
            new = [
                v
                for v in optimizer.state[held.values].values()
                if isinstance(v, Tensor) and v.shape == held.values.shape
            ]
            for j, i in enumerate(held.indices.tolist()):
                if i in kept:
                    assert held.values[j] == values[place[i]]
                    assert all(n[j] == o[place[i]] for n, o in zip(new, state, strict=True))
                else:
                    assert held.values[j] == 0
                    assert all(n[j] == 0 for n in new)
        model(**batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_refine_refuses_states_that_cannot_follow() -> None:
    net = nn.Sequential(nn.Linear(256, 256))
    handle = pk.patch(net, pk.SparseDeltaConfig(density=0.2))
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = pk.optim.AdamW8bit(parameters, lr=1e-3)
    net(torch.randn(4, 256)).sum().backward()
    optimizer.step()
    data = [torch.randn(4, 256)]
    where = parameters[0].detach().clone()
    with pytest.raises(ValueError, match="optimizer: its state"):
        handle.refine(data, optimizer=optimizer, loss_fn=lambda m, b: m(b).sum())
    assert_same_bits(parameters[0].detach(), where)
    with pytest.raises(ValueError, match="fraction: got 2"):
        handle.refine(data, fraction=2.0)
    with pytest.raises(ValueError, match="adapter_name: no layer"):
        pk.refine(net, data, adapter_name="other")
    assert isinstance(net[0].held("default"), SparseEntries)


def _task(seed: int) -> tuple[nn.Module, nn.Module]:
    """A base network, and a teacher that differs from it in few entries of one layer."""
    torch.manual_seed(seed)
    base = nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
    )
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        weight = teacher[2].weight
        at = torch.randperm(weight.numel())[:40]
        weight.view(-1)[at] += torch.randn(40) * 1.5
    return base, teacher


@pytest.mark.parametrize("seed", [0, 1])
def test_taylor_selection_trains_better_than_a_random_one(seed: int) -> None:
    base, teacher = _task(seed)
    data = [torch.randn(64, 32) for _ in range(8)]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(x), teacher(x).detach())

    scores = pk.importance(base, data, "taylor", loss_fn=loss_fn)
    chosen = pk.top_k(scores, k=120)
    losses = {}
    for label in ("taylor", "random"):
        model = copy.deepcopy(base)
        config = pk.SparseDeltaConfig(selection=chosen)
        if label == "random":
            total = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
            config = pk.SparseDeltaConfig(density=120 / total, seed=seed)
        pk.patch(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert abs(sum(p.numel() for p in parameters) - 120) <= 2
        optimizer = torch.optim.Adam(parameters, lr=3e-2)
        for step in range(120):
            optimizer.zero_grad()
            loss_fn(model, data[step % 8]).backward()
            optimizer.step()
        with torch.no_grad():
            losses[label] = sum(float(loss_fn(model, x)) for x in data)
    with torch.no_grad():
        start = sum(float(loss_fn(base, x)) for x in data)
    assert losses["taylor"] < 0.7 * losses["random"] < 0.7 * start
