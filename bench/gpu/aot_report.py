"""``python -m bench.gpu.aot_report``: what the compiler made of every kernel, without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.gpu import cuda_code
from bench.gpu.aot import Binary, compile_launch
from bench.gpu.aot_cases import launches
from peftkern.triton_kernels.launch import Launch

# Instructions an element that 128 lanes x 132 SMs x 1.755 GHz can issue while an H100 moves the
# element's bytes at 3.0 TB/s. The counts are static: equal to executed ones in straight-line code.
_BUDGET = {"_dequantize_4bit_kernel": 24.9, "_linear_kernel": 5.1}


@dataclass(frozen=True)
class Row:
    """One compiled kernel with what led to it."""

    label: str
    launch: Launch
    binary: Binary

    def tile(self) -> str:
        """The configuration in short."""
        options = self.launch.options
        blocks = [f"{k.removeprefix('BLOCK_').lower()}{v}" for k, v in options.items()
                  if k.startswith("BLOCK_") and v]  # fmt: skip
        split = options.get("SPLIT", 1)
        return " ".join([*blocks, f"w{options['num_warps']}"] + [f"split{split}"] * (split > 1))

    def per_weight(self) -> float | None:
        """Instructions a weight, where the kernel decodes 4-bit weights."""
        options = self.launch.options
        threads = 32 * options["num_warps"]
        if "GROUPS" in options and "NESTED" in options:
            return len(self.binary.sass) * threads / (options["GROUPS"] * options["BLOCKSIZE"])
        if options.get("FORMAT") in ("nf4", "fp4"):
            return self.binary.loop * threads / (options["BLOCK_O"] * options["BLOCK_C"])
        return None


def rows(archs: tuple[int, ...] = (80, 90), name: str = "") -> Iterator[Row]:
    """Compile the kernels with ``name`` in theirs; Triton's cache makes a second run quick."""
    for label, launch in launches():
        if name not in launch.kernel.__name__:
            continue
        for arch in archs:
            yield Row(label, launch, compile_launch(launch, arch))


_COLUMNS = (
    "kernel", "first call", "tile", "sm", "regs", "stack", "smem", "wgmma", "in flight", "mma",
    "cp.async", "instr", "per weight", "budget",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    binary, weight = row.binary, row.per_weight()
    budget = _BUDGET.get(binary.kernel) if weight is not None else None
    verdict = "" if budget is None or weight is None else ("met" if weight <= budget else "over")
    return [
        binary.kernel.strip("_").removesuffix("_kernel"),
        row.label,
        row.tile(),
        str(binary.arch),
        str(binary.registers),
        str(binary.stack),
        str(binary.shared),
        str(binary.count("HGMMA")),
        str(max(binary.wgmma_waits, default=0)) if binary.wgmma_waits else "",
        str(binary.count("HMMA")),
        str(binary.count("LDGSTS")),
        str(len(binary.sass)),
        "" if weight is None else f"{weight:.1f}",
        "" if budget is None else f"{budget} {verdict}",
    ]


def _print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def print_triton(archs: tuple[int, ...], name: str) -> None:
    """One row for each Triton kernel and tile."""
    import triton

    print(f"## Triton {triton.__version__}\n")
    _print_row(_COLUMNS)
    print("|" + "---|" * len(_COLUMNS), flush=True)
    for row in rows(archs, name):
        _print_row(_cells(row))


def print_cuda(archs: tuple[int, ...], name: str) -> None:
    """The hot loops against their budgets, then registers and spills of every kernel."""
    architectures = [a for a in cuda_code.ARCHITECTURES if int(a.strip("sm_a")) in archs]
    print(f"\n## CUDA C++, {cuda_code.nvcc_version()}\n")
    print(
        "Instructions of the hot loops, for each weight (mma, few: tensor cores, up to 64 and 16 "
        "rows; gemv: one row; wgmma: many) or element (optimizers).\n"
    )
    _print_row(("loop", "sm", "instructions", "budget"))
    print("|---|---|---|---|", flush=True)
    for budget in (*cuda_code.BUDGETS, *cuda_code.UPDATES):
        for architecture in architectures:
            if name not in budget.name or architecture not in budget.architectures:
                continue
            found = budget.measure(architecture)
            verdict = "met" if found <= budget.limit else "over"
            _print_row(
                (budget.name, architecture[3:], f"{found:.1f}", f"{budget.limit:g} {verdict}")
            )
    print()
    columns = ("source", "kernels", "sm", "registers", "budget", "spilled bytes", "stack")
    _print_row(columns)
    print("|" + "---|" * len(columns), flush=True)
    for source in cuda_code.SOURCES:
        for architecture in architectures:
            usage = {
                k: u for k, u in cuda_code.compiled(source, architecture)[0].items() if name in k
            }
            if not usage:
                continue
            # Of those that come closest to their budgets.
            most = max(usage, key=lambda k: usage[k].registers / cuda_code.register_budget(k))
            _print_row(
                (
                    source,
                    str(len(usage)),
                    architecture[3:],
                    str(usage[most].registers),
                    str(cuda_code.register_budget(most)),
                    str(sum(u.spilled for u in usage.values())),
                    str(max(u.stack for u in usage.values())),
                )
            )


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    given = parser.parse_args()
    archs = tuple(given.arch)
    print("# What the compilers made of the kernels\n\nNo GPU used.\n", flush=True)
    print_triton(archs, given.kernel)
    if cuda_code.nvcc() is None or cuda_code.disassembler() is None:
        print("\nThe CUDA C++ kernels need nvcc and Triton's disassembler; one is missing here.")
    else:
        print_cuda(archs, given.kernel)


if __name__ == "__main__":
    main()
