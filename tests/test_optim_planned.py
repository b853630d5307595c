"""Planned steps (peftkern/optim/planned.py): native, and by the CUDA kernels under the executor.

The executor's memory is the CPU's, so the parameters are there and the choice of the backend is
patched; everything else is what runs on a GPU. Both are compared with steps that are not planned.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_simt import COMPILER, KERNELS, SCHEDULES, SimtLibrary
from test_pager_device import LateLink
from torch import Tensor

from peftkern import cuda_native, native, registry
from peftkern.ops.optimizer import bound, reference
from peftkern.ops.optimizer.contract import hyper_row, sample_tensors
from peftkern.ops.optimizer.cuda import optimizer_step
from peftkern.ops.optimizer.table import Table
from peftkern.optim import (
    AdamW,
    AdamW8bit,
    Lion8bit,
    PagedAdamW,
    PagedAdamW8bit,
    SGD8bit,
    planned,
)
from peftkern.testing import assert_same_bits, tensors_of

SIZES = (
    (4096 + 256, torch.float32),
    (5000, torch.bfloat16),
    (7, torch.float32),
    (0, torch.float16),
    (4097, torch.float16),
    (300, torch.bfloat16),
)


class Counting:
    """The executor's library, and how often each launcher was called."""

    def __init__(self, inner: SimtLibrary | None) -> None:
        self.inner, self.calls = inner, []
        self.parameters: list[Tensor] = []

    def count(self, name: str) -> int:
        return self.calls.count(name)

    def launch(self, name: str, device: Any, args: Any, reaches: Iterable[Tensor] = ()) -> None:
        self.calls.append(name)
        # Gradients come and go; the executor must hear of them before it lets a kernel read them.
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.inner.launch(name, device, args, [*reaches, *grads])

    def ask(self, name: str, *args: int) -> int:
        return self.inner.ask(name, *args)


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    if COMPILER is None:
        pytest.skip("no g++ to compile the executor with")
    return SimtLibrary(*KERNELS)


_KNOWN: list[Tensor] = []  # parameters of the running test


@pytest.fixture(params=["cuda", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    _KNOWN.clear()
    torch.set_num_threads(1)
    if request.param == "native":
        if not native.available():
            pytest.skip("the native module is not built")
        library = Counting(None)
        plain = bound.BoundStep._run

        def counted(step: bound.BoundStep, name: str, more: Any) -> None:
            library.calls.append(f"optimizer_{name}")
            plain(step, name, more)

        monkeypatch.setattr(bound.BoundStep, "_run", counted)
        yield library
        return
    if COMPILER is None:
        pytest.skip("no g++ to compile the executor with")
    row = next(r for r in registry.implementations("optimizer_step", "cuda") if r.backend == "cuda")
    simt = request.getfixturevalue("simt")
    library = Counting(simt)
    library.parameters = _KNOWN
    simt.schedule("random", seed=3)
    with cuda_native.use_library(library):
        monkeypatch.setattr(bound.registry, "select", lambda op, args: row)
        yield library


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(n, generator=make).to(d)) for n, d in SIZES]
    _KNOWN.extend(made)
    return made


def _gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    """Multiples of 1/64, so that sums of squares are exact in any order."""
    make = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        p.grad = (torch.randint(-20, 21, p.shape, generator=make) / 64).to(p.dtype)


def _train(
    make: Callable[..., Any], steps: int, each: Callable[..., None] | None = None, **options: Any
) -> tuple[list[torch.nn.Parameter], Any]:
    torch.manual_seed(7)
    parameters = _parameters()
    groups = [
        {"params": parameters[:3], "lr": 1e-2},
        {"params": parameters[3:], "weight_decay": 0.3, "maximize": True},
    ]
    optimizer = make(groups, **options)
    for step in range(steps):
        _gradients(parameters, step)
        if each is not None:
            each(step, parameters, optimizer)
        optimizer.step()
        optimizer.param_groups[1]["lr"] *= 0.9
    return parameters, optimizer


