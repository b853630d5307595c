"""Every Triton kernel and configuration compiled ahead of time, without a GPU, and inspected."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from bench.gpu.aot import Binary, compile_launch, lower
from bench.gpu.aot_cases import launches, sampled
from peftkern import triton_kernels
from peftkern.triton_kernels.launch import Launch

# What a program may have on the smallest GPUs served (compute capability 8.6 and 8.9).
_SHARED_LIMIT = 99 * 1024
_REGISTER_LIMIT = {"_linear_kernel": 255, "_finish_kernel": 208, "_dequantize_4bit_kernel": 64}


def _cells() -> list[object]:
    """Each launch on 9.0, the first one of a kernel not slow, and every third of a kernel on 8.0.

    Each takes two seconds; ``PEFTKERN_AOT_ALL=1`` compiles them all on both.
    """
    every = os.environ.get("PEFTKERN_AOT_ALL", "0") not in ("", "0")
    seen: Counter[str] = Counter()
    cells = []
    for label, launch in launches():
        name = launch.kernel.__name__
        number = seen[name]
        seen[name] += 1
        for arch in (90, 80) if every or number % 3 == 0 else (90,):
            quick = arch == 90 and number == 0
            marks = () if quick else (pytest.mark.slow,)
            options = "-".join(
                f"{k}{v}" for k, v in launch.options.items() if k.startswith("BLOCK")
            )
            cells.append(
                pytest.param(launch, arch, marks=marks, id=f"{label}-{name}-{options}-{arch}")
            )
    return cells


def _multiplies_asynchronously(binary: Binary) -> None:
    assert binary.count("HGMMA") > 0, "no wgmma"
    assert max(binary.wgmma_waits) >= 1, "every wgmma is waited for at once"


def _weights_a_thread(options: dict[str, Any]) -> float:
    """How many 4-bit weights a thread decodes in a step of the kernel's loop."""
    if "GROUPS" in options:
        tile = options["GROUPS"] * options["BLOCKSIZE"]
    else:
        rows = next(options[name] for name in ("BLOCK_O", "BLOCK_N", "BLOCK_M") if name in options)
        tile = rows * options["BLOCK_C"]
    return tile / (32 * options["num_warps"])


@pytest.mark.parametrize(("launch", "arch"), _cells())
def test_compiles_within_its_budget(launch: Launch, arch: int) -> None:
    binary = compile_launch(launch, arch)
    assert binary.stack == 0, f"{binary.stack} bytes of registers spilled a thread"
    assert binary.registers <= _REGISTER_LIMIT.get(binary.kernel, 255)
    assert binary.shared <= _SHARED_LIMIT
    if binary.kernel == "_linear_kernel":
        assert binary.count("LDGSTS") > 0, "loads are not asynchronous"
        if arch == 90:
            _multiplies_asynchronously(binary)
        else:
            assert binary.count("HMMA") > 0
    if binary.kernel in ("_dequantize_4bit_kernel", "_dequantize_absmax_kernel"):
        assert binary.count("FFMA") == 0, "a nested statistic is rounded twice, not fused"
    if launch.options.get("FORMAT") in ("nf4", "fp4") or binary.kernel == "_dequantize_4bit_kernel":
        # Five table look-ups a weight; the FP4 table has fewer distinct bytes to pick from.
        a_weight = 3.0 if launch.options.get("FORMAT") == "fp4" else 4.6
        least = a_weight * _weights_a_thread(launch.options)
        assert binary.count("PRMT") >= least, "codes are not decoded in registers"
    if binary.kernel in ("_shrink_kernel", "_adapter_gradient_kernel", "_down_gradient_kernel"):
        assert binary.count("HGMMA") + binary.count("HMMA") > 0
        assert binary.count("RED") + binary.count("ATOM") == 0, "an atomic in a float reduction"


@pytest.mark.slow
def test_every_sample_passes_the_front_end() -> None:
    """What absent arguments and switches leave of a kernel still is one; the interpreter is lax."""
    failures = []
    for label, launch in sampled((torch.bfloat16, torch.float32)):
        try:
            assert "tt.func" in lower(launch, 90)
        except Exception as error:
            failures.append(f"{label}, {launch.kernel.__name__}: {str(error)[-300:]}")
    assert not failures, "\n\n".join(failures)


def test_every_kernel_is_covered() -> None:
    modules = [
        importlib.import_module(f"peftkern.triton_kernels.{info.name}")
        for info in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    defined = {
        name
        for module in modules
        for name in vars(module)
        if name.startswith("_") and name.endswith("_kernel")
    }
    assert {launch.kernel.__name__ for _, launch in launches()} == defined
