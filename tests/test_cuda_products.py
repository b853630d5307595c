"""Products and thin passes on tensor cores, under the SIMT executor, at their tiles' edges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cuda_simt import COMPILER, CSRC, KERNELS, SCHEDULES, SimtLibrary
from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels import choices, thin
from peftkern.cuda_kernels.products import LowRank, product
from peftkern.cuda_kernels.thin import Dropout
from peftkern.ops.bases import Base
from peftkern.ops.dropout.reference import philox_dropout
from peftkern.ops.lora.contract import base_sample
from peftkern.ops.lora.reference import base_weight
from peftkern.testing import assert_error_rule, assert_same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the SIMT executor with"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture(scope="module")
def simt() -> Iterator[SimtLibrary]:
    library = SimtLibrary(*KERNELS)
    with cuda_native.use_library(library):
        yield library


def _base(fmt: str, n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype) -> Base:
    weight, *statistics, stored, size = base_sample(fmt, n, k, blocksize, nested, dtype, n + k)
    return Base(weight, *statistics, stored, size, n, k)  # type: ignore[arg-type]


# (M, N, K, format, block size, nested, across, rank, dtype): rows that fill no tile, one and two
# warpgroups, outputs behind the last tile, rank steps of one and two, depths in parts and of no
# whole step.
WGMMA = (
    (64, 128, 128, "dense", 0, False, False, 0, BF16),
    (5, 264, 72, "dense", 0, False, True, 16, FP16),
    (70, 136, 192, "nf4", 64, True, False, 24, FP16),
    (130, 200, 192, "fp4", 128, False, True, 72, BF16),
    (300, 40, 128, "nf4", 4096, True, False, 8, BF16),
    (260, 72, 192, "nf4", 64, True, True, 16, BF16),
    (40, 128, 144, "int8", 0, False, False, 16, BF16),
    (100, 72, 144, "int8", 0, False, True, 0, FP16),
    (20, 128, 1024, "nf4", 64, True, False, 8, BF16),
    (20, 1024, 64, "nf4", 64, False, True, 8, BF16),
)
# More steps than stages: every stage is filled again.
LONG = (130, 136, 832, "nf4", 64, True, False, 16, BF16)


def _wgmma(
    case: tuple[Any, ...], onto: Tensor | None = None, cut: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel gives, the truth in fp64, plain torch, and x."""
    m, n, k, fmt, blocksize, nested, across, rank, dtype = case
    base = _base(fmt, n, k, blocksize, nested, dtype)
    outputs, depth = (k, n) if across else (n, k)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, depth, generator=generator).to(dtype)
    bias = None if across else torch.randn(n, generator=generator).to(dtype)
    term, low = None, torch.zeros(m, outputs, dtype=torch.float64)
    if rank:
        u = torch.randn(m, rank, generator=generator).bfloat16()
        v = torch.randn(*((rank, outputs) if across else (outputs, rank)), generator=generator)
        v = v.bfloat16()
        low = u.double() @ (v.double() if across else v.double().T)
        term = LowRank(u.float(), v, 1.0, u, v)
    w = base_weight(base.weight, *base.statistics, base.format, base.blocksize, [n, k], dtype)

    def eager(kind: torch.dtype) -> Tensor:
        y = x.to(kind) @ (w.to(kind) if across else w.to(kind).T) + low.to(kind)
        y = y if bias is None else y + bias.to(kind)
        return y if onto is None else y + onto.to(kind)

    truth, plain = eager(torch.float64), eager(FP32).to(dtype)
    got = product(x, base, across, bias, term, way="wgmma", onto=onto, cut=cut)
    return got, truth, plain, x


def _check(case: tuple[Any, ...], cut: tuple[int, int] | None = None) -> None:
    got, truth, plain, _ = _wgmma(case, cut=cut)
    assert_error_rule(got, truth, plain, 1.5, str(case))


@pytest.mark.parametrize("schedule", ["descending", "random"])
@pytest.mark.parametrize("case", WGMMA, ids=str)
def test_wgmma(simt: SimtLibrary, case: tuple[Any, ...], schedule: str) -> None:
    simt.schedule(schedule, seed=case[0])
    _check(case)


@pytest.mark.parametrize("cut", [(64, 1), (128, 1), (256, 1), (128, 3)], ids=str)
@pytest.mark.parametrize("fmt", ["nf4", "int8", "dense"])
def test_wgmma_turns_its_ring_in_every_cut(
    simt: SimtLibrary, fmt: str, cut: tuple[int, int]
) -> None:
    case = (*LONG[:3], fmt, 64 if fmt == "nf4" else 0, fmt == "nf4", *LONG[6:])
    simt.schedule("random", seed=cut[0])
    got, truth, plain, _ = _wgmma(case, cut=cut)
    assert_error_rule(got, truth, plain, 1.5, str(case))
    again = _wgmma(case, cut=cut)[0]
    assert_same_bits(got, again, "another turn of the schedule")


