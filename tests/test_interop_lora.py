"""LoRA and its relatives against the real PEFT: files both ways, gradients, starts, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.checkpoint import codecs
from peftkern.checkpoint.peft_format import adapter_tensors
from peftkern.hf.patching import handle_of
from peftkern.hf.targets import survey

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
from hf_models import (  # noqa: E402
    PEFT_WARNINGS,
    assert_unchanged,
    batch,
    build,
    randomize_adapters,
    snapshot,
    task,
)

pytestmark = [
    pytest.mark.hf,
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # PEFT means its own lora_B.bias
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense"],
}
FEEDFORWARD = {"gpt2": ["c_fc"], "llama": ["down_proj"], "bert": ["intermediate.dense"]}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings"}
LORA: list[dict[str, Any]] = [
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "orthogonal"},
    {"embedding": True},
]
CASES = [
    *((kind, spec) for kind in TARGETS for spec in LORA if spec != {"lora_bias": True}),
    ("gpt2", {"lora_bias": True}),
    ("bert", {"lora_bias": True}),
    ("llama", {"init_lora_weights": "olora"}),
    ("bert", {"init_lora_weights": "olora"}),
    *((kind, {"ia3": True}) for kind in TARGETS),
]
ids = pytest.mark.parametrize(
    ("kind", "spec"),
    CASES,
    ids=[f"{k}-{'-'.join(map(str, s.values()))}{next(iter(s))}" for k, s in CASES],
)


def configs(kind: str, spec: dict[str, Any]) -> tuple[Any, Any]:
    """The same configuration in PEFT's words and in ours."""
    spec = dict(spec)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    targets = list(TARGETS[kind])
    if spec.pop("ia3", False):
        inner = FEEDFORWARD[kind]
        theirs = peft.IA3Config(
            target_modules=targets, feedforward_modules=inner, task_type=task(kind), **fan
        )
        ours = pk.IA3Config(target_modules=targets, feedforward_modules=inner, task_type=task(kind))
        return theirs, ours
    if spec.pop("embedding", False):
        targets.append(EMBEDDING[kind])
    common = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": task(kind), **spec}
    return peft.LoraConfig(**common, **fan), pk.LoRAConfig(**common)


def theirs(kind: str, spec: dict[str, Any], folder: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    base = build(kind, **changes)
    torch.manual_seed(5)
    model = peft.get_peft_model(base, configs(kind, spec)[0]).eval()
    randomize_adapters(model)
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(kind)).logits


def own_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    codec = codecs.codec_of(handle_of(model).adapters[name].config.kind)
    return adapter_tensors(codec, model, survey(model), name)


