"""Models that PEFT or bitsandbytes has wrapped, on our kernels: same results, PEFT's API intact."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.hf.accelerate.fused import Accelerated, FusedLora
from peftkern.nn import Linear4bit, Linear8bit
from peftkern.nn.quantized import QuantizedLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from hf_models import KINDS, PEFT_WARNINGS, batch, build, randomize_adapters, task  # noqa: E402

pytestmark = [
    pytest.mark.hf,
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unmerge lora module:UserWarning"),
]


def wrapped(kind: str, base: nn.Module | None = None, **settings: Any) -> Any:
    fan = {"fan_in_fan_out": True} if kind == "gpt2" and base is None else {}
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | fan | settings
    base = build(kind) if base is None else base
    torch.manual_seed(11)
    model = peft.get_peft_model(base, peft.LoraConfig(**given, task_type=task(kind)))
    randomize_adapters(model)
    return model


def step(model: nn.Module, kind: str, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**batch(kind), **more)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().clone(), found


def assert_same_step(
    ours: nn.Module, theirs: nn.Module, kind: str, rtol: float = 1e-4, **more: Any
) -> None:
    (got, mine), (want, others) = step(ours, kind, **more), step(theirs, kind, **more)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    assert mine.keys() == others.keys()
    largest = max(gradient.abs().max().item() for gradient in others.values())
    for name, gradient in others.items():
        # The gradient of a key's bias is zero but for rounding: softmax does not see it.
        scale = max(gradient.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(mine[name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"bias": "all"}],
    ids=["plain", "rslora", "lora_bias", "bias_all"],
)
def test_results_and_gradients_are_those_of_peft(kind: str, settings: dict[str, Any]) -> None:
    model = wrapped(kind, **settings)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, kind)
    report = handle.report()
    layers = [m for m in model.modules() if isinstance(m, FusedLora)]
    assert report.fast_calls == len(layers) == len(report.accelerated) >= 8
    assert report.fallbacks == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_with_master_adapters(
    dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(
        build("llama").to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype
    )
    randomize_adapters(model)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    # Both round at every layer; they agree to a few roundings of the dtype.
    assert_same_step(model, twin, "llama", rtol=8 * torch.finfo(dtype).eps)
    assert handle.report().fallbacks == {}
    assert handle.verify(batch("llama")).ok


def test_autocast_gives_peft_dtypes() -> None:
    model = wrapped("llama")
    twin = copy.deepcopy(model)
    pk.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = model(**batch("llama")), twin(**batch("llama"))
    assert got.logits.dtype == want.logits.dtype == torch.bfloat16
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-2, atol=0)
    got.loss.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def test_several_active_adapters_add_up() -> None:
    model = wrapped("llama")
    model.add_adapter(
        "other", peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    )
    model.base_model.set_adapter(["default", "other"])
    randomize_adapters(model)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    assert handle.report().fallbacks == {}


def test_a_scaling_kept_as_a_tensor_is_followed() -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = wrapped("llama")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"], Tensor)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    for net in (model, twin):
        for module in net.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.scaling["default"].fill_(0.25)
    assert_same_step(model, twin, "llama")
    assert handle.report().fallbacks == {}


def reasons(handle: Any) -> str:
    return " | ".join(handle.report().fallbacks)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dora(kind: str) -> None:
    model = wrapped(kind, use_dora=True)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, kind)
    with torch.no_grad():  # as an optimizer does, behind the version counters
        for net in (model, twin):
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(1.5)
    assert_same_step(model, twin, kind)
    for net in (model, twin):
        net.merge_adapter()
        net.unmerge_adapter()
    assert_same_step(model, twin, kind)
    assert handle.report().fallbacks == {}
    assert handle.report().rows[0].kernel.startswith("dora_linear")
    checked = handle.verify(batch(kind))
    assert checked.ok, str(checked)


def test_dora_with_dropout_follows_peft_on_the_same_mask(monkeypatch: Any) -> None:
    model = wrapped("llama", use_dora=True, lora_dropout=0.4).train()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    twin = copy.deepcopy(layer)
    pk.accelerate(model)
    x = torch.randn(3, 64, requires_grad=True)
    seed = torch.tensor([5])
    monkeypatch.setattr("peftkern.functional.dora.seed_for", lambda *_: seed)
    got = layer(x)
    monkeypatch.setattr(
        twin.lora_dropout["default"], "forward", lambda v: pk.functional.dropout(v, 0.4, True, seed)
    )
    want = twin(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    parameters = [[x, *(p for p in m.parameters() if p.requires_grad)] for m in (layer, twin)]
    mine, others = (
        torch.autograd.grad(y.square().sum(), p)
        for y, p in zip((got, want), parameters, strict=True)
    )
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_not_cover_goes_to_peft() -> None:
    model = wrapped("llama", use_dora=True, target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=3, lora_dropout=0.5, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    randomize_adapters(model)
    twin = copy.deepcopy(model.eval())
    handle = pk.accelerate(model)
    got, want = step(model, "llama"), step(twin, "llama")
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])
    assert "one of them with DoRA" in reasons(handle)
    assert "one of them with DoRA" in str(handle.report())
    assert handle.report().fast_calls == 0
    model.base_model.set_adapter("other")
    model.train().add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["other", "third"])
    twin = copy.deepcopy(model)
    outputs = []
    for net in (model, twin):
        torch.manual_seed(2)
        outputs.append(step(net, "llama")[0])
    assert torch.equal(*outputs)
    assert "several active adapters with dropout" in reasons(handle)


@pytest.mark.parametrize("hotswappable", [False, True])
def test_mixed_batches(hotswappable: bool) -> None:
    model = wrapped("llama")
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    randomize_adapters(model)
    model.base_model.set_adapter(["default", "other"])  # so that both get gradients
    if hotswappable:
        from peft.utils.hotswap import prepare_model_for_compiled_hotswap

        prepare_model_for_compiled_hotswap(model, target_rank=8)
    twin = copy.deepcopy(model.eval())
    handle = pk.accelerate(model)
    names = ["default", "__base__", "other", "default"]
    assert_same_step(model, twin, "llama", adapter_names=names)
    assert handle.report().fallbacks == {}
    assert handle.report().fast_calls == 14
    with torch.no_grad():
        for choice in (["other"] * 4, ["__base__"] * 4):
            got = model(**batch("llama"), adapter_names=choice).logits
            want = twin(**batch("llama"), adapter_names=choice).logits
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for net in (model, twin):
        layer = net.base_model.model.model.layers[0].self_attn.q_proj
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            layer(torch.zeros(3, 64), adapter_names=names)
        layer.merge(adapter_names=["other"])
        with pytest.raises(ValueError, match="merged adapters"):
            layer(torch.zeros(4, 64), adapter_names=names)


def test_mixed_batches_with_biases_go_to_peft() -> None:
    model = wrapped("llama", lora_bias=True).eval()
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    names = ["default", "__base__", "default", "default"]
    got, want = (step(net, "llama", adapter_names=names) for net in (model, twin))
    assert torch.equal(got[0], want[0])
    assert reasons(handle) == "adapter_names with lora_bias"


def test_hooks_on_the_factors_run() -> None:
    model = wrapped("gpt2")
    handle = pk.accelerate(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLora))
    seen = []
    layer.lora_B["default"].register_forward_hook(lambda *_: seen.append(1))
    step(model, "gpt2")
    assert seen == [1]
    assert "lora_B carries forward hooks" in reasons(handle)
    assert handle.report().fast_calls == 7


def test_dropout_is_on_the_fast_path_and_follows_the_seed() -> None:
    model = wrapped("bert", lora_dropout=0.3).train()
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(step(model, "bert"))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[0][0], outputs[2][0])
    for name, gradient in outputs[0][1].items():
        assert torch.equal(gradient, outputs[1][1][name]), name
    assert handle.report().fallbacks == {}
    assert handle.verify(batch("bert")).ok
    assert_same_step(model.eval(), twin.eval(), "bert")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = wrapped("llama", lora_dropout=0.2).train()
    pk.accelerate(model)
    torch.manual_seed(1)
    plain = step(model, "llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    again = step(model, "llama", use_cache=False)
    assert torch.equal(plain[0], again[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    model = wrapped("llama", build("llama", num_hidden_layers=1))
    handle = pk.accelerate(model)
    want, gradients = step(model, "llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, mine = step(compiled, "llama")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        key = name if name in mine else f"_orig_mod.{name}"
        torch.testing.assert_close(mine[key], gradient, rtol=1e-4, atol=1e-6)
    assert handle.report().fast_calls == 7  # counted in the eager step only


def test_the_way_of_peft_goes_on_working(tmp_path: Path) -> None:
    model = wrapped("llama")
    keys = list(model.state_dict())
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert list(model.state_dict()) == keys
    for net in (model, twin):
        torch.manual_seed(3)
        net.add_adapter("other", peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"]))
        net.set_adapter("other")
        randomize_adapters(net)
    # lm_head is a new layer of PEFT's: not swapped until accelerate is called again.
    assert not isinstance(model.base_model.model.lm_head, Accelerated)
    assert pk.accelerate(model) is handle
    assert isinstance(model.base_model.model.lm_head, Accelerated)
    assert_same_step(model, twin, "llama")
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch("llama")).logits, twin(**batch("llama")).logits)
    model.set_adapter("default")
    twin.set_adapter("default")
    assert_same_step(model, twin, "llama")
    model.delete_adapter("other")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    pk.accelerate(loaded)
    twin.delete_adapter("other")
    assert_same_step(loaded, twin, "llama")
    expected = twin.merge_and_unload()
    merged = model.merge_and_unload()
    assert not any(isinstance(m, Accelerated) for m in merged.modules())
    with torch.no_grad():
        assert torch.equal(merged(**batch("llama")).logits, expected(**batch("llama")).logits)


def test_merged_and_unmerged_states() -> None:
    model = wrapped("gpt2").eval()
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    for net in (model, twin):
        net.merge_adapter()
    with torch.no_grad():
        assert torch.equal(model(**batch("gpt2")).logits, twin(**batch("gpt2")).logits)
    assert "merged" in reasons(handle)
    for net in (model, twin):
        net.unmerge_adapter()
    assert_same_step(model, twin, "gpt2")


def test_hotswap(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    first, second = wrapped("llama"), wrapped("llama")
    randomize_adapters(second, seed=99)
    second.save_pretrained(tmp_path)
    handle = pk.accelerate(first)
    hotswap_adapter(first, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert_same_step(first, second, "llama")
    assert handle.report().fallbacks == {}


def test_unpatch_puts_every_class_back() -> None:
    model = wrapped("llama")
    before = [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()]
    handle = pk.accelerate(model)
    assert pk.accelerate(model) is handle
    step(model, "llama")
    assert handle.unpatch() is model
    assert [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()] == before


def test_copies_and_pickles() -> None:
    model = wrapped("llama")
    pk.accelerate(model)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same_step(again, model, "llama")
    assert pk.accelerate(again).report().fast_calls > 0


def test_native_adapters_of_transformers() -> None:
    model = build("llama")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomize_adapters(model)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    assert handle.report().fast_calls == 4


def test_embeddings_are_named_and_left_alone() -> None:
    model = wrapped("llama", target_modules=["embed_tokens", "q_proj"])
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    (row,) = (row for row in handle.report().rows if not row.now)
    assert "embed_tokens" in row.name
    assert "table look-up" in row.reason
    with pytest.raises(ValueError, match=r"strict: 1 layers are left alone"):
        pk.accelerate(model, strict=True)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        pk.accelerate({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"use peftkern.patch"):
        pk.accelerate(build("llama"))


# bitsandbytes

SHAPE = {"intermediate_size": 128}  # its CPU kernels are right for in % 64 == 0, out % 32 == 0


def replace_linears(model: nn.Module, make: Any) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(module))
    return model


def bnb_model(quant: str, seed: int = 0, **settings: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        inner, outer, bias = linear.in_features, linear.out_features, linear.bias is not None
        if quant == "int8":
            layer = bnb.nn.Linear8bitLt(inner, outer, bias, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(linear.weight.data, False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(inner, outer, bias, quant_type=quant, **settings)
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                quant_type=quant,
                compress_statistics=settings.get("compress_statistics", True),
                module=layer,
            )
        return layer.to("cpu")

    model = replace_linears(build("llama", seed, **SHAPE), make)
    setattr(model, "is_loaded_in_8bit" if quant == "int8" else "is_loaded_in_4bit", True)
    return model.train()


def decoded_twin(model: nn.Module) -> nn.Module:
    """The same model with the stored bytes decoded by hand into dense layers."""
    twin = build("llama", **SHAPE)
    state = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            q = pk.QuantizedTensor.from_bnb(module)
            with pk.use_backend("reference"):
                state[f"{name}.weight"] = q.dequantize(torch.float32)
    twin.load_state_dict({**twin.state_dict(), **state})
    return twin


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_qlora_of_bitsandbytes(quant: str, double: bool) -> None:
    model = wrapped("llama", bnb_model(quant, compress_statistics=double))
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == addresses
    assert_same_step(model, twin, "llama")
    report = handle.report()
    assert report.fast_calls == 14
    assert {row.format for row in report.rows if "lora" not in row.name} == {quant}
    assert report.fallbacks == {}
    checked = handle.verify(batch("llama"))
    assert checked.ok, str(checked)


def test_dora_and_mixed_batches_over_bitsandbytes() -> None:
    model = wrapped("llama", bnb_model("nf4"), use_dora=True)
    model.add_adapter("plain", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    randomize_adapters(model)
    twin = copy.deepcopy(model)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    assert handle.report().fallbacks == {}
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    assert_same_step(model, twin, "llama")
    assert reasons(handle) == "its lora_magnitude_vector carries forward hooks, which must run"
    mixed = [net.base_model.model.model.layers[0].self_attn.q_proj for net in (model, twin)]
    names, x = ["plain", "__base__", "plain"], torch.randn(3, 5, 64)
    got, want = (layer(x, adapter_names=names) for layer in mixed)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # The layer that PEFT computed called its base, which is one of ours as well.
    assert handle.report().fast_calls == 14 + (13 + 1) + 1


def test_int8_of_bitsandbytes_is_decoded_exactly() -> None:
    base = bnb_model("int8")
    twin = wrapped("llama", decoded_twin(base))
    model = wrapped("llama", base)
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    assert handle.report().fallbacks == {}


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_eval_leaves_the_bytes_alone(quant: str) -> None:
    base = bnb_model(quant)
    twin = decoded_twin(base).eval()
    handle = pk.accelerate(base.eval())
    before = [p.data.clone() for p in base.parameters()]
    with torch.no_grad():
        got, want = base(**batch("llama")).logits, twin(**batch("llama")).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b.data) for a, b in zip(before, base.parameters(), strict=True))
    assert handle.report().fast_calls == 14


def test_compute_dtype_is_honoured() -> None:
    model = wrapped("llama", bnb_model("nf4", compute_dtype=torch.bfloat16))
    handle = pk.accelerate(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    got = layer(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, got.bfloat16().float())  # it was rounded to the compute dtype
    assert "computes in bfloat16" in str(handle.report())


def test_merging_into_bitsandbytes_is_followed() -> None:
    model = wrapped("llama", bnb_model("nf4"))
    handle = pk.accelerate(model)
    model.merge_adapter()  # PEFT replaces the base's weight by a new one
    x = batch("llama")
    twin = build("llama", **SHAPE)
    with torch.no_grad():
        merged = model(**x).logits
    assert "merged" in reasons(handle)
    state = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, FusedLora):
            state[f"{name}.weight"] = pk.QuantizedTensor.from_bnb(module.base_layer).dequantize()
    twin.load_state_dict({**twin.state_dict(), **state})
    with torch.no_grad():
        torch.testing.assert_close(merged, twin(**x).logits, rtol=1e-4, atol=1e-4)


# PEFT on peftkern's own quantized layers


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_on_our_quantized_base(quant: str, dora: bool) -> None:
    make = Linear8bit.from_linear if quant == "int8" else Linear4bit.from_linear
    base = replace_linears(build("llama"), make)
    dense = build("llama")
    for name, module in base.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    model = wrapped("llama", base, use_dora=dora)
    twin = wrapped("llama", dense, use_dora=dora)
    if dora:
        twin.load_state_dict(
            {**twin.state_dict(), **{k: v for k, v in model.state_dict().items() if "lora" in k}}
        )
    assert_same_step(model, twin, "llama")  # PEFT's own forward over our layer
    handle = pk.accelerate(model)
    assert_same_step(model, twin, "llama")
    assert handle.report().fallbacks == {}
    before = {n: p.data.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    row = handle.report().rows[0]
    assert row.merge_error is not None
    assert 0 < row.merge_error < 3
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    expected = twin.base_model.model.model.layers[0].mlp.up_proj
    expected.merge()
    q = layer.base_layer.requantize(expected.base_layer.weight.data)
    same = (q.dequantize(torch.float32) - layer.base_layer.dequantize(torch.float32)).abs()
    # The sums differ in the last bit, which may move a weight at a midpoint to the next code.
    assert (same > 1e-6).float().mean() < 0.01
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, before[name]), name
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, QuantizedLinear)
    merged(**batch("llama"))
