"""The op matrix for the Triton kernels, run by Triton's interpreter on the CPU.

The interpreter must be switched on before triton is imported, and other tests may import it first:
so each family runs in a process of its own, which is this file called as a script.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern import registry
from peftkern.testing import assert_error_rule, assert_same_bits, map_tensors, tensors_of

pytest.importorskip("triton")

_ROOT = str(Path(__file__).parents[1])
# Families that also run in the least tiles, and others that take more than a few seconds.
_TILED = ("lora", "dora", "bottleneck", "prefix", "multi_lora", "sparse_delta")
_LONG = ("lora_group", "gated")


def _implementations() -> dict[str, registry.Implementation]:
    rows = [r for name in registry.specs() for r in registry.implementations(name, "cuda")]
    return {row.op: row for row in rows if row.backend == "triton"}


def _family(row: registry.Implementation) -> str:
    return row.fn.__module__.split(".")[-2]


def _shifted(value: torch.Tensor) -> torch.Tensor:
    """The same values one element further into a buffer: contiguous, but aligned to nothing."""
    if not value.is_contiguous():
        return value
    buffer = value.new_empty(value.numel() + 1)
    buffer[1:] = value.reshape(-1)
    return buffer[1:].view(value.shape)


def _compare(
    spec: registry.OpSpec, fn: Any, sample: registry.Sample, args: tuple[Any, ...]
) -> None:
    theirs = map_tensors(torch.Tensor.clone, sample.args)
    expected = tensors_of(spec.reference(*theirs))
    actual = tensors_of(fn(*args))
    assert len(actual) == len(expected)
    # What the reference changes in place must have changed alike, and nothing else.
    for given, kept in zip(tensors_of(args), tensors_of(theirs), strict=True):
        assert_same_bits(given, kept, f"{spec.name} {sample.name}: an argument")
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        where = f"{spec.name} {sample.name} output {i}"
        assert got.stride() == want.stride(), where
        if spec.tolerance == "exact":
            assert_same_bits(got, want, where)
            continue
        assert spec.baseline is not None
        truth = tensors_of(spec.reference(*sample.args, compute=torch.float64))[i]
        plain = tensors_of(spec.baseline(*sample.args))[i]
        assert_error_rule(got, truth, plain, spec.factor, where)


def _smaller(config: Any) -> Any:
    """The same kernel in the least tiles: what many tiles, parts and blocks of ranks come from."""
    if config is None:
        return None
    changes: dict[str, int] = {"block_m": 16}
    if hasattr(config, "block_o"):  # 4-bit tiles hold whole groups
        changes |= {"split": 2, "block_o": max(32, config.group)}
    else:
        if hasattr(config, "block_n"):
            changes["block_n"] = 16
        changes |= {"block_c": 16 if config.block_c < 64 else 32, "split": max(2, config.split)}
        if hasattr(config, "programs"):  # several tiles for each
            changes["programs"] = 3
    return dataclasses.replace(config, **changes)


def _use_way(way: str) -> None:
    """The bottleneck by one of its ways wherever that can take it."""
    from peftkern.ops.bottleneck import triton as ways
    from peftkern.tuning.bottleneck import _LARGEST_RANK

    def chosen(m: int, c: int, n: int, rank: int, fp32: bool, back: bool, products: bool) -> str:
        takes = {"rows": rank <= _LARGEST_RANK[fp32], "library": products, "passes": True}
        return way if takes[way] else "passes"

    ways.bottleneck_way = chosen


def _use_small_tiles() -> None:
    """Heuristics give the least tiles, paths for many rows open with few, rules are reversed."""
    from peftkern.tuning import bottleneck, configs, sparse

    configs._WANTED_PROGRAMS = sparse._WANTED_PROGRAMS = bottleneck._WANTED_PROGRAMS = 4
    found = {**vars(configs), **vars(sparse), **vars(bottleneck)}
    functions = {name: value for name, value in found.items() if name.endswith("_config")}
    rules = {name: value for name, value in vars(sparse).items() if name.endswith(("win", "wins"))}
    for module in [m for name, m in sys.modules.items() if name.startswith("peftkern.")]:
        for name, function in functions.items():
            if getattr(module, name, None) is function:
                small = functools.partial(_call_smaller, function)
                setattr(module, name, small)
        for name, rule in rules.items():
            if getattr(module, name, None) is rule:
                setattr(module, name, functools.partial(_call_reversed, rule))


def _call_smaller(function: Any, *args: Any) -> Any:
    return _smaller(function(*args))


def _call_reversed(rule: Any, *args: Any) -> bool:
    return not rule(*args)


_SERVED: list[str] = []  # calls of torch's attention


def _use_torchs_attention() -> None:
    """torch's attention for CPUs in the place of those for GPUs: same results, same row sums."""
    from peftkern.ops.prefix import library

    def forward(q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
        _SERVED.append("forward")
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, 0.0, causal, scale=scale)

    def backward(*args: Any) -> Any:
        _SERVED.append("backward")
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(*args[:6], 0.0, args[6], scale=args[7])

    library._DEVICES["cpu"] = lambda *_: "cpu"
    library.WAYS["cpu"] = library.Attention(forward, backward)


