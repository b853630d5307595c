"""Every instruction set against plain torch and against the scalar kernels."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import native_build
import pytest
import torch
from torch import Tensor

from peftkern import native, registry
from peftkern.testing import assert_error_rule, assert_same_bits, bits, tensors_of

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not native.available(), reason=str(native.reason())),
]

ISAS = ("scalar", "avx2", "avx512", "avx512-bf16", "avx512-amx", "avx512-emulated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = "avx512-emulated"
PAIRS = (
    "avx512-bf16, pairs"  # its products of bf16 pairs everywhere, as on processors with fast ones
)


def module_of(isa: str) -> ModuleType:
    """The native module that holds ``isa``; skips where this machine cannot run it."""
    shipped = native.kernels()
    isa = isa.partition(",")[0]
    if isa in shipped.isas():
        return shipped
    if isa != EMULATED:
        pytest.skip(f"this CPU has no {isa}")
    if "avx512" in shipped.isas():
        pytest.skip("this CPU runs AVX-512 itself")
    if native_build.build()[0] is None:
        pytest.skip(native_build.build()[1])
    module = native_build.load()
    if EMULATED not in module.isas():
        pytest.skip("not an x86-64 machine")
    return module


# Emulation needs a build of its own, of two minutes.
@pytest.fixture(params=[*ISAS[:-1], PAIRS, pytest.param(EMULATED, marks=pytest.mark.slow)])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes every native implementation run on one instruction set."""
    module = module_of(request.param)
    before = module.isa(), module.fast_pair_products()
    module.set_isa(request.param.partition(",")[0])
    module.set_pair_products(request.param == PAIRS)
    monkeypatch.setattr(native, "kernels", lambda: module)
    yield request.param
    module.set_isa(before[0])
    module.set_pair_products(before[1])


def run(op: str, *args: Any) -> Any:
    (row,) = [row for row in registry.implementations(op) if row.backend == "native"]
    assert row.refusal(args) is None
    return row.fn(*args)


def reference(op: str, *args: Any, **kwargs: Any) -> Any:
    return registry.specs()[op].reference(*args, **kwargs)


def bundle(n: int, k: int, kind: str, blocksize: int, nested: bool) -> tuple[Any, ...]:
    packed, absmax = reference("quantize_4bit", torch.randn(n, k) * 0.1, kind, blocksize, True)
    if not nested:
        return packed, absmax, None, None
    return packed, *reference("quantize_absmax", absmax)


@pytest.mark.parametrize("op", sorted(registry.specs()))
def test_contract_samples(isa: str, op: str) -> None:
    spec = registry.specs()[op]
    kernel = next((r for r in registry.implementations(op) if r.backend == "native"), None)
    if kernel is None:
        pytest.skip("no native implementation")
    served = 0
    for dtype in spec.dtypes:
        for sample in spec.samples(dtype):
            if kernel.refusal(sample.args) is not None:
                continue
            served += 1
            got, want = tensors_of(run(op, *sample.args)), tensors_of(spec.reference(*sample.args))
            if spec.tolerance == "exact":
                for value, expected in zip(got, want, strict=True):
                    assert_same_bits(value, expected, f"{op} {sample.name}")
                continue
            assert spec.baseline is not None
            truth = tensors_of(spec.reference(*sample.args, compute=torch.float64))
            plain = tensors_of(spec.baseline(*sample.args))
            for value, exact, eager in zip(got, truth, plain, strict=True):
                name = f"{op} {sample.name}"
                assert_error_rule(value, exact, eager.to(value.dtype), spec.factor, name)
    assert served > 0


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_formats_bit_equal(isa: str, blocksize: int) -> None:
    generator = torch.Generator().manual_seed(blocksize)
    for i, (numel, dtype) in enumerate(itertools.product((1, 31, 97, 1000, 8191), DTYPES)):
        kind = ("nf4", "fp4")[i % 2]
        w = (torch.randn(numel, generator=generator) * 10.0 ** (i % 5 - 2)).to(dtype)
        args = (w, kind, blocksize, True)
        packed, absmax = run("quantize_4bit", *args)
        for value, expected in zip(
            (packed, absmax), reference("quantize_4bit", *args), strict=True
        ):
            assert_same_bits(value, expected)
        for statistics in ((absmax, None, None), run("quantize_absmax", absmax)):
            args = (packed, *statistics, kind, blocksize, [numel], dtype)
            value, expected = run("dequantize_4bit", *args), reference("dequantize_4bit", *args)
            assert_same_bits(value, expected)


