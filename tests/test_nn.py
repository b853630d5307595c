"""The modules: bytes that survive everything, adapters that follow PEFT, exact merges."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.nn import Linear4bit, Linear8bit, LoRALinear, TrainableCopy
from peftkern.nn.quantized import QuantizedLinear

FORMATS = ("nf4", "fp4", "int8")


class Conv1D(nn.Module):
    """The GPT-2 family's layer as transformers has it: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def quantized(linear: nn.Module, form: str, **options: object) -> QuantizedLinear:
    if form == "int8":
        return Linear8bit.from_linear(linear)
    return Linear4bit.from_linear(linear, quant_type=form, **options)


def layer_of(form: str, inner: int = 96, outer: int = 40, **options: object) -> nn.Module:
    linear = nn.Linear(inner, outer)
    return linear if form == "dense" else quantized(linear, form, **options)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(64, 32), (50, 7), (33, 5)])
def test_forward_is_the_dequantized_linear(form: str, shape: tuple[int, int]) -> None:
    layer = quantized(nn.Linear(*shape), form)
    x = torch.randn(3, 2, shape[0], requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_conv1d_is_quantized_transposed(form: str) -> None:
    conv = Conv1D(24, 64)
    layer = quantized(conv, form)
    assert (layer.in_features, layer.out_features) == (64, 24)
    plain = nn.Linear(64, 24)
    plain.weight.data = conv.weight.data.t().contiguous()
    assert torch.equal(layer.weight, quantized(plain, form).weight)
    assert layer.bias is conv.bias


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "float"])
def test_casting_moves_but_never_rounds(form: str, cast: str) -> None:
    layer = quantized(nn.Linear(64, 32), form)
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    if cast == "to":
        layer.to(torch.bfloat16)
    else:
        getattr(layer, cast)()
    for key, value in before.items():
        now = layer.state_dict()[key]
        assert now.dtype == value.dtype
        assert torch.equal(now, value)
    wanted = {"half": torch.float16, "double": torch.float64, "float": torch.float32}
    assert layer.bias.dtype == wanted.get(cast, torch.bfloat16)
    x = torch.randn(2, 64, dtype=layer.bias.dtype)
    assert layer(x).dtype == x.dtype


def test_type_does_not_destroy_codes() -> None:
    layer = quantized(nn.Linear(64, 32), "nf4")
    before = layer.weight.clone()
    layer.type(torch.float16)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("inner", [64, 33])
def test_state_dict_round_trip(form: str, double_quant: bool, inner: int) -> None:
    options = {} if form == "int8" else {"double_quant": double_quant}
    layer = layer_of(form, inner, 6, **options)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = layer_of(form, inner, 6, **options)
    twin.load_state_dict(state)
    for key, value in layer.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)
        assert not isinstance(value, nn.Parameter) or type(value) is nn.Parameter
    assert not list(layer.buffers())
    assert all(type(p) is nn.Parameter for p in layer.parameters())
    assert all(not p.requires_grad for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("form", FORMATS)
def test_meta_construction_loads_by_assignment(form: str) -> None:
    layer = layer_of(form)
    if form == "int8":
        empty: QuantizedLinear = Linear8bit(96, 40, device="meta")
    else:
        empty = Linear4bit(96, 40, quant_type=form, device="meta")
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in layer.named_parameters()
    }
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 96)
    assert torch.equal(empty(x), layer(x))
    meta = quantized(nn.Linear(96, 40, device="meta"), form)
    assert meta.weight.device.type == "meta"
    assert meta.weight.shape == layer.weight.shape


@pytest.mark.parametrize("form", FORMATS)
def test_loading_what_does_not_fit_raises(form: str) -> None:
    layer = layer_of(form)
    name = type(layer).__name__
    with pytest.raises(RuntimeError, match=rf"{name}.from_linear"):
        layer.load_state_dict(nn.Linear(96, 40).state_dict())
    with pytest.raises(RuntimeError, match=r"quantized differently|size mismatch"):
        layer.load_state_dict(layer_of(form, 96, 48).state_dict())
    plain = dict(layer_of(form, 96, 48).state_dict())  # without torch's metadata
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(plain)