@pytest.mark.parametrize("case", [WGMMA[5], WGMMA[9]], ids=["whole", "parts"])
def test_wgmma_adds_to_what_is_there(simt: SimtLibrary, case: tuple[Any, ...]) -> None:
    simt.schedule("starving", seed=1)
    onto = torch.randn(case[0], case[2]).to(case[-1])
    got, truth, plain, _ = _wgmma(case, onto)
    assert got.data_ptr() == onto.data_ptr()
    assert_error_rule(got, truth, plain, 1.5, str(case))


def test_wgmma_weights_are_those_that_dequantizing_gives(simt: SimtLibrary) -> None:
    """x = 1 at one column alone: the product is that column, bit for bit."""
    for fmt, nested in (("nf4", True), ("fp4", False), ("int8", False)):
        base = _base(fmt, 24, 128, 64, nested, BF16)
        w = base_weight(base.weight, *base.statistics, fmt, base.blocksize, [24, 128], BF16)
        simt.schedule("random", seed=2)
        y = product(torch.eye(128).bfloat16(), base, False, way="wgmma")
        assert_same_bits(y, w.T.contiguous() + 0.0, fmt)
        dx = product(torch.eye(24).bfloat16(), base, True, way="wgmma")
        assert_same_bits(dx, w + 0.0, f"{fmt} across")


