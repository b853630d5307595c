"""Many Python threads in the kernels at once, while the number of threads is changed under them.

Every operation of ``calls()`` is computed once alone; then a number of threads compute them over
and over in drawn order, each setting the number of threads as it likes, and every result must have
the same bits. ``make fuzz`` runs it for a minute, the tests for seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

import peftkern as pk
from peftkern.optim import AdamW8bit
from peftkern.testing import bits

F = pk.functional


def calls() -> dict[str, Callable[[], list[Tensor]]]:
    """Operations with fixed arguments, large enough for several threads; forward and backward."""
    make = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    n, k, r, m = 192, 320, 8, 40
    w, x, a, b = rand(n, k), rand(m, k), rand(r, k), rand(n, r)
    q4, q8 = pk.quantize_4bit(w), pk.quantize_8bit(w)
    q, kv = rand(2, 4, 33, 32), rand(2, 4, 33, 32)
    prefix = rand(4, 9, 32)
    up, down = rand(k, 24), rand(24, k)
    at = torch.arange(0, n * k, 7)
    values, seed = rand(at.numel()), torch.tensor([5])
    ids = torch.arange(m) % 3 - 1
    big = rand(700, k)

    def trained(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
        held = [t.detach().requires_grad_() for t in leaves]
        y = run(*held)
        return [y.detach(), *torch.autograd.grad(y.sum(), held)]

    def optimizer() -> list[Tensor]:
        p = torch.nn.Parameter(big.clone())
        step = AdamW8bit([p], lr=1e-2)
        for factor in (1.0, -0.5):
            p.grad = big * factor
            step.step()
        return [p.detach()]

    return {
        "quantize": lambda: list(pk.quantize_4bit(big).tensors()),
        "quantize 8": lambda: list(pk.quantize_8bit(big).tensors()),
        "dequantize": lambda: [q4.dequantize(torch.bfloat16), q8.dequantize()],
        "linear 4": lambda: trained(lambda x: F.linear_4bit(x, q4), x),
        "linear 8": lambda: trained(lambda x: F.linear_8bit(x, q8), x),
        "lora": lambda: trained(
            lambda x, a, b: F.lora_linear(x, q4, a, b, 0.5, None, 0.2, seed=seed), x, a, b
        ),
        "dora": lambda: trained(
            lambda x, a, b: F.dora_linear(x, q4, a, b, torch.ones(n), 0.5), x, a, b
        ),
        "rows": lambda: trained(
            lambda x, a, b: F.multi_lora_linear(x, q4, [(a, b, 1.0), (a, b, 2.0)], ids), x, a, b
        ),
        "bottleneck": lambda: trained(
            lambda x, d, u: F.bottleneck_adapter(x, d, None, u, None, "gelu", residual=x),
            *(x, down, up),
        ),
        "sparse": lambda: trained(lambda x, v: F.sparse_delta_linear(x, q4, at, v), x, values),
        "prefix": lambda: trained(
            lambda q, p: F.prefix_attention(q, kv, kv, p, p, is_causal=True), q, prefix
        ),
        "gated": lambda: trained(lambda g, u: F.gated_activation(g, u), big, big + 1.0),
        "optimizer": optimizer,
    }


def run(seconds: float, threads: int = 16, seed: int = 0) -> tuple[int, list[str]]:
    """How many results were compared, and what was wrong."""
    work = calls()
    torch.set_num_threads(1)
    want = {name: [bits(t) for t in call()] for name, call in work.items()}
    ends, wrong = time.monotonic() + seconds, []
    counts = [0] * threads

    def worker(number: int) -> None:
        dice = random.Random(seed * 1000 + number)
        try:
            while time.monotonic() < ends:
                torch.set_num_threads(dice.choice((1, 1, 2, 3, 8)))
                name = dice.choice(list(work))
                for got, expected in zip(work[name](), want[name], strict=True):
                    if not torch.equal(bits(got), expected):
                        wrong.append(f"{name}: other bits in thread {number}")
                counts[number] += 1
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    running = [threading.Thread(target=worker, args=(i,), daemon=True) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(seconds + 60)
        if thread.is_alive():
            wrong.append("a thread hangs")
    return sum(counts), wrong


def main() -> int:
    """Exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.stress", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=16)
    options = parser.parse_args()
    count, wrong = run(60 * options.minutes, options.threads)
    for line in wrong:
        print("FINDING", line)
    print(f"{count} operations by {options.threads} threads, {len(wrong)} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
