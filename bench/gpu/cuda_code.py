"""What nvcc makes of the CUDA C++ kernels: registers, spills, and instructions of the hot loops.

Needs nvcc, no GPU. The counts are static: the loops are unrolled and straight, so each instruction
between a loop's label and its backward branch runs once a turn.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", '-DPK_CUDA_ARCHITECTURES="test"')
ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = tuple(sorted(path.stem for path in CUDA.glob("*.cu") if path.stem != "runtime"))
FP32, BF16, FP16 = 0, 1, 2


def nvcc() -> str | None:
    """The compiler, if this machine has it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version() -> str:
    """What the compiler calls itself: "nvcc 13.0"."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release ([\d.]+)", text.stdout)
    return f"nvcc {found[1] if found else 'of unknown version'}"


def disassembler() -> Path | None:
    """The disassembler that Triton's package brings."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel: registers a thread, bytes spilled, bytes of locals."""

    registers: int
    spilled: int
    stack: int


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop, by their opcode without modifiers."""

    opcodes: tuple[str, ...]
    rare: int = 0  # of them in loops inside, which only rare operands enter (optimizer.cu)

    def count(self, opcode: str) -> int:
        """How many have this opcode."""
        return self.opcodes.count(opcode)


@functools.cache
def compiled(source: str, architecture: str) -> tuple[dict[str, Usage], bytes]:
    """Usage by mangled kernel name, and the cubin, of ``csrc/cuda/<source>.cu``."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        command = [str(nvcc()), *FLAGS, f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        command += [str(CUDA / f"{source}.cu"), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source}.cu does not compile:\n{done.stderr}")
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
def loops(source: str, architecture: str) -> dict[str, list[Loop]]:
    """The loops of every kernel, found by their backward branches."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled(source, architecture)[1])
        command = [str(disassembler()), "-c", str(cubin)]
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
        found = []
        for start, end in spans:
            opcodes = tuple(re.split(r"[.\s]", s)[0] for s in lines[start:end])
            inside = [b - a for a, b in spans if start < a and b < end]
            found.append(Loop(opcodes, sum(inside)))
        kernels[section.split(":")[0]] = found
    return kernels


def named(source: str, architecture: str, pattern: str) -> str:
    """The one kernel whose mangled name has ``pattern`` in it."""
    names = [name for name in compiled(source, architecture)[0] if re.search(pattern, name)]
    if len(names) != 1:
        raise LookupError(f"{pattern}: {names}")
    return names[0]


def template(*arguments: int) -> str:
    """How a kernel's integer template arguments look in its mangled name."""
    return "I" + "".join(f"L[ib]{value}E" for value in arguments) + "E"


@dataclass(frozen=True)
class Budget:
    """A hot loop: the one of ``kernel`` with the most ``marker`` instructions."""

    name: str
    source: str
    kernel: str
    marker: str
    weights: int  # that a thread handles in one turn
    limit: float  # instructions a weight
    architectures: tuple[str, ...] = ARCHITECTURES

    def hot(self, architecture: str) -> Loop:
        """The loop."""
        name = named(self.source, architecture, self.kernel)
        found = loops(self.source, architecture)[name]
        return max(found, key=lambda loop: loop.count(self.marker))

    def measure(self, architecture: str) -> float:
        """Instructions a weight in it."""
        return len(self.hot(architecture).opcodes) / self.weights


def _dequantize(dtype: int, nested: int, limit: float) -> Budget:
    kind = ("fp32", "bf16", "fp16")[dtype] + ("-nested" if nested else "")
    kernel = "dequantize_4bit_kernel" + template(dtype, nested)
    weights = 4 * (4 if dtype == FP32 else 8)  # four 16-byte stores
    return Budget(f"dequantize-{kind}", "quant4", kernel, "FMUL", weights, limit)


