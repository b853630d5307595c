"""LLM.int8(): exact integers, outlier columns, special values, threads, gradients, bitsandbytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern import native
from peftkern.ops.llm_int8 import reference

F = pk.functional
PLAIN = "avx512, no vnni"  # as on processors that have none
ISAS = ("scalar", "avx2", PLAIN, "avx512", "avx512-bf16", "avx512-amx")
needs_native = pytest.mark.skipif(not native.info()["available"], reason="no native module")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    module = native.kernels()
    name = request.param.partition(",")[0]
    if name not in module.isas():
        pytest.skip(f"this CPU has no {name}")
    before = module.isa()
    module.set_isa(name)
    module.set_vnni(request.param != PLAIN)
    yield request.param
    module.set_vnni(True)
    module.set_isa(before)


def rows(m: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).clamp(-5, 5)


def quantized(n: int, k: int, seed: int = 0) -> pk.QuantizedTensor:
    return pk.quantize_8bit(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))


def op(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    y: Tensor = torch.ops.peftkern.llm_int8(x, codes, scb, bias, threshold)
    return y


@needs_native
@pytest.mark.parametrize("m", [1, 2, 5, 8, 9, 64, 65])
@pytest.mark.parametrize(("n", "k"), [(7, 1), (64, 63), (65, 64), (66, 129), (3, 4097)])
def test_integers_are_exact(isa: str, m: int, n: int, k: int) -> None:
    """Rows whose largest value is 127 are their own codes; every int8 is a code, -128 too."""
    make = torch.Generator().manual_seed(m * n + k)
    x = torch.randint(-127, 128, (m, k), generator=make).float()
    x[:, k // 2] = 127.0
    codes = torch.randint(-128, 128, (n, k), generator=make).to(torch.int8)
    # 2^-7 * 127: products of sums and scales are exact as long as the sums are.
    scb = torch.full((n,), 127.0)
    got = op(x, codes, scb, None, 0.0)
    want = x.double() @ codes.double().T
    assert ((got.double() - want).abs() <= want.abs() * 2.0**-22).all()


@needs_native
def test_sums_fill_32_bits(isa: str) -> None:
    k = 131072
    x = torch.full((2, k), 1.0)
    x[1] = -1.0
    codes = torch.full((3, k), 127, dtype=torch.int8)
    codes[1] = -127
    got = op(x, codes, torch.ones(3), None, 0.0)
    want = torch.tensor([[k, -k, k], [-k, k, -k]], dtype=torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_reference(isa: str, dtype: torch.dtype) -> None:
    """Ties and all; an identity as weight shows each code."""
    k = 80
    x = torch.cat((rows(6, k).to(dtype), torch.arange(-k, 0).div(2).to(dtype)[None]))
    x[0] *= 1e-38 if dtype != torch.float16 else 1e-6
    x[1] = 0.0
    codes, absmax, _ = reference.round_rows(x, 0.0)
    got = op(x, torch.eye(k, dtype=torch.int8), torch.full((k,), 127.0), None, 0.0)
    want = (codes.double() * (absmax.double() / 127)[:, None]).to(dtype)
    torch.testing.assert_close(got, want)


@needs_native
@pytest.mark.parametrize("count", [1, 7, 300])
def test_outlier_columns_are_not_rounded(isa: str, count: int) -> None:
    q, x = quantized(48, 320), rows(9, 320) * 0.01
    columns = torch.randperm(320, generator=torch.Generator().manual_seed(3))[:count]
    for i, c in enumerate(columns.tolist()):
        x[i % 9, c] = 100.0 + i
    exact = F.linear_8bit(x, q)
    apart = F.linear_8bit(x, q, threshold=6.0)
    truth = reference.llm_int8(x, q.weight, q.absmax, None, 6.0, compute=torch.float64)
    size = x.double().abs() @ q.dequantize(torch.float64).abs().T  # of what sums are made of
    assert (
        (apart - truth).abs() <= 4 * count**0.5 * 2.0**-24 * size + 2.0**-22 * truth.abs()
    ).all()
    small = x.masked_fill(x.abs() >= 6.0, 0.0)
    bound = 0.02 * F.linear_8bit(small, q).norm() + 1e-5 * exact.norm()
    assert (apart - exact).norm() <= bound
    if count == 1:
        row = int((x.abs() >= 6.0).any(1).nonzero()[0])
        together = F.linear_8bit(x, q, threshold=0.0)
        assert (together - exact)[row].norm() > 10 * (apart - exact)[row].norm()


@needs_native
def test_values_that_are_no_numbers(isa: str) -> None:
    q, x = quantized(33, 100), rows(5, 100)
    clean = F.linear_8bit(x, q, threshold=6.0)
    x[1, 3] = math.nan
    x[3, 7] = math.inf
    got = F.linear_8bit(x, q, threshold=0.0)
    assert got[1].isnan().all()
    assert got[3].isnan().all()
    assert torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]])
    got = F.linear_8bit(x, q, threshold=6.0)  # Inf is an outlier: exact, in the dense sense
    assert got[1].isnan().all()
    codes = q.weight[:, 7]
    assert got[3][codes != 0].isinf().all()
    assert got[3][codes == 0].isnan().all()
    assert got[[0, 2, 4]].isfinite().all()
    torch.testing.assert_close(got[[0, 2, 4]], clean[[0, 2, 4]], rtol=0.05, atol=0.5)


@needs_native
def test_threads_and_repeats_change_no_bit(isa: str) -> None:
    q, x = quantized(700, 520), rows(130, 520)
    x[3, 5] = x[70, 400] = 30.0
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 8):
            torch.set_num_threads(threads)
            results += [F.linear_8bit(x, q, threshold=6.0) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    # A row alone: without outliers nothing depends on the other rows.
    whole = F.linear_8bit(x, q, threshold=0.0)
    for i in (0, 8, 64, 129):
        assert torch.equal(F.linear_8bit(x[i], q, threshold=0.0), whole[i])


def test_gradients_are_those_of_the_exact_product() -> None:
    q = quantized(24, 40)
    bias = torch.randn(24, requires_grad=True)
    x = rows(6, 40).requires_grad_()
    loose = rows(12, 40, 2)[::2].detach().requires_grad_()
    for given in (x, loose, rows(2 * 3, 40).view(2, 3, 40).requires_grad_()):
        grads = []
        for threshold in (None, 6.0):
            y = F.linear_8bit(given, q, bias, threshold=threshold)
            grads.append(torch.autograd.grad(y.sum(), (given, bias)))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def test_layer() -> None:
    dense = torch.nn.Linear(64, 32)
    layer = pk.nn.Linear8bit.from_linear(dense, threshold=6.0)
    assert "threshold=6" in repr(layer)
    assert "threshold" not in repr(pk.nn.Linear8bit.from_linear(dense))
    x = rows(7, 64)
    want = F.linear_8bit(x, layer.quantized, layer.bias, threshold=6.0)
    assert torch.equal(layer(x), want)
    assert not torch.equal(want, F.linear_8bit(x, layer.quantized, layer.bias))
    assert torch.equal(copy.deepcopy(layer)(x), want)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), want)
    lora = pk.nn.LoRALinear(layer, r=4)  # B is zero: the base alone, exact
    torch.testing.assert_close(lora(x), F.linear_8bit(x, layer.quantized, layer.bias))


@pytest.mark.parametrize("rows_", [1, 17])
def test_bitsandbytes(rows_: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear8bitLt(256, 96, bias=True, has_fp16_weights=False, threshold=6.0)
    dense = torch.nn.Linear(256, 96)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu").eval()
    x = rows(rows_, 256).half()
    x[0, 9] = 40.0
    with torch.no_grad():
        want = theirs(x).float()
        layer = pk.nn.Linear8bit.from_bnb(theirs, threshold=theirs.state.threshold)
        got = layer(x).float()
        assert layer.bias is not None
        exact = F.linear_8bit(x.float(), layer.quantized, layer.bias.float())
    scale = float(exact.abs().max())
    assert (got - exact).abs().max() < 0.02 * scale
    # Theirs rounds outliers' products and sums to half precision.
    assert (got - want).abs().max() < 0.01 * scale


@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (-1.0, ValueError, "threshold: got -1.0"),
        (math.nan, ValueError, "threshold: got nan"),
        (math.inf, ValueError, "threshold: got inf"),
        (1e-46, ValueError, "threshold: got 1e-46"),
        ("6", TypeError, "threshold: expected a number or None, got str"),
        (True, TypeError, "threshold: expected a number or None, got bool"),
    ],
)
def test_wrong_thresholds(threshold: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.linear_8bit(rows(2, 16), quantized(4, 16), threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        pk.nn.Linear8bit(16, 4, threshold=threshold)  # type: ignore[arg-type]


def test_too_many_features() -> None:
    codes = torch.zeros(1, 131073, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"131073 input features, expected at most 131072"):
        op(torch.zeros(1, 131073), codes, torch.zeros(1), None, 0.0)
