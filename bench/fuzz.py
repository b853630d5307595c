"""``python -m bench.fuzz --minutes 3``: random operations, each held against the reference.

Every draw is an operation with random sizes, dtypes, formats and layouts. It runs on the kernels,
on the reference in the same dtype (what eager torch would give) and on the reference in fp64;
outputs and all gradients must obey the error rule, and what is exact must be equal bit for bit. One
process for each instruction set that the processor has, turn and turn about; a finding prints the
command that draws it again.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import peftkern as pk
from peftkern import native, use_backend
from peftkern.quant import QuantizedTensor, quantize
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh")
_SLICE = 20.0  # seconds that an instruction set has before the next one's turn


@dataclass(frozen=True)
class Draw:
    """One drawn operation.

    Args:
        text: what was drawn, for people.
        run: the operation, from its tensors to one or several results.
        tensors: what is differentiated, by name; cast together.
        factors: the error rule's factors of results and of gradients.
        dtype: of the activations, and of the gradients of results; the first tensor's.
    """

    text: str
    run: Callable[..., Tensor | Sequence[Tensor]]
    tensors: dict[str, Tensor]
    factors: tuple[float, float] = (1.5, 2.0)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        first = next(iter(self.tensors.values()))
        if first.dtype != torch.float64:
            object.__setattr__(self, "dtype", first.dtype)


class Dice:
    """What a seed decides; sizes are small ones and those around block and tile edges."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def size(self, most: int = 200, least: int = 1) -> int:
        edges = [n for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 160)
                 if least <= n <= most]  # fmt: skip
        return self.random.choice((self.random.choice(edges), self.random.randint(least, most)))

    def pick(self, values: Sequence[Any]) -> Any:
        return self.random.choice(values)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.torch) * scale

    def laid_out(self, value: Tensor) -> Tensor:
        """The same values, contiguous, transposed in memory, strided, or one element further."""
        way = self.pick(("plain", "plain", "transposed", "strided", "shifted"))
        if way == "transposed" and value.ndim >= 2:
            return value.mT.contiguous().mT
        if way == "strided":
            return torch.stack([value, value], -1)[..., 0]
        if way == "shifted":
            wide = value.new_empty(value.numel() + 1)
            wide[1:] = value.reshape(-1)
            return wide[1:].view(value.shape)
        return value

    def rows(self, columns: int, dtype: torch.dtype) -> Tensor:
        lead = self.pick(((self.size(),), (self.size(4), self.size(30)), (self.size(), 1), (0,)))
        return self.laid_out(self.normal(*lead, columns).to(dtype))

    def base(self, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor | QuantizedTensor, str]:
        kind = self.pick(("dense", "nf4", "nf4", "fp4", "int8"))
        w = self.normal(n, k, scale=0.1).to(dtype)
        if kind == "dense":
            return w, kind
        blocksize = self.pick((32, 64, 64, 128, 256, 4096))
        nested = self.pick((True, False))
        q = quantize(w, kind, blocksize, nested)
        return q, kind if kind == "int8" else f"{kind}/{blocksize}{'/nested' * nested}"