def test_loading_another_format_of_the_same_shape_raises() -> None:
    with pytest.raises(RuntimeError, match=r"quant_type: saved 'fp4', this layer 'nf4'"):
        layer_of("nf4").load_state_dict(layer_of("fp4").state_dict())
    plain = dict(layer_of("nf4", double_quant=False).state_dict())
    with pytest.raises(RuntimeError, match=r"absmax: expected torch.uint8"):
        layer_of("nf4").load_state_dict(plain)


@pytest.mark.parametrize("form", ["dense", *FORMATS])
def test_copies_and_pickles_agree(form: str) -> None:
    layer = LoRALinear(layer_of(form), r=4, lora_dropout=0.1, init_lora_weights=False).eval()
    x = torch.randn(5, 96)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.lora_A["default"].weight.zero_()
        assert torch.equal(layer(x), expected)


def test_repr_says_what_it_is() -> None:
    text = repr(LoRALinear(layer_of("nf4"), r=4))
    assert "quant_type='nf4'" in text
    assert "blocksize=64" in text
    assert "format='nf4'" in text


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"from_linear: expected nn.Linear"):
        Linear4bit.from_linear(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="quant_type: got 'int4'"):
        Linear4bit(64, 32, quant_type="int4")
    with pytest.raises(ValueError, match="blocksize: got 63"):
        Linear4bit(64, 32, blocksize=63)
    with pytest.raises(RuntimeError, match="no random"):
        layer_of("nf4").reset_parameters()
    with pytest.raises(TypeError, match="base_layer: expected"):
        LoRALinear(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="r: expected a positive integer"):
        LoRALinear(nn.Linear(4, 4), r=0)
    with pytest.raises(ValueError, match="lora_dropout"):
        LoRALinear(nn.Linear(4, 4), lora_dropout=1.0)
    with pytest.raises(ValueError, match="adapter_name"):
        LoRALinear(nn.Linear(4, 4), adapter_name="my.lora")
    with pytest.raises(ValueError, match="init_lora_weights"):
        LoRALinear(nn.Linear(4, 4), init_lora_weights="pissa")


@pytest.mark.parametrize("form", ["dense", *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_matches_eager_forward_and_gradients(form: str, dtype: torch.dtype) -> None:
    layer = LoRALinear(layer_of(form), r=4, lora_alpha=8, init_lora_weights=False)
    layer.base_layer.to(dtype)
    x = torch.randn(2, 7, 96).to(dtype).requires_grad_()
    base = layer.base_layer
    weight = base.weight if form == "dense" else base.dequantize(dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = wide[0] @ weight.double().t() + base.bias.double()
    expected = expected + (wide[0] @ wide[1].t() @ wide[2].t()) * 2.0
    y = layer(x)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, a, b), dy)
    want = torch.autograd.grad(expected, wide, dy.double())
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 8e-2}
    )
    torch.testing.assert_close(y.double(), expected, **tolerance)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, **tolerance)


def test_conv1d_base() -> None:
    conv = Conv1D(24, 64)
    layer = LoRALinear(conv, r=4, init_lora_weights=False)
    assert layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (64, 24)
    x = torch.randn(3, 64)
    a, b = layer.factors("default")
    expected = conv(x) + (x @ a.t() @ b.t()) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), expected)


def test_initialisation_and_scaling_follow_peft() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear as PeftLinear

    for init in (True, "gaussian", False):
        for rslora in (False, True):
            config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_rslora=rslora)
            torch.manual_seed(5)
            theirs = PeftLinear(nn.Linear(16, 8), "default", config=config, r=4, lora_alpha=6)
            torch.manual_seed(5)
            ours = LoRALinear(
                nn.Linear(16, 8), r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=init
            )
            for part in ("lora_A", "lora_B"):
                mine = getattr(ours, part)["default"].weight
                assert torch.equal(mine, getattr(theirs, part)["default"].weight)
            assert ours.scaling["default"] == theirs.scaling["default"]


