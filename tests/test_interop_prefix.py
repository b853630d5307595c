"""Prefix and prompt tuning against the real PEFT: outputs, gradients, and files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hf_models
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftkern as pk

pytestmark = [pytest.mark.hf, *hf_models.PEFT_WARNINGS]
METHODS = ("prefix", "projected", "prompt")
LENGTH = 5


def _batch(kind: str, rows: int = 3) -> dict[str, Tensor]:
    """Rows of one length, the first with padding on the left and the second on the right."""
    batch = hf_models.batch(kind, rows=rows)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return {**batch, "attention_mask": mask}


def _theirs(kind: str, method: str) -> Any:
    common = dict(task_type=hf_models.task(kind), num_virtual_tokens=LENGTH)
    torch.manual_seed(3)
    config: Any
    if method == "prompt":
        config = peft.PromptTuningConfig(**common)
    elif method == "prefix":
        config = peft.PrefixTuningConfig(**common)
    else:
        config = peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=24)
    return peft.get_peft_model(hf_models.build(kind), config).eval()


def _ours(kind: str, method: str) -> nn.Module:
    common: Any = dict(task_type=hf_models.task(kind), num_virtual_tokens=LENGTH)
    model = hf_models.build(kind)
    config: Any
    if method == "prompt":
        config = pk.PromptTuningConfig(**common)
    elif method == "prefix":
        config = pk.PrefixTuningConfig(**common)
    else:
        config = pk.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=24)
    pk.patch(model, config)
    return model.eval()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the names that both libraries share."""
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.replace("base_model.", "").split(".")
            skip = ("prompt_encoder", "prefix_encoder", "prefix_tuning", "prompt_tuning", "default")
            names[".".join(p for p in parts if p not in skip)] = parameter
    return names


def _same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = _trained(ours), _trained(theirs)
    for name, parameter in other.items():
        key = name if name in mine else name.replace("embedding.weight", "weight")
        with torch.no_grad():
            mine[key].copy_(parameter)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_interop_outputs_and_gradients(kind: str, method: str) -> None:
    theirs, ours = _theirs(kind, method), _ours(kind, method)
    _same_weights(ours, theirs)
    batch = _batch(kind)
    got, want = ours(**batch), theirs(**batch)
    torch.testing.assert_close(got.logits, want.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-6, rtol=1e-5)
    got.loss.backward()
    want.loss.backward()
    mine = _trained(ours)
    assert len(mine) == len(_trained(theirs))
    for name, parameter in _trained(theirs).items():
        key = name if name in mine else name.replace("embedding.weight", "weight")
        assert parameter.grad is not None
        assert mine[key].grad is not None, name
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(mine[key].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_interop_peft_files_in_ours(kind: str, method: str, tmp_path: Path) -> None:
    theirs = _theirs(kind, method)
    hf_models.randomize_adapters(theirs)
    theirs.save_pretrained(tmp_path)
    model = hf_models.build(kind).eval()
    pk.load_adapter(model, tmp_path)
    batch = _batch(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, theirs(**batch).logits, atol=2e-6, rtol=1e-5
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_interop_our_files_in_peft(kind: str, method: str, tmp_path: Path) -> None:
    ours = _ours(kind, method)
    hf_models.randomize_adapters(ours)
    pk.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf_models.build(kind), tmp_path).eval()
    batch = _batch(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(**batch).logits, ours(**batch).logits, atol=2e-6, rtol=1e-5
        )
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    reference = _theirs(kind, method).peft_config["default"].to_dict()
    assert set(written) == {k for k in reference if k != "runtime_config"}
    for field in ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"):
        assert written[field] == reference[field], field


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_interop_of_an_encoder_decoder(method: str, tmp_path: Path) -> None:
    settings: Any = dict(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip

    def build() -> Any:
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()

    common: Any = dict(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    prefix = method == "prefix"
    config = (peft.PrefixTuningConfig if prefix else peft.PromptTuningConfig)(**common)
    theirs, ours = peft.get_peft_model(build(), config).eval(), build()
    pk.patch(ours, (pk.PrefixTuningConfig if prefix else pk.PromptTuningConfig)(**common))
    _same_weights(ours, theirs)
    ids = hf_models.batch("llama", rows=2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :7].contiguous()}
    got, want = ours(**batch), theirs(**batch)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-6, rtol=1e-5)
    grads = [
        torch.autograd.grad(out.loss, [p for p in m.parameters() if p.requires_grad])[0]
        for out, m in ((got, ours), (want, theirs))
    ]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-4)
    asked: Any = dict(input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5)
    generated = ours.generate(**asked)
    assert torch.equal(generated, ours.generate(**asked, use_cache=False))
    assert torch.equal(generated, theirs.generate(**asked))
    pk.save_adapter(ours, tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    loaded = build()
    pk.load_adapter(loaded, tmp_path)
    with torch.no_grad():
        for model in (again, loaded):
            torch.testing.assert_close(model(**batch).logits, got.logits.detach())


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_interop_generation(kind: str, method: str) -> None:
    theirs, ours = _theirs(kind, method), _ours(kind, method)
    for model in (theirs, ours):
        model.config.pad_token_id = model.generation_config.pad_token_id = 0
    _same_weights(ours, theirs)
    ids = hf_models.batch(kind, rows=2)["input_ids"]
    asked: Any = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                      min_new_tokens=6, do_sample=False)  # fmt: skip
    want = theirs.generate(**asked)
    assert torch.equal(ours.generate(**asked), want)
    assert torch.equal(ours.generate(**asked, use_cache=False), want)


