"""Timing on an NVIDIA GPU: events, cold caches, contenders in turns, ceilings of the same run.

A contender is timed in two ways. ``graph``: a CUDA graph of one call for each of its weight copies,
replayed; the copies together exceed the L2 cache, and what remains is device time. ``events``: the
plain call between two events behind a pass that overwrites the L2 cache, so that the host runs
ahead of the device: what a user meets. Ratios compare like with like.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

_LEAST_ROUNDS = 5
_MOST_ROUNDS = 200
_PROBE_BYTES = 1 << 30
_PROBE_SIDE = 8192


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    Args:
        name: the same in every case ("peftkern", "bitsandbytes", ...).
        calls: the timed call, once for each copy of its weights.
        traffic: bytes that one call must at least move in this contender's storage; 0: the case's.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    traffic: int = 0


@dataclass
class Timing:
    """Seconds of one call: every sample of both ways, and why a way is missing."""

    graph: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    error: str = ""
    graph_error: str = ""

    def seconds(self, way: str) -> float | None:
        """The median of a way; ``None`` if it was not measured."""
        samples: list[float] = getattr(self, way)
        return statistics.median(samples) if samples else None


def copies_for(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight exceed the L2 cache twice; at most 64."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, math.ceil(2 * cache / max(weight_bytes, 1))))


def short(error: BaseException) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


class Ruler:
    """Measures contenders on one device; on a CPU (a rehearsal) the times mean nothing.

    Args:
        device: where the contenders run.
        seconds: how long a case may be measured, without preparation.
    """

    def __init__(self, device: torch.device, seconds: float = 1.0) -> None:
        self.device, self.seconds = device, seconds
        self.real = device.type == "cuda"
        if self.real:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._spoiler = torch.empty(max(4 * cache, 64 << 20), dtype=torch.int8, device=device)

    def _timed(self, call: Callable[[], object], calls: int, *, cold: bool) -> Callable[[], float]:
        """Queue one sample; the function that is returned waits for its result."""
        if not self.real:
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            return lambda: taken / calls
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        if cold:
            self._spoiler.zero_()
        before.record()
        call()
        after.record()

        def result() -> float:
            after.synchronize()
            return before.elapsed_time(after) * 1e-3 / calls

        return result

    def _capture(self, contender: Contender) -> Callable[[], object]:
        """A replay of one call a copy, back to back."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in contender.calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in contender.calls:
                call()
        return graph.replay

    def compare(self, contenders: Sequence[Contender], *, graph: bool = True) -> dict[str, Timing]:
        """Both ways for every contender, taking turns in rounds; one that fails is left out."""
        timings = {c.name: Timing() for c in contenders}
        ready: list[Contender] = []
        for c in contenders:
            try:
                for call in (c.calls[0], c.calls[0], c.calls[-1]):
                    call()
                self._wait()
                ready.append(c)
            except Exception as error:
                timings[c.name].error = short(error)
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._events(ready, timings)
            if graph:
                self._graphs(ready, timings)
        finally:
            if collecting:
                gc.enable()
        return timings

    def _wait(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.device)

    def _rounds(
        self, players: Sequence[tuple[list[float], Callable[[int], Callable[[], float]]]]
    ) -> None:
        """Let every player take one sample a round."""
        end = time.perf_counter() + self.seconds / 2
        for turn in range(_MOST_ROUNDS if self.real else 2):
            if turn >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for samples, play in players:
                samples.append(play(turn)())

    def _events(self, ready: Sequence[Contender], timings: dict[str, Timing]) -> None:
        def player(c: Contender) -> Callable[[int], Callable[[], float]]:
            return lambda turn: self._timed(c.calls[turn % len(c.calls)], 1, cold=True)

        self._rounds([(timings[c.name].events, player(c)) for c in ready])

    def _graphs(self, ready: Sequence[Contender], timings: dict[str, Timing]) -> None:
        players = []
        for c in ready:
            if not self.real:
                timings[c.name].graph_error = "no GPU"
                continue
            try:
                replay = self._capture(c)
                replay()
                self._wait()
            except Exception as error:
                timings[c.name].graph_error = short(error)
                continue

            def play(
                turn: int, replay: Callable[[], object] = replay, count: int = len(c.calls)
            ) -> Callable[[], float]:
                return self._timed(replay, count, cold=count == 1)

            players.append((timings[c.name].graph, play))
        self._rounds(players)


@dataclass(frozen=True)
class Ceiling:
    """What this device reached in this run.

    Args:
        bytes_per_s: of a large copy, reads and writes counted.
        flop_per_s: of a large bf16 matrix product on random data.
        pcie_up: bytes/s from pinned host memory; 0 if not measured.
        pcie_down: bytes/s to pinned host memory.
    """

    bytes_per_s: float
    flop_per_s: float
    pcie_up: float
    pcie_down: float

    def seconds(self, traffic: int, flops: int) -> float:
        """The least time for ``traffic`` bytes and ``flops`` operations."""
        return max(traffic / self.bytes_per_s, flops / self.flop_per_s)


def measure_ceiling(ruler: Ruler) -> Ceiling:
    """Probe the device; on a CPU tiny probes that only show that the code runs."""
    device = ruler.device
    size = _PROBE_BYTES if ruler.real else 1 << 16
    side = _PROBE_SIDE if ruler.real else 32
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    b = torch.randn(side, side, device=device).to(torch.bfloat16)
    host = torch.empty(size // 4, dtype=torch.int8, device="cpu", pin_memory=ruler.real)
    part = target[: size // 4]
    times = ruler.compare(
        [
            Contender("copy", [lambda: target.copy_(source)]),
            Contender("matmul", [lambda: a @ b]),
            Contender("up", [lambda: part.copy_(host, non_blocking=True)]),
            Contender("down", [lambda: host.copy_(part, non_blocking=True)]),
        ],
        graph=False,
    )

    def best(name: str) -> float:
        if times[name].error:
            raise RuntimeError(f"probe {name}: {times[name].error}")
        return min(times[name].events)

    return Ceiling(
        2 * size / best("copy"),
        2 * side**3 / best("matmul"),
        (size // 4) / best("up"),
        (size // 4) / best("down"),
    )
