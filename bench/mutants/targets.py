"""Which files are changed, and which unit tests have to notice.

A C++ file is compiled for one instruction set (``units``), which the tests then force.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """A file, how it is built, and the arguments of pytest, most likely failure first."""

    path: str
    tests: tuple[str, ...]
    units: tuple[str, ...] = ()  # sources under csrc that a C++ change is compiled with
    isa: str = ""
    focus: str = ""  # names of tests that are tried before all the others


_ISA = "tests/test_isa.py"
_OPS = "tests/test_ops.py"


def _kernel(name: str, focus: str, *tests: str, isa: str = "avx2") -> Target:
    return Target(f"csrc/cpu/{name}", (_ISA, *tests), (f"cpu/isa_{isa}",), isa, focus)


def _common(name: str, focus: str, *tests: str, also: tuple[str, ...] = ()) -> Target:
    # The scalar kernels have no vector code of their own beside it.
    units = ("cpu/isa_scalar", *also)
    return Target(f"csrc/common/{name}", (_ISA, *tests), units, "scalar", focus)


_OPTIM = ("tests/test_optim_ops.py", "tests/test_optim_api.py")
_PAGED = ("tests/test_pager_optim.py", "tests/test_pager_crash.py")
CPP = (
    _kernel("kernels/runs.inl.h", "formats or 16_bit or linear"),
    _kernel("kernels/panel.inl.h", "linear", "tests/test_lora_ops.py"),
    _kernel("kernels/rows.inl.h", "linear", "tests/test_lora_ops.py"),
    _kernel("kernels/activation.inl.h", "gated or bottleneck"),
    _kernel("kernels/bottleneck.inl.h", "bottleneck", "tests/test_bottleneck.py"),
    _kernel("kernels/quantize.inl.h", "quant or formats or 16_bit", "tests/test_formats.py"),
    _kernel("kernels/optimizer.inl.h", "optim", *_OPTIM),
    _kernel("kernels/sparse.inl.h", "sparse or sampled", "tests/test_sparse.py"),
    _kernel("kernels/prefix.inl.h", "prefix", "tests/test_prefix_op.py"),
    _kernel("kernels/dora.inl.h", "dora or norm"),
    _kernel("kernels/gated.inl.h", "gated"),
    _kernel("simd_avx2.h", "formats or linear_4bit"),
    _kernel("simd_avx512.h", "formats or linear_4bit", isa="avx512"),
    _kernel("simd_scalar.h", "formats or linear_4bit", isa="scalar"),
    _common("convert.h", "16_bit or formats"),
    _common("philox.h", "random or dropout", *_OPTIM),
    _common("optimizer.h", "optim", *_OPTIM, also=("bind_optimizer",)),
    Target("csrc/cpu/crc32c.cpp", _PAGED, ("cpu/crc32c",)),
    Target("csrc/cpu/page_io.cpp", _PAGED, ("cpu/page_io",)),
)


def _python(path: str, *tests: str) -> Target:
    return Target(f"peftkern/{path}", tests)


_GRAD = "tests/test_grad.py"
_FILES = (
    "tests/test_checkpoint_peft.py",
    "tests/test_checkpoint_crash.py",
    "tests/test_hostile_arguments.py",
    "tests/test_interop_lora.py",
)
_HUB = ("tests/test_interop_adapterhub.py", "tests/test_hf_bottleneck.py")
PYTHON = (
    _python("ops/linear4/autograd.py", _GRAD),
    _python("ops/linear8/autograd.py", _GRAD),
    _python("ops/lora/autograd.py", _GRAD),
    _python("ops/lora_group/autograd.py", "tests/test_lora_ops.py"),
    _python("ops/multi_lora/autograd.py", "tests/test_lora_ops.py", "tests/test_lora_rows.py"),
    _python("ops/dora/autograd.py", "tests/test_lora_ops.py"),
    _python("ops/bottleneck/autograd.py", "tests/test_bottleneck.py"),
    _python("ops/prefix/autograd.py", "tests/test_prefix_op.py"),
    _python("ops/sparse_delta/autograd.py", "tests/test_sparse.py"),
    _python("ops/gated/autograd.py", "tests/test_lora_ops.py"),
    _python("ops/lora/cpu.py", _GRAD, _OPS),
    _python("ops/quant4/reference.py", "tests/test_formats.py", _OPS),
    _python("ops/optimizer/reference.py", *_OPTIM),
    _python("ops/dropout/reference.py", _OPS, _GRAD),
    _python(
        "quant.py",
        "tests/test_formats.py",
        "tests/test_hostile_arguments.py",
        "tests/test_nn.py",
        _GRAD,
    ),
    _python("codebooks.py", "tests/test_formats.py"),
    _python("nn/merging.py", "tests/test_nn.py", "tests/test_lora_family.py"),
    _python("checkpoint/files.py", *_FILES),
    _python("checkpoint/storage.py", *_FILES, "tests/test_cli_convert.py"),
    _python("checkpoint/peft_format.py", *_FILES),
    _python("checkpoint/peft_lora.py", *_FILES),
    _python(
        "checkpoint/adapterhub.py",
        "tests/test_interop_adapterhub.py",
        "tests/test_hf_bottleneck.py",
    ),
    _python("optim/files.py", *_PAGED),
    _python("optim/layout.py", "tests/test_optim_api.py", *_PAGED),
)
TARGETS = {target.path: target for target in (*CPP, *PYTHON)}


def missing(root: Path) -> list[str]:
    """Files named here that do not exist."""
    named = [*TARGETS, *(test for target in TARGETS.values() for test in target.tests)]
    return sorted({path for path in named if not (root / path).exists()})
