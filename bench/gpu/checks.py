"""``python -m bench.gpu.checks``: every kernel once on small shapes, for compute-sanitizer.

Each implementation of the asked backend runs on the smaller samples of its op's contract, and the
results are held loosely against the reference, so that a run that computes nothing shows.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import peftkern as pk  # noqa: F401  (registers the ops)
from peftkern import registry

_MOST_ELEMENTS = 1 << 16


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if r is not None]


def _close(got: Tensor, want: Tensor) -> bool:
    if got.numel() == 0 or not got.is_floating_point():
        return got.shape == want.shape
    got, want = got.double().cpu(), want.double()
    finite = want.isfinite()
    worst = (got - want)[finite].abs().max() if finite.any() else torch.tensor(0.0)
    scale = want[finite].abs().max() if finite.any() else torch.tensor(1.0)
    return bool(worst <= 0.05 * scale + 1e-6)


def check(row: registry.Implementation, dtype: torch.dtype, device: torch.device) -> int:
    """Run an implementation on its op's small samples; the number of samples that ran."""
    spec, ran = registry.specs()[row.op], 0
    for sample in spec.samples(dtype):
        if sum(a.numel() for a in sample.args if isinstance(a, Tensor)) > _MOST_ELEMENTS:
            continue
        args = tuple(_moved(a, device) for a in sample.args)
        if row.refusal(args) is not None:
            continue
        got = _outputs(row.fn(*args))
        if device.type == "cuda":
            torch.cuda.synchronize()
        fresh = next(s for s in spec.samples(dtype) if s.name == sample.name)
        for i, (a, b) in enumerate(zip(got, _outputs(spec.reference(*fresh.args)), strict=True)):
            if not _close(a, b):
                raise AssertionError(f"{row.op}[{row.backend}] {sample.name}: output {i} is wrong")
        ran += 1
    return ran


def main() -> int:
    """Run the kernels of one backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--dry", action="store_true", help="the CPU's kernels instead")
    given = parser.parse_args()
    device = torch.device("cpu" if given.dry else "cuda")
    backend = "native" if given.dry else given.backend
    total = 0
    for name, spec in registry.specs().items():
        for row in registry.implementations(name, device.type):
            if row.backend == backend:
                for dtype in dict.fromkeys((spec.dtypes[0], spec.dtypes[-1])):
                    total += check(row, dtype, device)
    print(f"{total} calls of the backend {backend}")
    return 0 if total else 1


if __name__ == "__main__":
    sys.exit(main())
