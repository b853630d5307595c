"""Write your own op: contract, reference, an implementation in C, gradients, and its test.

Needs torch alone; the implementation also a C compiler, and refuses with the reason without one.
The op is the squared ReLU, y = max(x, 0)^2, which eager torch computes in two passes.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import peftkern as pk
from peftkern import registry
from peftkern.ops import checks
from peftkern.registry import OpSpec, Sample, define_op, implementation
from peftkern.testing import assert_same_bits

# 1. The reference: the truth in plain torch, short enough to check by eye. It serves every device
# and dtype, and is what every implementation is held against.


def relu_squared(x: Tensor) -> Tensor:
    return x.relu() * x.relu()


def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    return 2 * x.relu() * dy


# 2. The contract: what arguments are right, what comes out, and on what it is tested.


def _check(x: Tensor) -> None:
    checks.float_matrix("x", x)


def _check_backward(dy: Tensor, x: Tensor) -> None:
    _check(x)
    checks.shape_is("dy", dy, tuple(x.shape))
    checks.dtype_in("dy", dy, (x.dtype,))


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for rows, columns in ((0, 3), (1, 1), (7, 13), (5, 257)):
        generator = torch.Generator().manual_seed(rows)
        yield Sample(
            f"{rows}x{columns}", (torch.randn(rows, columns, generator=generator).to(dtype),)
        )


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _samples(dtype):
        yield Sample(sample.name, (sample.args[0].flip(-1).contiguous(), *sample.args))


define_op(
    OpSpec(
        name="example_relu_squared",
        schema="(Tensor x) -> Tensor",
        check=_check,
        fake=torch.empty_like,
        reference=relu_squared,
        samples=_samples,
        tolerance="exact",
    )
)
define_op(
    OpSpec(
        name="example_relu_squared_backward",
        schema="(Tensor dy, Tensor x) -> Tensor",
        check=_check_backward,
        fake=lambda dy, x: torch.empty_like(x),
        reference=relu_squared_backward,
        samples=_samples_backward,
        tolerance="exact",
    )
)

# 3. An implementation: pointers and sizes go to the kernel, tensors stay here. `can_use` says why
# it cannot serve a call; then the next implementation is tried, in the end the reference.

KERNEL = r"""
#include <stdint.h>
void forward(const float *restrict x, float *restrict y, int64_t n) {
  for (int64_t i = 0; i < n; i++) { float r = x[i] < 0 ? 0 : x[i]; y[i] = r * r; }
}
void backward(const float *restrict dy, const float *restrict x, float *restrict dx, int64_t n) {
  for (int64_t i = 0; i < n; i++) { float r = x[i] < 0 ? 0 : x[i]; dx[i] = 2 * r * dy[i]; }
}
"""


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    # Without -fno-trapping-math the compiler keeps a branch for each element.
    flags = ["-O3", "-fno-trapping-math", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.c"), Path(folder, "kernel.so")
        source.write_text(KERNEL)
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


def _can_use(*args: Tensor) -> str | None:
    if any(t.dtype != torch.float32 for t in args):
        return f"dtype {args[-1].dtype} is not served, only torch.float32"
    if not all(t.is_contiguous() for t in args):
        return "the arguments are not contiguous"
    return None if _library() is not None else "there is no C compiler"


def _launch(name: str, *tensors: Tensor) -> None:
    library = _library()
    assert library is not None
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    getattr(library, name)(*pointers, ctypes.c_int64(tensors[0].numel()))


@implementation("example_relu_squared", device="cpu", backend="native", can_use=_can_use)
def _forward(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _launch("forward", x, y)
    return y


@implementation("example_relu_squared_backward", device="cpu", backend="native", can_use=_can_use)
def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    _launch("backward", dy, x, dx)
    return dx


# 4. Gradients: an autograd.Function over registered ops. It keeps x and nothing else, where eager
# torch keeps two results of relu.


class ReLUSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.peftkern.example_relu_squared(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        # A gradient may arrive with stride 0, from .sum().
        return torch.ops.peftkern.example_relu_squared_backward(dy.contiguous(), *ctx.saved_tensors)


# 5. The test. Under peftkern/ops nothing of it needs writing: tests/test_ops.py walks every op.


def test_every_implementation() -> int:
    """Holds every implementation to the bits of the reference; the number of comparisons."""
    compared = 0
    for name in ("example_relu_squared", "example_relu_squared_backward"):
        spec, op = registry.specs()[name], getattr(torch.ops.peftkern, name)
        for dtype in spec.dtypes:
            for sample in spec.samples(dtype):
                torch.library.opcheck(op.default, sample.args)  # schema and fake are true
                for row in registry.implementations(name):
                    if row.refusal(sample.args) is None:
                        got, want = row.fn(*sample.args), spec.reference(*sample.args)
                        assert_same_bits(got, want, f"{name}[{row.backend}] {sample.name}")
                        compared += 1
    return compared


def test_gradients() -> None:
    x = torch.randn(33, 65, requires_grad=True)
    mine, plain = (torch.autograd.grad(f(x).sum(), x)[0] for f in (ReLUSquared.apply, relu_squared))
    assert_same_bits(mine, plain, "dx")


def milliseconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Least of several calls."""
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        function(x)
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


def main() -> None:
    print(f"compared {test_every_implementation()} results with the reference: the same bits")
    test_gradients()
    print("the gradient has the bits of torch's own")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 4).to(dtype)
        chosen = registry.select("example_relu_squared", (x,)).backend
        print(f"{dtype}: served by {chosen}; {registry.explain('example_relu_squared', args=(x,))}")
        assert chosen == ("native" if dtype == torch.float32 and _library() else "reference")

    # The test can fail: a kernel with a wrong constant is found.
    x = torch.randn(8, 8)
    try:
        assert_same_bits(relu_squared_backward(x, x) * 1.001, relu_squared_backward(x, x))
    except AssertionError as error:
        print(f"a wrong kernel is found: {error}")
    else:
        raise SystemExit("a wrong kernel was not found")
    try:
        torch.ops.peftkern.example_relu_squared(torch.zeros(3))
    except ValueError as error:
        print(f"wrong arguments are named: {error}")
    else:
        raise SystemExit("a wrong argument was not refused")

    x = torch.randn(2048, 2048)
    op = torch.ops.peftkern.example_relu_squared
    with pk.use_backend("reference"):
        eager = milliseconds(op, x)
    print(
        f"2048x2048 here: {eager:.2f} ms by the reference, {milliseconds(op, x):.2f} ms by the op"
    )


if __name__ == "__main__":
    main()