# (M, N, K, type, block size, nested, rank): one tile of x and two, tiles of outputs in several
# rounds of a block, depths of half a turn and of more turns than stages.
FEW = (
    (1, 40, 64, "nf4", 64, True, 0),
    (8, 16, 2112, "fp4", 128, False, 4),
    (9, 70, 192, "nf4", 64, True, 3),
    (16, 2200, 128, "nf4", 4096, True, 0),
    (3, 17, 10304, "nf4", 64, False, 0),
)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_rows(simt: SimtLibrary, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    m, n, k, kind, blocksize, nested, rank = case
    base = _base(kind, n, k, blocksize, nested, dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    term = LowRank(torch.randn(m, rank), torch.randn(n, rank), 0.5) if rank else None
    w = base_weight(base.weight, *base.statistics, kind, blocksize, [n, k], dtype)

    def eager(kind: torch.dtype) -> Tensor:
        y = x.to(kind) @ w.to(kind).T + bias.to(kind)
        return y if term is None else y + 0.5 * (term.low.to(kind) @ term.up.to(kind).T)

    for seed, schedule in enumerate(("random", "starving")):
        simt.schedule(schedule, seed=seed)
        got = product(x, base, False, bias, term, way="few")
        assert_error_rule(got, eager(torch.float64), eager(FP32).to(dtype), 1.5, str(case))
    least = 1 if m <= 8 else 9  # as many warps share the depth
    few = product(x[-least:].clone(), base, False, bias, way="few")
    whole = product(x, base, False, bias, way="few")
    assert_same_bits(few, whole[-least:], "rows alone")


# (M, depth, rank, dtype of x, of the adapter, dropout, transposed): parts of rows and slices of the
# depth, one and several, and blocks with fewer rows than warps.
THIN = (
    (20, 136, 5, BF16, FP32, 0.0, False),
    (40, 1024, 16, BF16, BF16, 0.3, False),
    (33, 128, 30, FP16, FP16, 0.0, True),
    (17, 200, 70, BF16, FP32, 0.5, False),
    (17, 136, 40, BF16, FP32, 0.0, True),
    (2100, 64, 1, BF16, FP32, 0.0, True),
    (300, 1088, 33, BF16, FP32, 0.0, False),
)


@pytest.mark.parametrize("case", THIN, ids=str)
def test_shrink(simt: SimtLibrary, case: tuple[Any, ...]) -> None:
    m, depth, rank, dtype, kind, p, transposed = case
    x, a = torch.randn(m, depth).to(dtype), torch.randn(rank, depth).to(kind)
    seed = torch.tensor([m]) if p else None
    dropped = x if seed is None else philox_dropout(x, p, seed)
    stored = a.t().contiguous() if transposed else a
    wide = torch.full((m, rank + 3), float("nan"))
    for across in (False, True):
        up = torch.randn(*((rank, 24) if across else (24, rank))).to(kind)
        simt.schedule("random", seed=rank)
        s, u, v = thin.shrink(
            x,
            stored,
            transposed=transposed,
            scale=0.5,
            dropout=Dropout(p, seed),
            out=wide[:, 2 : rank + 2],
            parts=(up, 3.0, across),
        )
        truth = 0.5 * (dropped.double() @ a.double().T)
        plain = 0.5 * (dropped.float() @ a.float().T)
        assert_error_rule(s, truth, plain, 1.5, "s")
        assert wide[:, [0, 1, rank + 2]].isnan().all()
        assert u is not None
        assert v is not None
        term = u.double() @ (v.double() if across else v.double().T)
        exact = 3.0 * s.double() @ (up.double() if across else up.double().T)
        assert (term - exact).norm() < 2e-5 * exact.norm()


@pytest.mark.parametrize("case", THIN, ids=str)
def test_outer(simt: SimtLibrary, case: tuple[Any, ...]) -> None:
    m, c, rank, dtype, kind, p, transposed = case
    x, wide = torch.randn(m, c).to(dtype), torch.randn(m, rank + 4)
    s = wide[:, 3 : rank + 3].to(dtype).float() if dtype == FP16 else wide[:, 3 : rank + 3]
    seed = torch.tensor([m]) if p else None
    dropped = x if seed is None else philox_dropout(x, p, seed)
    like = torch.empty((c, rank) if transposed else (rank, c), dtype=kind)
    simt.schedule("starving", seed=rank)
    got = thin.outer(x, s, like, transposed=transposed, scale=2.0, dropout=Dropout(p, seed))

    def eager(kind: torch.dtype) -> Tensor:
        g = 2.0 * (s.to(kind).T @ dropped.to(kind))
        return (g.T if transposed else g).contiguous()

    assert_error_rule(got, eager(torch.float64), eager(FP32).to(kind), 2.0, str(case))


def test_a_row_has_the_same_sum_in_any_batch(simt: SimtLibrary) -> None:
    x, a = torch.randn(70, 1032).bfloat16(), torch.randn(16, 1032)
    whole = thin.shrink(x, a)[0]
    assert_same_bits(thin.shrink(x[37:38].clone(), a)[0], whole[37:38], "a row alone")


def test_infinite_activations_stay_infinite(simt: SimtLibrary) -> None:
    simt.schedule("ascending")
    x, a = torch.ones(4, 64).bfloat16(), torch.ones(2, 64)
    a[1, 3] = float("inf")
    s = thin.shrink(x, a)[0]
    assert torch.equal(s, torch.tensor([[64.0, float("inf")]] * 4))


def test_the_ways_are_chosen_by_what_kernels_take() -> None:
    hopper, older = choices.Device(True, 227 << 10), choices.Device(False, 99 << 10)

    def way(m: int, k: int = 4096, fmt: str = "nf4", device: choices.Device = hopper, **more: Any):  # type: ignore[no-untyped-def]
        facts = {"across": False, "dtype": BF16, "aligned": True, "blocksize": 64} | more
        return choices.way(choices.Product(m, 4096, k, fmt, **facts), device)

    few, mma, most = choices.FEW_BEST, choices.MMA_BEST, choices.WGMMA_BEST["nf4"]
    assert (way(1), way(few), way(few + 1), way(mma)) == ("few", "few", "mma", "mma")
    assert (way(mma + 1), way(most), way(most + 1)) == ("wgmma", "wgmma", "library")
    assert (way(64, device=older), way(65, device=older)) == ("library", "library")
    assert (way(8, device=older), way(16, device=older)) == ("mma", "mma")
    assert (way(4, k=31), way(40, k=31), way(4, dtype=FP32)) == ("rows", "library", "rows")
    assert (way(4, across=True), way(4, fmt="dense")) == ("wgmma", "library")
    assert (way(8, fmt="int8", k=36), way(9, fmt="int8", k=36)) == ("rows", "library")
    assert way(0) == way(5, k=0) == "library"


MISTAKES = (
    ("linear_wgmma", "fence_async();", "", None),
    ("linear_wgmma", "if (!first)", "if (true)", None),
    ("linear_wgmma", "barrier_wait(&barriers->empty[slot], parity);", "", None),
    ("linear_wgmma", "product_wait<1>();", "product_wait<2>();", None),
    ("linear_wgmma", "barrier_wait(&barriers->empty[slot], ring.parity ^ 1);", "", None),
    ("linear_wgmma", "barrier_wait(&stored[i], parity);", "", None),
    ("linear_wgmma", "barrier_wait(&taken[i], parity ^ 1);", "", None),
    ("wgmma_steps", "P::kXTile + (copies_weight", "(copies_weight", None),
    ("wgmma_steps", "map, k, n + 64, full", "map, k, n, full", 5),
    ("decode_tile", "exchange) << 4", "0) << 4", None),
    ("decode_tile", "c ^ turn", "c", None),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m[0]}-{m[1][:24]!r}")
def test_a_mistake_in_the_pipeline_is_caught(mistake: Any, tmp_path: Path) -> None:
    name, old, new, case = mistake
    folder = tmp_path / "cuda"
    folder.mkdir()
    (tmp_path / "common").symlink_to(CSRC / "common")
    (tmp_path / "simt").symlink_to(CSRC / "simt")
    for path in (CSRC / "cuda").iterdir():
        text = path.read_text()
        if path.stem == name:
            assert text.count(old) >= 1, "the kernel has changed: bring the mistake up to date"
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    library = SimtLibrary(
        folder / "linear_wgmma.cu", *(p for p in KERNELS if "wgmma" not in p.name)
    )
    with cuda_native.use_library(library):
        for schedule in SCHEDULES:
            library.schedule(schedule, seed=3)
            with pytest.raises((RuntimeError, AssertionError)):
                _check(*((LONG, (128, 1)) if case is None else (WGMMA[case], None)))