@ids
def test_files_of_peft_give_its_outputs_and_gradients(
    kind: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    reference = theirs(kind, spec, tmp_path)
    model = build(kind).eval()
    before = snapshot(model)
    handle = pk.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, kind), logits(reference, kind), rtol=2e-5, atol=2e-5)
    for each in (model, reference):
        each.train()
        each(**batch(kind)).loss.backward()
    gradients = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    got = {key: gradients[tensor.data_ptr()] for key, tensor in own_tensors(model).items()}
    want = {}
    for key, parameter in reference.named_parameters():
        if parameter.requires_grad:
            key = key.replace(".modules_to_save.default", "").replace(".default", "")
            want[key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter
    assert got.keys() == want.keys()
    for key, parameter in want.items():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(got[key], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)
    handle.unpatch()
    model.eval()
    assert_unchanged(model, before)


@ids
def test_our_files_give_peft_our_outputs(kind: str, spec: dict[str, Any], tmp_path: Path) -> None:
    model = build(kind).eval()
    pk.patch(model, configs(kind, spec)[1])
    randomize_adapters(model)
    pk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(kind), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, kind), logits(model, kind), rtol=2e-5, atol=2e-5)
    theirs(kind, spec, tmp_path / "theirs")
    keys = [
        {
            key: value.shape
            for key, value in safetensors_torch.load_file(f / "adapter_model.safetensors").items()
            if not key.endswith("embed_tokens.base_layer.weight")  # PEFT adds it, and needs it not
        }
        for f in (tmp_path, tmp_path / "theirs")
    ]
    assert keys[0] == keys[1]
    ours, other = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "theirs")
    )
    assert ours.keys() == other.keys()
    lists = {"target_modules", "modules_to_save", "feedforward_modules"}
    assert {k for k in ours if ours[k] != other[k]} <= lists
    for key in lists & ours.keys():
        assert set(ours[key] or ()) == set(other[key] or ())


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_one_seed_gives_pefts_start(init: bool | str) -> None:
    spec = {"init_lora_weights": init, "use_dora": init == "gaussian"}
    base, ours = build("llama"), build("llama")
    torch.manual_seed(11)
    reference = peft.get_peft_model(base, configs("llama", spec)[0])
    torch.manual_seed(11)
    pk.patch(ours, configs("llama", spec)[1])
    want = {k.replace(".default", ""): v for k, v in reference.named_parameters()}
    for key, tensor in own_tensors(ours).items():
        other = want.get(key, want.get(f"{key}.weight"))
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(logits(ours, "llama"), logits(reference, "llama"))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_changed_bases_become_plain_adapters(init: str, rslora: bool, tmp_path: Path) -> None:
    spec = {"init_lora_weights": init, "use_rslora": rslora}
    torch.manual_seed(11)
    reference = peft.get_peft_model(build("llama"), configs("llama", spec)[0]).eval()
    start = str(tmp_path / "start")
    reference.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    reference.save_pretrained(start)
    reference.peft_config["default"].init_lora_weights = init
    randomize_adapters(reference)
    reference.save_pretrained(
        str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=start
    )
    torch.manual_seed(11)
    ours = build("llama").eval()
    pk.patch(ours, configs("llama", spec)[1])
    randomize_adapters(ours)
    pk.save_adapter(ours, tmp_path / "ours", plain_lora=True)
    first, second = (
        safetensors_torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("ours", "theirs")
    )
    for key in second:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-5, msg=key)
    first, second = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    )
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora"):
        assert first[key] == second[key]
    expected = logits(ours, "llama")
    plain = build("llama").eval()
    pk.load_adapter(plain, tmp_path / "ours")
    torch.testing.assert_close(logits(plain, "llama"), expected, rtol=1e-4, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "theirs")).eval()
    torch.testing.assert_close(logits(loaded, "llama"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("target", ["llama", "bert"])
def test_weighted_adapters_have_pefts_numbers(kind: str, target: str, tmp_path: Path) -> None:
    spec = {"embedding": True} if target == "llama" else {}
    base = build(target).eval()
    config = configs(target, spec)[0]
    config.task_type = None
    reference = peft.get_peft_model(base, config, adapter_name="one").eval()
    config = configs(target, spec)[0]
    config.task_type, config.lora_alpha = None, 3
    reference.add_adapter("two", config)
    reference.set_adapter("one")
    randomize_adapters(reference, 1)
    reference.set_adapter("two")
    randomize_adapters(reference, 2)
    reference.save_pretrained(tmp_path)
    ours = build(target).eval()
    for name in ("one", "two"):
        pk.load_adapter(ours, tmp_path / name, adapter_name=name)
    reference.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mixed", combination_type=kind)
    pk.add_weighted_adapter(ours, ["one", "two"], [0.7, -0.4], "mixed", combination_type=kind)
    assert all(layer.active_adapters == ["two"] for layer in adapters_of(ours))
    assert not any(tensor.requires_grad for tensor in own_tensors(ours, "mixed").values())
    reference.set_adapter("mixed")
    pk.set_adapter(ours, "mixed")
    torch.testing.assert_close(
        logits(ours, target), logits(reference, target), rtol=1e-4, atol=1e-4
    )
    if kind != "svd":  # whose factors have free signs
        want = {k.replace(".mixed", ""): v for k, v in reference.named_parameters()}
        for key, tensor in own_tensors(ours, "mixed").items():
            torch.testing.assert_close(tensor, want[key], rtol=1e-5, atol=1e-6, msg=key)


def adapters_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, pk.nn.LoRALinear | pk.nn.LoRAEmbedding)]