def _cast(base: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor | QuantizedTensor:
    return base.to(dtype) if isinstance(base, Tensor) else base


def _linear(d: Dice) -> Draw:
    dtype, n, k = d.pick(_FLOATS), d.size(), d.size()
    base, text = d.base(n, k, dtype)
    given = {"x": d.rows(k, dtype)}
    if d.pick((True, False)):
        given["bias"] = d.normal(n).to(dtype)
    if isinstance(base, Tensor):
        a, b = torch.zeros(1, k), torch.zeros(n, 1)
        return Draw(
            f"dense {n}x{k}",
            lambda x, bias=None: F.lora_linear(x, _cast(base, x.dtype), a, b, 0.0, bias),
            given,
        )
    run = F.linear_8bit if base.quant_type == "int8" else F.linear_4bit
    return Draw(f"{text} {n}x{k}", lambda x, bias=None: run(x, base, bias), given)


def _lora(d: Dice) -> Draw:
    dtype, n, k, r = d.pick(_FLOATS), d.size(), d.size(), d.size(40)
    base, text = d.base(n, k, dtype)
    master = torch.float32 if dtype == torch.bfloat16 and d.pick((True, False)) else dtype
    given = {
        "x": d.rows(k, dtype),
        "A": d.laid_out(d.normal(r, k, scale=0.3).to(master)),
        "B": d.laid_out(d.normal(n, r, scale=0.3).to(master)),
    }
    if d.pick((True, False)):
        given["bias"] = d.normal(n).to(dtype)
    return Draw(
        f"lora {text} {n}x{k} r{r} {master}",
        lambda x, A, B, bias=None: F.lora_linear(x, _cast(base, x.dtype), A, B, 1.7, bias),
        given,
    )


def _group(d: Dice) -> Draw:
    dtype, k, count = d.pick(_FLOATS), d.size(), d.random.randint(1, 3)
    given = {"x": d.rows(k, dtype)}
    bases, texts = [], []
    for i in range(count):
        n, r = d.size(100), d.size(20)
        base, text = d.base(n, k, dtype)
        bases.append(base)
        texts.append(f"{text} {n} r{r}")
        given |= {f"A{i}": d.normal(r, k, scale=0.3), f"B{i}": d.normal(n, r, scale=0.3)}

    def run(x: Tensor, **factors: Tensor) -> tuple[Tensor, ...]:
        members = [(_cast(b, x.dtype), factors[f"A{i}"], factors[f"B{i}"], 0.5 + i)
                   for i, b in enumerate(bases)]  # fmt: skip
        return F.lora_linear_group(x, members)

    return Draw(f"group k{k}: {', '.join(texts)}", run, given)


def _many(d: Dice) -> Draw:
    dtype, n, k, count = d.pick(_FLOATS), d.size(100), d.size(100), d.random.randint(1, 4)
    base, text = d.base(n, k, dtype)
    x = d.laid_out(d.normal(d.size(40), d.size(6), k).to(dtype))
    ids = torch.randint(-1, count, (x.shape[0],), generator=d.torch)
    given = {"x": x}
    for i in range(count):
        r = d.size(16)
        given |= {f"A{i}": d.normal(r, k, scale=0.3), f"B{i}": d.normal(n, r, scale=0.3)}

    def run(x: Tensor, **factors: Tensor) -> Tensor:
        adapters = [(factors[f"A{i}"], factors[f"B{i}"], 1.0 + i) for i in range(count)]
        return F.multi_lora_linear(x, _cast(base, x.dtype), adapters, ids)

    return Draw(f"multi {text} {n}x{k} of {count}", run, given)


def _bottleneck(d: Dice) -> Draw:
    dtype, h, r, act = d.pick(_FLOATS), d.size(), d.size(70), d.pick(_ACTIVATIONS)
    given = {
        "x": d.rows(h, dtype),
        "down": d.normal(r, h, scale=0.3),
        "down_bias": d.normal(r),
        "up": d.normal(h, r, scale=0.3),
        "up_bias": d.normal(h),
    }

    def run(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        return F.bottleneck_adapter(x, down, down_bias, up, up_bias, activation=act, residual=x)

    return Draw(f"bottleneck {h} r{r} {act}", run, given)


def _prefix(d: Dice) -> Draw:
    dtype, b, kv, width = d.pick(_FLOATS), d.size(3), d.size(3), d.pick((8, 16, 24, 64))
    heads, p, length = kv * d.pick((1, 2, 3)), d.size(20), d.size(40)
    causal = d.pick((True, False))
    queries = length if causal else d.size(40)
    given = {
        "q": d.normal(b, heads, queries, width).to(dtype),
        "k": d.laid_out(d.normal(b, kv, length, width).to(dtype)),
        "v": d.normal(b, kv, length, width).to(dtype),
        "prefix_k": d.normal(kv, p, width).to(dtype),
        "prefix_v": d.normal(kv, p, width).to(dtype),
    }
    return Draw(
        f"prefix b{b} h{heads}/{kv} p{p} q{queries} k{length} d{width} causal={causal}",
        lambda q, k, v, prefix_k, prefix_v: F.prefix_attention(
            q, k, v, prefix_k, prefix_v, is_causal=causal
        ),
        given,
    )


def _gated(d: Dice) -> Draw:
    dtype, act = d.pick(_FLOATS), d.pick(("silu", "gelu", "gelu_tanh"))
    gate = d.rows(d.size(), dtype)
    up = torch.randn(gate.shape, generator=d.torch).to(dtype)
    given = {"gate": gate, "up": up}
    return Draw(f"gated {act}", lambda gate, up: F.gated_activation(gate, up, act), given)


def _sparse(d: Dice) -> Draw:
    dtype, n, k = d.pick(_FLOATS), d.size(100), d.size(100)
    base, text = d.base(n, k, dtype)
    count = d.random.randint(0, min(n * k, 60))
    indices = torch.randperm(n * k, generator=d.torch)[:count].sort().values
    given = {"x": d.rows(k, dtype), "values": d.normal(count)}
    return Draw(
        f"sparse {text} {n}x{k} of {count}",
        lambda x, values: F.sparse_delta_linear(x, _cast(base, x.dtype), indices, values),
        given,
    )


DRAWS = (_linear, _lora, _lora, _group, _many, _bottleneck, _prefix, _gated, _sparse)


def _evaluate(
    draw: Draw, cast: torch.dtype | None, seed: int, move: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Results and gradients; the gradients of results are drawn, or one number for all."""
    leaves = {
        n: (t.to(cast) if cast is not None else t).detach().requires_grad_()
        for n, t in draw.tensors.items()
    }
    ys = draw.run(**leaves)
    ys = [ys] if isinstance(ys, Tensor) else list(ys)
    make = torch.Generator().manual_seed(seed)
    dys = []
    for y in ys:
        dy = torch.randn(y.shape, generator=make).to(draw.dtype)
        if seed % 5 == 0:  # what .sum().backward() sends: stride 0
            dy = dy.new_ones(()).expand(y.shape)
        dys.append(dy.to(y.dtype) if move is None else move(dy.to(y.dtype)))
    grads = torch.autograd.grad(ys, list(leaves.values()), dys, allow_unused=True)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    pairs = zip(leaves, grads, strict=True)
    return found | {f"d{n}": g for n, g in pairs if g is not None}


def _condition(draw: Draw, truth: dict[str, Tensor], seed: int) -> dict[str, float]:
    """By how much each result moves when its inputs move by an ulp of fp32: sums that cancel."""
    make = torch.Generator().manual_seed(seed)
    eps = torch.finfo(torch.float32).eps

    def moved(t: Tensor) -> Tensor:
        wide = t.double()
        return wide * (1 + eps * torch.randn(t.shape, generator=make, dtype=torch.float64))

    near = replace(draw, tensors={n: moved(t) for n, t in draw.tensors.items()}, dtype=draw.dtype)
    other = _evaluate(near, None, seed, moved)
    return {n: float((other[n] - t).abs().max()) if t.numel() else 0.0 for n, t in truth.items()}


def check(seed: int) -> str:
    """Draw and compare; the text of the draw.

    Raises:
        AssertionError: the kernels differ from the reference by more than rounding.
    """
    d = Dice(seed)
    draw = d.pick(DRAWS)(d)
    try:
        got = _evaluate(draw, None, seed)
        with use_backend("reference"):
            plain = _evaluate(draw, None, seed)
            truth = _evaluate(draw, torch.float64, seed)
        again = _evaluate(draw, None, seed)
        for name, value in got.items():
            assert_same_bits(again[name], value, f"{name} repeated")
            factor = draw.factors[0 if name.startswith("y") else 1]
            try:
                assert_error_rule(value, truth[name], plain[name], factor, name)
            except AssertionError:
                # Eager torch may have been lucky, most of all where the result is a few numbers.
                with use_backend("reference"):
                    limit = 8 * _condition(draw, truth, seed)[name]
                if not float((value.double() - truth[name]).abs().max()) <= limit:
                    raise
    except Exception as error:
        error.add_note(draw.text)
        raise
    return draw.text


def check_codes(seed: int) -> str:
    """Quantizing and decoding, bit for bit against the reference."""
    d = Dice(seed)
    dtype, kind = d.pick(_FLOATS), d.pick(("nf4", "fp4", "int8"))
    shape = d.size(300), d.size(300)
    w = d.normal(*shape, scale=10.0 ** d.random.randint(-6, 4)).to(dtype)
    w[torch.rand(shape, generator=d.torch) < 0.05] = 0.0
    blocksize, nested = d.pick((32, 64, 128, 512, 4096)), d.pick((True, False))
    text = f"{kind} {shape} {dtype} blocks of {blocksize} nested={nested}"
    q = quantize(w, kind, blocksize, nested)
    with use_backend("reference"):
        want = quantize(w, kind, blocksize, nested)
        values = want.dequantize(dtype)
    for name in ("weight", "absmax", "nested_absmax", "nested_offset"):
        one, two = getattr(q, name), getattr(want, name)
        if two is not None:
            assert_same_bits(one, two, f"{text}: {name}")
    assert_same_bits(q.dequantize(dtype), values, f"{text}: decoded")
    return text


def fuzz(seed: int, seconds: float) -> tuple[int, int]:
    """Draws from ``seed`` on until the time is over; how many, and how many failed."""
    ends, done, failed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < ends:
        one = seed + done
        try:
            (check_codes if one % 7 == 0 else check)(one)
        except Exception as error:
            failed += 1
            notes = "; ".join(getattr(error, "__notes__", ()))
            isa = os.environ.get("PEFTKERN_CPU_ISA", "auto")
            print(f"FINDING seed {one}: {type(error).__name__}: {error} [{notes}]")
            print(f"  PEFTKERN_CPU_ISA={isa} python -m bench.fuzz --seed {one} --one", flush=True)
        done += 1
    return done, failed


def instruction_sets() -> list[str]:
    """Those that are compiled in and that this processor has."""
    info: Any = native.info()
    return list(info["isas"])


def main() -> int:
    """All instruction sets in turns; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first draw; by the clock")
    parser.add_argument("--one", action="store_true", help="this draw alone, with its traceback")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time()) * 1000
    torch.set_num_threads(1 if options.worker else torch.get_num_threads())
    if options.one:
        print("fine:", (check_codes if seed % 7 == 0 else check)(seed))
        return 0
    if options.worker:
        done, failed = fuzz(seed, options.worker)
        print(f"{done} {failed}")
        return 0
    ends, totals, found = time.monotonic() + 60 * options.minutes, {}, 0
    isas = instruction_sets()
    print(f"seed {seed}; instruction sets: {', '.join(isas)}", flush=True)
    while (left := ends - time.monotonic()) > 1:
        isa = min(isas, key=lambda name: totals.get(name, 0))
        env = os.environ | {"PEFTKERN_CPU_ISA": isa}
        command = [sys.executable, "-m", "bench.fuzz", "--worker", str(min(_SLICE, left))]
        ran = subprocess.run(
            [*command, "--seed", str(seed)], env=env, capture_output=True, text=True, check=False
        )
        lines = ran.stdout.strip().splitlines()
        if ran.returncode != 0 or not lines:
            print(f"FINDING: {isa} died with status {ran.returncode} at or after seed {seed}")
            print(ran.stderr[-2000:], flush=True)
            found += 1
            seed += 1_000_000
            continue
        done, failed = (int(n) for n in lines[-1].split())
        print("\n".join(lines[:-1]), end="\n" * (len(lines) > 1), flush=True)
        totals[isa] = totals.get(isa, 0) + done
        found += failed
        seed += done
        minutes = 60 * options.minutes
        print(f"{1 - left / minutes:4.0%}  {isa}: {done} draws, {failed} findings", flush=True)
    print(", ".join(f"{isa} {count}" for isa, count in totals.items()), "draws;", found, "findings")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
