"""The CUDA kernels, run on the CPU: the same .cu files under the SIMT executor of csrc/simt.

Every implementation for the device "cuda" goes through its own Python code and launcher, over the
contract's samples, against the reference, in several schedules. The broken kernels of
csrc/simt/broken must each be stopped: they prove that the executor sees what it should.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern as pk
from peftkern import cuda_native, registry
from peftkern.cuda_kernels import thin
from peftkern.cuda_kernels.choices import Device
from peftkern.cuda_kernels.products import LowRank, product
from peftkern.ops.bases import Base
from peftkern.ops.optimizer import bound
from peftkern.ops.optimizer.table import Table, segments_of
from peftkern.ops.quant4 import reference as quant4
from peftkern.ops.quant4.contract import bundles_4bit
from peftkern.ops.sparse_delta import cuda as sparse
from peftkern.testing import assert_error_rule, assert_same_bits, map_tensors, tensors_of

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++")
FLAGS = "-std=c++17 -O1 -g0 -fPIC -ffp-contract=off -fno-strict-aliasing -Wall -Wextra".split()
# `make sanitize` adds a sanitizer. The thread sanitizer's calls are the executor's view of memory;
# they cannot be had together with the address sanitizer's, which looks at local arrays instead.
SANITIZER = os.environ.get("SIMT_SANITIZER", "")
FLAGS += [f"-fsanitize={SANITIZER}", "-g1"] if SANITIZER else []
KERNEL_FLAGS = [*FLAGS, "-Wno-unknown-pragmas", "-DPK_SIMT"]
KERNEL_FLAGS += [] if SANITIZER == "address" else ["-fsanitize=thread"]
KERNEL_FLAGS += ["-I", str(CSRC / "cuda"), "-x", "c++"]
SCHEDULES = {"ascending": 0, "descending": 1, "random": 2, "starving": 3}
FAULT = 900
# runtime.cu talks to the CUDA runtime and holds no kernel.
KERNELS = sorted(path for path in (CSRC / "cuda").glob("*.cu") if path.name != "runtime.cu")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the SIMT executor with"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def _compile(source: Path, target: Path, flags: list[str]) -> None:
    command = [str(COMPILER), *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def _executor() -> tuple[Path, ...]:
    """The compiled executor; kept until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="peftkern-simt-"))
    atexit.register(shutil.rmtree, folder)
    objects = []
    for name, level in (("executor", "-O2"), ("memory", "-O2"), ("hopper", "-O2")):
        objects.append(folder / f"{name}.o")
        _compile(CSRC / "simt" / f"{name}.cpp", objects[-1], [*FLAGS, level])
    return tuple(objects)


@functools.cache
def _object(source: Path) -> Path:
    """A compiled kernel file of the product."""
    target = _executor()[0].with_name(f"kernels-{source.stem}.o")
    _compile(source, target, KERNEL_FLAGS)
    return target


