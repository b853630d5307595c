"""The targets for an NVIDIA GPU, and a results file held against them as a Markdown table.

``python -m bench.gpu.targets RESULTS.json`` prints the table. A target is judged from the rows of
one file only: figures of different machines are never put into one ratio.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Args:
        what: what is promised, in words.
        limit: the figure promised.
        least: True if the figure must reach the limit, False if it must not exceed it.
        value: computes it from the rows; ``None`` where a row is missing.
        shown: how the figure is written.
    """

    what: str
    limit: float
    least: bool
    value: Callable[[Rows], float | None]
    shown: str = "{:.2f}x"


def seconds(rows: Rows, case: str, who: str, against: str | None = None) -> float | None:
    """Median seconds of a call: device time where both sides have it, else between events."""
    row = rows.get((case, who))
    if row is None or row.get("error"):
        return None
    other = rows.get((case, against)) if against else row
    for way in ("graph", "events"):
        if row.get(f"{way}_s") and other and other.get(f"{way}_s"):
            return float(row[f"{way}_s"])
    return None


def ratio(case: str, who: str, against: str) -> Callable[[Rows], float | None]:
    """Time of ``who`` over time of ``against``."""

    def value(rows: Rows) -> float | None:
        mine, theirs = seconds(rows, case, who, against), seconds(rows, case, against, who)
        return mine / theirs if mine and theirs else None

    return value


def speedup(case: str, against: str) -> Callable[[Rows], float | None]:
    """How many times faster than ``against`` peftkern is."""
    return ratio(case, against, "peftkern")


def share(case: str) -> Callable[[Rows], float | None]:
    """Share of the floor: least time for bytes and operations at the ceilings of the same run."""

    def value(rows: Rows) -> float | None:
        row = rows.get((case, "peftkern"))
        return None if row is None else row.get("share_of_floor")

    return value


def milliseconds(case: str) -> Callable[[Rows], float | None]:
    """peftkern's time in ms."""

    def value(rows: Rows) -> float | None:
        taken = seconds(rows, case, "peftkern")
        return None if taken is None else taken * 1e3

    return value


