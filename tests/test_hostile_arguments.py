"""Every public function against wrong arguments: a TypeError or ValueError that names the argument.

A table of valid calls. Each argument of each is replaced, one at a time, by everything that it must
not be; what is legitimate all the same is listed with the call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
import peftkern.nn
import peftkern.optim
from peftkern.select import Scores

F = pk.functional
N, K, R, M = 16, 64, 4, 5  # out, in, rank, rows
Arguments = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Call:
    """A function, how to make each of its arguments, and what may take an argument's place.

    Args:
        function: what is called, by keywords.
        arguments: name -> a function that makes a valid value.
        fine: name -> labels of replacements that are valid as well, besides those that keep every
            rule (see ``_replacements``).
    """

    function: Callable[..., Any]
    arguments: Arguments
    fine: dict[str, set[str]] = field(default_factory=dict)


def _rand(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _plain(value: Any) -> Callable[[], Any]:
    return lambda: value


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def _patched() -> nn.Module:
    net = _net()
    pk.patch(net, pk.LoRAConfig(r=2))
    return net


def _linear() -> nn.Module:
    return nn.Linear(8, 6)


def _scores() -> Scores:
    return pk.importance(_net(), score="magnitude")


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4))]


def _projection(n: int, k: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(n, k), torch.randn(R, k), torch.randn(n, R), 1.0)


def _seed() -> Tensor:
    return torch.tensor([3])


LEADING = {"extra dimensions", "more rows"}  # activations may have any leading dimensions
ANY_FLOAT = {*LEADING, "half"}
OPTIONAL = {"None"}
X: Arguments = {"x": _rand(M, K)}
BASE: Arguments = {"base": _rand(N, K)}
LORA: Arguments = {"lora_A": _rand(R, K), "lora_B": _rand(N, R)}
SCALING: Arguments = {"scaling": _plain(1.0)}
BIAS: Arguments = {"bias": _rand(N)}
DROPOUT: Arguments = {"dropout_p": _plain(0.25), "seed": _seed}
COMMON = {
    "x": LEADING,
    "bias": OPTIONAL,
    "seed": OPTIONAL,
    "scaling": {"negative"},
}


def _optimizer(function: Callable[..., Any], **more: Any) -> Call:
    numbers = {name: _plain(value) for name, value in {"lr": 1e-3, **more}.items()}
    return Call(function, {"params": _parameters, **numbers})


CALLS: dict[str, Call] = {
    "linear_4bit": Call(
        F.linear_4bit, {**X, "q": lambda: pk.quantize_4bit(torch.randn(N, K))}, {"x": ANY_FLOAT}
    ),
    "linear_8bit": Call(
        F.linear_8bit, {**X, "q": lambda: pk.quantize_8bit(torch.randn(N, K))}, {"x": ANY_FLOAT}
    ),
    "lora_linear": Call(
        F.lora_linear, {**X, **BASE, **LORA, **SCALING, **BIAS, **DROPOUT}, COMMON
    ),
    "dora_linear": Call(
        F.dora_linear,
        {
            **{**X, **BASE, **LORA, "magnitude": _rand(N), **SCALING, **BIAS, **DROPOUT},
            "weight_norm": lambda: torch.rand(N) + 1.0,
        },
        COMMON | {"weight_norm": {"None", "half"}, "magnitude": {"half"}},
    ),
    "dora_weight_norm": Call(
        F.dora_weight_norm,
        {**BASE, **LORA, **SCALING, "base_norm_sq": lambda: torch.rand(N).double()},
        COMMON | {"base_norm_sq": OPTIONAL, "base": {"half"}},
    ),
    "weight_norm_sq": Call(
        F.weight_norm_sq, BASE, {"base": {"meta", "wider", "more rows", "half"}}
    ),
    "lora_linear_group": Call(
        F.lora_linear_group, {**X, "projections": lambda: [_projection(N, K)()]}, COMMON
    ),
    "lora_mlp": Call(
        F.lora_mlp,
        {
            **X,
            "gate": _projection(N, K),
            "up": _projection(N, K),
            "down": _projection(K, N),
            "activation": _plain("silu"),
        },
        COMMON,
    ),
    "multi_lora_linear": Call(
        F.multi_lora_linear,
        {
            **{**X, **BASE, **BIAS, **DROPOUT},
            "adapters": lambda: [(torch.randn(R, K), torch.randn(N, R), 1.0)],
            "adapter_ids": lambda: torch.tensor([0, -1, 0, 0, 0]),
        },
        # One id for each row, however many dimensions they are laid out in.
        {"x": {"extra dimensions"}, "bias": OPTIONAL, "seed": OPTIONAL},
    ),
    "bottleneck_adapter": Call(
        F.bottleneck_adapter,
        {
            **X,
            **{"down_w": _rand(R, K), "down_b": _rand(R), "up_w": _rand(K, R), "up_b": _rand(K)},
            **{"activation": _plain("relu"), **SCALING, "residual": _rand(M, K), **DROPOUT},
        },
        {name: OPTIONAL for name in ("down_b", "up_b", "residual", "seed")}
        | {"scaling": {"negative"}},
    ),
    "gated_activation": Call(
        F.gated_activation, {"gate": _rand(M, K), "up": _rand(M, K), "activation": _plain("silu")}
    ),
    "sparse_delta_linear": Call(
        F.sparse_delta_linear,
        {**X, **BASE, "indices": lambda: torch.tensor([1, 5, 70]), "values": _rand(3), **BIAS},
        COMMON,
    ),
    "prefix_attention": Call(
        F.prefix_attention,
        {
            **{"q": _rand(2, 4, 5, 8), "k": _rand(2, 4, 6, 8), "v": _rand(2, 4, 6, 8)},
            **{"prefix_k": _rand(4, 3, 8), "prefix_v": _rand(4, 3, 8)},
            "attn_mask": lambda: torch.zeros(2, 1, 5, 6),
            "is_causal": _plain(False),
            "scale": _plain(0.5),
            **DROPOUT,
        },
        # Masks of one number and of other float dtypes broadcast and are cast.
        {
            "attn_mask": {"None", "no dimension", "half"},
            "scale": {"None", "negative"},
            "seed": OPTIONAL,
        },
    ),
    "soft_prompt": Call(
        F.soft_prompt,
        {"input_embeds": _rand(2, 5, 8), "prompt": _rand(3, 8)},
        {"input_embeds": {"more rows", "half"}, "prompt": {"more rows", "half"}},
    ),
    "prompt_embedding": Call(
        F.prompt_embedding,
        {"ids": lambda: torch.tensor([[1, 2]]), "table": _rand(10, 8), "prompt": _rand(3, 8)},
        {
            "ids": {"wider", "more rows"},
            "table": {"more rows", "half"},
            "prompt": {"more rows", "half"},
        },
    ),
    "dropout": Call(
        F.dropout,
        {**X, "p": _plain(0.5), "seed": _seed},
        {"x": {*LEADING, "meta", "no dimension", "wider", "half"}, "seed": OPTIONAL},
    ),
    "quantize_4bit": Call(
        pk.quantize_4bit,
        {"w": _rand(N, K), "quant_type": _plain("nf4"), "blocksize": _plain(64)},
        {"w": {*LEADING, "meta", "no dimension", "wider", "half"}},
    ),
    "quantize_8bit": Call(
        pk.quantize_8bit, {"w": _rand(N, K)}, {"w": {"meta", "wider", "more rows", "half"}}
    ),
    "LoRALinear": Call(
        pk.nn.LoRALinear,
        {
            **{"base_layer": _linear, "r": _plain(4), "lora_alpha": _plain(8.0)},
            **{"lora_dropout": _plain(0.1), "adapter_name": _plain("default")},
            "init_lora_weights": _plain("gaussian"),
        },
        {"base_layer": {"module"}, "lora_alpha": {"negative"}, "adapter_name": {"word"}},
    ),
    "DoRALinear": Call(
        pk.nn.DoRALinear,
        {"base_layer": _linear, "r": _plain(4), "lora_alpha": _plain(8.0)},
        {"base_layer": {"module"}, "lora_alpha": {"negative"}},
    ),
    "LoRAEmbedding": Call(
        pk.nn.LoRAEmbedding,
        {"base_layer": lambda: nn.Embedding(9, 8), "r": _plain(4), "lora_alpha": _plain(8.0)},
        {"lora_alpha": {"negative"}},
    ),
    "IA3Linear": Call(
        pk.nn.IA3Linear,
        {"base_layer": _linear, "adapter_name": _plain("default")},
        {"base_layer": {"module"}, "adapter_name": {"word"}},
    ),
    "Linear4bit": Call(
        pk.nn.Linear4bit,
        {
            **{"in_features": _plain(64), "out_features": _plain(16)},
            **{"quant_type": _plain("nf4"), "blocksize": _plain(64)},
        },
    ),
    "Linear8bit": Call(
        pk.nn.Linear8bit, {"in_features": _plain(64), "out_features": _plain(16)}
    ),
    "BottleneckAdapter": Call(
        pk.nn.BottleneckAdapter,
        {
            **{"width": _plain(8), "reduction_factor": _plain(2.0), "dropout": _plain(0.1)},
            **{"non_linearity": _plain("relu"), "scaling": _plain(1.0)},
            "init_weights": _plain("bert"),
        },
        {"scaling": {"negative"}},
    ),
    "PrefixTuning": Call(
        pk.nn.PrefixTuning,
        {
            **{"num_virtual_tokens": _plain(4), "num_layers": _plain(2)},
            **{"num_heads": _plain(2), "head_dim": _plain(8)},
        },
    ),
    "PromptTuning": Call(
        pk.nn.PromptTuning,
        {"num_virtual_tokens": _plain(4), "token_dim": _plain(8), "initial": _rand(4, 8)},
        {"initial": {"None", "half"}},
    ),
    "SparseDeltaLinear": Call(
        pk.nn.SparseDeltaLinear,
        {"base_layer": _linear, "indices": lambda: torch.tensor([1, 2])},
        {"base_layer": {"module"}},
    ),
    "TrainableCopy": Call(pk.nn.TrainableCopy, {"original": _linear}, {"original": {"module"}}),
    "AdamW": _optimizer(pk.optim.AdamW, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01),
    "AdamW8bit": _optimizer(pk.optim.AdamW8bit, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01),
    "Lion": _optimizer(pk.optim.Lion, betas=(0.9, 0.99), weight_decay=0.01),
    "Lion8bit": _optimizer(pk.optim.Lion8bit, betas=(0.9, 0.99), weight_decay=0.01),
    "SGD8bit": _optimizer(pk.optim.SGD8bit, momentum=0.9, weight_decay=0.01),
    "PagedAdamW": Call(
        pk.optim.PagedAdamW,
        {
            **{"params": _parameters, "ram_budget": _plain(1 << 20)},
            **{"commit_every": _plain(1), "bucket_bytes": _plain(1 << 16)},
        },
        {"ram_budget": OPTIONAL, "bucket_bytes": OPTIONAL},
    ),
    "lora_plus_groups": Call(
        pk.optim.lora_plus_groups, {"model": _patched, "lr": _plain(1e-3), "ratio": _plain(4.0)}
    ),
    "LoRAConfig": Call(
        pk.LoRAConfig,
        {
            **{"r": _plain(4), "lora_alpha": _plain(8.0), "lora_dropout": _plain(0.1)},
            **{"target_modules": _plain("all-linear"), "quantize": _plain("nf4")},
            **{"blocksize": _plain(64), "adapter_dtype": _plain(torch.float32)},
            "keep_original": _plain("disk"),
        },
        {"target_modules": {"word"}, "quantize": OPTIONAL},
    ),
    "PrefixTuningConfig": Call(pk.PrefixTuningConfig, {"num_virtual_tokens": _plain(4)}),
    "PromptTuningConfig": Call(
        pk.PromptTuningConfig,
        {"num_virtual_tokens": _plain(4), "prompt_tuning_init": _plain("RANDOM")},
    ),
    "SparseDeltaConfig": Call(
        pk.SparseDeltaConfig,
        {"density": _plain(0.1), "pattern": _plain("random"), "seed": _plain(3)},
        {"seed": {"negative"}},
    ),
    "BottleneckConfig": Call(
        pk.BottleneckConfig,
        {
            **{"reduction_factor": _plain(16.0), "non_linearity": _plain("relu")},
            **{"dropout": _plain(0.1), "scaling": _plain(1.0)},
        },
        {"scaling": {"negative"}},
    ),
    "patch": Call(
        pk.patch,
        {"model": _net, "config": lambda: pk.LoRAConfig(r=2), "adapter_name": _plain("default")},
        {"model": {"module"}, "adapter_name": {"word"}},
    ),
    "merge": Call(
        pk.merge, {"model": _patched, "adapter_names": _plain(["default"])},
        {"adapter_names": OPTIONAL},
    ),
    "set_adapter": Call(pk.set_adapter, {"model": _patched, "names": _plain("default")}),
    "add_weighted_adapter": Call(
        pk.add_weighted_adapter,
        {
            **{"model": _patched, "names": _plain(["default"]), "weights": _plain([1.0])},
            **{"new_name": _plain("sum"), "combination_type": _plain("svd")},
        },
        {"new_name": {"word"}},
    ),
    "importance": Call(
        pk.importance,
        {
            **{"model": _net, "score": _plain("magnitude"), "granularity": _plain("entry")},
            **{"dtype": _plain(torch.float32)},
        },
    ),
    "top_k": Call(pk.top_k, {"scores": _scores, "density": _plain(0.1), "scope": _plain("layer")}),
    "threshold": Call(
        pk.threshold, {"scores": _scores, "value": _plain(0.1)}, {"value": {"negative"}}
    ),
    "plan": Call(
        pk.plan,
        {
            **{"model_or_config": _plain("llama-3-8b"), "method": _plain("qlora")},
            **{"batch": _plain(1), "seq": _plain(16), "r": _plain(4)},
            **{"optimizer": _plain("adamw"), "device": _plain("cuda")},
        },
    ),
    "verify": Call(
        pk.verify,
        {
            "model": _patched,
            "batch": lambda: {"input": torch.randn(3, 8)},
            "loss": _plain(lambda model, batch: model(batch["input"]).sum()),
            "against": _plain("reference"),
        },
        # A batch is whatever the model takes: it is the loss that refuses it.
        {"batch": {"None", "word", "objects", "module"}, "loss": OPTIONAL},
    ),
    "GradientWatchdog": Call(
        pk.GradientWatchdog, {"model": _net, "steps": _plain(3)}, {"model": {"module"}}
    ),
    "save_adapter": Call(
        pk.save_adapter,
        {"model": _patched, "format": _plain("peft"), "compact": _plain("nf4")},
        {"compact": OPTIONAL},
    ),
    "use_backend": Call(pk.use_backend, {"name": _plain("auto")}),
}  # fmt: skip
# Replacements that are of the right kind but do not fit: another argument may be the one blamed.
MISFITS = {"wider", "more rows", "extra dimensions", "half", "module"}
ALSO = ("model", "target_modules", "indices")  # what a model without a place for it is blamed on


def _replacements(value: Any) -> dict[str, Any]:
    """What must not stand where ``value`` is valid, by a label."""
    wrong: dict[str, Any] = {
        "None": None,
        "word": "nonsense",
        "objects": [object()],
        "module": nn.Linear(2, 2),
    }
    if isinstance(value, Tensor):
        wrong |= {
            "meta": value.to("meta"),
            "int32": value.to(torch.int32),
            "no dimension": torch.tensor(1.0),
            "extra dimensions": value[None, None],
            "wider": torch.cat([value, value], -1),
            "more rows": torch.cat([value, value], 0),
            "half": value.half(),
            "numpy": value.numpy(),
            "sparse": value.to_sparse(),
        }
        if not value.is_floating_point():
            del wrong["half"]
        if value.dim() == 1:
            del wrong["more rows"]  # the same as wider
    elif isinstance(value, float):
        wrong |= {"nan": math.nan, "inf": math.inf, "negative": -1.0, "complex": 1j}
    elif isinstance(value, int) and not isinstance(value, bool):
        wrong |= {"fraction": 1.5, "negative": -3, "huge": 2**70, "nan": math.nan}
    elif isinstance(value, str):
        wrong |= {"number": 3}
    elif isinstance(value, pk.QuantizedTensor):
        other = pk.quantize_4bit if value.quant_type == "int8" else pk.quantize_8bit
        wrong |= {"codes": value.weight, "other format": other(torch.randn(N, K))}
        if value.quant_type != "int8":
            wrong["vector weight"] = pk.quantize_4bit(torch.randn(K))
    return wrong


def _cells() -> list[Any]:
    return [
        pytest.param(name, argument, id=f"{name}-{argument}")
        for name, call in CALLS.items()
        for argument in call.arguments
    ]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _called(call: Call, changed: dict[str, Any]) -> Any:
    arguments = {name: make() for name, make in call.arguments.items()} | changed
    if call.function is pk.save_adapter:
        arguments["path"] = Path("adapter")
    return call.function(**arguments)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_are_valid(name: str) -> None:
    _called(CALLS[name], {})


@pytest.mark.parametrize(("name", "argument"), _cells())
def test_a_wrong_argument_is_named(name: str, argument: str) -> None:
    call = CALLS[name]
    fine = call.fine.get(argument, set())
    problems = []
    for label, value in _replacements(call.arguments[argument]()).items():
        if label in fine:
            continue
        try:
            _called(call, {argument: value})
        except (TypeError, ValueError) as error:
            names = [*call.arguments, *ALSO] if label in MISFITS else [argument]
            if not re.search(rf"\b({'|'.join(names)})\b", str(error)):
                problems.append(f"{label}: does not name {argument}: {error}")
        except Exception as error:
            problems.append(f"{label}: {type(error).__name__}: {error}")
        else:
            problems.append(f"{label}: accepted")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("argument", ["model", "path", "adapter_name"])
def test_load_adapter(argument: str) -> None:
    pk.save_adapter(_patched(), "adapter")
    good = {"model": _net(), "path": "adapter", "adapter_name": "default"}
    for value in (None, 3, [object()], object()):
        with pytest.raises(TypeError, match=rf"\b{argument}\b"):
            pk.load_adapter(**good | {argument: value})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pk.load_adapter(_net(), "nowhere")


def test_a_base_that_requires_a_gradient_is_refused() -> None:
    base = nn.Parameter(torch.randn(N, K))
    x, a, b = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R)
    for run in (
        lambda: F.lora_linear(x, base, a, b, 1.0),
        lambda: F.dora_linear(x, base, a, b, torch.ones(N), 1.0),
        lambda: F.sparse_delta_linear(x, base, torch.tensor([1]), torch.ones(1)),
        lambda: F.multi_lora_linear(x, base, [(a, b, 1.0)], torch.zeros(M, dtype=torch.int64)),
        lambda: F.lora_linear_group(x, [(base, a, b, 1.0)]),
    ):
        with pytest.raises(ValueError, match="base: requires a gradient"):
            run()
    mask = torch.zeros(1, 1, 5, 6, requires_grad=True)
    q, k, p = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(4, 3, 8)
    with pytest.raises(ValueError, match="attn_mask: requires a gradient"):
        F.prefix_attention(q, k, k, p, p, mask)
    table = nn.Parameter(torch.randn(9, 8))
    with pytest.raises(ValueError, match="table: requires a gradient"):
        F.prompt_embedding(torch.tensor([[1]]), table, torch.randn(2, 8))


class _Marked(Tensor):
    """A tensor subclass without behaviour of its own."""


def test_plain_subclasses_give_the_same_values() -> None:
    x, w = torch.randn(M, K), torch.randn(N, K)
    a, b = torch.randn(R, K), torch.randn(N, R)
    marked = [t.as_subclass(_Marked) for t in (x, w, a, b)]
    got = F.lora_linear(*marked, 0.5)
    assert torch.equal(got.as_subclass(Tensor), F.lora_linear(x, w, a, b, 0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused_by_quantizers(bad: float) -> None:
    w = torch.randn(N, K)
    w[3, 7] = bad
    for quantize in (pk.quantize_4bit, pk.quantize_8bit):
        with pytest.raises(ValueError, match=r"\bw\b"):
            quantize(w)
        assert quantize(w, allow_nonfinite=True).shape == w.shape
