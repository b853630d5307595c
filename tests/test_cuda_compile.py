"""Compile gates of the CUDA kernels: registers, spills, and instructions per weight of hot loops.

Needs nvcc, no GPU. The counts are static: the loops are unrolled and straight, so each instruction
between a loop's label and its backward branch runs once a turn. The budgets per weight are those
of the bandwidth of an H100 (docs of issue 5): a kernel above them cannot reach it.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from peftkern import cuda_native

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O3", "--fmad=false", '-DPK_CUDA_ARCHITECTURES="test"']
ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = sorted(path.stem for path in CUDA.glob("*.cu") if path.stem != "runtime")
BF16, FP32 = 1, 0


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _disassembler() -> Path | None:
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_nvcc() is None, reason="no nvcc on this machine"),
]


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel."""

    registers: int
    spilled: int
    stack: int


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop, by their opcode without modifiers."""

    opcodes: tuple[str, ...]
    rare: int = 0  # of them in loops inside, which only rare operands enter (optimizer.cu)

    def count(self, opcode: str) -> int:
        return self.opcodes.count(opcode)


@functools.cache
def _compile(source: str, architecture: str) -> tuple[dict[str, Usage], bytes]:
    """Usage by mangled kernel name, and the cubin."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        command = [str(_nvcc()), *FLAGS, f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        command += [str(CUDA / f"{source}.cu"), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        pattern = re.compile(
            r"entry function '(\w+)'.*?\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
            re.DOTALL,
        )
        usage = {
            name: Usage(int(registers), int(stores) + int(loads), int(stack))
            for name, stack, stores, loads, registers in pattern.findall(done.stderr)
        }
        return usage, target.read_bytes()


@functools.cache
def _loops(source: str, architecture: str) -> dict[str, list[Loop]]:
    """The loops of every kernel, found by their backward branches."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(_compile(source, architecture)[1])
        command = [str(_disassembler()), "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in re.split(r"\n\.text\.", text)[1:]:
        labels: dict[str, int] = {}
        lines: list[str] = []
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))
        spans = []
        for i, line in enumerate(lines):
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            start = labels.get(jump[1], i) if jump else i
            if start < i:
                spans.append((start, i + 1))
        loops = []
        for start, end in spans:
            opcodes = tuple(re.split(r"[.\s]", s)[0] for s in lines[start:end])
            inside = [b - a for a, b in spans if start < a and b < end]
            loops.append(Loop(opcodes, sum(inside)))
        kernels[section.split(":")[0]] = loops
    return kernels


def _kernel(source: str, architecture: str, pattern: str) -> str:
    names = [name for name in _compile(source, architecture)[0] if re.search(pattern, name)]
    assert len(names) == 1, f"{pattern}: {names}"
    return names[0]


def _template(*arguments: int) -> str:
    return "I" + "".join(f"L[ib]{value}E" for value in arguments) + "E"


# Registers that let two blocks of 256 threads (four of 128, eight of 256) share a multiprocessor.
REGISTERS = {
    "dequantize_4bit_kernel": 64,
    "quantize_4bit_kernel": 64,
    "quantize_absmax_kernel": 64,
    "dequantize_absmax_kernel": 64,
    "dequantize_8bit_kernel": 64,
    "quantize_8bit_kernel": 64,
    "philox_dropout_kernel": 64,
    "linear_rows_kernel": 128,
    "low_rank_kernel": 128,
    "add_parts_kernel": 64,
    "linear_4bit_mma_kernel": 128,
    "scatter_add_kernel": 64,
    "transpose_kernel": 64,
    "sparse_term_kernel": 64,
    "sampled_rows_kernel": 128,
    "prompt_embedding_kernel": 64,
    "prompt_gradient_kernel": 64,
    "optimizer_step_kernel": 64,  # two blocks of 512 threads on a multiprocessor
    "optimizer_squares_kernel": 64,
    "optimizer_root_kernel": 64,
    "optimizer_prepare_kernel": 64,
    "optimizer_finish_kernel": 64,
    "optimizer_words_kernel": 64,
}
# More than 32 rows of x: shared memory lets one block of 256 threads run anyway.
LARGEST_TILE = ("linear_4bit_mma_kernelI" + r"L[ib]\dEL[ib]8E", 192)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_registers_in_budget(source: str, architecture: str) -> None:
    usage, _ = _compile(source, architecture)
    assert usage
    for name, used in usage.items():
        budget = next(limit for kernel, limit in REGISTERS.items() if kernel in name)
        if re.search(LARGEST_TILE[0], name):
            budget = LARGEST_TILE[1]
        assert used.spilled == 0, f"{name} spills {used.spilled} bytes"
        assert used.stack == 0, f"{name} keeps {used.stack} bytes of locals in memory"
        assert used.registers <= budget, f"{name}: {used.registers} registers, budget {budget}"


@dataclass(frozen=True)
class Budget:
    """A hot loop: the one of ``kernel`` with the most ``marker`` instructions."""

    name: str
    source: str
    kernel: str
    marker: str
    weights: int  # that a thread handles in one turn
    limit: float  # instructions a weight


def _dequantize(dtype: int, nested: int, weights: int, limit: float) -> Budget:
    kind = ("fp32", "bf16", "fp16")[dtype] + ("-nested" if nested else "")
    kernel = "dequantize_4bit_kernel" + _template(dtype, nested)
    return Budget(f"dequantize-{kind}", "quant4", kernel, "FMUL", weights, limit)


def _mma(tiles: int, group: int, limit: float) -> Budget:
    kernel = "linear_4bit_mma_kernel" + _template(BF16, tiles, group)
    name = f"mma-m{8 * tiles}-group{group}"
    return Budget(name, "linear4_mma", kernel, "HMMA", 128 * 128 // 256, limit)


def _rows(dtype: int, nested: int, limit: float) -> Budget:
    kernel = "linear_rows_kernel" + _template(dtype, nested, 1)
    kind = ("fp32", "bf16")[dtype] + ("-nested" if nested else "")
    return Budget(f"gemv-{kind}", "linear_rows", kernel, "FFMA", 4 * 32, limit)


BUDGETS = (
    _dequantize(BF16, 0, 64, 6.0),
    _dequantize(BF16, 1, 64, 6.0),
    _dequantize(2, 1, 64, 6.0),
    _dequantize(FP32, 0, 32, 6.0),
    # fp32 writes 4 bytes where bf16 writes 2, so its budget is wider by as much.
    _dequantize(FP32, 1, 32, 8.0),
    _mma(1, 64, 5.0),
    _mma(2, 64, 5.0),
    _mma(4, 64, 6.5),
    _mma(8, 64, 6.5),
    # Blocks of 32 have twice the scales: one more FMA for each accumulator and half block.
    _mma(1, 32, 5.0),
    _mma(2, 32, 5.5),
    _mma(4, 32, 6.5),
    _mma(8, 32, 7.5),
    _rows(FP32, 0, 5.0),
    _rows(FP32, 1, 5.1),
    # bf16 activations are widened once for four outputs: a quarter of an instruction a weight. The
    # tensor-core kernel serves M = 1 in 16 bits; this one serves what that cannot take.
    _rows(BF16, 1, 5.4),
)


@dataclass(frozen=True)
class UpdateBudget:
    """The loop over blocks of the optimizers' pass: the innermost with this kind of loads."""

    name: str
    rule: int
    coded: bool
    size: int  # bytes of a parameter
    limit: float  # instructions an element