def _build(*sources: Path) -> ctypes.CDLL:
    """Kernels and executor in one shared library."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects = list(_executor())
        for i, source in enumerate(sources):
            if source in KERNELS:
                objects.append(_object(source))
                continue
            objects.append(folder / f"{i}.o")
            _compile(source, objects[-1], KERNEL_FLAGS)
        target = folder / "simt.so"
        link = [f"-fsanitize={SANITIZER}"] if SANITIZER else ["-Wl,-z,defs"]
        command = [str(COMPILER), "-shared", *link, "-o", str(target), *map(str, objects)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        library = ctypes.CDLL(str(target))
    library.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.simt_add_buffer.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
    library.simt_report.restype = ctypes.c_char_p
    library.simt_kernels.restype = ctypes.c_char_p
    library.simt_launches.restype = ctypes.c_int64
    return library


class SimtLibrary:
    """Stands in for ``_cuda.so``: tensors are registered as the only memory a kernel may touch."""

    def __init__(self, *sources: Path) -> None:
        self.library = _build(*sources)
        self.launchers = cuda_native.launchers(self.library)

    def schedule(self, name: str, seed: int = 0) -> None:
        self.library.simt_configure(SCHEDULES[name], seed)

    def launch(
        self,
        name: str,
        device: torch.device,
        args: tuple[Any, ...],
        reaches: Iterable[torch.Tensor] = (),
    ) -> None:
        self.library.simt_clear_buffers()
        for i, value in enumerate((*args, *reaches)):
            if isinstance(value, torch.Tensor):
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                size = (last + 1) * value.element_size() if value.numel() else 0
                label = f"argument {i} of {name}".encode()
                self.library.simt_add_buffer(label, value.data_ptr(), size)
        function, pack = self.launchers[name]
        status = function(pack(args, 0))
        if status:
            raise RuntimeError(f"{name}: status {status}: {self.library.simt_report().decode()}")

    def facts(self, device: torch.device) -> Device:
        return Device(hopper=True, shared=227 * 1024)

    def ask(self, name: str, *args: int) -> int:
        function = getattr(self.library, f"pk_cuda_{name}")
        function.restype = ctypes.c_int64
        return int(function(*map(ctypes.c_int64, args)))


@pytest.fixture(scope="module")
def simt() -> Iterator[SimtLibrary]:
    library = SimtLibrary(*KERNELS)
    with cuda_native.use_library(library):
        yield library


def _cells() -> Iterator[Any]:
    for name, spec in registry.specs().items():
        if any(row.backend == "cuda" for row in registry.implementations(name, "cuda")):
            for dtype in spec.dtypes:
                yield pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")


def _shifted(value: torch.Tensor) -> torch.Tensor:
    """The same values one element further into a buffer: contiguous, but aligned to nothing."""
    if not value.is_contiguous():
        return value
    buffer = value.new_empty(value.numel() + 1)
    buffer[1:] = value.reshape(-1)
    return buffer[1:].view(value.shape)


def _assert_like_reference(name: str, args: tuple[Any, ...], where: str) -> None:
    spec = registry.specs()[name]
    row = next(r for r in registry.implementations(name, "cuda") if r.backend == "cuda")
    theirs = map_tensors(torch.Tensor.clone, args)
    actual = tensors_of(row.fn(*args))
    expected = tensors_of(spec.reference(*theirs))
    # What the reference changes in place must have changed alike, and nothing else.
    for given, kept in zip(tensors_of(args), tensors_of(theirs), strict=True):
        assert_same_bits(given, kept, f"{where}: an argument")
    fakes = tensors_of(spec.fake(*args))
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.stride() == fakes[i].stride(), where
        if spec.tolerance == "exact":
            assert_same_bits(got, want, f"{where} output {i}")
            continue
        truth = tensors_of(spec.reference(*args, compute=torch.float64))[i]
        assert spec.baseline is not None
        plain = tensors_of(spec.baseline(*args))[i]
        assert_error_rule(got, truth, plain, spec.factor, f"{where} output {i}")


def test_signatures_are_those_of_the_launchers() -> None:
    """Python packs arguments by these letters, and a wrong one would be read as another type."""
    kinds = {"int": "i", "int64_t": "n", "uint32_t": "u", "float": "f"}
    found = {}
    for path in KERNELS:
        text = path.read_text()
        for name in re.findall(r"PK_LAUNCHER\((\w+)\)", text):
            (parameters,) = re.findall(rf"int pk_cuda_{name}\(([^)]*)\)\s*{{", text)
            declared = [parameter.strip() for parameter in parameters.split(",")]
            found[name] = "".join("p" if "*" in d else kinds[d.split()[0]] for d in declared)
    assert found == cuda_native.SIGNATURES


@pytest.mark.parametrize(("name", "dtype"), list(_cells()))
def test_matches_reference(simt: SimtLibrary, name: str, dtype: torch.dtype) -> None:
    row = next(r for r in registry.implementations(name, "cuda") if r.backend == "cuda")
    ran, reasons = 0, []
    for i, sample in enumerate(registry.specs()[name].samples(dtype)):
        if (reason := row.refusal(sample.args)) is not None:
            reasons.append(reason)
            continue
        schedule = list(SCHEDULES)[i % len(SCHEDULES)]
        simt.schedule(schedule, seed=i)
        for layout, args in (
            ("plain", sample.args),
            ("shifted", map_tensors(_shifted, sample.args)),
        ):
            if row.refusal(args) is not None:
                continue
            _assert_like_reference(name, args, f"{name} {sample.name} {layout} {schedule}")
        ran += 1
    if not ran:  # only because of its dtype
        assert any(str(dtype) in reason for reason in reasons), reasons


# (M, N, K, block size, type, nested): both paths at the edges of their ranges; depths that fill no
# stage, blocks of 32 and across rows, one and several parts of the depth, more outputs than a tile.
FUSED = (
    (1, 130, 1024, 64, "nf4", True),
    (8, 20, 1056, 64, "nf4", False),
    (9, 16, 2080, 4096, "fp4", True),
    (16, 129, 96, 64, "nf4", True),
    (17, 40, 192, 32, "nf4", False),
    (33, 24, 256, 128, "fp4", False),
    (64, 12, 160, 32, "nf4", True),
)


def _fused(
    way: str, x: torch.Tensor, base: Any, n: int, term: LowRank | None = None
) -> torch.Tensor:
    return product(x, Base(*base, n, x.shape[1]), False, None, term, way=way)


def _fused_arguments(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Any, int]:
    m, n, k, blocksize, kind, nested = case
    base = (*bundles_4bit((n, k), kind, blocksize, nested, m), kind, blocksize)
    return torch.randn(m, k).to(dtype), base, n


def _check_linear(
    actual: torch.Tensor, x: torch.Tensor, base: Any, n: int, term: LowRank | None, where: str
) -> None:
    def product(compute: torch.dtype) -> torch.Tensor:
        w = quant4.dequantize_4bit(*base, [n, x.shape[1]], x.dtype).to(compute)
        y = x.to(compute) @ w.T
        if term is not None:
            y = y + term.scaling * (term.low.to(compute) @ term.up.to(compute).T)
        return y

    plain = product(torch.float32).to(x.dtype)
    assert_error_rule(actual, product(torch.float64), plain, 1.5, where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_paths(simt: SimtLibrary, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    x, base, n = _fused_arguments(case, dtype)
    term = LowRank(torch.randn(x.shape[0], 5), torch.randn(n, 5).to(dtype), 0.5)
    for i, way in enumerate(["rows"] if dtype == torch.float32 else ["mma", "rows"]):
        if way == "rows" and x.shape[0] > 17:
            continue
        simt.schedule(list(SCHEDULES)[(case[0] + i) % 4], seed=case[0])
        actual = _fused(way, x, base, n)
        _check_linear(actual, x, base, n, None, f"{way} {case}")
        actual = _fused(way, x, base, n, term)
        _check_linear(actual, x, base, n, term, f"{way} {case} with LoRA")


@pytest.mark.parametrize("way", ["mma", "rows"])
def test_row_and_batch_change_no_bit(simt: SimtLibrary, way: str) -> None:
    x, base, n = _fused_arguments((17, 24, 1056, 64, "nf4", True), torch.bfloat16)
    simt.schedule("random", seed=5)
    whole = _fused(way, x, base, n)
    for rows in (slice(0, 1), slice(3, 11), slice(16, 17), slice(0, 16)):
        simt.schedule("starving", seed=6)
        part = _fused(way, x[rows].clone(), base, n)
        assert_same_bits(part, whole[rows], f"{way} rows {rows}")


def test_integers_are_exact(simt: SimtLibrary) -> None:
    signs = torch.randint(0, 2, (20, 128)) * 2.0 - 1.0
    packed, absmax = quant4.quantize_4bit(signs, "nf4", 64, True)
    base = (packed, absmax * 4, None, None, "nf4", 64)
    x = torch.randint(-3, 4, (12, 128)).bfloat16()
    expected = (x.float() @ (signs * 4).T).bfloat16()
    for way in ("mma", "rows"):
        assert_same_bits(_fused(way, x, base, 20), expected, way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_entries_of_long_rows(simt: SimtLibrary, dtype: torch.dtype) -> None:
    """Rows that all warps of a block share, more entries in a row of W than a warp has lanes."""
    dy, x = torch.randn(531, 9).to(dtype), torch.randn(531, 70).to(dtype)
    for i, at in enumerate((torch.tensor([0, 3, 70, 500, 629]), torch.arange(630))):
        simt.schedule(list(SCHEDULES)[i + 2], seed=7)
        truth = (dy.double().T @ x.double()).view(-1)[at]
        plain = (dy.float().T @ x.float()).view(-1)[at]
        assert_error_rule(sparse.sampled_gradient(dy, x, at), truth, plain, 2.0, f"{len(at)}")
        w, values = torch.randn(9, 70).to(dtype), torch.randn(len(at)).to(dtype)
        base = (w, None, None, None, "dense", 0)
        actual = sparse.sparse_delta_linear(x[:8].clone(), *base, 9, None, at, values)
        whole = w.double().view(-1).index_add(0, at, values.double()).view(9, 70)
        truth = x[:8].double() @ whole.T
        plain = torch.nn.functional.linear(x[:8], whole.to(dtype))
        assert_error_rule(actual, truth, plain, 1.5, f"term of {len(at)}")


def test_backend_says_what_it_is() -> None:
    text = pk.backends()["cuda"]
    if (Path(cuda_native.__file__).parent / "_cuda.so").exists():
        assert text == "ok" or "compiled for sm_80, sm_90a" in text
    else:
        assert "PEFTKERN_CUDA=1" in text
    if text != "ok":
        with pytest.raises(RuntimeError, match="cannot be used here"):
            pk.use_backend("cuda")


def test_nonfinite_weights_are_named(simt: SimtLibrary) -> None:
    simt.schedule("random", seed=1)
    w = torch.ones(8, 64)
    w[3, 7] = float("nan")
    w[6, 1] = float("inf")
    for op, args, where in (
        ("quantize_4bit", (w, "nf4", 64, True), "block 3"),
        ("quantize_8bit", (w, True), "row 3"),
    ):
        row = next(r for r in registry.implementations(op, "cuda") if r.backend == "cuda")
        with pytest.raises(ValueError, match=where):
            row.fn(*args)


def _bound_step() -> None:
    """What tests/test_optim_planned.py tests."""
    p, g, m, v = (torch.ones(300) for _ in range(4))
    counts = bound.Counts([0], p.device)
    step = bound.BoundStep("cuda", "adamw", [bound.Row(300, 0, 0, 0)], 1, counts, rounding=False)
    segments = segments_of([p], [g], [m], [v], [p], [p])
    step.cover(Table(segments, p.device), [p, g, m, v], norm=True)
    settings = bound.Settings(0.1, (0.9, 0.999), 1e-8, 0.0, maximize=False)
    step.upload(array("q", [g.data_ptr()]), settings.pack())
    step.launch(clip=2, limit=1.0)
    assert counts.steps.tolist() == [1]
    assert bool((p < 1).all())


def test_every_kernel_was_executed(simt: SimtLibrary) -> None:
    """Runs what it counts; a kernel that nothing here launches fails this test."""
    simt.schedule("ascending")
    for op, spec in registry.specs().items():
        for row in registry.implementations(op, "cuda"):
            if row.backend == "cuda":
                for sample in spec.samples(spec.dtypes[-1]):
                    if row.refusal(sample.args) is None:
                        row.fn(*sample.args)
    x, base, n = _fused_arguments(FUSED[0], torch.bfloat16)
    _fused("mma", x, base, n)
    x, base, n = _fused_arguments((20, 128, 1024, 64, "nf4", True), torch.bfloat16)
    _fused("wgmma", x, base, n)  # in parts
    rows = torch.ones(129, 8).bfloat16()
    thin.outer(rows, torch.ones(129, 1), torch.empty(1, 8))  # likewise
    _bound_step()
    executed = set(simt.library.simt_kernels().decode().split())
    in_source = set(re.findall(r'launch\("(\w+)"', "".join(path.read_text() for path in KERNELS)))
    assert executed == in_source


@dataclass(frozen=True)
class Mutation:
    """A mistake put into a kernel of the product, and the kernel path that meets it."""

    name: str
    source: str
    old: str
    new: str
    way: str = "mma"


MUTATIONS = (
    Mutation("no-stage-barrier", "linear4_mma", "__syncthreads(); // stage i is there", "// stage"),
    Mutation("early-stage", "linear4_mma", "wait<S::kStages - 2>", "wait<S::kStages - 1>"),
    Mutation("wrong-fragment", "linear4_mma", "first, x.x, x.y,", "first, x.y, x.x,"),
    Mutation(
        "wrong-nibbles",
        "linear4_mma",
        "code_pair(codes, lane4, low, 1)",
        "code_pair(codes, lane4, low, 2)",
    ),
    Mutation(
        "rows-behind-n",
        "linear4_mma",
        "min64(first_n + tid / 4 + 64 * j, a.n - 1)",
        "(first_n + tid / 4 + 64 * j)",
    ),
    Mutation("scales-behind-k", "linear4_mma", "if (k < depth)", "if (depth > 0)"),
    Mutation("x-behind-m", "linear4_mma", "inside && x_row + 16 * j < a.m", "inside"),
    Mutation(
        "gemv-no-table-barrier",
        "linear_rows",
        "    __syncthreads();\n    float offset",
        "    float offset",
        "rows",
    ),
    Mutation(
        "gemv-no-sum-barrier",
        "linear_rows",
        "    __syncthreads();\n    int64_t m",
        "    int64_t m",
        "rows",
    ),
    Mutation("gemv-tail", "linear_rows", "first_n + r < a.n; ++r", "true; ++r", "rows"),
)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_in_a_real_kernel_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    text = (CSRC / "cuda" / f"{mutation.source}.cu").read_text()
    assert text.count(mutation.old) == 1, "the kernel has changed: bring the mutation up to date"
    mutant = tmp_path / f"{mutation.source}.cu"
    mutant.write_text(text.replace(mutation.old, mutation.new))
    library = SimtLibrary(*(mutant if p.name == mutant.name else p for p in KERNELS))
    caught = 0
    shapes = [(9, 130, 672, 64, "nf4", False), (3, 7, 31, 64, "nf4", False)]
    case = shapes[mutation.name == "gemv-tail"]
    with cuda_native.use_library(library):
        for schedule in SCHEDULES:
            library.schedule(schedule, seed=3)
            x, base, n = _fused_arguments(case, torch.bfloat16)
            try:
                actual = _fused(mutation.way, x, base, n)
                _check_linear(actual, x, base, n, None, mutation.name)
            except (RuntimeError, AssertionError):
                caught += 1
    assert caught == len(SCHEDULES)


BROKEN = sorted((CSRC / "simt" / "broken").glob("*.cu"))


@functools.cache
def _broken_cases() -> tuple[ctypes.CDLL, dict[str, Any]]:
    """All broken kernels in one library, each launcher under the name of its file."""
    folder = Path(tempfile.mkdtemp(prefix="peftkern-broken-"))
    for source in BROKEN:
        text = source.read_text().replace("../../cuda/", f"{CSRC}/cuda/")
        (folder / source.name).write_text(text.replace("run_case", f"run_{source.stem}"))
    gathered = folder / "all.cu"
    gathered.write_text(
        "".join(f'namespace {source.stem} {{\n#include "{source.name}"\n}}\n' for source in BROKEN)
    )
    head = f'#include "{CSRC}/cuda/primitives.cuh"\n'
    gathered.write_text(head + gathered.read_text())
    library = _build(gathered)
    shutil.rmtree(folder)
    cases = {source.stem: getattr(library, f"run_{source.stem}") for source in BROKEN}
    return library, cases


def _run_case(name: str, broken: int, schedule: str, seed: int) -> tuple[int, torch.Tensor, str]:
    library, cases = _broken_cases()
    n = 100
    given = torch.arange(n, dtype=torch.float32).sub_(50)
    out = torch.full((n,), -1000.0)
    library.simt_clear_buffers()
    for label, value in (("in", given), ("out", out)):
        library.simt_add_buffer(label.encode(), value.data_ptr(), 4 * n)
    library.simt_configure(SCHEDULES[schedule], seed)
    pointer = ctypes.c_void_p
    status = cases[name](pointer(given.data_ptr()), pointer(out.data_ptr()), n, broken)
    return status, out, library.simt_report().decode()


RACE, EARLY = "race in shared memory", "before its cp.async was waited for"
UNWRITTEN = "uninitialised read"  # a reader that overtakes its writer finds nothing
REPORTS: dict[str, tuple[str, ...]] = {
    "async_without_barrier": (RACE, EARLY, UNWRITTEN),
    "block_race": ("race in out",),
    "divergent_barrier": ("divergent barrier",),
    "divergent_shuffle": ("divergent warp",),
    "early_async_read": (EARLY,),
    "early_refill": (RACE, EARLY),
    "misaligned_vector": ("misaligned",),
    "missing_barrier": (RACE, UNWRITTEN),
    "missing_warp_barrier": (RACE, UNWRITTEN),
    "off_by_one_tail": ("out of bounds",),
    "out_of_bounds_store": ("out of bounds",),
    "plain_counter": (RACE,),
    "shared_overrun": ("belongs to no array",),
    "uninitialised_shared": (UNWRITTEN,),
    "wrong_fragment": (),  # legal, but the numbers are wrong
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", [source.stem for source in BROKEN])
def test_broken_kernel_is_caught(name: str, schedule: str) -> None:
    for seed in range(3):
        status, sound, report = _run_case(name, 0, schedule, seed)
        assert status == 0, f"the sound variant was stopped: {report}"
        status, out, report = _run_case(name, 1, schedule, seed)
        if REPORTS[name]:
            assert status == FAULT
            assert any(text in report for text in REPORTS[name]), report
        else:
            assert status == 0
            assert not torch.equal(out, sound)


def test_the_executor_computes_what_hardware_does() -> None:
    library = _build(CSRC / "simt" / "sound.cu")

    def run(name: str, *values: torch.Tensor) -> None:
        library.simt_clear_buffers()
        for value in values:
            library.simt_add_buffer(b"argument", value.data_ptr(), value.numel() * 4)
        pointers = [ctypes.c_void_p(value.data_ptr()) for value in values]
        assert getattr(library, f"run_{name}")(*pointers) == 0, library.simt_report().decode()

    for schedule in SCHEDULES.values():
        library.simt_configure(schedule, 1)
        given = torch.randint(-8, 9, (384,)).float()
        out = torch.empty(16, 8)
        run("matrix", given, out)
        torch.testing.assert_close(out, given[:256].view(16, 16) @ given[256:].view(8, 16).T + 1)

        v, out = torch.randn(32), torch.empty(6, 32)
        run("warp", v, out)
        at = torch.arange(32)
        down = torch.where(at % 8 + 3 < 8, at + 3, at)
        up = torch.where(at % 16 >= 2, at - 2, at)
        for row, source in enumerate((at ^ 5, down, up, at // 8 * 8 + 7)):
            assert torch.equal(out[row], v[source])
        assert torch.equal(out[4], (at % 3 == 0).float())
        assert torch.equal(out[5], torch.ones(32))

        total, least = torch.zeros(1, dtype=torch.int32), torch.full((1,), 77, dtype=torch.int32)
        run("atomic", total, least)
        assert total.item() == 192 * 191 // 2
        assert least.item() == 100 - 63
