"""What ``make gpu`` measures: the shapes of the targets, with their peers, as contenders.

Every builder takes the device and whether this is a rehearsal (tiny shapes). A function that this
build lacks, or a peer that cannot be imported, is a reason in ``absent``, not an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import peftkern as pk
from bench.gpu import peers
from bench.gpu.timing import Contender, copies_for

F = pk.functional
BF16 = torch.bfloat16
STORED = {"dense": 2.0, "nf4": 0.516, "fp4": 0.516, "int8": 1.0}


@dataclass
class Built:
    """The contenders of a case, the least traffic and operations, and who is absent and why."""

    contenders: list[Contender]
    traffic: int = 0
    flops: int = 0
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of figures.

    Args:
        name: what the targets refer to.
        build: ``build(device)`` makes the contenders.
    """

    name: str
    build: Callable[[torch.device], Built]


def _weight(device: torch.device, n: int, k: int) -> Tensor:
    return (torch.randn(n, k, device=device) / k**0.5).to(BF16)


def _base(fmt: str, w: Tensor) -> Any:
    if fmt == "dense":
        return w
    if fmt == "int8":
        return pk.quantize_8bit(w)
    return pk.quantize_4bit(w, quant_type=fmt, blocksize=64, double_quant=True)


def _copies(thing: Any, size: float, device: torch.device) -> list[Any]:
    return [thing, *(copy.deepcopy(thing) for _ in range(copies_for(int(size), device) - 1))]


def _step(layer: Callable[[Tensor], Tensor], trained: list[Tensor], x: Tensor, dy: Tensor) -> Any:
    """Forward, then backward to the input and to what is trained."""
    return lambda: torch.autograd.grad(layer(x), [x, *trained], dy)


def lora_step(fmt: str, m: int, d: int, r: int) -> Callable[[torch.device], Built]:
    """LoRA forward and backward over a frozen base, against the frozen dense base alone."""

    def build(device: torch.device) -> Built:
        w = _weight(device, d, d)
        x = torch.randn(m, d, device=device).to(BF16).requires_grad_()
        dy = torch.randn(m, d, device=device).to(BF16)
        a = (torch.randn(r, d, device=device) / d**0.5).requires_grad_()
        b = torch.randn(d, r, device=device).requires_grad_()
        base = _base(fmt, w)
        rows = [
            Contender(
                "peftkern",
                [_step(lambda x: F.lora_linear(x, base, a, b, 1.0), [a, b], x, dy)],
            ),
            Contender(
                "frozen",
                [_step(lambda x: torch.nn.functional.linear(x, w), [], x, dy)],
            ),
        ]
        built = Built(rows, int(2 * d * d * STORED[fmt]) + 10 * m * d, 4 * m * d * d)
        for name, make in (("hf-peft", peers.hf_peft), ("unsloth", peers.unsloth)):
            try:
                layer, trained = make(fmt, w, r, device)
            except Exception as error:
                built.absent[name] = f"{type(error).__name__}: {error}"[:200]
            else:
                built.contenders.append(Contender(name, [_step(layer, trained, x, dy)]))
        return built

    return build


def dequantize(fmt: str, n: int, k: int) -> Callable[[torch.device], Built]:
    """A nested 4-bit (or INT8) weight to bf16."""

    def build(device: torch.device) -> Built:
        w = _weight(device, n, k)
        size = n * k * (2.0 + STORED[fmt])
        qs = _copies(_base(fmt, w), size, device)
        rows = [Contender("peftkern", [lambda q=q: q.dequantize(BF16) for q in qs])]
        built = Built(rows, int(size))
        try:
            theirs = _copies(peers.bitsandbytes_dequantizer(fmt, w), size, device)
        except Exception as error:
            built.absent["bitsandbytes"] = f"{type(error).__name__}: {error}"[:200]
        else:
            built.contenders.append(Contender("bitsandbytes", theirs))
        return built

    return build


