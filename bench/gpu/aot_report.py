"""``python -m bench.gpu.aot_report``: what the compiler made of every kernel, without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

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


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    given = parser.parse_args()
    import triton

    print(f"Triton {triton.__version__}, no GPU used.\n", flush=True)
    print("| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS), flush=True)
    for row in rows(tuple(given.arch), given.kernel):
        print("| " + " | ".join(_cells(row)) + " |", flush=True)


if __name__ == "__main__":
    main()
