"""Ahead-of-time compilation of recorded launches, and what can be read off the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkern.triton_kernels.launch import Launch

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    Args:
        kernel: its name.
        arch: 80 or 90.
        registers: a thread's.
        stack: bytes of local memory a thread; above 0 means spills.
        shared: bytes of shared memory a program.
        sass: the opcodes in program order, without operands.
        wgmma_waits: for each wait on asynchronous products, how many may stay in flight.
        loop: instructions in the longest backward branch: the body of the main loop.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    sass: tuple[str, ...]
    wgmma_waits: tuple[int, ...]
    loop: int

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that matches from its beginning."""
        return sum(re.match(pattern, opcode) is not None for opcode in self.sass)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """What Triton's launcher would specialise on; data pointers count as aligned to 16 bytes."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    values |= {k: v for k, v in launch.options.items() if k not in _OPTIONS}
    for i, (name, parameter) in enumerate(zip(names, launch.kernel.params, strict=True)):
        value = values[name]
        if isinstance(value, torch.Tensor):
            types[name] = _TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, attributes


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _longest_loop(sass: str) -> int:
    """Instructions between a label and the last branch back to it, for the longest such stretch."""
    seen: dict[str, int] = {}
    longest = count = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            seen[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            target = re.search(r"\bBRA\b.*?`\((\.L_\S+)\)", line)
            if target and target[1] in seen:
                longest = max(longest, count - seen[target[1]])
    return longest


def lower(launch: Launch, arch: int) -> str:
    """Triton's own IR of what ``launch`` would run: the front end alone, 20 times as fast."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({k: v for k, v in launch.options.items() if k in _OPTIONS})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(launch.kernel, *signature(launch))
    tools = (backend.get_codegen_implementation(options), backend.get_module_map())
    return str(source.make_ir(target, options, *tools, context))


def compile_launch(launch: Launch, arch: int) -> Binary:
    """Compile what ``launch`` would run, for compute capability ``arch`` (80, 90); needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    options = {k: v for k, v in launch.options.items() if k in _OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True
        ).stdout
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage!r}")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", compiled.asm["ptx"])
    return Binary(
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        sass=tuple(opcodes),
        wgmma_waits=tuple(int(wait) for wait in waits),
        loop=_longest_loop(sass),
    )