def _assert_equal_runs(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    for i, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")
    first, second = one[1].state_dict(), other[1].state_dict()
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        theirs = second["state"][key]
        assert state["step"] == theirs["step"]
        assert type(state["step"]) is int
        for name, value in state["__bnb_optimizer_quant_state__"].items():
            assert_same_bits(value, theirs["__bnb_optimizer_quant_state__"][name], f"{key} {name}")


def _both(
    kernels: Counting, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], steps: int,
    each: Callable[..., None] | None = None, **options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The same training with planned steps and without; compared bit for bit."""
    ours = _train(make, steps, each, **options)
    assert "optimizer_run" in kernels.calls
    monkeypatch.undo()
    monkeypatch.setattr(planned, "DEVICES", frozenset())
    theirs = _train(make, steps, each, **options)
    _assert_equal_runs(ours, theirs)
    return ours[1], theirs[1]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (AdamW8bit, {}),
        (AdamW, {"max_grad_norm": 0.5}),
        (AdamW8bit, {"stochastic_rounding": True, "max_grad_norm": 1e9}),
        (Lion8bit, {"skip_nonfinite_step": True}),
        (SGD8bit, {"weight_decay": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value) or "plain",
)
def test_planned_steps_are_the_steps(
    kernels: Counting, monkeypatch: pytest.MonkeyPatch, make: Any, options: dict[str, Any]
) -> None:
    ours, theirs = _both(kernels, monkeypatch, make, 3, **options)
    assert ours.last_grad_norm == theirs.last_grad_norm
    assert kernels.count("optimizer_run") == 3
    assert kernels.count("optimizer_upload") == 1  # one plan


@pytest.mark.parametrize("whole", [False, True])
def test_gradients_that_are_not_finite(
    kernels: Counting, monkeypatch: pytest.MonkeyPatch, whole: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def spoil(step: int, parameters: list[Tensor], optimizer: Any) -> None:
        if step == 1:
            parameters[1].grad[300] = float("inf")
            parameters[2].grad[:] = float("nan")

    options = {"skip_nonfinite_step": True} if whole else {}
    ours, theirs = _both(kernels, monkeypatch, AdamW8bit, 3, spoil, **options)
    mine, other = ours.nonfinite_report(), theirs.nonfinite_report()
    if whole:  # parameters without elements have no blocks to skip
        other["last"]["parameters"].pop(3)
    assert mine == other
    assert "NaN or Inf" in caplog.text
    steps = [state["step"] for state in ours.state_dict()["state"].values()]
    assert steps == ([2, 2, 2, 2, 2, 2] if whole else [3, 3, 2, 3, 3, 3])


def test_what_changes_between_steps_is_noticed(
    kernels: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(step: int, parameters: list[Tensor], optimizer: Any) -> None:
        state = optimizer.state
        if step == 1:
            parameters[0].grad = None
        elif step == 2:
            parameters[1].data = parameters[1].data.clone()
        elif step == 3:
            state[parameters[4]]["state1"] = state[parameters[4]]["state1"].clone()
        elif step == 4:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif step == 5:
            state[parameters[5]] = {**state[parameters[5]], "step": 9}
        elif step == 6:
            extra = torch.nn.Parameter(torch.ones(300))
            extra.grad = torch.ones(300)
            optimizer.add_param_group({"params": [extra]})
            parameters.append(extra)
            _KNOWN.append(extra)
        elif step == 7:
            parameters[1].grad = parameters[1].grad.repeat_interleave(2)[::2]
        elif step == 9:
            optimizer.state = pickle.loads(pickle.dumps(dict(optimizer.state)))
            optimizer.state = dict(zip(parameters, optimizer.state.values(), strict=True))

    _both(kernels, monkeypatch, AdamW8bit, 10, meddle)


def test_gradients_that_move_are_followed(kernels: Counting) -> None:
    parameters = _parameters()
    optimizer = AdamW8bit(parameters, lr=1e-2)
    for step in range(4):
        if step != 2:
            _gradients(parameters, step)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        for p, old in zip(parameters, before, strict=True):
            assert p.numel() == 0 or not torch.equal(p, old)
    assert kernels.count("optimizer_upload") == 1


def test_parameters_that_take_turns_keep_their_plans(kernels: Counting) -> None:
    parameters = _parameters()
    optimizer = AdamW(parameters)
    for step in range(6):
        _gradients(parameters, step)
        for p in parameters[step % 2 :: 2]:
            p.grad = None
        optimizer.step()
    # The first plan is made again, because the second one's parameters had to be counted too.
    assert kernels.count("optimizer_upload") == 3
    steps = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert steps == [3] * 6


def test_learning_rate_on_the_device(kernels: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, others = _parameters(), _parameters()
    rate = torch.tensor(0.02)
    optimizer, plain = AdamW(parameters, lr=rate), AdamW(others, lr=0.02)
    for step in range(3):
        _gradients(parameters, step)
        _gradients(others, step)
        optimizer.step()
        plain.param_groups[0]["lr"] = float(rate)
        plain.step()
        rate.mul_(0.5)
    for p, q in zip(parameters, others, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_copies_go_on(kernels: Counting) -> None:
    parameters = _parameters()
    optimizer = AdamW8bit(parameters, lr=1e-2)
    _gradients(parameters, 0)
    optimizer.step()
    copied, theirs = copy.deepcopy((optimizer, parameters))
    _KNOWN.extend(theirs)
    for some, which in ((parameters, optimizer), (theirs, copied)):
        _gradients(some, 1)
        which.step()
    _assert_equal_runs((parameters, optimizer), (theirs, copied))


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
def test_hyperparameters_are_those_of_the_contract(kernels: Counting, rule: str) -> None:
    backend = "native" if kernels.inner is None else "cuda"
    steps = [0, 1, 2, 9, 99, 999, 12345, 10**6, 10**9]
    counts = bound.Counts(steps, torch.device("cpu"))
    rows = [bound.Row(256, 0, i, i) for i in range(len(steps))]
    step = bound.BoundStep(backend, rule, rows, 1, counts, rounding=True)
    step.cover(Table([], step.device), [], norm=False)
    numbers: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    step.norm.fill_(8.0)
    settings = bound.Settings(**numbers, maximize=True, seed=5)
    step.upload(array("q", [0] * len(steps)), settings.pack())
    step.launch("upload")
    step.launch("prepare", clip=1, limit=2.0)
    factor = -2.0 / (8.0 + 1e-6)
    expected = [hyper_row(rule, **numbers, step=s + 1, grad_scale=factor) for s in steps]
    assert_same_bits(step.hyper, torch.tensor(expected))
    step.norm.fill_(float("inf"))
    step.launch("prepare", clip=1, limit=math.inf)
    assert step.hyper[:, 0].isnan().all()


def test_scans_agree(kernels: Counting) -> None:
    if not native.available():
        pytest.skip("one of the two needs the native module")
    parameters = _parameters()
    states = [{"state1": torch.zeros(1)} for _ in parameters]
    kept = [(weakref.ref(s["state1"]),) for s in states]

    def facts() -> array[int]:
        found = array("q")
        for p, s in zip(parameters, states, strict=True):
            state = s["state1"].data_ptr()
            found.extend((p.data_ptr(), state, p.grad.nbytes, p.grad.data_ptr()))
        return found

    def answers(before: array[int]) -> list[int]:
        result = []
        for scan in (native.kernels().scan_parameters, planned.scan_parameters):
            copied = array("q", before)
            given = copied if scan is planned.scan_parameters else copied.buffer_info()[0]
            result.append(scan(parameters, states, kept, given))
        return result

    _gradients(parameters, 0)
    known = facts()
    assert answers(known) == [0, 0]
    held = [p.grad for p in parameters]
    _gradients(parameters, 1)
    assert answers(known) == [1, 1]
    parameters[1].grad = held[1].to(torch.bfloat16).repeat(2)[::2]
    assert answers(known) == [2, 2]
    parameters[1].grad = None
    assert answers(known) == [2, 2]
    parameters[1].grad = held[1]
    states[2]["more"] = 1
    assert answers(known) == [2, 2]
    del states[2]["more"]
    assert answers(known) == [1, 1]
    states[2]["state1"].data = torch.zeros(1)
    assert answers(known) == [2, 2]
    states[2]["state1"] = torch.zeros(1)
    assert answers(known) == [2, 2]


def test_a_plan_keeps_no_memory(kernels: Counting) -> None:
    """State and parameters that are moved away are gone, whatever was planned with them."""
    memory = [np.zeros(5000, dtype=np.float32) for _ in range(3)]
    parameters = [torch.nn.Parameter(torch.from_numpy(m)) for m in memory]
    _KNOWN.extend(parameters)
    optimizer = AdamW8bit(parameters, lr=1e-2)
    gone = [weakref.ref(m) for m in memory]
    del memory
    for step in range(2):
        for p in parameters:
            p.grad = torch.ones(5000)
        optimizer.step()
        for p in parameters if step == 0 else ():
            state = optimizer.state[p]
            gone.append(weakref.ref(state["state2"]))
            state["state1"], state["state2"] = state["state1"].clone(), state["state2"].clone()
            p.data = p.data.clone()
        gc.collect()
        assert all(reference() is None for reference in gone)
    assert [s["step"] for s in optimizer.state_dict()["state"].values()] == [2] * 3


EXTREMES = (0.0, -0.0, 1e-45, 1e-38, 1e-30, 2.0**-70, 1e-12, 1.0, 1e12, 1e18, 3e38)


@pytest.mark.parametrize("eight", [False, True])
def test_rare_operands(simt: SimtLibrary, eight: bool) -> None:
    """Zeros, denormals and huge numbers in moments and gradients take the careful path."""
    pairs = torch.tensor([(a, b) for a in EXTREMES for b in EXTREMES])
    n = 4 * 256 + 9
    m = pairs[torch.arange(n) % len(pairs), 0] * torch.tensor([1.0, -1.0])[torch.arange(n) % 2]
    v = pairs[torch.arange(n) % len(pairs), 1]
    if eight:  # a block each of ordinary, tiny, denormal and zero moments
        scale = torch.tensor([1.0, 1e-30, 1e-41, 0.0, 1.0]).repeat_interleave(256)[:n]
        m, v = torch.randn(n) * scale, torch.rand(n) * scale
        (c1, a1), (c2, a2) = reference.encode(m, True), reference.encode(v, False)
        state: list[list[Tensor]] = [[c1.contiguous()], [c2.contiguous()], [a1], [a2]]
    else:
        state = [[m], [v], [m.new_empty(0)], [m.new_empty(0)]]
    for g in (torch.zeros(n), torch.randn(n) * 1e-20, torch.randn(n) * 1e15):
        for eps in (0.0, 1e-8, 1e6):
            row = hyper_row("adamw", lr=0.1, betas=(0.9, 0.999), eps=eps, weight_decay=0.1, step=3)
            args = (torch.tensor([row]), [torch.randn(n)], [g], *state, "adamw", None)
            ours, theirs = copy.deepcopy(args), copy.deepcopy(args)
            simt.schedule("descending")
            with cuda_native.use_library(simt):
                skipped = optimizer_step(*ours)
            assert_same_bits(skipped, reference.optimizer_step(*theirs))
            for a, b in zip(ours[1:7], theirs[1:7], strict=True):
                assert_same_bits(a[0], b[0], f"eps {eps}")


def test_every_schedule_gives_the_same_bits(simt: SimtLibrary) -> None:
    results = []
    for schedule in SCHEDULES:
        simt.schedule(schedule, seed=11)
        make = torch.Generator().manual_seed(1)
        n = 20 * 256 + 17
        m, v = torch.randn(n, generator=make), torch.rand(n, generator=make)
        (c1, a1), (c2, a2) = reference.encode(m, True), reference.encode(v, False)
        row = hyper_row("adamw", lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3)
        p, g = torch.randn(n, generator=make), torch.randn(n, generator=make)
        with cuda_native.use_library(simt):
            optimizer_step(torch.tensor([row]), [p], [g], [c1], [c2], [a1], [a2], "adamw", None)
        results.append([p, c1, c2, a1, a2])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("make", "device", "ram"),
    [
        (PagedAdamW8bit, None, None),
        (PagedAdamW8bit, 16384, None),
        (PagedAdamW, 49152, 49152),
    ],
    ids=["resident", "device", "all"],
)
def test_paged_steps_are_the_steps(
    kernels: Counting, monkeypatch: pytest.MonkeyPatch, make: Any, device: int | None,
    ram: int | None, tmp_path: Path,
) -> None:  # fmt: skip
    def spoil(step: int, parameters: list[Tensor], optimizer: Any) -> None:
        if step == 1:
            parameters[1].grad[300] = float("inf")
        if step == 2:
            parameters[0].grad = None

    paging: dict[str, Any] = {"bucket_bytes": 8192 if device else 1 << 20, "device_budget": device}
    if ram:
        paging |= {"ram_budget": ram, "page_dir": tmp_path, "keep_parameters": True}
    options = {"max_grad_norm": 1e9} if device else {}
    ours = _train(make, 4, spoil, link=LateLink(3), **paging, **options)
    if device is None:  # the first step zeroes buckets; from then on all of one is one call
        assert (kernels.count("optimizer_step"), kernels.count("optimizer_run")) == (1, 3)
    else:
        assert kernels.count("optimizer_step") > 8
    monkeypatch.undo()
    monkeypatch.setattr(planned, "DEVICES", frozenset())
    theirs = _train(AdamW8bit if make is PagedAdamW8bit else AdamW, 4, spoil, **options)
    _assert_equal_runs(ours, theirs)
    assert ours[1].nonfinite_report()["blocks"] == theirs[1].nonfinite_report()["blocks"] > 0
    ours[1].close()
    if ram:
        again = [torch.nn.Parameter(torch.zeros_like(p)) for p in theirs[0]]
        groups = [{"params": again[:3]}, {"params": again[3:]}]
        resumed = make(groups, link=LateLink(4), resume=True, **paging, **options)
        _assert_equal_runs((again, resumed), theirs)
        resumed.close()


def _many_tensors() -> tuple[Any, ...]:
    """More chunks than warps, so that warps take a second one; tails and whole blocks."""
    sizes = (2600, *range(1, 600, 17))
    lists = sample_tensors(sizes, torch.bfloat16, "adamw", True)
    row = hyper_row("adamw", lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=2)
    return (torch.tensor([row] * len(sizes)), *lists, "adamw", None)


def test_warps_take_several_tensors(simt: SimtLibrary) -> None:
    args = _many_tensors()
    for schedule in SCHEDULES:
        simt.schedule(schedule, seed=3)
        ours, theirs = copy.deepcopy(args), copy.deepcopy(args)
        reference.optimizer_step(*theirs)
        with cuda_native.use_library(simt):
            optimizer_step(*ours)
        for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert_same_bits(a, b)


MUTATIONS = {
    "no-table-barrier": (
        "        __syncthreads();\n    }\n    SharedAddress words",
        "    }\n    SharedAddress words",
    ),
    "run-overwritten": ("        __syncwarp(); // the last chunk is done with\n", ""),
    "old-statistics": ("            __syncwarp(); // every lane has read the old statistics\n", ""),
    "tail": ("int n = (int)min64(kChunk, s.numel - from);", "int n = (int)kChunk;"),
    "wrong-half": ("own + 128 * h, codes1[h]", "own + 124 * h, codes1[h]"),
    "wrong-bytes": ("0x5410u", "0x4510u"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_mistake_in_the_kernel_is_caught(name: str, tmp_path: Path) -> None:
    old, new = MUTATIONS[name]
    source = next(path for path in KERNELS if path.stem == "optimizer")
    text = source.read_text()
    assert text.count(old) == 1, "the kernel has changed: bring the mutation up to date"
    mutant = tmp_path / source.name
    mutant.write_text(text.replace(old, new).replace('"../', f'"{source.parent.parent}/'))
    library = SimtLibrary(*(mutant if p == source else p for p in KERNELS))
    args = _many_tensors()
    caught = 0
    for schedule in SCHEDULES:
        library.schedule(schedule, seed=3)
        ours, theirs = copy.deepcopy(args), copy.deepcopy(args)
        reference.optimizer_step(*theirs)
        try:
            with cuda_native.use_library(library):
                optimizer_step(*ours)
            for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
                assert_same_bits(a, b)
        except (RuntimeError, AssertionError):
            caught += 1
    assert caught == len(SCHEDULES)