def linear(fmt: str, m: int, k: int, n: int) -> Callable[[torch.device], Built]:
    """``x Wᵀ`` with a quantized weight, against bitsandbytes and the dense bf16 weight."""

    def build(device: torch.device) -> Built:
        w = _weight(device, n, k)
        x = torch.randn(m, k, device=device).to(BF16)
        function = F.linear_8bit if fmt == "int8" else F.linear_4bit
        size = n * k * STORED[fmt]
        qs = _copies(_base(fmt, w), size, device)
        dense = _copies(w, 2 * n * k, device)
        rows = [
            Contender("peftkern", [lambda q=q: function(x, q) for q in qs]),
            Contender("dense", [lambda v=v: torch.nn.functional.linear(x, v) for v in dense]),
        ]
        built = Built(rows, int(size) + 2 * m * (k + n), 2 * m * k * n)
        try:
            layers = _copies(peers.bitsandbytes_layer(fmt, w), size, device)
        except Exception as error:
            built.absent["bitsandbytes"] = f"{type(error).__name__}: {error}"[:200]
        else:
            calls = [lambda layer=layer: layer(x) for layer in layers]
            built.contenders.append(Contender("bitsandbytes", calls))
        return built

    return build


def adamw(state: str, tensors: int, elements: int) -> Callable[[torch.device], Built]:
    """One optimizer step over a model's LoRA parameters."""

    def build(device: torch.device) -> Built:
        def parameters() -> list[Tensor]:
            made = [torch.zeros(elements, device=device).to(BF16) for _ in range(tensors)]
            for p in made:
                p.requires_grad_()
                p.grad = torch.randn_like(p)
            return made

        ours: Any = pk.optim.AdamW8bit if state == "8bit" else pk.optim.AdamW
        rows = [
            Contender("peftkern", [ours(parameters(), lr=1e-4).step]),
            Contender(
                "torch-fused",
                [torch.optim.AdamW(parameters(), lr=1e-4, fused=device.type == "cuda").step],
            ),
        ]
        total = tensors * elements
        built = Built(rows, int(total * (10.06 if state == "8bit" else 22)))
        try:
            theirs = peers.bitsandbytes_adamw(state, parameters())
        except Exception as error:
            built.absent["bitsandbytes"] = f"{type(error).__name__}: {error}"[:200]
        else:
            built.contenders.append(Contender("bitsandbytes", [theirs.step]))
        return built

    return build


def paged(state: str, tensors: int, elements: int, budget: int | None) -> Any:
    """A step whose state passes through ``budget`` bytes of the device, from pinned memory.

    Against the same step without paging, and against the bytes alone: copied both ways at once.
    """

    def build(device: torch.device) -> Built:
        def parameters() -> list[Tensor]:
            made = [torch.zeros(elements, device=device).to(BF16) for _ in range(tensors)]
            for p in made:
                p.requires_grad_()
                p.grad = torch.randn_like(p)
            return made

        names = ("PagedAdamW8bit", "AdamW8bit") if state == "8bit" else ("PagedAdamW", "AdamW")
        kinds: list[Any] = [getattr(pk.optim, name) for name in names]
        limit: dict[str, Any] = {"device_budget": budget} if device.type == "cuda" else {}
        ours = kinds[0](parameters(), lr=1e-4, **limit)
        rows = [
            Contender("peftkern", [ours.step]),
            Contender("unpaged", [kinds[1](parameters(), lr=1e-4).step]),
        ]
        if budget is not None and device.type == "cuda":
            ours.step()
            ours.step()
            last = ours.paging_report()["history"][-1]
            sizes = (last["bytes_fetched"], last["bytes_stored"])
            rows.append(Contender("pinned-copies", [_both_ways(sizes, device)]))
        return Built(rows, tensors * elements * (10 if state == "8bit" else 22))

    return build