def test_dropout_acts_in_training_only_and_is_reproducible() -> None:
    layer = LoRALinear(nn.Linear(64, 32), r=4, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(16, 64)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    still = layer(x)
    assert torch.equal(layer(x), still)
    torch.testing.assert_close(
        still, layer.base_layer(x) + x @ layer.delta_weight("default").t(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", ["dense", *FORMATS])
def test_several_adapters_add_up(form: str) -> None:
    layer = LoRALinear(layer_of(form), r=4, adapter_name="one", init_lora_weights=False)
    layer.add_adapter("two", r=2, lora_alpha=6, init_lora_weights=False)
    assert layer.active_adapters == ["two"]
    assert not layer.lora_A["one"].weight.requires_grad
    x = torch.randn(5, 96)
    terms = {n: x @ layer.delta_weight(n).t() for n in ("one", "two")}
    base = layer.base_layer(x)
    torch.testing.assert_close(layer(x), base + terms["two"], rtol=1e-4, atol=1e-4)
    layer.set_adapter(["one", "two"])
    y = layer(x)
    torch.testing.assert_close(y, base + terms["one"] + terms["two"], rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(layer.lora_A[n].weight.grad is not None for n in ("one", "two"))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer.delete_adapter("two")
    assert layer.adapter_names == ["one"]
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("one")


@pytest.mark.parametrize("form", ["dense", *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_exact_unmerge(form: str, dtype: torch.dtype) -> None:
    base = nn.Linear(96, 40).to(dtype)
    base = base if form == "dense" else quantized(base, form)
    layer = LoRALinear(base, r=4, lora_alpha=32, init_lora_weights=False).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(6, 96, dtype=dtype)
    adapted, plain = layer(x), layer.base_layer(x)
    dense = base.weight.float() if form == "dense" else base.dequantize(torch.float32)
    wanted = dense + layer.delta_weight("default")
    error = layer.merge()
    written = base.weight.float() if form == "dense" else base.dequantize(torch.float32)
    size = torch.linalg.vector_norm(layer.delta_weight("default"))
    assert error == pytest.approx(float(torch.linalg.vector_norm(written - wanted) / size))
    assert layer.merged
    if form == "dense":
        loose = dtype == torch.bfloat16
        torch.testing.assert_close(
            layer(x), adapted, rtol=2e-2 if loose else 1e-5, atol=5e-2 if loose else 1e-5
        )
        assert error < (0.05 if loose else 1e-5)
    else:
        assert 0 < error < 1
        assert torch.equal(layer(x), base(x))
    layer.unmerge()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(layer.base_layer(x), plain)
    assert torch.equal(layer(x), adapted)
    layer.unmerge()


def test_merge_refuses_before_writing() -> None:
    layer = LoRALinear(layer_of("nf4"), r=4, init_lora_weights=False)
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="max_error"):
        layer.merge(max_error=1e-6)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    with pytest.raises(ValueError, match="no adapter 'other'"):
        layer.merge(["other"])
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="unmerge before"):
        layer.set_adapter("default")
    layer.unmerge()
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge()


def test_merging_nothing_leaves_quantized_bytes_alone() -> None:
    layer = LoRALinear(layer_of("nf4"), r=4)
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    assert layer.merge() == 0.0
    assert all(torch.equal(v, before[k]) for k, v in layer.base_layer.state_dict().items())


def test_merging_a_tied_weight_leaves_the_other_owner_alone() -> None:
    table = nn.Embedding(40, 96)
    head = nn.Linear(96, 40, bias=False)
    head.weight = table.weight
    layer = LoRALinear(head, r=4, init_lora_weights=False)
    before = table.weight.clone()
    layer.merge()
    assert torch.equal(table.weight, before)
    layer.unmerge()
    assert head.weight is table.weight


def test_hooks_on_the_parts_run() -> None:
    layer = LoRALinear(nn.Linear(16, 8), r=2, init_lora_weights=False)
    x = torch.randn(3, 16)
    expected = layer(x)
    seen: list[str] = []
    layer.base_layer.register_forward_hook(lambda m, a, o: seen.append("base"))
    torch.testing.assert_close(layer(x), expected)
    layer.lora_A["default"].register_forward_hook(lambda m, a, o: seen.append("A"))
    torch.testing.assert_close(layer(x), expected)
    assert seen == ["base", "base", "A"]
    assert "base layer carries forward hooks" in str(layer.why_not_fused("default"))


def test_a_subclass_with_its_own_forward_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    base = Doubled(16, 8)
    layer = LoRALinear(base, r=2, init_lora_weights=False)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight("default").t())
    assert "forward of its own" in str(layer.why_not_fused("default"))
    with pytest.raises(RuntimeError, match="cannot be merged"):
        layer.merge()


@pytest.mark.parametrize("form", ["dense", *FORMATS])
def test_autocast_gives_the_autocast_dtype(form: str) -> None:
    layer = LoRALinear(layer_of(form), r=4, init_lora_weights=False)
    x = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("form", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_graph_breaks(form: str, dropout: float) -> None:
    layer = LoRALinear(layer_of(form), r=4, lora_dropout=dropout, init_lora_weights=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = run(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, layer.lora_A["default"].weight.grad.clone()))
    for mine, theirs in zip(*results, strict=True):
        if dropout == 0.0:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert mine.shape == theirs.shape


def test_attributes_of_the_wrapped_layer_are_reachable() -> None:
    base = nn.Linear(16, 8)
    base.tag = "mine"
    layer = LoRALinear(base)
    assert layer.tag == "mine"
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (16, 8)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_trainable_copy() -> None:
    head = nn.Linear(8, 3)
    wrapper = TrainableCopy(head)
    x = torch.randn(2, 8)
    assert torch.equal(wrapper(x), head(x))
    assert wrapper.out_features == 3
    with torch.no_grad():
        wrapper.modules_to_save["default"].bias.add_(1)
    assert torch.equal(wrapper.weight, head.weight)
    torch.testing.assert_close(wrapper(x), head(x) + 1)
    wrapper.enable_adapters(False)
    assert torch.equal(wrapper(x), head(x))
    wrapper.enable_adapters(True)
    wrapper.add_adapter("two")
    assert torch.equal(wrapper(x), head(x))
    with pytest.raises(ValueError, match="activate one of them"):
        wrapper.set_adapter(["default", "two"])
    wrapper.set_adapter("absent")
    assert torch.equal(wrapper(x), head(x))
    assert not any(p.requires_grad for p in head.parameters())


@pytest.mark.hf
def test_bitsandbytes_layers_are_taken_over_without_copying() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    source = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    source.to("cpu")
    layer = Linear4bit.from_bnb(source)
    assert layer.weight.data_ptr() == source.weight.data_ptr()
    assert layer.bias is source.bias
    x = torch.randn(4, 64)
    expected = nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    eight = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    eight.weight = eight.weight.to("cpu")
    dense = pk.quantize_8bit(torch.randn(32, 64)).to_bnb()
    eight.weight = dense
    taken = Linear8bit.from_bnb(eight)
    assert taken.weight.data_ptr() == dense.data.data_ptr()


def test_only_adapters_that_are_there_are_merged() -> None:
    """An unknown name is an error of every kind of adapter; other layers' active ones are not."""
    index = torch.arange(4)
    layers = [
        pk.nn.LoRALinear(torch.nn.Linear(8, 6), r=2),
        pk.nn.IA3Linear(torch.nn.Linear(8, 6)),
        pk.nn.SparseDeltaLinear(torch.nn.Linear(8, 6), index),
        pk.nn.LoRAEmbedding(torch.nn.Embedding(8, 6), r=2),
        pk.nn.LoRAParameters(torch.nn.Linear(8, 6), ["weight"], r=2),
    ]
    for layer in layers:
        with pytest.raises(ValueError, match=r"no adapter 'other' here; there are: default"):
            layer.merge(["other"])
        assert not layer.merged
        layer.set_adapter(["other"])
        assert layer.merge() == 0.0
        assert not layer.merged
        layer.merge(["default"])
        assert layer.merged
        with pytest.raises(RuntimeError, match="merged already"):
            layer.merge(["default"])
        layer.unmerge()
        assert not layer.merged
