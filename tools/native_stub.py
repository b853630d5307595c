"""Writes ``peftkern/_C.pyi`` from the built module: ``python tools/native_stub.py``.

Types come from the signatures that pybind11 writes into docstrings, names of arguments from the
bindings in ``csrc/bind*.cpp``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401 - first: its OpenMP runtime is the one that the module uses

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "peftkern" / "_C.pyi"

_HEAD = '''\
"""The native module: addresses, sizes and strides in; it allocates nothing.

Written by ``tools/native_stub.py``. Addresses are those of contiguous memory unless strides are
given; only ``peftkern/ops/*/cpu.py`` and ``peftkern/optim`` call these.
"""

from typing import Any

from typing_extensions import Buffer
'''
_NAMES = {"in": "in_features", "list": "members"}
_TYPES = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing_extensions.Buffer": "Buffer",
    "tuple": "tuple[Any, ...]",
    "object": "Any",
    "list": "list[Any]",
    "dict": "dict[str, Any]",
}


def functions(module: ModuleType) -> dict[str, str]:
    """Name and pybind11's signature of everything that the module gives."""
    found = {}
    for name in sorted(dir(module)):
        if not name.startswith("_"):
            found[name] = (getattr(module, name).__doc__ or "").strip().splitlines()[0]
    return found


def argument_names(source: str, function: str) -> list[str]:
    """Names of the arguments of a C++ function that is defined in a source; empty if none is."""
    found = re.search(rf"^[\w:<>\s]*\b{function}\(([^)]*)\)\s*\{{", source, re.MULTILINE)
    if found is None:
        return []
    names = [part.split()[-1].strip("&*") for part in found[1].split(",") if part.strip()]
    return [_NAMES.get(name, name) for name in names]


def stub(module: ModuleType) -> str:
    """The text of the stub."""
    source = "\n".join(file.read_text() for file in sorted((ROOT / "csrc").glob("bind*.cpp")))
    lines = [_HEAD]
    for name, signature in functions(module).items():
        found = re.fullmatch(r"\w+\((.*)\) -> (.+)", signature)
        if found is None:
            raise ValueError(f"{name}: {signature!r} is no signature of pybind11")
        names = argument_names(source, name)
        parts = [part for part in found[1].split(", ") if part]
        if len(names) != len(parts):
            names = []
        made = []
        for index, part in enumerate(parts):
            label, _, kind = part.partition(": ")
            kind, _, default = kind.partition(" = ")
            positional = label.startswith("arg")
            label = names[index] if names and positional else label
            made.append(f"{label}: {_TYPES.get(kind, kind)}" + (f" = {default}" if default else ""))
        if parts and parts[0].startswith("arg"):
            made.append("/")
        result = _TYPES.get(found[2], found[2])
        line = f"def {name}({', '.join(made)}) -> {result}: ..."
        if len(line) > 100:
            line = f"def {name}(\n    " + ",\n    ".join(made) + f",\n) -> {result}: ..."
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from peftkern import _C

    STUB.write_text(stub(_C))
    print(f"wrote {STUB.relative_to(ROOT)}")