def test_quantize_thresholds(isa: str) -> None:
    """Values on the midpoints and one step beside them; a tie takes the lower rung."""
    tables = native.kernels().tables()
    for kind in ("nf4", "fp4"):
        middle = torch.tensor(tables[f"{kind}_thresholds"])
        middle = torch.cat([middle, -middle])
        above = torch.nextafter(middle, torch.tensor(2.0))
        below = torch.nextafter(middle, torch.tensor(-2.0))
        w = torch.cat([torch.ones(1), middle, above, below, torch.zeros(37)])[:128]
        args = (w, kind, 128, True)
        for value, expected in zip(
            run("quantize_4bit", *args), reference("quantize_4bit", *args), strict=True
        ):
            assert_same_bits(value, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_statistics_dequantize_alike(isa: str, dtype: torch.dtype) -> None:
    """Weights that are denormal, infinite or NaN by their statistic, among ordinary ones."""
    extreme = [0.0, 1e-45, 1e-40, 1e-38, 2.9e-36, 3.1e-36, 1e-30, 1.0, 3e38, 3.4e38]
    absmax = torch.tensor([*extreme, float("inf"), float("nan")])
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, (12, 97), generator=generator, dtype=torch.int8)
    args: tuple[Any, ...] = (codes, absmax, dtype)
    assert_same_bits(run("dequantize_8bit", *args), reference("dequantize_8bit", *args))
    packed = torch.randint(0, 256, (12 * 32,), generator=generator, dtype=torch.uint8)
    for kind in ("nf4", "fp4"):
        args = (packed, absmax, None, None, kind, 64, [12 * 64], dtype)
        assert_same_bits(run("dequantize_4bit", *args), reference("dequantize_4bit", *args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value_dequantizes_and_quantizes(isa: str, dtype: torch.dtype) -> None:
    """All bit patterns of a 16-bit dtype pass through load, round and store unchanged."""
    if dtype == torch.float32:
        special = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 1.17e-38, 3.4e38, -65504.0, 65520.0])
        x = special.repeat(8)
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()]
    seed = torch.tensor([3])
    assert_same_bits(
        run("philox_dropout", x.view(1, -1), 0.5, seed),
        reference("philox_dropout", x.view(1, -1), 0.5, seed),
    )
    args = (x, "nf4", 64, True)
    for value, expected in zip(
        run("quantize_4bit", *args), reference("quantize_4bit", *args), strict=True
    ):
        assert_same_bits(value, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize"),
    [
        (1, 5, 64, 64),
        (3, 67, 129, 32),
        (8, 19, 1091, 64),
        (9, 129, 64, 256),
        (13, 31, 37, 4096),
        (2, 7, 2048, 512),
        (150, 33, 259, 128),
        (17, 300, 132, 1024),
        (6, 11, 4099, 2048),
    ],
)
def test_linear(isa: str, m: int, n: int, k: int, blocksize: int, dtype: torch.dtype) -> None:
    if isa in ("scalar", EMULATED) and dtype == torch.float16 and m * n * k > 500_000:
        pytest.skip("the largest shape runs in the other dtypes")
    kind, nested = (("nf4", True), ("fp4", False))[(m + n) % 2]
    base = (*bundle(n, k, kind, blocksize, nested), kind, blocksize)
    codes = reference("quantize_8bit", torch.randn(n, k), True)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias = torch.randn(n).to(dtype)
    for op, args in (
        ("linear_4bit", (x, *base, n, bias)),
        ("linear_4bit_dx", (dy, *base, k)),
        ("linear_8bit", (x, *codes, bias)),
        ("linear_8bit_dx", (dy, *codes)),
    ):
        spec = registry.specs()[op]
        assert spec.baseline is not None
        truth = reference(op, *args, compute=torch.float64)
        # Eager torch sums 16-bit products on AVX2 one after the other in fp32, like the kernels.
        assert_error_rule(run(op, *args), truth, spec.baseline(*args), spec.factor, op)


