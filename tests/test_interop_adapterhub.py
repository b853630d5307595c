"""AdapterHub's files: those of ``adapters`` give its outputs here, and ours have its layout.

The golden files and the reverse check against ``adapters`` itself are made by
``tests/golden/make_adapterhub.py``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.testing import assert_same_bits

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parent / "golden"))

from make_adapterhub import (
    ARCHITECTURES,
    CASES,
    GOLDEN,
    NAME,
    cases_of,
    load_base,
    randomize,
    run,
)
from safetensors.torch import load_file

PAIRS = [(a, case) for a in ARCHITECTURES for case in cases_of(a)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # so small that threads only cost; conftest.py puts the number back


def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "outputs.safetensors")


def loaded(architecture: str, case: str, **options: Any) -> nn.Module:
    model = load_base(architecture)
    pk.load_adapter(model, GOLDEN / architecture / case, allow_pickle=True, **options)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interop_base_models_agree(architecture: str) -> None:
    """Else nothing below would mean anything."""
    expected = golden()[f"{architecture}.base"]
    torch.testing.assert_close(
        run(load_base(architecture), architecture), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("architecture", "case"), PAIRS)
def test_interop_reads_adapterhub(architecture: str, case: str) -> None:
    outputs = golden()
    model = loaded(architecture, case)
    expected, plain = outputs[f"{architecture}.{case}"], outputs[f"{architecture}.base"]
    got = run(model, architecture)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert (expected - plain).abs().max() > 0.1
    pk.unpatch(model)
    torch.testing.assert_close(run(model, architecture), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("architecture", "case"), PAIRS)
def test_interop_writes_what_adapterhub_writes(
    architecture: str, case: str, tmp_path: Path
) -> None:
    """The same keys, shapes, bytes and configuration as the file that was read."""
    theirs = GOLDEN / architecture / case
    model = load_base(architecture)
    pk.load_adapter(model, theirs, NAME, allow_pickle=True)
    pk.save_adapter(model, tmp_path, format="adapterhub")
    if (theirs / "adapter.safetensors").exists():
        want = load_file(theirs / "adapter.safetensors")
    else:
        want = torch.load(theirs / "pytorch_adapter.bin", weights_only=True)
    got = load_file(tmp_path / "adapter.safetensors")
    assert set(got) == set(want)
    for key, value in want.items():
        assert_same_bits(got[key], value, key)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    original = json.loads((theirs / "adapter_config.json").read_text())
    assert ours["config"] == original["config"]
    # The path of the checkpoint, which is another one here.
    assert {**ours, "model_name": None} == {**original, "model_name": None}


@pytest.mark.parametrize("case", list(CASES))
def test_interop_fresh_adapters_come_back(case: str, tmp_path: Path) -> None:
    preset, changes = CASES[case]
    model = load_base("bert")
    pk.patch(model, pk.BottleneckConfig.preset(preset, **changes))
    randomize(nn.ParameterList([p for p in model.parameters() if p.requires_grad]), 0.3)
    expected = run(model.eval(), "bert")
    pk.save_adapter(model, tmp_path, format="adapterhub")
    again = load_base("bert")
    pk.load_adapter(again, tmp_path, "other")
    assert_same_bits(run(again.eval(), "bert"), expected)
    into = load_base("bert")
    pk.patch(into, pk.BottleneckConfig.preset(preset, **changes))
    pk.load_adapter(into, tmp_path)
    assert_same_bits(run(into.eval(), "bert"), expected)


def test_interop_head_and_base_are_alike(tmp_path: Path) -> None:
    """A file made with the bare model fits the one with a head; the head's copy comes along."""
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(GOLDEN / "bert").eval()
    pk.load_adapter(model, GOLDEN / "bert" / "seq_bn")
    got = model.bert(**_bert_inputs()).last_hidden_state
    torch.testing.assert_close(got, golden()["bert.seq_bn"], rtol=1e-5, atol=2e-5)
    pk.unpatch(model)
    pk.patch(model, pk.BottleneckConfig.preset("seq_bn", task_type="SEQ_CLS"))
    randomize(nn.ParameterList([p for p in model.parameters() if p.requires_grad]), 0.3)
    expected = model(**_bert_inputs()).logits
    pk.save_adapter(model, tmp_path, format="adapterhub")
    again = transformers.BertForSequenceClassification.from_pretrained(GOLDEN / "bert").eval()
    pk.load_adapter(again, tmp_path)
    assert_same_bits(again(**_bert_inputs()).logits.detach(), expected.detach())


def _bert_inputs() -> dict[str, Tensor]:
    from make_adapterhub import inputs_of

    return inputs_of("bert")


def test_interop_over_a_quantized_base() -> None:
    model = loaded("llama", "double_seq_bn", quantize="nf4")
    names = {type(m).__name__ for m in model.modules()}
    assert "Linear4bit" in names
    difference = run(model, "llama") - golden()["llama.double_seq_bn"]
    assert 0 < difference.abs().max() < 2.0  # what NF4 loses in a random 32-wide model


def test_interop_refusals(tmp_path: Path) -> None:
    model = load_base("bert")

    def variant(change: dict[str, Any], drop: str | None = None) -> Path:
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / "bert" / "seq_bn", folder)
        fields = json.loads((folder / "adapter_config.json").read_text())
        fields["config"] |= change
        fields["config"].pop(drop, None)
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return folder

    cases = [
        ({"phm_layer": True}, None, r"phm_layer=True .*Compacter"),
        ({"inv_adapter": "nice"}, None, r"inv_adapter='nice'"),
        ({"architecture": "lora"}, None, r"architecture is 'lora'"),
        ({"sparkle": 3}, None, r"sparkle=3 is not known"),
        ({}, "non_linearity", r"non_linearity is missing"),
        ({"non_linearity": "mish"}, None, r"non_linearity: got 'mish'"),
        ({"mh_adapter": True}, None, r"missing keys: .*attention.output.adapters"),
        ({"reduction_factor": 8}, None, r"shapes differ"),
        ({"output_adapter": False, "mh_adapter": True}, None, r"unexpected keys"),
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for change, drop, message in cases:
        with pytest.raises(ValueError, match=message):
            pk.load_adapter(model, variant(change, drop))
        assert list(model.state_dict()) == list(before)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        pk.load_adapter(model, GOLDEN / "bert" / "norms")
    with pytest.raises(ValueError, match="expected 'peft' or 'adapterhub'"):
        pk.save_adapter(model, tmp_path, format="onnx")
    pk.patch(model, pk.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="kind 'lora'"):
        pk.save_adapter(model, tmp_path / "x", format="adapterhub")