# GPU-5.1: 99 instructions an element take as long as an H100's memory with 8-bit state and bf16
# parameters. fp32 state moves 22 bytes or more where that moves 10, so half of it must do there.
UPDATES = (
    UpdateBudget("adamw-8bit-bf16", 0, True, 2, 92.0),
    UpdateBudget("adamw-8bit-fp32", 0, True, 4, 92.0),
    UpdateBudget("adamw-fp32-bf16", 0, False, 2, 55.0),
    UpdateBudget("lion-8bit-bf16", 1, True, 2, 60.0),
    UpdateBudget("momentum-8bit-bf16", 2, True, 2, 50.0),
)


def measure_update(budget: UpdateBudget, architecture: str) -> float:
    """Instructions an element, of which a lane has eight in a turn."""
    name = _kernel("optimizer", architecture, "optimizer_step_kernel" + _template(budget.rule))
    # Of the loops over whole blocks: those that look codes up in shared memory, or do not. Random
    # rounding multiplies most; the others differ by how they widen what they load.
    found = []
    for loop in _loops("optimizer", architecture)[name]:
        coded, stores = loop.count("LDS") >= 24, loop.count("STG")
        whole = loop.count("LDG") >= 6 and stores >= 4 and loop.count("ST") == 0
        if whole and coded == budget.coded and loop.count("REDUX") <= 3:
            found.append((len(loop.opcodes) - loop.rare) / 8)
    assert len(found) == 4, f"{name}: {found}"
    return sorted(found)[0 if budget.size == 4 else 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", UPDATES, ids=lambda budget: budget.name)
@pytest.mark.skipif(_disassembler() is None, reason="no disassembler (it comes with triton)")
def test_instructions_per_element(budget: UpdateBudget, architecture: str) -> None:
    assert measure_update(budget, architecture) <= budget.limit


def measure(budget: Budget, architecture: str) -> float:
    """Instructions a weight in the hot loop."""
    name = _kernel(budget.source, architecture, budget.kernel)
    hot = max(_loops(budget.source, architecture)[name], key=lambda loop: loop.count(budget.marker))
    return len(hot.opcodes) / budget.weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)
@pytest.mark.skipif(_disassembler() is None, reason="no disassembler (it comes with triton)")
def test_instructions_per_weight(budget: Budget, architecture: str) -> None:
    assert measure(budget, architecture) <= budget.limit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.skipif(_disassembler() is None, reason="no disassembler (it comes with triton)")
def test_the_loops_use_the_hardware(architecture: str) -> None:
    name = _kernel("linear4_mma", architecture, "linear_4bit_mma_kernel" + _template(BF16, 2, 64))
    hot = max(_loops("linear4_mma", architecture)[name], key=lambda loop: loop.count("HMMA"))
    assert hot.count("HMMA") == 4 * 2 * 2  # 16-deep steps x eights of x x groups
    assert hot.count("LDGSTS") >= 3  # cp.async
    assert hot.count("LDL") == hot.count("STL") == 0
    name = _kernel("quant4", architecture, "dequantize_4bit_kernel" + _template(BF16, 1))
    hot = max(_loops("quant4", architecture)[name], key=lambda loop: loop.count("FMUL"))
    assert hot.count("STG") == 8  # 16-byte stores of 8 elements
    assert hot.count("BAR") == 0


def test_library_loads_without_a_driver(tmp_path: Path) -> None:
    """A launch without a usable device returns a status with a text; it does not crash."""
    target = tmp_path / "kernels.so"
    sources = [str(CUDA / "runtime.cu"), str(CUDA / "dropout.cu")]
    command = [str(_nvcc()), *FLAGS, "-arch=sm_80", "-shared", "-cudart=static", "-Xcompiler=-fPIC"]
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
