"""Which modules a configuration means: always those that PEFT itself would take."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import peftkern as pk
from peftkern.hf.targets import minimal_names
from peftkern.nn import LoRALinear

peft = pytest.importorskip("peft")
from hf_models import PEFT_WARNINGS, build, task  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]

SPECS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    ("llama", {"target_modules": ["q_proj", "mlp.up_proj"]}),
    ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    ("bert", {"target_modules": ["query", "output.dense"]}),
    ("bert", {"target_modules": ["bert.encoder.layer.0.output.dense", "pooler.dense"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"}),
    ("bert", {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"q_proj": 32},
        },
    ),
    (
        "gpt2",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"c_fc": 2},
            "use_rslora": True,
            "alpha_pattern": {r"h\.0\.attn\.c_attn": 1},
        },
    ),
    ("bert", {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
]


@pytest.mark.parametrize(("kind", "spec"), SPECS, ids=[str(i) for i in range(len(SPECS))])
def test_the_modules_ranks_and_scalings_are_pefts(kind: str, spec: dict[str, Any]) -> None:
    theirs, spec = build(kind), copy.deepcopy(spec)  # PEFT appends to lists that it is given
    ours, config = build(kind), pk.LoRAConfig(r=4, lora_alpha=12, task_type=task(kind), **spec)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=12, task_type=task(kind), **spec, **fan)
    )
    pk.patch(ours, config)
    expected = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in wrapped.named_modules()
        if isinstance(m, LoraLayer)
    }
    got = {
        name: (m.r["default"], m.scaling["default"])
        for name, m in ours.named_modules()
        if isinstance(m, LoRALinear)
    }
    assert got == expected
    assert got
    trained = {
        n.removeprefix("base_model.model.")
        for n, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained


def test_the_same_seed_gives_the_same_adapter() -> None:
    ours, theirs = build("llama"), build("llama")
    torch.manual_seed(11)
    pk.patch(ours, pk.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    state = wrapped.state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, state[f"base_model.model.{name}"]), name


def test_all_linear_leaves_the_head_out_and_says_so() -> None:
    for kind, head in (("bert", "classifier"), ("llama", "lm_head"), ("gpt2", "lm_head")):
        handle = pk.patch(build(kind), pk.LoRAConfig())
        row = next(r for r in handle.report().rows if r.name == head)
        assert "output layer or head" in row.reason
        assert not row.asked


def test_names_that_match_nothing_are_reported_with_near_ones() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"target_modules: no module matches 'q_prj'.*q_proj"):
        pk.patch(model, pk.LoRAConfig(target_modules=["q_prj", "v_proj"]))
    with pytest.raises(ValueError, match=r"no module matches 'zzz'.*q_proj, k_proj"):
        pk.patch(model, pk.LoRAConfig(target_modules=["zzz"]))
    with pytest.raises(ValueError, match=r"no module matches '.*attn'"):
        pk.patch(model, pk.LoRAConfig(target_modules=r"nothing.*attn"))
    with pytest.raises(ValueError, match="modules_to_save: no module's path ends with 'clasifier'"):
        pk.patch(model, pk.LoRAConfig(modules_to_save=["clasifier"]))
    with pytest.raises(ValueError, match=r"(?s)nothing to adapt.*model.norm: LlamaRMSNorm"):
        pk.patch(model, pk.LoRAConfig(target_modules=["model.norm"]))
    with pytest.raises(ValueError, match=r"(?s)nothing to adapt.*embed_tokens: nn.Embedding"):
        pk.patch(model, pk.IA3Config(target_modules=["embed_tokens"]))


def test_strict_refuses_what_cannot_be_adapted() -> None:
    model = build("llama")
    config = pk.LoRAConfig(target_modules=["q_proj", "model.norm"])
    with pytest.raises(ValueError, match=r"model.norm: LlamaRMSNorm"):
        pk.patch(model, config, strict=True)
    handle = pk.patch(model, config)
    assert [row.name for row in handle.report().refused] == ["model.norm"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"r": 4.0}, "r: expected a positive integer, got 4.0"),
        ({"lora_alpha": -1}, "lora_alpha: expected a positive number"),
        ({"lora_dropout": 1}, r"lora_dropout: expected a number in \[0, 1\)"),
        ({"target_modules": []}, "target_modules: empty"),
        ({"target_modules": "("}, "target_modules: '\\(' is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: expected a positive integer"),
        ({"rank_pattern": {"*": 1}}, "rank_pattern key: '\\*' is not a regular expression"),
        ({"quantize": "int4"}, "quantize: got 'int4'"),
        ({"blocksize": 48}, "blocksize: got 48"),
        ({"quantize_modules": "all-linear"}, "quantize_modules: needs quantize"),
        ({"keep_original": "cloud"}, "keep_original: got 'cloud'"),
        ({"task_type": "CLS"}, "task_type: got 'CLS'"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights: got 'pizza'"),
        ({"layers_to_transform": 1}, "layers_to_transform: works with a list"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern: needs"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype: got"),
    ],
)
def test_config_values_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.LoRAConfig(**fields)


def test_config_types_are_checked() -> None:
    with pytest.raises(TypeError, match="modules_to_save: expected a list of names"):
        pk.LoRAConfig(modules_to_save="classifier")
    with pytest.raises(TypeError, match="target_modules: expected a list"):
        pk.LoRAConfig(target_modules=3)
    with pytest.raises(TypeError, match="rank_pattern: expected a dict"):
        pk.LoRAConfig(rank_pattern=["q"])
    config = pk.LoRAConfig(target_modules={"b", "a"})
    assert config.to_dict()["target_modules"] == ["a", "b"]
    assert config.to_dict()["adapter_dtype"] == "float32"


def test_minimal_names_mean_just_the_chosen() -> None:
    chosen = ["m.0.attn.q", "m.1.attn.q", "m.0.mlp.out", "m.1.mlp.out"]
    others = ["m", "m.0", "m.0.attn", "m.0.attn.out", "head"]
    names = minimal_names(chosen, others)
    assert names == ["mlp.out", "q"]
    for path in chosen + others:
        means = any(path == n or path.endswith(f".{n}") for n in names)
        assert means == (path in chosen)
    assert re.fullmatch(r"\w+", minimal_names(["x"], [])[0])