@pytest.mark.parametrize("m", [1, 8, 9, 20])
def test_exact_integers(isa: str, m: int) -> None:
    """Weights -1, 0, 1 times powers of two, small integers in x: every sum is exact."""
    n, k = 37, 320
    codes = torch.tensor([0, 7, 15], dtype=torch.uint8)[torch.randint(0, 3, (n, k))]
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).contiguous()
    absmax = 2.0 ** torch.randint(-2, 3, (n, k // 64)).float()
    base = (packed, absmax, None, None, "nf4", 64)
    w = reference("dequantize_4bit", *base, [n, k], torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randint(-4, 5, (m, k)).to(dtype)
        dy = torch.randint(-4, 5, (m, n)).to(dtype)
        y = (x.double() @ w.double().T).to(dtype)
        dx = (dy.double() @ w.double()).to(dtype)
        # 0.0 + -0.0 * x may leave either zero: compare values, which are exact.
        assert torch.equal(run("linear_4bit", x, *base, n, None), y)
        assert torch.equal(run("linear_4bit_dx", dy, *base, k), dx)


def test_non_finite_inputs_spread_as_ieee_says(isa: str) -> None:
    base = (*bundle(12, 128, "nf4", 64, False), "nf4", 64)
    w = reference("dequantize_4bit", *base, [12, 128], torch.float32)
    for m, bad in itertools.product((2, 10), (float("nan"), float("inf"))):
        x = torch.randn(m, 128)
        x[1, 77] = bad
        want = x @ w.T
        got = run("linear_4bit", x, *base, 12, None)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
    packed, absmax, *_ = base
    absmax = absmax.clone()
    absmax[0] = float("nan")
    absmax[1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN of all ones
    for dtype in DTYPES:
        got = run("dequantize_4bit", packed, absmax, None, None, "nf4", 64, [12, 128], dtype)
        assert got.view(-1)[:128].isnan().all()
        assert got.view(-1)[128:].isfinite().all()


def everything(m: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op, large enough that several threads get work."""
    n, k, r = 192, 576, 8
    generator = torch.Generator().manual_seed(m)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    packed, absmax = reference("quantize_4bit", randn(n, k), "nf4", 64, True)
    base = (packed, absmax, None, None, "nf4", 64)
    codes = reference("quantize_8bit", randn(n, k), True)
    x, dy, seed = randn(m, k).to(dtype), randn(m, n).to(dtype), torch.tensor([5])
    a, b, s = randn(r, k), randn(n, r), randn(m, r)
    dropout = (0.5, 0.25, seed)
    return {
        "linear_4bit": (x, *base, n, None),
        "linear_4bit_dx": (dy, *base, k),
        "linear_8bit": (x, *codes, None),
        "linear_8bit_dx": (dy, *codes),
        "lora_linear": (x, *base, n, None, a, b, *dropout),
        "lora_linear_backward": (dy, x, s, *base, a, b, *dropout, True, True),
        "quantize_4bit": (randn(400, k).to(dtype), "nf4", 64, True),
        "quantize_8bit": (randn(400, k).to(dtype), True),
        "dequantize_4bit": (*base, [n, k], dtype),
        "dequantize_8bit": (*codes, dtype),
        "philox_dropout": (randn(400, k).to(dtype), 0.3, seed),
    }


@pytest.mark.parametrize("m", [4, 40])
def test_same_bits_for_any_number_of_threads(isa: str, m: int) -> None:
    for op, args in everything(m, torch.bfloat16).items():
        torch.set_num_threads(1)
        want = [bits(value) for value in tensors_of(run(op, *args))]
        for threads in (2, 3, 4, 8, 2, 2):
            torch.set_num_threads(threads)
            for value, expected in zip(tensors_of(run(op, *args)), want, strict=True):
                assert torch.equal(bits(value), expected), f"{op}, {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_in_a_batch(isa: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    forward = ("linear_4bit", "linear_8bit")
    for m, smaller in ((8, (1, 2, 3, 5, 7)), (200, (9, 10, 40, 150))):
        args = everything(m, dtype)
        for op, (x, *rest) in args.items():
            if not op.startswith("linear"):
                continue
            whole = run(op, x, *rest)
            # dX has one kernel for any number of rows; the forward pass has two ranges.
            counts = smaller if op in forward else (*smaller, 1, 4)
            for rows in counts:
                start = m - rows - 1 if rows + 1 < m else 0
                part = x[start : start + rows].contiguous()
                assert_same_bits(run(op, part, *rest), whole[start : start + rows], f"{op} {rows}")


GUARDED = """
import ctypes, mmap, sys
import torch

sys.path.insert(0, {tests!r})
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
plain_empty, maps = torch.empty, []


def guarded_empty(*size, dtype=None, **kwargs):
    # An uninitialised tensor whose last byte is the last before a page that nobody may touch.
    if len(size) == 1 and not isinstance(size[0], int):
        size = tuple(size[0])
    dtype = dtype or torch.float32
    nbytes = torch.Size(size).numel() * dtype.itemsize
    if nbytes == 0:
        return plain_empty(size, dtype=dtype)
    room = -(-nbytes // PAGE) * PAGE
    start = libc.mmap(None, room + PAGE, 3, 0x22, -1, 0)
    assert libc.mprotect(start + room, PAGE, 0) == 0
    maps.append((start, room + PAGE))
    memory = (ctypes.c_ubyte * nbytes).from_address(start + room - nbytes)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(size)


def guarded(value):
    if value.dim() == 2 and not value.is_contiguous():
        return guarded(value.t()).t()
    return guarded_empty(value.shape, dtype=value.dtype).copy_(value)


import native_build
from peftkern import native, registry
from peftkern.testing import map_tensors

isa = {isa!r}
module = native_build.load() if isa == "avx512-emulated" else native.kernels()
module.set_isa(isa.partition(",")[0])
module.set_pair_products("," in isa)
native.kernels = lambda: module
torch.set_num_threads(2)
ran = 0
for name, spec in registry.specs().items():
    rows = [row for row in registry.implementations(name) if row.backend == "native"]
    for row, dtype in ((row, dtype) for row in rows for dtype in spec.dtypes):
        for sample in spec.samples(dtype):
            args = map_tensors(guarded, sample.args)
            torch.empty = guarded_empty
            torch.empty_like = lambda x, dtype=None: guarded_empty(x.shape, dtype=dtype or x.dtype)
            row.fn(*args)
            torch.empty = plain_empty
            del args
            for start, size in maps:
                libc.munmap(start, size)
            maps.clear()
            ran += 1
print("ran", ran)
"""


def test_nothing_is_touched_past_the_end_of_a_buffer(isa: str) -> None:
    """All samples of all ops, each input and output right before an inaccessible page."""
    code = GUARDED.format(tests=str(Path(__file__).parent), isa=isa)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert int(done.stdout.split()[-1]) > 100
