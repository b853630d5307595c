"""``python -m bench.gpu.ways``: where an op has several ways on a GPU, each of them, in one run.

What is learned here goes into ``peftkern/tuning``: which way serves which shape. Also sets DoRA
and bottleneck steps against the frozen linear, LoRA, eager torch and a copy of the activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import peftkern as pk
from bench.gpu.timing import Ceiling, Contender, Ruler, measure_ceiling, short
from peftkern.ops.prefix import library
from peftkern.triton_kernels.matmul import Base
from peftkern.tuning.bottleneck import BottleneckConfig

F = pk.functional
BF16, FP32 = torch.bfloat16, torch.float32
linear = torch.nn.functional.linear
Call = Callable[[], Any]
Group = tuple[str, list[Contender], int, int]  # name, contenders, least bytes, operations


def _randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _step(call: Callable[[], Tensor], over: list[Tensor], dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(call(), over, dy)


def _by(way: str | None, call: Call) -> Call:
    """The call with the sequence's part of attention by ``way``; ``None``: by the one kernel."""

    def run() -> Any:
        with mock.patch.object(library, "choose", return_value=way):
            return call()

    return run


def prefix(b: int, h: int, kv: int, length: int, p: int, d: int) -> Iterator[Group]:
    """Causal attention with a prefix, forward and with backward."""
    q = _randn(b, length, h, d).transpose(1, 2).requires_grad_()
    k, v = (_randn(b, length, kv, d).transpose(1, 2).requires_grad_() for _ in range(2))
    prefix_k, prefix_v = (_randn(kv, p, d, dtype=FP32).requires_grad_() for _ in range(2))
    dout = _randn(b, length, h, d).transpose(1, 2)
    leaves = [q, k, v, prefix_k, prefix_v]

    def causal() -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=True, enable_gqa=h != kv)

    def ours() -> Tensor:
        return F.prefix_attention(*leaves, is_causal=True)

    def joined() -> Tensor:
        """Copies of keys and values with the prefix in front; flash aligns causality to the end."""
        pairs = ((prefix_k, k), (prefix_v, v))
        keys, values = (torch.cat([p.to(BF16).expand(b, -1, -1, -1), own], 2) for p, own in pairs)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, True)[0]

    def ways(call: Call, plain: Call, copied: Call) -> list[Contender]:
        return [
            Contender("causal alone", [plain]),
            Contender("chosen", [call]),
            Contender("flash + share", [_by("flash", call)]),
            Contender("cudnn + share", [_by("cudnn", call)]),
            Contender("one pass", [_by(None, call)]),
            Contender("concatenated", [copied]),
        ]

    quiet = torch.no_grad()
    name, size = f"prefix b{b} h{h}:{kv} l{length} p{p} d{d}", 2 * b * length * d
    area = b * h * d * length * (length / 2 + p)
    forward = ways(quiet(ours), quiet(causal), quiet(joined))
    yield f"{name} forward", forward, size * 2 * (h + kv), int(4 * area)
    steps = (_step(ours, leaves, dout), _step(causal, leaves[:3], dout))
    both = ways(*steps, _step(joined, leaves, dout))
    yield f"{name} both", both, size * 6 * (h + kv), int(14 * area)


def sparse(m: int, n: int, k: int, density: float) -> Iterator[Group]:
    """The sampled gradient, and the forward with entries joined or as a term of their own."""
    from peftkern.ops.sparse_delta import triton as ways

    x, dy, w = _randn(m, k), _randn(m, n), _randn(n, k) / k**0.5
    count = max(1, int(density * n * k))
    at = torch.randperm(n * k)[:count].sort().values
    values = _randn(count, dtype=FP32)
    base = Base(w, None, None, None, "dense", 0, n, k)
    name = f"m{m} {n}x{k} density {density:g}"
    rows = [
        Contender("chosen", [lambda: ways.sampled_gradient(dy, x, at)]),
        Contender("rows", [lambda: ways.sampled_by_rows(dy, x, at)]),
        Contender("tiles", [lambda: ways.sampled_by_tiles(dy, x, at)]),
        Contender("dense dW, picked", [lambda: torch.mm(dy.t(), x).view(-1)[at]]),
        Contender("dense dW alone", [lambda: torch.mm(dy.t(), x)]),
        Contender("op", [lambda: torch.ops.peftkern.sampled_gradient(dy, x, at)]),
    ]
    yield f"sampled {name}", rows, 2 * m * (n + k) + 12 * count, 2 * m * count
    rows = [
        Contender("frozen", [lambda: linear(x, w)]),
        Contender("own term", [lambda: ways._add_term(linear(x, w), x, at, values)]),
        Contender("joined", [lambda: linear(x, ways._joined(base, at, values, BF16).weight)]),
        Contender("op", [lambda: F.sparse_delta_linear(x, w, at, values)]),
    ]
    yield f"forward {name}", rows, 2 * (m * (n + k) + n * k), 2 * m * n * k