@pytest.mark.parametrize("spec", [{"use_dora": True}, {"ia3": True}, {"lora_bias": True}], ids=str)
def test_merging_gives_pefts_weights(spec: dict[str, Any], tmp_path: Path) -> None:
    reference = theirs("bert", spec, tmp_path)
    model = build("bert").eval()
    handle = pk.load_adapter(model, tmp_path)
    expected = logits(model, "bert")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pk.merge(model)
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-4, atol=1e-5)
    reference.merge_adapter()
    want = dict(reference.named_parameters())
    for key, value in model.named_parameters():
        if ".base_layer." in key:
            torch.testing.assert_close(value, want[f"base_model.model.{key}"], msg=key)
    pk.unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    handle.unpatch()


def test_several_active_adapters_act_in_pefts_order(tmp_path: Path) -> None:
    base = build("llama")
    first = configs("llama", {"use_dora": True})[0]
    reference = peft.get_peft_model(base, first, adapter_name="one").eval()
    reference.add_adapter("two", configs("llama", {})[0])
    reference.add_adapter("three", configs("llama", {"use_dora": True})[0])
    for seed, name in enumerate(("one", "two", "three")):
        reference.set_adapter(name)
        randomize_adapters(reference, seed)
    reference.save_pretrained(tmp_path)
    ours = build("llama").eval()
    for name in ("one", "two", "three"):
        pk.load_adapter(ours, tmp_path / name, adapter_name=name)
    for names in (["one", "two"], ["two", "one"], ["one", "three"], ["three", "two", "one"]):
        reference.base_model.set_adapter(names)
        pk.set_adapter(ours, names)
        expected = logits(reference, "llama")
        torch.testing.assert_close(logits(ours, "llama"), expected, rtol=1e-4, atol=1e-5)
        if names == ["three", "two", "one"]:
            pk.merge(ours)
            torch.testing.assert_close(logits(ours, "llama"), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_of_another_base_are_refused(tmp_path: Path) -> None:
    theirs("llama", {"embedding": True}, tmp_path)
    other = build("llama", seed=1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"other base weights.*embed_tokens\.base_layer\.weight"):
        pk.load_adapter(other, tmp_path)
    assert_unchanged(other, before)


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    ids = torch.randint(1, 64, (3, 7))
    data = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "labels": ids[:, 1:6].clone()}
    return transformers.T5ForConditionalGeneration(config), data


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    data = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}
    return transformers.ViTForImageClassification(config), data


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("family", [t5, vit])
def test_all_linear_layers_of_other_families(family: Any, method: str, tmp_path: Path) -> None:
    config: Any = pk.IA3Config(feedforward_modules=r".*\.(wo|fc2)") if method == "ia3" else None
    if config is None:
        config = pk.LoRAConfig(r=4, use_dora=method == "dora")
    model, data = family()
    pk.patch(model.eval(), config)
    randomize_adapters(model)
    pk.save_adapter(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(family()[0], str(tmp_path), is_trainable=True).eval()
    losses = [each(**data).loss for each in (model, reference)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    want = {
        n.removeprefix("base_model.model."): p.grad
        for n, p in reference.named_parameters()
        if p.requires_grad
    }
    assert gradients.keys() == want.keys()
    for name, gradient in want.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    reference.save_pretrained(tmp_path / "again")
    fresh = family()[0].eval()
    pk.load_adapter(fresh, tmp_path / "again")
    torch.testing.assert_close(fresh(**data).loss, losses[1], rtol=1e-5, atol=1e-5)


def test_factors_on_chosen_layers_keep_their_sides(tmp_path: Path) -> None:
    config = pk.IA3Config(
        target_modules=["v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        layers_to_transform=[1],  # a field that PEFT's (IA)^3 does not have
    )
    model = build("llama").eval()
    pk.patch(model, config)
    randomize_adapters(model)
    pk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, "llama"), logits(model, "llama"))
    again = build("llama").eval()
    pk.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"))