def _mma(tiles: int, group: int, limit: float) -> Budget:
    kernel = "linear_4bit_mma_kernel" + template(BF16, tiles, group)
    name = f"mma-m{8 * tiles}-group{group}"
    return Budget(name, "linear4_mma", kernel, "HMMA", 128 * 128 // 256, limit)


def _few(tiles: int, nested: int, limit: float) -> Budget:
    kernel = "linear_4bit_few_kernel" + template(BF16, tiles, nested)
    name = f"few-m{8 * tiles}" + ("-nested" if nested else "")
    return Budget(name, "linear4_few", kernel, "HMMA", 16 * 128 // 32, limit)


def _rows(dtype: int, nested: int, limit: float) -> Budget:
    kernel = "linear_rows_kernel" + template(dtype, nested, 1)
    kind = ("fp32", "bf16")[dtype] + ("-nested" if nested else "")
    return Budget(f"gemv-{kind}", "linear_rows", kernel, "FFMA", 4 * 32, limit)


def _wgmma(across: int, nested: int, limit: float) -> Budget:
    kernel = "linear_wgmma_kernel" + template(1, nested, across, BF16, 256)
    name = "wgmma-m256" + ("-across" if across else "") + ("-nested" if nested else "")
    # Two steps a turn, in each the 64 weights of an output.
    return Budget(name, "linear_wgmma", kernel, "PRMT", 2 * 64, limit, ("sm_90a",))


# Registers that let two blocks of 256 threads (four of 128, eight of 256) share a multiprocessor;
# more where shared memory, or the rows a block keeps, let no second block in anyway.
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
    "linear_4bit_mma_kernelI" + r"L[ib]\dEL[ib]8E": 192,  # more than 32 rows of x: one block
    "linear_4bit_mma_kernel": 128,
    "linear_4bit_few_kernelI" + r"L[ib]\dEL[ib]2E": 255,  # one block of 256 threads
    "linear_4bit_few_kernel": 128,  # one block of 512 threads
    # Registers move from the warpgroups that decode to those that multiply; this is the average.
    "linear_wgmma_kernel": 168,
    "add_wgmma_parts_kernel": 64,
    "shrink_kernel": 255,  # one block of 256 threads; its rings fill the shared memory
    "add_slices_kernel": 64,
    "outer_kernel": 255,  # likewise
    "add_outer_parts_kernel": 64,
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


def register_budget(mangled: str) -> int:
    """The registers that a kernel may use: the first entry of ``REGISTERS`` in its name."""
    return next(limit for kernel, limit in REGISTERS.items() if re.search(kernel, mangled))


# The budgets a weight are those of an H100's bandwidth (GPU-2.1): a kernel above them cannot
# reach it.
BUDGETS = (
    _dequantize(BF16, 0, 6.0),
    # Nested: a code and a look-up more for every eight weights.
    _dequantize(BF16, 1, 6.3),
    _dequantize(FP16, 1, 6.3),
    # fp32 writes 4 bytes where bf16 writes 2, so its budget is wider by as much.
    _dequantize(FP32, 0, 8.0),
    _dequantize(FP32, 1, 9.0),
    _few(1, 0, 5.0),
    _few(1, 1, 5.0),
    _few(2, 0, 5.0),
    _few(2, 1, 5.0),
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
    # 256 rows of x keep the tensor cores busy for 1024 clocks a step, in which four schedulers
    # issue 16 instructions for each of the step's 128 x 64 weights. Half of what is counted runs
    # only where a tile ends (the divisions that find the next one).
    _wgmma(0, 0, 10.5),
    _wgmma(0, 1, 10.5),
    _wgmma(1, 1, 10.5),
)


@dataclass(frozen=True)
class UpdateBudget:
    """The loop over blocks of the optimizers' pass: the innermost with this kind of loads."""

    name: str
    rule: int
    coded: bool
    size: int  # bytes of a parameter
    limit: float  # instructions an element
    architectures: tuple[str, ...] = ARCHITECTURES

    def measure(self, architecture: str) -> float:
        """Instructions an element, of which a lane has eight in a turn."""
        kernel = "optimizer_step_kernel" + template(self.rule)
        name = named("optimizer", architecture, kernel)
        # Of the loops over whole blocks: those that look codes up in shared memory, or do not.
        # Random rounding multiplies most; the others differ by how they widen what they load.
        found = []
        for loop in loops("optimizer", architecture)[name]:
            coded, stores = loop.count("LDS") >= 24, loop.count("STG")
            whole = loop.count("LDG") >= 6 and stores >= 4 and loop.count("ST") == 0
            if whole and coded == self.coded and loop.count("REDUX") <= 3:
                found.append((len(loop.opcodes) - loop.rare) / 8)
        if len(found) != 4:
            raise LookupError(f"{name}: {found}, expected four loops")
        return sorted(found)[0 if self.size == 4 else 1]


# GPU-5.1: 99 instructions an element take as long as an H100's memory with 8-bit state and bf16
# parameters. fp32 state moves 22 bytes or more where that moves 10, so half of it must do there.
UPDATES = (
    UpdateBudget("adamw-8bit-bf16", 0, True, 2, 92.0),
    UpdateBudget("adamw-8bit-fp32", 0, True, 4, 92.0),
    UpdateBudget("adamw-fp32-bf16", 0, False, 2, 55.0),
    UpdateBudget("lion-8bit-bf16", 1, True, 2, 60.0),
    UpdateBudget("momentum-8bit-bf16", 2, True, 2, 50.0),
)