_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"num_key_value_heads": 2, "head_dim": 24},
    "gpt_neox": {},
    "granite": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "phi": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    "stablelm": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", list(_FAMILIES))
def test_interop_outputs_of_a_family(family: str) -> None:
    settings = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=64)  # fmt: skip

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **settings, **_FAMILIES[family])
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    common: Any = dict(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(build(), peft.PrefixTuningConfig(**common)).eval()
    ours = build()
    pk.patch(ours, pk.PrefixTuningConfig(**common))
    _same_weights(ours, theirs)
    batch = _batch("llama")
    with torch.no_grad():
        got, want = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_interop_feature_extraction() -> None:
    for method, config in (
        (pk.PrefixTuningConfig, peft.PrefixTuningConfig),
        (pk.PromptTuningConfig, peft.PromptTuningConfig),
    ):
        base = hf_models.build("bert").bert.eval()
        common: Any = dict(task_type="FEATURE_EXTRACTION", num_virtual_tokens=LENGTH)
        ours = copy.deepcopy(base)
        theirs = peft.get_peft_model(base, config(**common)).eval()
        pk.patch(ours, method(**common))
        _same_weights(ours, theirs)
        batch = {k: v for k, v in _batch("bert").items() if k != "labels"}
        with torch.no_grad():
            got, want = ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_interop_files_hold_what_an_mlp_made(tmp_path: Path) -> None:
    ours = _ours("llama", "projected")
    hf_models.randomize_adapters(ours)
    pk.save_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match="reparametrization MLP"):
        pk.load_adapter(ours, tmp_path)
    twin = hf_models.build("llama").eval()
    pk.load_adapter(twin, tmp_path)
    batch = _batch("llama")
    with torch.no_grad():
        torch.testing.assert_close(twin(**batch).logits, ours(**batch).logits)


def test_interop_refuses_what_is_not_computed(tmp_path: Path) -> None:
    ours = _ours("gpt2", "prefix")
    pk.save_adapter(ours, tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    for change, message in (
        ({"num_transformer_submodules": 3}, "num_transformer_submodules: got 3"),
        ({"something_new": 3}, "something_new=3"),
        ({"num_virtual_tokens": 7}, "shapes differ: prompt_embeddings"),
    ):
        file.write_text(json.dumps({**fields, **change}))
        model = hf_models.build("gpt2")
        before = hf_models.snapshot(model)
        with pytest.raises(ValueError, match=message):
            pk.load_adapter(model, tmp_path)
        hf_models.assert_unchanged(model, before)
