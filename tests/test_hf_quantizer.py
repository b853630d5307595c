"""from_pretrained into our quantized layers: the bytes of quantizing by hand, saved and loaded."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern as pk
from peftkern.nn.experts import QuantizedExperts, is_experts
from peftkern.nn.quantized import QuantizedLinear

transformers = pytest.importorskip("transformers")
import architectures  # noqa: E402
from hf_models import KINDS, PEFT_WARNINGS, batch, build, randomize_adapters  # noqa: E402

pytestmark = [pytest.mark.hf, *PEFT_WARNINGS]


def same_state(a: Any, b: Any) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", ["nf4", "nf4 single", "int8"])
def test_bytes_and_round_trip(kind: str, quant: str, tmp_path: Path) -> None:
    source = build(kind)
    source.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    config = pk.INT8Config() if quant == "int8" else pk.NF4Config(double_quant=quant == "nf4")
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == {"gpt2": 8, "llama": 14, "bert": 13}[kind]
    assert "classifier" not in layers
    assert "lm_head" not in layers
    for name, layer in layers.items():
        original = source.get_submodule(name).weight.detach()
        wanted = layer.requantize(original.T.contiguous() if kind == "gpt2" else original)
        for mine, hand in zip(layer.quantized.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(mine, hand), name
            assert not mine.requires_grad
    model.save_pretrained(tmp_path / "small")
    saved = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "peftkern"
    again = type(source).from_pretrained(tmp_path / "small")
    same_state(model, again)
    again.save_pretrained(tmp_path / "smaller")
    same_state(model, type(source).from_pretrained(tmp_path / "smaller"))
    with torch.no_grad():
        first, second = model(**batch(kind)).logits, again(**batch(kind)).logits
    assert torch.equal(first, second)


def test_statistics_stay_fp32_in_a_half_precision_model(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=pk.NF4Config(double_quant=False), dtype=torch.bfloat16
    )
    layer = model.model.layers[0].mlp.up_proj
    assert layer.absmax.dtype == torch.float32
    assert layer.quant_dtype == torch.bfloat16
    assert model(**batch("llama")).logits.dtype == torch.bfloat16


def test_adapters_train_over_it(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=pk.NF4Config()
    )
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_qat_trainable
    handle = pk.patch(model, pk.LoRAConfig(r=4))
    assert model.hf_quantizer.is_qat_trainable  # so that Trainer takes it
    assert handle.report().rows[0].format == "nf4"
    randomize_adapters(model)
    report = handle.verify(batch("llama"))
    assert report.ok, str(report)


def test_peft_over_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=pk.NF4Config()
    )
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    handle = pk.accelerate(wrapped)
    wrapped(**batch("llama")).loss.backward()
    assert handle.report().fast_calls == 14


def test_weights_that_a_model_reads_itself_stay_dense(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    source = transformers.T5ForConditionalGeneration(config).eval()
    source.save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=pk.INT8Config()
    ).eval()
    kinds = {n.rsplit(".")[-1]: isinstance(m, QuantizedLinear) for n, m in model.named_modules()}
    assert kinds["wi"]
    assert kinds["q"]
    assert not kinds["wo"]  # T5 casts its activations to the dtype of this weight
    given = {"input_ids": torch.arange(1, 9)[None], "labels": torch.arange(1, 9)[None]}
    with torch.no_grad():
        got, want = model(**given).logits, source(**given).logits
    assert torch.linalg.vector_norm(got - want) < 0.05 * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("config", [pk.NF4Config(), pk.INT8Config()], ids=["nf4", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_stacked_experts(name: str, config: Any, tmp_path: Path) -> None:
    """Checkpoints hold a matrix an expert, models a stack, ours a quantized layer an expert."""
    source = architectures.build(name).eval()
    source.save_pretrained(tmp_path / "dense")
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert not [n for n, p in model.named_parameters() if p.is_meta]
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}
    assert len(stacks) == sum(is_experts(m) for m in source.modules()) > 0
    for path, stack in stacks.items():
        for parameter in ("gate_up_proj", "down_proj"):
            dense = getattr(source.get_submodule(path), parameter).detach()
            for layer, weight in zip(stack.layers(parameter), dense, strict=True):
                wanted = layer.requantize(weight)
                for mine, hand in zip(layer.quantized.tensors(), wanted.tensors(), strict=True):
                    assert torch.equal(mine, hand)
    model.save_pretrained(tmp_path / "small")
    again = type(source).from_pretrained(tmp_path / "small")
    same_state(model, again)
    again.save_pretrained(tmp_path / "smaller")
    same_state(model, type(source).from_pretrained(tmp_path / "smaller"))
    given = architectures.batch(name, 0)
    with torch.no_grad():
        first, second = model(**given).logits, again(**given).logits
    assert torch.equal(first, second)
    handle = pk.patch(again, pk.LoRAConfig(r=2, target_parameters=["experts.down_proj"]))
    randomize_adapters(again)
    report = handle.verify(given)
    assert report.ok, str(report)


def test_stacked_experts_can_stay_dense(tmp_path: Path) -> None:
    source = architectures.build("qwen3_moe")
    source.save_pretrained(tmp_path / "dense")
    config = pk.NF4Config(skip_modules=["lm_head", "experts"])
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, QuantizedLinear)
    assert torch.equal(layer.mlp.experts.down_proj, source.model.layers[0].mlp.experts.down_proj)
    model.save_pretrained(tmp_path / "small")
    same_state(model, type(source).from_pretrained(tmp_path / "small"))


def test_a_stack_that_the_checkpoint_lacks_is_reported(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = architectures.build("qwen3_moe")
    source.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(file)
    gone = [n for n in tensors if "layers.1.mlp.experts" in n and "down_proj" in n]
    assert gone
    safetensors.save_file(
        {n: t for n, t in tensors.items() if n not in gone}, file, {"format": "pt"}
    )
    model, info = type(source).from_pretrained(
        tmp_path, quantization_config=pk.NF4Config(), output_loading_info=True
    )
    path = "model.layers.1.mlp.experts"
    assert set(info["missing_keys"]) == {f"{path}.down_proj", f"{path}.gate_up_proj"}
    assert not [n for n, p in model.named_parameters() if p.is_meta]
    kinds = [isinstance(m, QuantizedExperts) for m in model.modules() if is_experts(m)]
    assert kinds == [True, False]  # the incomplete one is whole, dense and freshly initialised


def test_unknown_settings() -> None:
    with pytest.raises(ValueError, match=r"blocksize: got 48"):
        pk.NF4Config(blocksize=48)
    from peftkern.hf.quantizer import PeftkernConfig

    with pytest.raises(ValueError, match=r"quant_type: got 'nf3'"):
        PeftkernConfig("nf3")
    with pytest.raises(ValueError, match=r"unknown fields: group"):
        PeftkernConfig(group=3)


class _Allocated(TorchDispatchMode):
    """The most bytes outside the meta device that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone() -> None:
            self.now -= size
            self._seen.discard(key)

        self._seen.add(key)
        weakref.finalize(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("config", [pk.NF4Config(), pk.INT8Config()], ids=["nf4", "int8"])
def test_the_dense_model_is_never_in_memory(config: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    source = build("llama", **sizes)
    dense = sum(p.nbytes for p in source.parameters())
    source.save_pretrained(tmp_path, max_shard_size="1MB")
    with _Allocated() as allocated:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config
        )
    kept = sum(p.nbytes for p in model.parameters())
    assert kept < dense / 3
    largest = max(p.nbytes for p in source.parameters())
    assert kept <= allocated.most < kept + 2 * largest  # one weight at a time


def test_checkpoints_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    safetensors = pytest.importorskip("safetensors.torch")
    source = build("llama", intermediate_size=128)
    twin = copy.deepcopy(source)
    for name, module in list(source.named_modules()):
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, quant_type="nf4"
        )
        layer.load_state_dict({"weight": module.weight.data})
        source.set_submodule(name, layer.to("cpu"))
        q = pk.QuantizedTensor.from_bnb(layer)
        twin.get_submodule(name).weight.data = q.dequantize(torch.float32)
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    config = source.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
            "llm_int8_skip_modules": ["lm_head"],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    handle = pk.accelerate(model)
    with torch.no_grad():
        got, want = model(**batch("llama")).logits, twin(**batch("llama")).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert handle.report().fast_calls == 14
    assert handle.report().fallbacks == {}
