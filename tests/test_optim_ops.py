"""The optimizer pass as an op: kernels against the reference, every tensor that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern import native
from peftkern.ops.optimizer import contract, reference
from peftkern.testing import assert_same_bits

OP = torch.ops.peftkern.optimizer_step
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 255, 256, 257, 16384, 16384 * 2 + 3)


@pytest.fixture(params=native.info().get("isas", []))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.info()["isa"]
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def _copy(lists: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
    return tuple([t.clone() for t in values] for values in lists)


def _hyper(rule: str, count: int, step: int = 3, **changes: Any) -> Tensor:
    kwargs = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1} | changes
    return torch.tensor([contract.hyper_row(rule, step=step, **kwargs)] * count)


@pytest.mark.native
@pytest.mark.parametrize("eight", [False, True], ids=["fp32-state", "8bit-state"])
@pytest.mark.parametrize("rule", contract.RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_write_the_reference_bits(
    isa: str, rule: str, dtype: torch.dtype, eight: bool
) -> None:
    for step in (1, 5):
        start = contract.sample_tensors(SIZES, dtype, rule, eight, seed=step)
        start[1][3][200] = float("inf")  # its block of 256 stays as it is
        start[0][1][:] = 0.0
        start[1][1][:] = 0.0
        start[1][4][256:512] *= 1e-20  # denormal second moments
        rounding = torch.tensor([[12345678901, step, i, 256 * i] for i in range(len(SIZES))])
        for extra in (None, rounding):
            hyper = _hyper(rule, len(SIZES), step, grad_scale=-0.5)
            want, got = _copy(start), _copy(start)
            with pk.use_backend("reference"):
                skipped = OP(hyper, *want, rule, extra)
            with pk.use_backend("native"):
                assert_same_bits(OP(hyper, *got, rule, extra), skipped, "skipped")
            assert skipped.tolist() == [0, 0, 0, 1, 0, 0]
            for which, values in enumerate(want):
                for i, value in enumerate(values):
                    assert_same_bits(got[which][i], value, f"{rule} list {which} tensor {i}")


@pytest.mark.native
def test_threads_change_nothing() -> None:
    start = contract.sample_tensors((100_003, 16384, 7), torch.float32, "adamw", True)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        lists = _copy(start)
        OP(_hyper("adamw", 3), *lists, "adamw", None)
        norm = torch.ops.peftkern.optimizer_grad_norm(torch.zeros(0), start[1])
        results.append([t for values in lists for t in values] + [norm])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.native
def test_code_search_is_exact_around_every_threshold() -> None:
    """absmax 1 in the block, so t is the value itself; one ulp on either side of each midpoint."""
    for signed in (True, False):
        edges = reference.dynamic_thresholds() if signed else reference.unsigned_thresholds()
        numpy = edges.numpy()
        t = np.concatenate(
            [numpy, np.nextafter(numpy, np.float32(2)), np.nextafter(numpy, np.float32(-2))]
        )
        t = np.concatenate([t, [0.0, 1.0, 1e-45, 1e-8], [-1.0] if signed else []])
        t = t.astype(np.float32)
        for lo in range(0, len(t), 255):
            m = torch.ones(256)
            part = torch.from_numpy(t[lo : lo + 255].copy())
            m[: len(part)] = part
            expected = torch.bucketize(m, edges).to(torch.uint8)
            # lion with beta2 = 0 stores the gradient as the moment; AdamW its square, so the
            # unsigned map is reached with a gradient of 0 and beta2 = 1.
            codes, absmax = reference.encode(m, signed)
            assert torch.equal(codes, expected)
            assert absmax.item() == 1.0
            if signed:
                state = [torch.zeros(256, dtype=torch.uint8)]
                hyper = _hyper("lion", 1, betas=(0.9, 0.0))
                args = ([torch.zeros(256)], [m], state, [], [torch.zeros(1)], [], "lion", None)
                with pk.use_backend("native"):
                    OP(hyper, *args)
                assert torch.equal(state[0], expected)


@pytest.mark.native
def test_code_arithmetic_is_exact_around_every_threshold(isa: str) -> None:
    """Vector code rounds a sum where the reference searches; both maps, every rule's block."""
    edges = reference.unsigned_thresholds().numpy()
    steps = np.arange(-4, 5, dtype=np.int32)
    # With beta2 = 0 and no state yet, v is g * g: these roots hit all sides of the thresholds.
    roots = (np.sqrt(edges).view(np.int32)[:, None] + steps).view(np.float32).ravel()
    signed = reference.dynamic_thresholds().numpy()
    near = (signed.view(np.int32)[:, None] + steps).view(np.float32).ravel()
    extra = np.array([0.0, -0.0, 1e-30, -1e-30, 0.5, -0.999], np.float32)
    rng = np.random.default_rng(0)
    random = rng.uniform(-1, 1, 20_000).astype(np.float32) ** 5
    values = np.concatenate([roots, near, -near, extra, random])
    values = values[: len(values) // 255 * 255].reshape(-1, 255)
    whole = np.concatenate([values, np.ones((len(values), 1), np.float32)], 1)  # absmax 1
    g = torch.from_numpy(np.clip(whole, -1, 1)).reshape(-1)
    blocks = g.numel() // 256
    for rule in contract.RULES:
        two = rule == "adamw"
        betas = (0.0, 0.0)
        hyper = _hyper(rule, 1, 1, betas=betas, weight_decay=0.0)
        results = []
        for backend in ("reference", "native"):
            codes = [torch.full((g.numel(),), 127, dtype=torch.uint8)]
            codes2 = [torch.zeros(g.numel(), dtype=torch.uint8)] if two else []
            scales = [torch.zeros(blocks)], [torch.zeros(blocks)] if two else []
            lists = ([torch.zeros_like(g)], [g], codes, codes2, *scales)
            with pk.use_backend(backend):
                OP(hyper, *lists, rule, None)
            results.append([t for values in lists for t in values])
        assert len(results[0][2].unique()) == 256
        for want, got in zip(*results, strict=True):
            assert_same_bits(got, want, rule)


@pytest.mark.hf
def test_maps_are_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert_same_bits(reference.unsigned_map(), bnb.create_dynamic_map(signed=False))
    assert_same_bits(reference.dynamic_map(), bnb.create_dynamic_map(signed=True))
    if native.available():
        tables = native.kernels().tables()
        assert_same_bits(torch.tensor(tables["unsigned"]), reference.unsigned_map())
        assert_same_bits(
            torch.tensor(tables["unsigned_thresholds"]), reference.unsigned_thresholds()
        )


def test_stochastic_rounding_keeps_the_mean() -> None:
    n = 1 << 16
    for value in (1.0 + 0.25 * 2**-7, -3.3e-5):
        p = [torch.full((n,), value, dtype=torch.bfloat16)]
        wanted = value - 0.3 * float(p[0][0]) * 2**-8
        grad = [torch.full((n,), (float(p[0][0]) - wanted))]
        hyper = _hyper("momentum", 1, step=1, lr=1.0, weight_decay=0.0)
        args = (grad, [torch.zeros(n)], [], [torch.zeros(0)], [], "momentum")
        OP(hyper, p, *args, torch.tensor([[5, 1, 0, 0]]))
        assert len(p[0].unique()) == 2
        assert p[0].double().mean().item() == pytest.approx(wanted, rel=2e-5)


def test_bad_arguments_name_themselves() -> None:
    lists = contract.sample_tensors((5, 6), torch.float32, "adamw", True)
    hyper = _hyper("adamw", 2)
    with pytest.raises(ValueError, match="rule: got 'adam'"):
        OP(hyper, *lists, "adam", None)
    with pytest.raises(ValueError, match="grads: got 1 tensors, expected 2"):
        OP(hyper, lists[0], lists[1][:1], *lists[2:], "adamw", None)
    with pytest.raises(ValueError, match=r"absmax1\[1\]: got 2 elements, expected 1"):
        OP(hyper, *lists[:4], [torch.ones(1), torch.ones(2)], lists[5], "adamw", None)
    with pytest.raises(TypeError, match=r"params\[0\]: got dtype torch.int64"):
        OP(hyper, [torch.zeros(5).long(), lists[0][1]], *lists[1:], "adamw", None)
    with pytest.raises(ValueError, match=r"params\[0\]: got strides"):
        OP(hyper, [torch.zeros(10)[::2], lists[0][1]], *lists[1:], "adamw", None)
    with pytest.raises(ValueError, match="lion has one moment"):
        OP(hyper, *lists, "lion", None)