def dora(fmt: str, m: int, d: int, r: int) -> Iterator[Group]:
    """A DoRA step with fresh norms, beside LoRA's and the frozen linear's."""
    w = _randn(d, d) / d**0.5
    x, dy = _randn(m, d).requires_grad_(), _randn(m, d)
    base: Any = w if fmt == "dense" else pk.quantize_4bit(w, double_quant=True)
    a = (_randn(r, d, dtype=FP32) / d**0.5).requires_grad_()
    b = _randn(d, r, dtype=FP32).requires_grad_()
    squares = F.weight_norm_sq(base)
    scale = F.dora_weight_norm(base, a, b, 1.0, squares).requires_grad_()

    def adapted(p: float) -> Tensor:
        fresh = F.dora_weight_norm(base, a, b, 1.0, squares)
        return F.dora_linear(x, base, a, b, scale, 1.0, dropout_p=p, weight_norm=fresh)

    def lora(p: float) -> Tensor:
        return F.lora_linear(x, base, a, b, 1.0, dropout_p=p)

    rows = [
        Contender("frozen", [_step(lambda: linear(x, w), [x], dy)]),
        Contender("lora", [_step(lambda: lora(0.0), [x, a, b], dy)]),
        Contender("dora", [_step(lambda: adapted(0.0), [x, a, b, scale], dy)]),
        Contender("lora p0.1", [_step(lambda: lora(0.1), [x, a, b], dy)]),
        Contender("dora p0.1", [_step(lambda: adapted(0.1), [x, a, b, scale], dy)]),
        Contender("norm alone", [lambda: F.dora_weight_norm(base, a, b, 1.0, squares)]),
    ]
    yield f"dora {fmt} m{m} d{d} r{r}", rows, 10 * m * d, 4 * m * d * d


def bottleneck(m: int, d: int, rank: int, kind: torch.dtype = BF16) -> Iterator[Group]:
    """A bottleneck adapter with residual beside eager torch and a copy of the activations.

    ``kind`` is the weights' dtype; eager torch rounds fp32 ones, as under autocast.
    """
    from peftkern.ops.bottleneck import rows
    from peftkern.ops.bottleneck import triton as ways

    x, dy = _randn(m, d).requires_grad_(), _randn(m, d)
    shapes = ((rank, d), (rank,), (d, rank), (d,))
    weights = [(0.05 * _randn(*s)).to(kind).requires_grad_() for s in shapes]
    target = torch.empty_like(dy)

    def ours() -> Tensor:
        return F.bottleneck_adapter(x, *weights, activation="relu", residual=x)

    def eager() -> Tensor:
        down_w, down_b, up_w, up_b = (w.to(BF16) for w in weights)
        return x + linear(torch.relu(linear(x, down_w, down_b)), up_w, up_b)

    def by(way: str, call: Call, size: int = 0) -> Contender:
        """By one way; by whole rows in programs of ``size``."""
        warps = 8 if size == 128 or size * rank >= 64 * 128 else 4
        config = BottleneckConfig(size, 64, max(16, rank), 1, warps, 3, 64)

        def run() -> Any:
            with (
                mock.patch.object(ways, "bottleneck_way", return_value=way),
                mock.patch.object(rows, "rows_config", return_value=config),
            ):
                return call()

        return Contender(f"{way} {size or ''}", [run])

    quiet, floor = torch.no_grad(), Contender("copy of x", [lambda: target.copy_(dy)])
    name, over = f"bottleneck m{m} d{d} r{rank}" + " fp32" * (kind == FP32), [x, *weights]
    calls = {
        "forward": (quiet(ours), quiet(eager), 4),
        "both": (_step(ours, over, dy), _step(eager, over, dy), 12),
    }
    for kind, (mine, plain, factor) in calls.items():
        players = [floor, Contender("peftkern", [mine]), Contender("eager", [plain])]
        players += [by("rows", mine, size) for size in (32, 64, 128)]
        players += [by(way, mine) for way in ("library", "passes")]
        yield f"{name} {kind}", players, factor * m * d, factor * m * d * rank