def _field(case: str, name: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        row, other = rows.get((case, "peftkern")), rows.get((case, "hf-peft"))
        if row is None or other is None or not row.get(name) or not other.get(name):
            return None
        return float(row[name]) / float(other[name])

    return value


_SQUARE = "4096x4096"
TARGETS = (
    Target("LoRA step, bf16 base, d 4096, over the frozen linear", 1.08, False,
           ratio("lora dense d4096", "peftkern", "frozen")),
    Target("LoRA step, NF4 base, d 4096, over the frozen dense linear", 1.08, False,
           ratio("lora nf4 d4096", "peftkern", "frozen")),
    Target("LoRA step, bf16 base, d 8192, over the frozen linear", 1.05, False,
           ratio("lora dense d8192", "peftkern", "frozen")),
    Target("LoRA step, bf16 base, faster than eager PEFT", 1.25, True,
           speedup("lora dense d4096", "hf-peft")),
    Target("LoRA step, NF4 base, faster than eager PEFT", 1.25, True,
           speedup("lora nf4 d4096", "hf-peft")),
    Target("NF4 dequantize, nested, 4096x4096: share of the copy rate", 0.88, True,
           share("dequantize nf4 4096x4096"), "{:.0%}"),
    Target("NF4 dequantize, faster than bitsandbytes", 1.5, True,
           speedup("dequantize nf4 4096x4096", "bitsandbytes")),
    *(Target(f"NF4 matmul M={m}: share of the weight-streaming bound", least, True,
             share(f"linear nf4 m{m} {_SQUARE}"), "{:.0%}")
      for m, least in ((1, 0.8), (8, 0.8), (16, 0.65), (32, 0.65), (64, 0.65))),
    *(Target(f"NF4 matmul M={m}, N=4096, faster than bitsandbytes", least, True,
             speedup(f"linear nf4 m{m} {_SQUARE}", "bitsandbytes"))
      for m, least in ((1, 1.0), (8, 3.0), (16, 3.0), (32, 3.0), (48, 3.0), (64, 3.0))),
    *(Target(f"NF4 matmul M={m}: share of cuBLAS' dense speed", 0.8, True,
             speedup(f"linear nf4 m{m} {_SQUARE}", "dense"), "{:.0%}")
      for m in (64, 128, 256, 512, 1024)),
    *(Target(f"INT8 linear M={m}, faster than bitsandbytes", 1.3, True,
             speedup(f"linear int8 m{m}", "bitsandbytes")) for m in (512, 2048)),
    Target("AdamW 8-bit, 40 M parameters, ms", 0.25, False, milliseconds("adamw 8bit 40M"),
           "{:.3f}"),
    Target("AdamW fp32 state, 40 M parameters, ms", 0.45, False, milliseconds("adamw fp32 40M"),
           "{:.3f}"),
    Target("AdamW 8-bit, faster than bitsandbytes", 20.0, True,
           speedup("adamw 8bit 40M", "bitsandbytes"), "{:.1f}x"),
    Target("bottleneck r=64: share of the traffic floor", 0.9, True, share("bottleneck r64"),
           "{:.0%}"),
    Target("bottleneck r=64, faster than eager", 3.0, True, speedup("bottleneck r64", "eager")),
    Target("prefix attention 64 + 2048, over causal attention", 1.03, False,
           ratio("prefix p64 l2048", "peftkern", "causal")),
    Target("QLoRA step, Llama-3-8B shape, faster than HF PEFT + bitsandbytes", 1.5, True,
           speedup("qlora step", "hf-peft")),
    Target("QLoRA step, 4 sequences at a time, faster than the same", 1.5, True,
           speedup("qlora step, 4 sequences", "hf-peft")),
    Target("QLoRA step, peak memory over HF PEFT + bitsandbytes", 0.6, False,
           _field("qlora step", "peak_bytes")),
)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The targets, then every row, as Markdown."""
    rows: Rows = {(r["case"], r["contender"]): r for r in results.get("rows", [])}
    machine = results.get("machine", {})
    lines = [
        f"# {machine.get('gpu', 'no GPU')}, {machine.get('date', '')}",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("gpu", "date") and v),
        "",
    ]
    if results.get("rehearsal"):
        lines += ["**A rehearsal on a CPU: the times mean nothing.**", ""]
    if ceiling := results.get("ceiling"):
        lines += [
            f"Ceilings of this run: copy {ceiling['bytes_per_s'] / 1e12:.2f} TB/s (read + write), "
            f"bf16 matmul {ceiling['flop_per_s'] / 1e12:.0f} TFLOP/s, host to device "
            f"{ceiling['pcie_up'] / 1e9:.1f} GB/s, back {ceiling['pcie_down'] / 1e9:.1f} GB/s.",
            "",
        ]
    lines += ["| target | promised | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        value = target.value(rows)
        bound = ("≥ " if target.least else "≤ ") + target.shown.format(target.limit)
        if value is None:
            lines.append(f"| {target.what} | {bound} | not measured | |")
            continue
        met = value >= target.limit if target.least else value <= target.limit
        verdict = "" if results.get("rehearsal") else "met" if met else "missed"
        lines.append(f"| {target.what} | {bound} | {target.shown.format(value)} | {verdict} |")
    lines += ["", "| part | outcome | seconds |", "|---|---|---|"]
    for name, part in results.get("parts", {}).items():
        lines.append(f"| {name} | {part['outcome']} | {part['seconds']:.0f} |")
    if tests := results.get("tests"):
        counts = ", ".join(f"{n} {outcome}" for outcome, n in tests["counts"].items())
        lines += ["", f"Tests: {counts}."]
        lines += [f"- {row['test']}: {row['said'][:200]}" for row in tests["failures"][:40]]
    lines += ["", "Median microseconds of a call: device time (graph), between events, least.", ""]
    lines += ["| case | who | graph | events | least | of floor | note |", "|" + "---|" * 7]
    for (case, who), row in rows.items():
        cells = [_us(row.get(key)) for key in ("graph_s", "events_s", "least_s")]
        floor = row.get("share_of_floor")
        note = str(row.get("error") or row.get("graph_error") or "").replace("|", "/")
        shown = "" if floor is None else f"{floor:.0%}"
        lines.append(f"| {case} | {who} | {' | '.join(cells)} | {shown} | {note} |")
    return "\n".join(lines) + "\n"


def _us(value: float | None) -> str:
    return "" if value is None else f"{value * 1e6:.1f}"


if __name__ == "__main__":
    sys.stdout.write(table(json.loads(Path(sys.argv[1]).read_text())))
