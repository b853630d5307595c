"""Adapter files: PEFT reads ours, we read PEFT's, and nothing is loaded that does not fit."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.checkpoint.files import write_atomically
from peftkern.checkpoint.peft_common import PEFT_VERSION
from peftkern.checkpoint.peft_lora import FIELDS
from peftkern.nn import LoRALinear

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
from hf_models import (  # noqa: E402
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

CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"target_modules": "all-linear"}) for kind in KINDS),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_rslora": True}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 5},
        },
    ),
    ("llama", {"target_modules": r".*self_attn\.(q|k)_proj", "lora_dropout": 0.1}),
    (
        "bert",
        {
            "target_modules": ["query", "dense"],
            "exclude_modules": ["pooler.dense"],
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    ("bert", {"target_modules": ["value"], "modules_to_save": ["pooler"]}),
]
ids = pytest.mark.parametrize(("kind", "spec"), CASES, ids=[str(i) for i in range(len(CASES))])


def save_ours(kind: str, spec: dict[str, Any], folder: Path) -> torch.Tensor:
    model = build(kind).eval()
    pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=8, task_type=task(kind), **spec))
    randomize_adapters(model)
    pk.save_adapter(model, folder)
    return model(**batch(kind)).logits


def save_theirs(kind: str, spec: dict[str, Any], folder: Path) -> torch.Tensor:
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    spec = {k: list(v) if isinstance(v, list) else v for k, v in spec.items()}
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type=task(kind), **spec, **fan)
    model = peft.get_peft_model(build(kind), config).eval()
    randomize_adapters(model)
    model.save_pretrained(folder)
    return model(**batch(kind)).logits


@ids
def test_peft_reads_ours(kind: str, spec: dict[str, Any], tmp_path: Path) -> None:
    expected = save_ours(kind, spec, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(kind), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**batch(kind)).logits, expected, rtol=1e-5, atol=1e-5)


@ids
def test_we_read_pefts(kind: str, spec: dict[str, Any], tmp_path: Path) -> None:
    expected = save_theirs(kind, spec, tmp_path)
    model = build(kind).eval()
    before = snapshot(model)
    handle = pk.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(**batch(kind)).logits, expected, rtol=1e-5, atol=1e-5)
    pk.save_adapter(model, tmp_path / "again")
    first, second = (
        safetensors_torch.load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    handle.unpatch()
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_pefts_key_for_key(kind: str, tmp_path: Path) -> None:
    spec = {"target_modules": "all-linear"}
    save_ours(kind, spec, tmp_path / "ours")
    save_theirs(kind, spec, tmp_path / "theirs")
    states, configs = [], []
    for name in ("ours", "theirs"):
        file = tmp_path / name / "adapter_model.safetensors"
        states.append({k: (v.shape, v.dtype) for k, v in safetensors_torch.load_file(file).items()})
        configs.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
    assert states[0] == states[1]
    ours, theirs = configs
    assert ours.keys() == theirs.keys()
    differ = {k for k in ours if ours[k] != theirs[k]}
    assert differ <= {"target_modules", "modules_to_save"}
    if theirs["modules_to_save"] is not None:
        assert set(ours["modules_to_save"]) == set(theirs["modules_to_save"])


def test_our_table_of_fields_is_pefts() -> None:
    if peft.__version__ != PEFT_VERSION:
        pytest.skip(f"the table is that of PEFT {PEFT_VERSION}, here is {peft.__version__}")
    known = {f.name for f in fields(peft.LoraConfig)} - {"runtime_config"}
    assert known == set(FIELDS)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_adapters_of_quantized_bases(quantize: str, tmp_path: Path) -> None:
    model = build("llama").eval()
    pk.patch(model, pk.LoRAConfig(r=4, quantize=quantize))
    randomize_adapters(model)
    expected = model(**batch("llama")).logits
    pk.merge(model)
    pk.save_adapter(model, tmp_path)  # merged or not, the file is the same
    twin = build("llama").eval()
    pk.load_adapter(twin, tmp_path, quantize=quantize, trainable=False)
    assert torch.equal(twin(**batch("llama")).logits, expected)
    assert not any(p.requires_grad for p in twin.parameters())
    peft.PeftModel.from_pretrained(build("llama"), str(tmp_path))


def test_several_adapters_go_to_their_folders(tmp_path: Path) -> None:
    model = build("llama").eval()
    pk.patch(model, pk.LoRAConfig(r=4, target_modules=["q_proj"]))
    randomize_adapters(model, 1)
    first = model(**batch("llama")).logits
    pk.patch(model, pk.LoRAConfig(r=2, target_modules=["v_proj"]), "other")
    randomize_adapters(model, 2)
    second = model(**batch("llama")).logits
    pk.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other",
    ]
    loaded = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**batch("llama")).logits, first, rtol=1e-5, atol=1e-5)
    loaded.load_adapter(str(tmp_path / "other"), "other")
    loaded.set_adapter("other")
    torch.testing.assert_close(loaded(**batch("llama")).logits, second, rtol=1e-5, atol=1e-5)
    ours = build("llama").eval()
    pk.load_adapter(ours, tmp_path)
    pk.load_adapter(ours, tmp_path / "other", "other")
    assert torch.equal(ours(**batch("llama")).logits, second)
    pk.set_adapter(ours, "default")
    assert torch.equal(ours(**batch("llama")).logits, first)
    with pytest.raises(ValueError, match="no adapter 'none'"):
        pk.save_adapter(model, tmp_path, adapter_names="none")


def test_loading_into_an_existing_adapter_goes_on_training(tmp_path: Path) -> None:
    spec = {"target_modules": ["q_proj"]}
    expected = save_ours("llama", spec, tmp_path)
    model = build("llama").eval()
    handle = pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=8, **spec))
    assert pk.load_adapter(model, tmp_path) is handle
    assert torch.equal(model(**batch("llama")).logits, expected)
    model.train()
    model(**batch("llama")).loss.backward()
    with pytest.raises(ValueError, match="options quantize cannot be applied"):
        pk.load_adapter(model, tmp_path, quantize="nf4")


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_another_scaling_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_ours("llama", {"target_modules": ["q_proj"]}, tmp_path)
    model = build("llama")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | change
    pk.patch(model, pk.LoRAConfig(**config))
    with pytest.raises(ValueError, match="scaling would be wrong"):
        pk.load_adapter(model, tmp_path)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, "use_qalora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"use_dora": True}, "missing keys: .*lora_magnitude_vector"),
        ({"lora_bias": True}, "missing keys: .*lora_B.bias"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base"),
        ({"use_wonder": True}, "use_wonder=True is unknown"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"r": 0}, "r: expected a positive integer"),
        ({"use_bdlora": True, "bias": "all"}, "use_bdlora=True.*bias='all'|bias='all'.*use_bd"),
    ],
)
def test_what_we_do_not_compute_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_ours("llama", {"target_modules": ["q_proj"]}, tmp_path)
    rewrite(tmp_path, **changes)
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    state = safetensors_torch.load_file(path)
    change(state)
    safetensors_torch.save_file(state, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(KEY), f"missing keys: {KEY}"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected keys: extra"),
        (lambda s: s.update({KEY: torch.zeros(64, 3)}), r"file \[64, 3\], model \[64, 4\]"),
        (
            lambda s: s.update({KEY.replace("base_model.model.", ""): s.pop(KEY)}),
            "missing keys: .*unexpected keys: ",
        ),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_files_that_do_not_fit_are_refused(
    change: Any, message: str, patched: bool, tmp_path: Path
) -> None:
    spec = {"target_modules": ["q_proj"]}
    save_ours("llama", spec, tmp_path)
    edit(tmp_path, change)
    model = build("llama")
    if patched:
        pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=8, **spec))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_second_adapter_that_does_not_fit_leaves_the_first(tmp_path: Path) -> None:
    save_ours("llama", {"target_modules": ["q_proj"]}, tmp_path)
    edit(tmp_path, lambda s: s.pop(KEY))
    model = build("llama").eval()
    pk.patch(model, pk.LoRAConfig(r=4))
    randomize_adapters(model)
    before, expected = snapshot(model), model(**batch("llama")).logits
    with pytest.raises(ValueError, match="missing keys"):
        pk.load_adapter(model, tmp_path, "second")
    assert_unchanged(model, before)
    assert torch.equal(model(**batch("llama")).logits, expected)


def test_the_wrong_model_is_refused(tmp_path: Path) -> None:
    save_ours("llama", {"target_modules": ["q_proj"]}, tmp_path)
    with pytest.raises(ValueError, match="target_modules: no module matches 'q_proj'"):
        pk.load_adapter(build("bert"), tmp_path)
    wider = build("llama", hidden_size=128)
    with pytest.raises(ValueError, match="shapes differ"):
        pk.load_adapter(wider, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in wider.modules())


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        pk.load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json"):
        pk.load_adapter(model, tmp_path)
    save_ours("llama", {"target_modules": ["q_proj"]}, tmp_path / "inner")
    with pytest.raises(FileNotFoundError, match="folders inner hold adapters"):
        pk.load_adapter(model, tmp_path)
    config = tmp_path / "inner" / "adapter_config.json"
    with pytest.raises(NotADirectoryError, match="give the directory"):
        pk.load_adapter(model, config)
    weights = tmp_path / "inner" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        pk.load_adapter(model, tmp_path / "inner")
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(ValueError, match="pickled weights can run code"):
        pk.load_adapter(model, tmp_path / "inner")
    config.write_text("{")
    (tmp_path / "inner" / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="not valid JSON"):
        pk.load_adapter(model, tmp_path / "inner")
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="is not patched"):
        pk.save_adapter(model, tmp_path)
    pk.patch(model, pk.LoRAConfig())
    with pytest.raises(ValueError, match="format: got 'pickle'"):
        pk.save_adapter(model, tmp_path, format="pickle")
    with pytest.raises(TypeError, match="unknown option 'rank'"):
        pk.load_adapter(model, tmp_path, rank=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a directory"):
        pk.save_adapter(model, tmp_path / "file")


def test_refused_modules_are_not_promised_to_peft(tmp_path: Path) -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "out_proj": nn.Linear(16, 4)})
    handle = pk.patch(net, pk.LoRAConfig(r=2, target_modules=["out_proj"]))
    assert [row.name for row in handle.report().refused] == ["attention.out_proj"]
    pk.save_adapter(net, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    # As a list, PEFT would take the end of "attention.out_proj" for it; this is an expression.
    assert written["target_modules"] == "out_proj"
    keys = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(k.startswith("base_model.model.out_proj.lora_") for k in keys)


def test_half_precision_files_load_into_fp32_adapters(tmp_path: Path) -> None:
    model = build("llama")
    pk.patch(model, pk.LoRAConfig(r=4, target_modules=["q_proj"], adapter_dtype=torch.bfloat16))
    randomize_adapters(model)
    pk.save_adapter(model, tmp_path)
    state = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for v in state.values()} == {torch.bfloat16}
    twin = build("llama")
    pk.load_adapter(twin, tmp_path)
    layer = twin.model.layers[0].self_attn.q_proj
    assert layer.factors("default")[1].dtype == torch.float32
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(layer.factors("default")[1], state[key].float())


def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_a_models_card_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_ours("llama", {"target_modules": ["q_proj"]}, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