def groups(quick: bool, dry: bool) -> Iterator[partial[Iterator[Group]]]:
    """All comparisons, those that decide the most first; each is made when it is its turn."""
    if dry:
        yield partial(prefix, 1, 2, 1, 16, 4, 16)
        yield partial(bottleneck, 8, 32, 8)
        yield partial(dora, "dense", 8, 32, 4)
        yield partial(sparse, 8, 32, 32, 0.05)
        return
    yield partial(prefix, 4, 32, 8, 2048, 64, 128)
    for rank in (64, 16, 128):
        yield partial(bottleneck, 4096, 4096, rank)
    yield partial(bottleneck, 4096, 4096, 64, FP32)
    for fmt in ("dense", "nf4"):
        yield partial(dora, fmt, 4096, 4096, 16)
    for density in (0.001, 0.01, 0.05):
        yield partial(sparse, 4096, 4096, 4096, density)
    if quick:
        return
    yield partial(prefix, 4, 32, 32, 2048, 64, 64)
    yield partial(prefix, 1, 32, 8, 8192, 64, 128)
    yield partial(bottleneck, 16384, 4096, 64)
    for m in (128, 16384):
        for density in (0.001, 0.01):
            yield partial(sparse, m, 4096, 4096, density)


def _show(ruler: Ruler, ceiling: Ceiling, group: Group) -> None:
    name, contenders, traffic, flops = group
    print(f"\n{name}: floor {ceiling.seconds(traffic, flops) * 1e6:.1f} us", flush=True)
    timings = ruler.compare(contenders)
    first = timings[contenders[0].name]
    for c in contenders:
        t = timings[c.name]
        cells = [f"{c.name:18}", t.error]
        for way in ("graph", "events"):
            taken, least = t.seconds(way), first.seconds(way)
            if taken is not None:
                share = "" if least is None else f" ({taken / least:5.2f}x)"
                cells.append(f"{way} {taken * 1e6:9.1f} us{share}")
        print("  " + " ".join(cells) + f" {t.graph_error[:80]}", flush=True)


def main() -> None:
    """Print one line for each contender as it is measured; what fails is named and passed by."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first shapes of each kind")
    parser.add_argument("--dry", action="store_true", help="rehearse tiny shapes on the CPU")
    parser.add_argument("--only", default="", help="groups with this in their name")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each group")
    given = parser.parse_args()
    if not (given.dry or torch.cuda.is_available()):
        raise SystemExit("bench.gpu.ways: torch sees no NVIDIA GPU; --dry rehearses on the CPU")
    device = torch.device("cpu" if given.dry else "cuda")
    torch.set_default_device(device)
    ruler = Ruler(device, given.seconds)
    ceiling = measure_ceiling(ruler)
    where = "CPU, times mean nothing" if given.dry else torch.cuda.get_device_name()
    speeds = f"{ceiling.bytes_per_s / 1e12:.2f} TB/s, {ceiling.flop_per_s / 1e12:.0f} TFLOP/s"
    print(f"{where}, torch {torch.__version__}: {speeds}")
    torch.manual_seed(0)
    failed = 0
    for make in groups(given.quick, given.dry):
        try:
            for group in make():
                if given.only in group[0]:
                    _show(ruler, ceiling, group)
        except Exception as error:
            failed += 1
            print(f"\n{make.func.__name__}{make.args} failed: {short(error)}", flush=True)
    if failed:
        raise SystemExit(f"bench.gpu.ways: {failed} groups failed")


if __name__ == "__main__":
    main()
