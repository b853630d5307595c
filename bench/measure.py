"""Timing: contenders take turns in one process; the floor is measured in the same run.

Two contenders timed one after the other are compared under different clocks and neighbours. Here
they run A B C A B C ... in rounds, so that whatever slows the machine slows all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

COLD_BYTES = 64 << 20
_PROBE_BYTES = 320 << 20
# Shorter calls are repeated within a sample: below this the clock's own cost shows.
_SAMPLE_SECONDS = 200e-6


@dataclass(frozen=True)
class Contender:
    """One implementation of a cell.

    Args:
        name: the row's name, the same in every cell ("peftkern", "bitsandbytes", ...).
        prepare: ``prepare(rows)`` does what is not timed (inputs, graphs) and returns the timed
            call, which takes the number of the weight copy to use.
        copies: number of weight copies held; a cold measurement walks through them.
        traffic: bytes this contender must at least move for one call (its own storage format).
    """

    name: str
    prepare: Callable[[int], Callable[[int], object]]
    copies: int
    traffic: int


@dataclass
class Timing:
    """Seconds per call of one contender, or why there are none."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    skipped: str = ""


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight it takes so that a walk through them finds none in a cache."""
    return max(2, math.ceil(max(COLD_BYTES, 2 * last_level_cache()) / max(weight_bytes, 1)) + 1)


def last_level_cache() -> int:
    """Size of the largest cache of the first core in bytes; 0 where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
        elif text.endswith("M"):
            sizes.append(int(text[:-1]) << 20)
    return max(sizes, default=0)


def quantile(times: Sequence[float], share: float) -> float:
    """The value that ``share`` of the times do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def _once(call: Callable[[int], object], copy: int) -> float:
    start = time.perf_counter()
    call(copy)
    return time.perf_counter() - start


def too_slow(contender: Contender, rows: int, budget: float) -> str:
    """Why one call at ``rows`` exceeds ``budget`` seconds, or "" if it fits.

    Some peers take a minute for a call that others do in 50 ms (bf16 matmul on a processor without
    bf16 instructions), and a call cannot be interrupted. So the row count rises by a factor of
    four and only from a step that was within the budget: no step costs more than about four
    budgets, and what is skipped is quoted with its estimate.
    """
    step = min(rows, 4)
    while True:
        call = contender.prepare(step)
        taken = min(_once(call, 0), _once(call, contender.copies - 1))
        if taken > budget:
            if step >= rows:
                return f"a call takes {taken:.3g} s, over the budget of {budget:g} s"
            return (
                f"a call would take about {taken * rows / step:.3g} s ({taken:.3g} s measured at "
                f"{step} rows), over the budget of {budget:g} s"
            )
        if step >= rows:
            return ""
        step = min(rows, 4 * step)


def interleave(
    contenders: Sequence[Contender], rows: int, *, cold: bool, seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each contender, taking turns in rounds.

    Cold: every call uses the next weight copy, so that none of it is in a cache. Warm: every
    sample follows an untimed call on the same copy, because the other contenders' turns have
    pushed it out.
    """
    calls, repeats, cursor = {}, {}, {}
    for c in contenders:
        call = c.prepare(rows)
        call(0)
        once = min(_once(call, i % c.copies) for i in range(3))
        calls[c.name] = call
        repeats[c.name] = max(1, math.ceil(_SAMPLE_SECONDS / max(once, 1e-9)))
        cursor[c.name] = 0
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        done = 0
        while done < min_rounds or (time.perf_counter() < end and done < 1000):
            for c in contenders:
                call, n = calls[c.name], repeats[c.name]
                if cold:
                    first = cursor[c.name]
                    order = [(first + i) % c.copies for i in range(n)]
                    cursor[c.name] = (first + n) % c.copies
                else:
                    order = [0] * n
                    call(0)
                start = time.perf_counter()
                for copy in order:
                    call(copy)
                times[c.name].append((time.perf_counter() - start) / n)
            done += 1
    finally:
        if collecting:
            gc.enable()
    return times


def peak_memory(contender: Contender, rows: int) -> int:
    """Bytes by which one call raises the resident memory at its highest, outputs included.

    The second call is measured: the first one pays for caches that stay.
    """
    call = contender.prepare(rows)
    call(0)
    reset_peak_memory()
    before = memory_status("VmRSS")
    call(0)
    return max(0, memory_status("VmHWM") - before)


def reset_peak_memory() -> None:
    """Sets the peak (VmHWM) back to what is resident now, after giving free memory back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before hides the growth
    Path("/proc/self/clear_refs").write_text("5")


def memory_status(name: str) -> int:
    """Bytes of this process by a name of /proc/self/status, for instance VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


class Floor:
    """What this machine can do at best, measured in this run: the best of all probes so far.

    Attributes:
        bandwidth: bytes/s of a streaming read of memory that no cache can hold.
        peak: flop/s of a large matrix product in the benchmark's dtype or fp32, whichever is
            faster (fp32 is what the arithmetic of a quantized matmul costs without bf16 units).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.bandwidth = 0.0
        self.peak = 0.0
        self._stream = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32)
        self._squares = [torch.randn(1536, 1536)]
        if dtype != torch.float32 and has_fast_bf16():
            self._squares.append(self._squares[0].to(dtype))
        self.probe(10)

    def probe(self, times: int = 3) -> None:
        """Measure again; a noisy machine may only now show what it can do."""
        for _ in range(times):
            start = time.perf_counter()
            self._stream.sum()
            taken = time.perf_counter() - start
            self.bandwidth = max(self.bandwidth, _PROBE_BYTES / taken)
            for square in self._squares:
                start = time.perf_counter()
                square @ square
                taken = time.perf_counter() - start
                self.peak = max(self.peak, 2 * square.shape[0] ** 3 / taken)

    def seconds(self, traffic: int, flops: int) -> float:
        """The least time for an op that moves ``traffic`` bytes and does ``flops`` operations."""
        return max(traffic / self.bandwidth, flops / self.peak)


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware (elsewhere torch's bf16 is no peer)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def summary(times: Sequence[float]) -> dict[str, float]:
    """min, median and p90 in seconds."""
    return {
        "min": min(times),
        "median": statistics.median(times),
        "p90": quantile(times, 0.9),
    }
