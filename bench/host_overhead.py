"""What a call costs on the host before its kernel runs, layer by layer of the stack.

``python -m bench.host_overhead`` times tiny problems, so that what remains is Python, torch's
dispatcher, autograd and the launch. Without a GPU it runs twice: on the CPU's kernels, and through
the implementations for CUDA devices with launches that do nothing. With a GPU it uses CUDA tensors
and real launches; it does not wait for the device within a sample. Cases take turns in rounds and
the least time of a call counts: a shared machine only ever adds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import peftkern as pk
from peftkern import cuda_native, registry
from peftkern.cuda_kernels.choices import Device

F = pk.functional
Call = Callable[[], object]
# Short enough to end before a neighbour takes the core.
_SAMPLE_SECONDS = 800e-6


@dataclass(frozen=True)
class Shape:
    """Rows of the activations, a square base, and the rank."""

    rows: int
    width: int
    rank: int


class NoLaunch:
    """Takes the place of the CUDA library: marshals arguments for a function that does nothing."""

    def __init__(self) -> None:
        nothing = ctypes.CDLL(None)["pthread_testcancel"]
        nothing.argtypes, nothing.restype = [ctypes.c_char_p], None
        self._launch = nothing
        self._pack = {
            name: cuda_native.Slots(letters) for name, letters in cuda_native.SIGNATURES.items()
        }

    def launch(
        self,
        name: str,
        device: torch.device,
        args: tuple[Any, ...],
        reaches: Iterable[Tensor] = (),
    ) -> None:
        """Everything but the launch itself."""
        self._launch(self._pack[name](args, 0))

    def ask(self, name: str, *args: int) -> int:
        """A cut without parts; no workspace."""
        return 128001 if name == "linear_wgmma_cut" else 0

    def facts(self, device: torch.device) -> Device:
        """A Hopper GPU."""
        return Device(hopper=True, shared=227 * 1024)


def _cuda(args: tuple[Any, ...]) -> str:
    return "cuda"


@contextlib.contextmanager
def cuda_rows_for_the_cpu() -> Iterator[None]:
    """Serve tensors on the CPU by the implementations for CUDA devices, without launches."""
    with (
        cuda_native.use_library(NoLaunch()),
        mock.patch.object(registry, "_device_of", new=_cuda),
    ):
        yield


def cases(shape: Shape, device: torch.device, dtype: torch.dtype, master: bool) -> dict[str, Call]:
    """Calls by name, from torch's own linear to a group's training step."""
    m, d, r = shape.rows, shape.width, shape.rank
    make = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=make).to(device, dtype)

    x, w, dy = randn(m, d), randn(d, d), randn(m, d)
    xg = x.clone().requires_grad_()
    q = pk.quantize_4bit(w)
    adapter = torch.float32 if master else dtype
    a, b = (t.to(adapter).requires_grad_() for t in (randn(r, d), randn(d, r)))
    frozen_a, frozen_b = a.detach(), b.detach()
    nf4 = (q.weight, *q.statistics(), "nf4", 64)
    ops = torch.ops.peftkern
    linear, linear_op = torch.nn.functional.linear, ops.linear_4bit
    lora_op, back_op = ops.lora_linear, ops.lora_linear_backward
    rest = (frozen_a, frozen_b, 1.0, 0.0, None)
    s = torch.zeros(m, r, device=device)
    back_args = (dy, x, s, *nf4, *rest, True, True)
    members = [(q, a, b, 1.0)] * 3
    dense_members = [(w, a, b, 1.0)] * 3
    layer = pk.nn.LoRALinear(torch.nn.Linear(d, d, bias=False, device=device, dtype=dtype), r=r)
    base4 = pk.nn.Linear4bit.from_quantized(q)
    layer4 = pk.nn.LoRALinear(base4, r=r)

    def step(y: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> object:
        dys = [dy] * len(y) if isinstance(y, tuple) else dy
        return torch.autograd.grad(y, inputs, dys)

    def trained(module: Any) -> Call:
        return lambda: step(module(xg), xg, module.lora_A.default.weight)

    without = torch.no_grad()

    def plain(call: Call) -> Call:
        def run() -> object:
            with without:
                return call()

        return run

    return {
        "F.linear": lambda: linear(x, w),
        "F.linear, forward + backward": lambda: step(linear(xg, w), xg),
        "linear_4bit: op": lambda: linear_op(x, *nf4, d, None),
        "linear_4bit: functional": lambda: F.linear_4bit(x, q),
        "linear_4bit: Linear4bit": lambda: base4(x),
        "linear_4bit: forward + backward": lambda: step(F.linear_4bit(xg, q), xg),
        "lora_linear: op": lambda: lora_op(x, *nf4, d, None, *rest),
        "lora_linear: functional, no gradient": lambda: F.lora_linear(x, q, *rest[:3]),
        "lora_linear: functional": lambda: F.lora_linear(xg, q, a, b, 1.0),
        "lora_linear: LoRALinear": lambda: layer4(xg),
        "lora_linear: backward op": lambda: back_op(*back_args),
        "lora_linear: forward + backward": lambda: step(F.lora_linear(xg, q, a, b, 1.0), xg, a, b),
        "lora_linear: LoRALinear, forward + backward": trained(layer4),
        "lora_linear, dense base: functional": lambda: F.lora_linear(xg, w, a, b, 1.0),
        "lora_linear, dense base: forward + backward": lambda: step(
            F.lora_linear(xg, w, a, b, 1.0), xg, a, b
        ),
        "lora_linear, dense base: LoRALinear, forward + backward": trained(layer),
        "lora_linear_group of 3: functional": lambda: F.lora_linear_group(xg, members),
        "lora_linear_group of 3: forward + backward": lambda: step(
            F.lora_linear_group(xg, members), xg, a, b
        ),
        "lora_linear_group of 3, dense: forward + backward": lambda: step(
            F.lora_linear_group(xg, dense_members), xg, a, b
        ),
    }


def least(calls: dict[str, Call], seconds: float, wait: Call) -> dict[str, float]:
    """Microseconds of a call: the least of many short samples, the cases taking turns."""
    best = dict.fromkeys(calls, _SAMPLE_SECONDS)
    gc.collect()
    gc.freeze()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for name, call in calls.items():
            # A few calls to warm the caches that the other cases have filled.
            count = int(_SAMPLE_SECONDS / best[name]) + 1
            for _ in range(3):
                call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / count)
            wait()
    gc.unfreeze()
    return {name: least * 1e6 for name, least in best.items()}


def parts(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """The name and the figures of each way that this machine can measure."""
    seconds, bf16 = arguments.seconds, torch.bfloat16
    small, whole = Shape(1, 64, 4), Shape(72, 64, 16)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        calls = cases(whole, device, bf16, True)
        yield torch.cuda.get_device_name(device), least(calls, seconds, torch.cuda.synchronize)
        return
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    calls = cases(small, cpu, bf16, True)
    yield "CPU kernels", least(calls, seconds, lambda: None)
    with cuda_rows_for_the_cpu():
        yield (
            "CUDA implementations without launches",
            least(cases(whole, cpu, bf16, True), seconds, lambda: None),
        )


def main() -> None:
    """Print a table for each part; ``--output`` writes the figures as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.host_overhead")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each part")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    results = {}
    for title, figures in parts(arguments):
        results[title] = figures
        print(f"{title} (least microseconds of a call)")
        for name, figure in figures.items():
            print(f"  {name:58s}{figure:9.1f}")
        print(flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
