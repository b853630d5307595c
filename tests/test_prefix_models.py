"""Prefix and prompt tuning in whole models: undoing, switching, checkpointing, generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.hf import disable_adapter
from peftkern.nn import PrefixTuning, PromptTuning

pytestmark = [pytest.mark.hf]
CONFIGS = {
    "prefix": pk.PrefixTuningConfig(num_virtual_tokens=4),
    "projected": pk.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
    "prompt": pk.PromptTuningConfig(num_virtual_tokens=4),
}


def _loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    loss = model(**batch).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_unpatch_leaves_no_trace(kind: str, method: str) -> None:
    model = hf_models.build(kind).eval()
    batch = hf_models.batch(kind)
    before, implementation = hf_models.snapshot(model), model.config._attn_implementation
    with torch.no_grad():
        want = model(**batch).logits
        handle = pk.patch(model, CONFIGS[method])
        assert not torch.allclose(model(**batch).logits[:, -want.shape[1] :], want)
        with disable_adapter(model):
            assert torch.equal(model(**batch).logits, want)
        handle.unpatch()
        assert torch.equal(model(**batch).logits, want)
    hf_models.assert_unchanged(model, before)
    assert model.config._attn_implementation == implementation
    assert not any("_peftkern_prefix" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_gradients_with_checkpointing_are_those_without(
    kind: str, method: str, reentrant: bool
) -> None:
    if reentrant and method == "projected":
        pytest.skip("reentrant checkpointing walks the MLP's graph once a layer")
    model = hf_models.build(kind).train()
    pk.patch(model, CONFIGS[method])
    hf_models.randomize_adapters(model)
    batch = hf_models.batch(kind)
    plain = _loss_and_gradients(model, batch)
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    loss = model(**batch).loss
    loss.backward()
    again = [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
    for got, want in zip(again, plain, strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)
    assert all(g.abs().max() > 0 for g in plain)


@pytest.mark.parametrize("method", list(CONFIGS))
def test_several_adapters(method: str) -> None:
    model = hf_models.build("llama").eval()
    batch = hf_models.batch("llama")
    handle = pk.patch(model, CONFIGS[method])
    hf_models.randomize_adapters(model)
    with torch.no_grad():
        first = model(**batch).logits
        pk.patch(model, CONFIGS[method], adapter_name="other")
        assert not torch.allclose(model(**batch).logits, first)
        pk.set_adapter(model, "default")
        assert torch.equal(model(**batch).logits, first)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    with pytest.raises(ValueError, match="of which one can be active"):
        pk.set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match="cannot be merged"):
        pk.merge(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, first)
    handle.unpatch()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_with_padding_on_the_left(kind: str, method: str) -> None:
    model = hf_models.build(kind).eval()
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    pk.patch(model, CONFIGS[method])
    hf_models.randomize_adapters(model)
    ids = hf_models.batch(kind, rows=2, length=9)["input_ids"]
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :4], mask[0, :4] = 0, 0
    options: Any = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    both = model.generate(input_ids=padded, attention_mask=mask, **options)
    for row, start in ((0, 4), (1, 0)):
        own = ids[row : row + 1, start:]
        alone = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(both[row, -6:], alone[0, -6:])


@pytest.mark.parametrize("method", list(CONFIGS))
def test_gradients_over_an_nf4_base_under_autocast(method: str) -> None:
    config = CONFIGS[method]
    fields = {k: v for k, v in config.to_dict().items() if k not in ("quantize", "adapter_dtype")}
    model = hf_models.build("llama").train()
    handle = pk.patch(model, type(config)(**{**fields, "quantize": "nf4"}))
    hf_models.randomize_adapters(model)
    assert "Linear4bit" in {type(m).__name__ for m in model.modules()}
    batch = hf_models.batch("llama")
    wide = _loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = _loss_and_gradients(model, batch)
    for got, want in zip(narrow, wide, strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).norm() < 0.1 * want.norm()
    handle.unpatch()


@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_attention_dropout_trains(kind: str) -> None:
    name = {"gpt2": "attn_pdrop", "llama": "attention_dropout"}.get(
        kind, "attention_probs_dropout_prob"
    )
    model = hf_models.build(kind, **{name: 0.5}).train()
    pk.patch(model, CONFIGS["prefix"])
    batch = hf_models.batch(kind)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_sliding_windows_keep_the_prefix_in_sight() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=3,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    pk.patch(model, CONFIGS["prefix"])
    ids = hf_models.batch("llama", rows=1, length=16)["input_ids"]
    prefix = model.prefix_tuning.prefix_encoder["default"].embedding.weight
    (grad,) = torch.autograd.grad(model(input_ids=ids).logits[0, -1].sum(), prefix)
    assert grad.abs().max() > 0
    changed = ids.clone()
    changed[0, 0] += 1
    with torch.no_grad():
        far = model(input_ids=changed).logits[0, -1]
        assert torch.equal(far, model(input_ids=ids).logits[0, -1])


def test_prompts_start_from_the_vocabulary(tmp_path: Path) -> None:
    import transformers

    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sort", "these", "words"]
    vocabulary.write_text("\n".join(words))
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path)
    model = hf_models.build("bert")
    table = model.get_input_embeddings().weight
    text = pk.PromptTuningConfig(
        num_virtual_tokens=7,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="sort these words",
        tokenizer_name_or_path=str(tmp_path),
    )
    pk.patch(model, text)
    own = model.prompt_tuning.prompt_encoder["default"].weight
    assert torch.equal(own, table[[2, 5, 6, 7, 3, 2, 5]])
    sampled = pk.PromptTuningConfig(num_virtual_tokens=9, prompt_tuning_init="SAMPLE_VOCAB")
    pk.patch(model, sampled, adapter_name="sampled")
    drawn = model.prompt_tuning.prompt_encoder["sampled"].weight
    assert all((table == row).all(1).any() for row in drawn)


def test_modules_without_a_model() -> None:
    prefix = PrefixTuning(3, num_layers=2, num_heads=2, head_dim=8, encoder_hidden_size=5)
    assert prefix.prefix_encoder["default"].embedding.weight.shape == (3, 16)
    assert prefix.prefix_encoder["default"].transform[2].weight.shape == (64, 5)
    q, k, v = (torch.randn(2, h, 4, 8) for h in (4, 2, 2))
    out = prefix(q, k, v, layer=1)
    want = pk.functional.prefix_attention(q, k, v, *prefix.keys_and_values(1))
    assert torch.equal(out, want)
    zero = PrefixTuning(3, 2, 2, 8, init_weights="zero")
    assert not zero.keys_and_values(0)[0].any()
    prefix.enable_adapters(False)
    with pytest.raises(RuntimeError, match="no prefix is active"):
        prefix.keys_and_values(0)
    prompt = PromptTuning(3, 8, initial=torch.ones(3, 8))
    assert torch.equal(prompt(torch.zeros(2, 1, 8))[:, :3], torch.ones(2, 3, 8))
    with pytest.raises(ValueError, match="initial: got shape"):
        PromptTuning(3, 8, initial=torch.ones(2, 8))


def test_refusals_name_the_family() -> None:
    import transformers

    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )  # fmt: skip
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    )
    for model, name in ((opt, "'opt'"), (bloom, "'bloom'")):
        with pytest.raises(ValueError, match=f"does not know how {name}"):
            pk.patch(model, CONFIGS["prefix"])
    plain = nn.Sequential(nn.Linear(4, 4))
    for method in ("prefix", "prompt"):
        with pytest.raises(ValueError, match="needs a transformers model"):
            pk.patch(plain, CONFIGS[method])
    upcast = hf_models.build("gpt2", reorder_and_upcast_attn=True)
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        pk.patch(upcast, CONFIGS["prefix"])
    for wrong in (
        lambda: pk.PrefixTuningConfig(num_virtual_tokens=0),
        lambda: pk.PrefixTuningConfig(encoder_hidden_size=4),
        lambda: pk.PrefixTuningConfig(init_weights="ones"),
        lambda: pk.PromptTuningConfig(prompt_tuning_init="TEXT"),
        lambda: pk.PromptTuningConfig(prompt_tuning_init="other"),
        lambda: pk.PromptTuningConfig(tokenizer_kwargs={"trust_remote_code": True}),
    ):
        with pytest.raises(ValueError, match=r"expected|needs|needed|refused"):
            wrong()


def test_attentions_cannot_be_asked_for() -> None:
    model = hf_models.build("llama").eval()
    pk.patch(model, CONFIGS["prefix"])
    ids = hf_models.batch("llama")["input_ids"]
    with pytest.raises(ValueError, match="output_attentions"):
        model.model(input_ids=ids, output_attentions=True)


def test_the_report_names_the_kernel() -> None:
    model = hf_models.build("llama")
    report = pk.patch(model, CONFIGS["prefix"]).report()
    rows = {row.name: row for row in report.rows if row.asked}
    assert set(rows) == {f"model.layers.{i}.self_attn" for i in range(2)}
    assert all(row.kernel.startswith("prefix_attention: ") for row in rows.values())
    assert report.trainable == 4 * 2 * 2 * 32


# Dynamo itself looks at the gradient of the lengthened embeddings while it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_model_compiles_whole(method: str) -> None:
    model = hf_models.build("llama").train()
    pk.patch(model, CONFIGS[method])
    batch = hf_models.batch("llama")
    want = _loss_and_gradients(model, batch)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch).loss
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for got, expected in zip([loss.detach(), *grads], want, strict=True):
        torch.testing.assert_close(got, expected)