def _both_ways(sizes: tuple[int, int], device: torch.device) -> Callable[[], object]:
    """Copy so many bytes to the device and from it, at the same time."""
    streams = [torch.cuda.Stream(device) for _ in sizes]
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]

    def call() -> None:
        current = torch.cuda.current_stream(device)
        for stream in streams:
            stream.wait_stream(current)
        with torch.cuda.stream(streams[0]):
            there[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(there[1], non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    return call


def _missing(name: str) -> Built | None:
    return None if hasattr(F, name) else Built([], absent={"peftkern": f"no functional.{name}"})


def bottleneck(m: int, d: int, r: int) -> Callable[[torch.device], Built]:
    """A bottleneck adapter with residual, forward and backward, against eager torch."""

    def build(device: torch.device) -> Built:
        if (gone := _missing("bottleneck_adapter")) is not None:
            return gone
        x = torch.randn(m, d, device=device).to(BF16).requires_grad_()
        dy = torch.randn(m, d, device=device).to(BF16)
        shapes = ((r, d), (r,), (d, r), (d,))
        weights = [(0.05 * torch.randn(s, device=device)).to(BF16).requires_grad_() for s in shapes]

        def ours(x: Tensor) -> Tensor:
            return F.bottleneck_adapter(x, *weights, activation="relu", residual=x)

        def eager(x: Tensor) -> Tensor:
            linear = torch.nn.functional.linear
            down = torch.relu(linear(x, weights[0], weights[1]))
            return x + linear(down, weights[2], weights[3])

        rows = [
            Contender("peftkern", [_step(ours, weights, x, dy)]),
            Contender("eager", [_step(eager, weights, x, dy)]),
        ]
        return Built(rows, 10 * m * d, 12 * m * d * r)

    return build


def prefix(batch: int, heads: int, kv: int, length: int, p: int, d: int) -> Any:
    """Causal attention with a trained prefix, forward and backward, against causal attention."""

    def build(device: torch.device) -> Built:
        if (gone := _missing("prefix_attention")) is not None:
            return gone

        def heads_of(count: int) -> Tensor:
            """As projections leave them: [B, L, H, D], seen through a transpose."""
            return torch.randn(batch, length, count, d, device=device).to(BF16).transpose(1, 2)

        q, k, v = (heads_of(n).requires_grad_() for n in (heads, kv, kv))
        pk_, pv = (torch.randn(kv, p, d, device=device).to(BF16).requires_grad_() for _ in "kv")
        dy = heads_of(heads)
        attention = torch.nn.functional.scaled_dot_product_attention

        def ours() -> Any:
            y = F.prefix_attention(q, k, v, pk_, pv, is_causal=True)
            return torch.autograd.grad(y, [q, k, v, pk_, pv], dy)

        def plain() -> Any:
            y = attention(q, k, v, is_causal=True, enable_gqa=heads != kv)
            return torch.autograd.grad(y, [q, k, v], dy)

        def joined() -> Any:
            keys = torch.cat([pk_.expand(batch, -1, -1, -1), k], dim=2)
            values = torch.cat([pv.expand(batch, -1, -1, -1), v], dim=2)
            mask = torch.ones(length, length + p, dtype=torch.bool, device=device).tril(p)
            y = attention(q, keys, values, attn_mask=mask, enable_gqa=heads != kv)
            return torch.autograd.grad(y, [q, k, v, pk_, pv], dy)

        rows = [
            Contender("peftkern", [ours]),
            Contender("causal", [plain]),
            Contender("concatenated", [joined]),
        ]
        flops = int(3.5 * 4 * batch * heads * d * length * (length / 2 + p))
        return Built(rows, 2 * batch * length * d * (6 * heads + 6 * kv), flops)

    return build


def gated(m: int, f: int) -> Callable[[torch.device], Built]:
    """SwiGLU's ``silu(gate) * up``, forward and backward, against eager torch and Liger."""

    def build(device: torch.device) -> Built:
        if (gone := _missing("gated_activation")) is not None:
            return gone
        gate = torch.randn(m, f, device=device).to(BF16).requires_grad_()
        up = torch.randn(m, f, device=device).to(BF16).requires_grad_()
        dy = torch.randn(m, f, device=device).to(BF16)

        def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(gate, up), [gate, up], dy)

        rows = [
            Contender("peftkern", [step(lambda g, u: F.gated_activation(g, u, "silu"))]),
            Contender("eager", [step(lambda g, u: torch.nn.functional.silu(g) * u)]),
        ]
        built = Built(rows, 2 * m * f * 8)
        try:
            liger = peers.liger_swiglu()
        except Exception as error:
            built.absent["liger"] = f"{type(error).__name__}: {error}"[:200]
        else:
            built.contenders.append(Contender("liger", [step(liger)]))
        return built

    return build


def multi_lora(m: int, d: int, r: int, adapters: int) -> Callable[[torch.device], Built]:
    """A different adapter for each row, forward and backward, against the frozen dense base."""

    def build(device: torch.device) -> Built:
        if (gone := _missing("multi_lora_linear")) is not None:
            return gone
        w = _weight(device, d, d)
        x = torch.randn(m, d, device=device).to(BF16).requires_grad_()
        dy = torch.randn(m, d, device=device).to(BF16)
        pairs = [
            ((torch.randn(r, d, device=device) / d**0.5).requires_grad_(),
             torch.randn(d, r, device=device).requires_grad_(), 1.0)
            for _ in range(adapters)
        ]  # fmt: skip
        ids = torch.arange(m, device=device) * adapters // m
        trained = [t for a, b, _ in pairs for t in (a, b)]
        ours = _step(lambda x: F.multi_lora_linear(x, w, pairs, ids), trained, x, dy)
        frozen = _step(lambda x: torch.nn.functional.linear(x, w), [], x, dy)
        rows = [Contender("peftkern", [ours]), Contender("frozen", [frozen])]
        return Built(rows, 4 * d * d + 10 * m * d, 4 * m * d * d)

    return build


def cases(dry: bool) -> Iterator[Case]:
    """All cases, those that decide the most first; tiny ones for a rehearsal."""
    big, mid = (64, 64) if dry else (4096, 8192)
    rows = 8 if dry else 4096
    yield Case("lora dense d4096", lora_step("dense", rows, big, 16))
    yield Case("lora nf4 d4096", lora_step("nf4", rows, big, 16))
    yield Case("dequantize nf4 4096x4096", dequantize("nf4", big, big))
    tall = 128 if dry else 14336
    for m in (1, 8, 16, 64):
        yield Case(f"linear nf4 m{m} 4096x4096", linear("nf4", m, big, big))
    yield Case("linear nf4 m8 14336x4096", linear("nf4", 8, big, tall))
    yield Case("adamw 8bit 40M", adamw("8bit", 448 if not dry else 2, 89_286 if not dry else 4096))
    yield Case("adamw fp32 40M", adamw("fp32", 448 if not dry else 2, 89_286 if not dry else 4096))
    pages = (2, 4096) if dry else (448, 89_286)
    yield Case("adamw fp32 40M paged", paged("fp32", *pages, 128 << 20))
    yield Case("adamw 8bit 40M paged, resident", paged("8bit", *pages, None))
    yield Case("bottleneck r64", bottleneck(rows, big, 16 if dry else 64))
    shape = (1, 2, 1, 16, 4, 16) if dry else (4, 32, 8, 2048, 64, 128)
    yield Case("prefix p64 l2048", prefix(*shape))
    yield Case("lora dense d8192", lora_step("dense", rows, mid, 16))
    for m in (128, 256, 512, 1024):
        yield Case(f"linear nf4 m{m} 4096x4096", linear("nf4", 8 if dry else m, big, big))
    yield Case("linear int8 m1", linear("int8", 1, big, big))
    for m in (512, 2048):
        yield Case(f"linear int8 m{m}", linear("int8", 8 if dry else m, big, big))
    yield Case("dequantize nf4 14336x4096", dequantize("nf4", tall, big))
    yield Case("dequantize int8", dequantize("int8", big, big))
    yield Case("gated silu", gated(rows, tall))
    yield Case("multi lora 8 adapters", multi_lora(rows, big, 16, 8))
    for m in (32, 48):
        yield Case(f"linear nf4 m{m} 4096x4096", linear("nf4", m, big, big))
