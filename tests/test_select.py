"""Importance scores, exact selection, what selections feed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hf_models import assert_unchanged, batch, build, snapshot
from torch import Tensor, nn

import peftkern as pk
from peftkern.select import Scores, Selection, subset, weights
from peftkern.testing import assert_same_bits

SCORES = ["magnitude", "gradient", "taylor", "fisher", "activation"]


def _mlp(quantize: str | None = None) -> nn.Module:
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 6))
    if quantize == "int8":
        net[0] = pk.nn.Linear8bit.from_linear(net[0])
    elif quantize is not None:
        net[0] = pk.nn.Linear4bit.from_linear(net[0], quantize, 32, double_quant=True)
    return net


def _dense(net: nn.Module) -> nn.Module:
    """The same function on plain trainable layers."""
    out = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 6))
    for mine, theirs in zip(out, net, strict=True):
        if isinstance(mine, nn.Linear):
            w = theirs.weight if type(theirs) is nn.Linear else theirs.dequantize(torch.float32)
            mine.weight.data = w.detach().clone()
            mine.bias.data = theirs.bias.detach().clone()
    return out


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _data(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(9, 24), torch.randint(6, (9,))) for _ in range(count)]


def _expected(net: nn.Module, data: list[Any], score: str) -> dict[str, Tensor]:
    """By plain autograd, on the whole gradient."""
    total: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for item in data:
        net.zero_grad()
        _loss(net, item).backward()
        x = item[0]
        for name in ("0", "2"):
            layer = net[int(name)]
            inputs[name] = inputs.get(name, 0) + x.square().sum(0)
            x = torch.tanh(layer(x)).detach()
            w, g = layer.weight.detach(), layer.weight.grad
            part = {
                "magnitude": w.abs() / len(data),
                "gradient": g.abs() / len(data),
                "taylor": (w * g).abs() / len(data),
                "fisher": g.square() / len(data),
                "activation": torch.zeros_like(w),
            }[score]
            total[name] = total.get(name, 0) + part
    if score == "activation":
        return {n: net[int(n)].weight.detach().abs() * inputs[n].sqrt() for n in ("0", "2")}
    return total


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_scores_against_autograd(score: str, quantize: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "BLOCK", 100)  # several blocks of rows a layer
    net, data = _mlp(quantize), _data()
    want = _expected(_dense(net), data, score)
    before = snapshot(net)
    for granularity in ("entry", "row", "module"):
        got = pk.importance(net, data, score, granularity, _loss)
        assert got.batches == (0 if score == "magnitude" else 3)
        for name, value in want.items():
            dims = {"entry": (), "row": (1,), "module": (0, 1)}[granularity]
            expected = value.sum(dims) if dims else value
            torch.testing.assert_close(got.values[name], expected, rtol=1e-4, atol=1e-6)
    assert_unchanged(net, before)
    assert all(p.grad is None for p in net.parameters())


def test_a_layer_that_runs_twice_has_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    net, x = Twice(), torch.randn(5, 8)
    net(x).square().sum().backward()
    want = (net.layer.weight * net.layer.weight.grad).abs().detach()
    got = pk.importance(net, [x], "taylor", loss_fn=lambda m, b: m(b).square().sum())
    torch.testing.assert_close(got.values["layer"], want, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_hugging_face_models_and_gradient_checkpointing(kind: str) -> None:
    model = build(kind)
    data = [batch(kind, seed) for seed in range(2)]
    plain = pk.importance(model, data, "taylor")
    model.gradient_checkpointing_enable()
    model.train()
    flags = {n: getattr(m, "gradient_checkpointing", None) for n, m in model.named_modules()}
    seen: list[tuple[int, int | None]] = []
    again = pk.importance(model, data, "taylor", progress=lambda d, t, _: seen.append((d, t)))
    assert seen == [(1, 2), (2, 2)]
    assert flags == {
        n: getattr(m, "gradient_checkpointing", None) for n, m in model.named_modules()
    }
    for name, value in plain.values.items():
        torch.testing.assert_close(again.values[name], value)
    name = next(iter(plain.values))
    model.gradient_checkpointing_disable()
    model.zero_grad()
    total = 0
    for item in data:
        model.zero_grad()
        model(**item).loss.backward()
        layer = model.get_submodule(name)
        total = total + (layer.weight * layer.weight.grad).abs().detach() / 2
    if kind == "gpt2":  # Conv1D stores [in, out]
        total = total.t()
    torch.testing.assert_close(plain.values[name], total, rtol=1e-3, atol=1e-7)


def test_scores_of_a_patched_quantized_model() -> None:
    model = build("llama")
    pk.patch(model, pk.LoRAConfig(r=2, quantize="nf4", target_modules=["q_proj", "down_proj"]))
    scores = pk.importance(model, [batch("llama")], "fisher", "module")
    assert all(float(v) > 0 for v in scores.values.values())
    assert any(name.endswith("q_proj") for name in scores.values)


def test_bf16_scores_and_a_batch_limit() -> None:
    net, data = _mlp(), _data(5)
    wide = pk.importance(net, iter(data), "gradient", loss_fn=_loss, batches=2)
    narrow = pk.importance(net, data[:2], "gradient", loss_fn=_loss, dtype=torch.bfloat16)
    assert wide.batches == 2
    assert narrow.values["0"].dtype == torch.bfloat16
    torch.testing.assert_close(narrow.values["0"].float(), wide.values["0"], rtol=2e-2, atol=1e-6)


def test_scores_save_and_load(tmp_path: Any) -> None:
    scores = pk.importance(_mlp(), _data(), "taylor", loss_fn=_loss)
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert list(again.values) == list(scores.values)
    for name, value in scores.values.items():
        assert_same_bits(again.values[name], value)
    assert (again.score, again.granularity, again.batches) == ("taylor", "entry", 3)
    assert again.shapes == scores.shapes
    assert "taylor by entry over 3 batches" in str(again)
    json.dumps(again.to_dict())


def _scores(*tensors: Tensor, granularity: str = "entry") -> Scores:
    values = {f"layers.{i}": t for i, t in enumerate(tensors)}
    shapes = {name: (t.shape[0], t.shape[1]) for name, t in values.items()}
    return Scores(values, shapes, "taylor", granularity, 1)


def _brute(scores: Scores, k: int) -> dict[str, list[int]]:
    rows = [
        (-float(v), i, j)
        for i, tensor in enumerate(scores.values.values())
        for j, v in enumerate(tensor.flatten())
    ]
    chosen = sorted(rows)[:k]
    return {name: sorted(j for _, i, j in chosen if i == n) for n, name in enumerate(scores.values)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_is_exact(dtype: torch.dtype, ties: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(subset, "_CHUNK", 37)
    a, b, c = torch.rand(11, 13), torch.rand(7, 5) * 3, torch.randn(1, 40)
    if ties:
        a, b, c = (t.mul(4).round().div(4) for t in (a, b, c))
    scores = _scores(*(t.to(dtype) for t in (a, b, c, torch.zeros(0, 4))))
    total = sum(t.numel() for t in scores.values.values())
    for k in (1, 2, 17, 100, total - 1, total):
        got = pk.top_k(scores, k=k)
        assert {n: t.tolist() for n, t in got.indices.items()} == _brute(scores, k), k
        assert got.count == k
    by_layer = pk.top_k(scores, density=0.2, scope="layer")
    for name, tensor in scores.values.items():
        want = max(1, round(0.2 * tensor.numel())) if tensor.numel() else 0
        assert by_layer.indices[name].numel() == want


def test_threshold_and_non_finite_scores() -> None:
    scores = _scores(torch.tensor([[0.5, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, float("inf")]]))
    chosen = pk.threshold(scores, 1.0)
    assert {n: t.tolist() for n, t in chosen.indices.items()} == {
        "layers.0": [1, 2],
        "layers.1": [0, 1],
    }
    assert pk.top_k(scores, k=1).indices["layers.1"].tolist() == [1]
    with pytest.raises(ValueError, match="largest score is"):
        pk.threshold(_scores(torch.zeros(2, 2)), 1.0)
    with pytest.raises(ValueError, match=r"layers\.0 holds NaN"):
        pk.top_k(_scores(torch.full((1, 2), float("nan"))), k=1)


def test_rows_and_modules_expand_to_entries() -> None:
    rows = _scores(torch.zeros(3, 2), granularity="row")
    rows.values["layers.0"] = torch.tensor([1.0, 5.0, 2.0])
    chosen = pk.top_k(rows, k=2)
    assert chosen.entries("layers.0").tolist() == [2, 3, 4, 5]
    assert chosen.count == 4
    modules = _scores(torch.zeros(3, 2), torch.zeros(2, 2), granularity="module")
    modules.values.update({"layers.0": torch.tensor(1.0), "layers.1": torch.tensor(2.0)})
    chosen = pk.top_k(modules, k=1)
    assert chosen.entries("layers.1").tolist() == [0, 1, 2, 3]
    assert chosen.entries("layers.0").numel() == 0
    assert "4 entries" in str(chosen)
    json.dumps(chosen.to_dict())


def test_selections_feed_lora() -> None:
    model = build("llama")
    scores = pk.importance(model, [batch("llama")], "taylor", "module")
    chosen = pk.top_k(scores, k=5)
    names = chosen.target_modules(3)
    assert len(names) == 3
    totals = scores.module_totals()
    assert names == sorted(totals, key=lambda n: -totals[n])[:3]
    pattern = chosen.rank_pattern(20, minimum=2)
    assert sum(pattern.values()) == 20
    assert min(pattern.values()) >= 2
    targets = chosen.target_modules(5)
    handle = pk.patch(model, pk.LoRAConfig(target_modules=targets, rank_pattern=pattern))
    assert sum(row.r for row in handle.report().adapted) == 20
    with pytest.raises(ValueError, match="budget: got 4"):
        chosen.rank_pattern(4)


def test_errors_say_what_to_do() -> None:
    net, data = _mlp(), _data(1)
    cases = [
        (ValueError, "score: got 'x'", lambda: pk.importance(net, data, "x")),
        (ValueError, "granularity: got", lambda: pk.importance(net, data, granularity="y")),
        (ValueError, "loader: got None", lambda: pk.importance(net)),
        (ValueError, "loader: gave no batch", lambda: pk.importance(net, [], loss_fn=_loss)),
        (TypeError, "loss_fn: the model returned Tensor", lambda: pk.importance(net, [data[0][0]])),
        (ValueError, "near names", lambda: pk.importance(net, data, target_modules=["nope"])),
        (TypeError, "1 is Tanh", lambda: pk.importance(net, data, target_modules=["1"])),
        (
            ValueError,
            "no gradient reached 1 layers",
            lambda: pk.importance(net, data, loss_fn=lambda m, b: m[0](b[0]).sum()),
        ),
        (ValueError, "density and k", lambda: pk.top_k(_scores(torch.ones(1, 1)))),
        (ValueError, "density: got 2", lambda: pk.top_k(_scores(torch.ones(1, 1)), 2.0)),
        (ValueError, "k: got 5", lambda: pk.top_k(_scores(torch.ones(1, 1)), k=5)),
        (ValueError, "scope: got", lambda: pk.top_k(_scores(torch.ones(1, 1)), k=1, scope="z")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert isinstance(pk.top_k(_scores(torch.ones(1, 1)), k=1), Selection)
    assert all(p.requires_grad for p in net.parameters())
