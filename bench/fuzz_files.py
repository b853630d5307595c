"""``python -m bench.fuzz_files --minutes 1``: broken adapter files, read as a stranger's.

Files of every layout that :func:`peftkern.load_adapter` reads are cut at each byte, have bits
flipped, and tell lies about shapes, dtypes and lengths. Reading must succeed or raise a documented
error (``ValueError``, ``TypeError``, ``OSError``), take no more than 64 MB of address space beyond
what the libraries have, and leave a model that refused a file as it was.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkern as pk

ALLOWED = (ValueError, TypeError, OSError)
Breaking = Iterator[tuple[str, bytes]]


class Net(nn.Module):
    """Two layers, small enough for thousands of readings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def make(folder: Path) -> dict[str, Path]:
    """An adapter of each layout, by name."""
    torch.manual_seed(0)
    made = {}
    for name, compact in (("plain", None), ("nf4", "nf4"), ("int8", "int8")):
        model = Net()
        pk.patch(model, pk.LoRAConfig(r=16, target_modules=["first", "second"]))
        made[name] = folder / name
        pk.save_adapter(model, made[name], compact=compact)
    model = Net()
    pk.patch(model, pk.SparseDeltaConfig(target_modules=["first"], density=0.1))
    made["sparse"] = folder / "sparse"
    pk.save_adapter(model, made["sparse"])
    return made


def cuts(content: bytes) -> Breaking:
    """The file ends early, at every byte."""
    for size in range(len(content)):
        yield f"cut at {size}", content[:size]


def flips(content: bytes, rng: random.Random, count: int) -> Breaking:
    """One to four bits are others."""
    for _ in range(count):
        broken = bytearray(content)
        places = [rng.randrange(8 * len(content)) for _ in range(rng.randint(1, 4))]
        for place in places:
            broken[place // 8] ^= 1 << place % 8
        yield f"bits {places}", bytes(broken)


def lies(content: bytes) -> Breaking:
    """A safetensors header that says something else about its tensors."""
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def packed(changed: Any, length: int | None = None) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + rest

    for length in (0, 1, 2**31, 2**63 - 1, 2**64 - 1):
        yield f"header of {length} bytes", packed(header, length)
    for key, row in header.items():
        if key == "__metadata__":
            for text in ("", "{", "[]", '{"version": 99}', '{"version": 1, "tensors": 3}'):
                yield f"metadata {text!r}", packed(header | {key: dict.fromkeys(row, text)})
            continue
        start, end = row["data_offsets"]
        for label, change in (
            ("shape", {"shape": [*row["shape"], 1]}),
            ("shape", {"shape": [2**40, 2**40]}),
            ("shape", {"shape": [-1]}),
            ("shape", {"shape": list(reversed(row["shape"]))}),
            ("dtype", {"dtype": "F64"}),
            ("dtype", {"dtype": "BOOL"}),
            ("dtype", {"dtype": "X99"}),
            ("offsets", {"data_offsets": [start, end + 4]}),
            ("offsets", {"data_offsets": [0, 2**62]}),
            ("offsets", {"data_offsets": [end, start]}),
        ):
            yield f"{key}: {label} {change}", packed(header | {key: row | change})
        without = {k: v for k, v in header.items() if k != key}
        yield f"without {key}", packed(without)
        yield f"{key} renamed", packed(without | {f"{key}x": row})


def config_lies(content: bytes) -> Breaking:
    """An ``adapter_config.json`` with other types and sizes in each field."""
    fields = json.loads(content)
    values = (None, -1, 0, 2**70, 1e308, "x", "../../etc/passwd", [], ["("], {}, {"a": {}}, True)
    for key in fields:
        for value in values:
            yield f"{key}={value!r}", json.dumps(fields | {key: value}).encode()
    for text in (b"", b"null", b"[]", b'"a"', b"{" * 5000, b"\xff\xfe", b'{"r": NaN}'):
        yield f"config {text[:20]!r}", text


def read(folder: Path) -> str | None:
    """Load into a fresh model; what went wrong, or ``None``."""
    torch.manual_seed(1)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        pk.load_adapter(model, folder)
    except ALLOWED:
        now = model.state_dict()
        if list(now) != list(before) or any(not torch.equal(now[n], before[n]) for n in before):
            return "refused, but the model is not what it was"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def limit_memory(extra: int) -> None:
    """From here on this process may take ``extra`` more bytes of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def breakings(path: Path, rng: random.Random, count: int) -> Breaking:
    """Everything that is done to a file."""
    content = path.read_bytes()
    yield from (lies if path.suffix == ".safetensors" else config_lies)(content)
    yield from flips(content, rng, count)
    yield from cuts(content)


def run(
    seconds: float, seed: int, every: int = 1, say: Callable[[str], None] = print
) -> tuple[int, int]:
    """Break and read until the time is over, or all is done twice as deep; (read, findings)."""
    rng, done, found = random.Random(seed), 0, 0
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folders = make(Path(name))
        for folder in folders.values():
            assert read(folder) is None, folder.name
        for layout, folder in folders.items():
            for path in sorted(folder.glob("adapter_*")):
                whole = path.read_bytes()
                share = ends if every > 1 else time.monotonic() + seconds / (2 * len(folders))
                for i, (text, broken) in enumerate(breakings(path, rng, 400)):
                    if i % every or time.monotonic() > share:
                        continue
                    path.write_bytes(broken)
                    wrong = read(folder)
                    done += 1
                    if wrong is not None:
                        found += 1
                        say(f"FINDING {layout}/{path.name}, {text}: {wrong}")
                path.write_bytes(whole)
    return done, found


def main() -> int:
    """Exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_files", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:  # libraries load now, before the limit
        read(make(Path(name))["plain"])
    if sys.platform == "linux":
        limit_memory(64 << 20)
    done, found = run(60 * options.minutes, options.seed)
    print(f"{done} broken files read, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