def _run_family(family: str, dtypes: tuple[torch.dtype, ...] | None) -> dict[str, dict[str, Any]]:
    """``{"op dtype": {"ran": count, "failures": [text]}}`` for every triton implementation."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    report: dict[str, dict[str, Any]] = {}
    for name, row in _implementations().items():
        if _family(row) != family:
            continue
        spec = registry.specs()[name]
        for dtype in dtypes or _dtypes(name, family):
            failures, ran, before = [], 0, len(_SERVED)
            for i, sample in enumerate(spec.samples(dtype)):
                args = map_tensors(_shifted, sample.args) if i % 2 else sample.args
                ran += 1
                try:
                    _compare(spec, row.fn, sample, args)
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    failures.append(f"{sample.name}: {error!r} at {place.filename}:{place.lineno}")
            torchs = len(_SERVED) - before
            report[f"{name} {dtype}"] = {"ran": ran, "failures": failures, "torchs": torchs}
    return report


@functools.cache
def _report(family: str, tiles: str = "") -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__)), family, tiles],
        env=environment,
        capture_output=True,
        text=True,
        cwd=_ROOT,
    )
    if done.returncode:  # kept, so that every cell of the family shows it without another process
        return {"": {"ran": 0, "failures": [done.stderr[-4000:]]}}
    return json.loads(done.stdout.splitlines()[-1])


def _dtypes(name: str, family: str) -> list[torch.dtype]:
    """Those of the op; where small tiles run as well, they take fp16 over."""
    known = registry.specs()[name].dtypes
    return [d for d in known if family not in _TILED or d != torch.float16]


def _cells() -> list[Any]:
    cells = []
    for name, row in _implementations().items():
        family = _family(row)
        marks = (pytest.mark.slow,) if family in _TILED + _LONG else ()
        cells += [pytest.param(name, str(d), marks=marks) for d in _dtypes(name, family)]
    return cells


@pytest.mark.parametrize(("name", "dtype"), _cells())
def test_matches_reference(name: str, dtype: str) -> None:
    report = _report(_family(_implementations()[name]))
    cell = report.get("", {}) or report[f"{name} {dtype}"]
    assert not cell["failures"], "\n".join(cell["failures"])
    assert cell["ran"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["prefix_attention", "prefix_attention_backward"])
def test_prefix_share(name: str, dtype: torch.dtype) -> None:
    """The sequence's part by torch, which takes it on a GPU only."""
    report = _report("prefix", "torchs")
    cell = report.get("", {}) or report[f"{name} {dtype}"]
    assert not cell["failures"], "\n".join(cell["failures"])
    assert cell["torchs"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rows", "passes", "library"])
@pytest.mark.parametrize("name", ["bottleneck_adapter", "bottleneck_adapter_backward"])
def test_bottleneck_by_every_way(name: str, way: str) -> None:
    report = _report("bottleneck", way)
    dtype = torch.bfloat16 if way == "library" else torch.float16
    cell = report.get("", {}) or report[f"{name} {dtype}"]
    assert not cell["failures"], "\n".join(cell["failures"])
    assert cell["ran"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, row in _implementations().items() if _family(row) in _TILED]
)
def test_small_tiles(name: str) -> None:
    """Several tiles, parts and blocks of ranks, which samples of this size never fill."""
    report = _report(_family(_implementations()[name]), "small")
    cell = report.get("", {}) or report[f"{name} {torch.float16}"]
    assert not cell["failures"], "\n".join(cell["failures"])
    assert cell["ran"] >= 5


def test_importing_peftkern_imports_no_triton() -> None:
    code = "import sys, peftkern; sys.exit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT)
    assert done.returncode == 0


if __name__ == "__main__":
    from bench.gpu import interpreter

    interpreter.repair()
    kind = sys.argv[2] if len(sys.argv) > 2 else ""
    dtypes: tuple[torch.dtype, ...] | None = None
    if kind:
        _use_small_tiles()
        dtypes = (torch.float16,)
    if kind in ("rows", "passes", "library"):
        _use_way(kind)
    if kind == "library":  # fp32 weights in parts are for bf16 alone
        dtypes = (torch.bfloat16, torch.float16)
    if kind == "torchs":
        _use_torchs_attention()
        dtypes = (torch.bfloat16, torch.float16)
    print(json.dumps(_run_family(sys.argv[1], dtypes)))
