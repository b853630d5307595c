"""Compile gates of the CUDA kernels: registers, spills, and instructions per weight of hot loops.

Needs nvcc, no GPU; bench/gpu/cuda_code.py compiles, counts and holds the budgets.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from bench.gpu import cuda_code
from bench.gpu.cuda_code import ARCHITECTURES, BUDGETS, CUDA, FLAGS, SOURCES, UPDATES
from peftkern import cuda_native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_code.nvcc() is None, reason="no nvcc on this machine"),
]
disassembles = pytest.mark.skipif(
    cuda_code.disassembler() is None, reason="no disassembler (it comes with triton)"
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_registers_in_budget(source: str, architecture: str) -> None:
    usage, _ = cuda_code.compiled(source, architecture)
    assert usage
    for name, used in usage.items():
        budget = cuda_code.register_budget(name)
        assert used.spilled == 0, f"{name} spills {used.spilled} bytes"
        assert used.stack == 0, f"{name} keeps {used.stack} bytes of locals in memory"
        assert used.registers <= budget, f"{name}: {used.registers} registers, budget {budget}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", UPDATES, ids=lambda budget: budget.name)
@disassembles
def test_instructions_per_element(budget: cuda_code.UpdateBudget, architecture: str) -> None:
    assert budget.measure(architecture) <= budget.limit


@pytest.mark.parametrize(
    ("budget", "architecture"),
    [pytest.param(b, a, id=f"{b.name}-{a}") for b in BUDGETS for a in b.architectures],
)
@disassembles
def test_instructions_per_weight(budget: cuda_code.Budget, architecture: str) -> None:
    assert budget.measure(architecture) <= budget.limit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@disassembles
def test_the_loops_use_the_hardware(architecture: str) -> None:
    loops = {budget.name: budget for budget in BUDGETS}
    hot = loops["mma-m16-group64"].hot(architecture)
    assert hot.count("HMMA") == 4 * 2 * 2  # 16-deep steps x eights of x x groups
    assert hot.count("LDGSTS") >= 3  # cp.async
    assert hot.count("LDL") == hot.count("STL") == 0
    hot = loops["few-m8-nested"].hot(architecture)
    assert hot.count("HMMA") == 8  # 128 of the depth
    assert hot.count("LDGSTS") == 2
    assert hot.count("PRMT") >= 32  # a look-up's address in one instruction
    hot = loops["dequantize-bf16-nested"].hot(architecture)
    assert hot.count("STG") == 4  # 16-byte stores of 8 elements
    assert hot.count("BAR") == 0


@disassembles
def test_the_products_of_hopper_are_asynchronous() -> None:
    for name in ("wgmma-m256-nested", "wgmma-m256-across-nested"):
        budget = {b.name: b for b in BUDGETS}[name]
        hot = budget.hot("sm_90a")
        assert hot.count("UTMALDG") > 0  # the copy engine
        assert hot.count("LDL") == hot.count("STL") == 0
        kernel = cuda_code.named(budget.source, "sm_90a", budget.kernel)
        counts = [loop.count("HGMMA") for loop in cuda_code.loops("linear_wgmma", "sm_90a")[kernel]]
        assert max(counts) >= 8  # four 16-deep steps of two tiles of 64 rows


def test_library_loads_without_a_driver(tmp_path: Path) -> None:
    """A launch without a usable device returns a status with a text; it does not crash."""
    target = tmp_path / "kernels.so"
    sources = [str(CUDA / "runtime.cu"), str(CUDA / "dropout.cu")]
    command = [
        str(cuda_code.nvcc()),
        *FLAGS,
        "-arch=sm_80",
        "-shared",
        "-cudart=static",
        "-Xcompiler=-fPIC",
    ]
    done = subprocess.run([*command, *sources, "-o", str(target)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    library = ctypes.CDLL(str(target))
    library.pk_cuda_status_text.restype = ctypes.c_char_p
    library.pk_cuda_architectures.restype = ctypes.c_char_p
    assert library.pk_cuda_architectures() == b"test"
    if library.pk_cuda_probe() == 0:
        pytest.skip("there is a device")
    x = torch.ones(8)
    address = x.data_ptr()
    pack = cuda_native.Slots(cuda_native.SIGNATURES["philox_dropout"])
    arguments = (address, 0, 8, address, 5, 1.0, address)
    status = library.pk_cuda_philox_dropout_slots(pack(arguments, 0))
    assert status > 1000
    assert library.pk_cuda_status_text(status)
