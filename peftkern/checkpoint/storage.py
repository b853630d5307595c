"""Tensors in fewer bytes than their dtype: NF4 and INT8 blocks, positions as gaps.

The stored form of tensor ``key`` is one or two tensors ``key:<part>``; the file's metadata entry
``peftkern`` lists encoding, shape and dtype of each key. Layouts: docs/formats.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from peftkern.checkpoint.files import open_safetensors
from peftkern.quant import QuantizedTensor, quantize_4bit

COMPACT = ("nf4", "int8")
SMALL = 256  # elements; smaller tensors stay as they are
BLOCK = 64
_ENTRY = "peftkern"
_VERSION = 1
_GAPS = (torch.uint8, torch.uint16, torch.int32, torch.int64)
_PARTS = {
    "nf4": ("codes", "absmax"),
    "int8": ("codes", "absmax"),
    "gaps": ("gaps",),
}
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StorageReport:
    """What storing an adapter in few bits lost; ``str()`` says it in a line.

    Args:
        compact: ``"nf4"`` or ``"int8"``.
        errors: key -> Frobenius norm of the error over that of the tensor.
        bytes_before: of all tensors in their own dtypes.
        bytes_after: as stored.
    """

    compact: str
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int

    @property
    def max_error(self) -> float:
        """The largest relative error."""
        return max(self.errors.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "compact": self.compact,
            "errors": dict(self.errors),
            "max_error": self.max_error,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        return (
            f"{self.compact}: {len(self.errors)} tensors, relative error at most "
            f"{self.max_error:.2%}; {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )


def encode(
    tensors: Mapping[str, Tensor],
    compact: str | None,
    flat_too: tuple[str, ...] = (),
    ascending: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], dict[str, str], StorageReport | None]:
    """What goes into the file for these tensors.

    Args:
        tensors: by key.
        compact: ``"nf4"``, ``"int8"``, or ``None``: float tensors stay as they are.
        flat_too: endings of keys whose one-dimensional tensors are encoded as well.
        ascending: endings of keys whose int64 tensors ascend; they are stored as gaps.

    Returns:
        The stored tensors, the metadata (empty when nothing is encoded), and the report.

    Raises:
        ValueError: NaN or infinity in a tensor to encode.
    """
    stored: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu()
        if ascending and key.endswith(ascending):
            stored[f"{key}:gaps"] = _gaps(value)
            table[key] = {"encoding": "gaps", "shape": list(value.shape), "dtype": "int64"}
        elif compact is not None and _encodes(key, value, flat_too):
            codes, absmax, back = _quantized(key, value, compact)
            stored[f"{key}:codes"], stored[f"{key}:absmax"] = codes, absmax
            name = str(value.dtype).removeprefix("torch.")
            table[key] = {"encoding": compact, "shape": list(value.shape), "dtype": name}
            norm = float(torch.linalg.vector_norm(value.double()))
            lost = float(torch.linalg.vector_norm(back.double() - value.double()))
            errors[key] = lost / norm if norm else 0.0
        else:
            stored[key] = value
    metadata = {_ENTRY: json.dumps({"version": _VERSION, "tensors": table})} if table else {}
    if compact is None:
        return stored, metadata, None
    before = sum(tensor.nbytes for tensor in tensors.values())
    after = sum(tensor.nbytes for tensor in stored.values())
    return stored, metadata, StorageReport(compact, errors, before, after)


def _encodes(key: str, value: Tensor, flat_too: tuple[str, ...]) -> bool:
    if value.numel() < SMALL or value.dtype not in _FLOATS.values():
        return False
    return value.dim() >= 2 or (bool(flat_too) and key.endswith(flat_too))


def _quantized(key: str, value: Tensor, compact: str) -> tuple[Tensor, Tensor, Tensor]:
    flat = value.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(f"compact: {key} holds NaN or infinity, which {compact} cannot store")
    if compact == "nf4":
        q = quantize_4bit(flat, "nf4", BLOCK, double_quant=False)
        codes, absmax = q.weight.reshape(-1), q.absmax.reshape(-1)
    else:
        blocks = torch.nn.functional.pad(flat.float(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        scale = torch.where(absmax > 0, 127.0 / absmax, 0.0)
        scale = torch.where(torch.isfinite(scale), scale, 0.0)  # denormal blocks become zero
        codes = (blocks * scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        codes = codes.view(-1)[: flat.numel()].clone()
    return codes, absmax, _decoded(compact, codes, absmax, value.shape, value.dtype)


def _decoded(
    encoding: str, codes: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    numel = math.prod(shape)
    if encoding == "nf4":
        flat = torch.Size((numel,))
        q = QuantizedTensor(codes, absmax, None, None, "nf4", BLOCK, flat, dtype)
        return q.dequantize(dtype).view(shape)
    values = torch.nn.functional.pad(codes.float(), (0, -numel % BLOCK)).view(-1, BLOCK)
    return (values * (absmax / 127.0)[:, None]).view(-1)[:numel].to(dtype).view(shape)


def _gaps(indices: Tensor) -> Tensor:
    gaps = torch.diff(indices, prepend=indices.new_full((1,), -1)) - 1
    if gaps.numel() and int(gaps.min()) < 0:
        raise ValueError("indices: expected ascending positions without repeats")
    top = int(gaps.max()) if gaps.numel() else 0
    return gaps.to(next(dtype for dtype in _GAPS if top <= torch.iinfo(dtype).max))


class StoredTensors:
    """An adapter file, read as the tensors that were saved; use as a context manager.

    Raises:
        ValueError: damaged, of a later version, or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = open_safetensors(path)

    def __enter__(self) -> StoredTensors:
        self._file = self._open.__enter__()
        text = (self._file.metadata() or {}).get(_ENTRY)
        self._table: dict[str, Any] = {}
        if text is not None:
            about = json.loads(text)
            version = about.get("version") if isinstance(about, dict) else None
            if version != _VERSION:
                raise ValueError(
                    f"{self._path}: storage version {version!r}, this library reads {_VERSION}"
                )
            table = about.get("tensors")
            if not isinstance(table, dict):
                raise ValueError(f"{self._path}: its table of tensors is {table!r}, expected a map")
            self._table = table
        raw = list(self._file.keys())
        parts = {f"{key}:{p}" for key, row in self._table.items() for p in self._parts(key, row)}
        lost = sorted(parts - set(raw))
        if lost:
            raise ValueError(f"{self._path}: its table lists {lost[0]}, which is not in the file")
        self._plain = [key for key in raw if key not in parts]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _parts(self, key: str, row: Any) -> tuple[str, ...]:
        if not isinstance(row, dict) or row.get("encoding") not in _PARTS:
            raise ValueError(f"{self._path}: {key} is stored in an unknown way ({row!r})")
        shape, dtype = row.get("shape"), row.get("dtype")
        sizes = shape if isinstance(shape, list) else [None]
        if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
            raise ValueError(f"{self._path}: {key} has the shape {shape!r}, expected sizes")
        gaps = row["encoding"] == "gaps"
        if dtype not in (("int64",) if gaps else _FLOATS) or (gaps and len(sizes) != 1):
            raise ValueError(f"{self._path}: {key} is {dtype!r} of shape {shape!r} as {row!r}")
        return _PARTS[row["encoding"]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading its data."""
        shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._plain}
        shapes.update({key: tuple(row["shape"]) for key, row in self._table.items()})
        return shapes

    def get(self, key: str) -> Tensor:
        """One tensor, decoded.

        Raises:
            ValueError: its stored form does not have the size that its shape asks for.
        """
        row = self._table.get(key)
        if row is None:
            plain: Tensor = self._file.get_tensor(key)
            return plain
        parts = [self._file.get_tensor(f"{key}:{part}") for part in self._parts(key, row)]
        shape, encoding = torch.Size(row["shape"]), row["encoding"]
        numel = math.prod(shape)
        if encoding == "gaps":
            self._check(key, parts[0].view(-1), _GAPS, numel)
            if parts[0].ndim != 1:
                raise ValueError(f"{self._path}: {key} is stored as {tuple(parts[0].shape)}")
            gaps = parts[0].to(torch.int64)
            if numel and int(gaps.min()) < 0:
                raise ValueError(f"{self._path}: {key} holds positions that do not ascend")
            return gaps.add_(1).cumsum_(0).sub_(1)
        four = encoding == "nf4"
        self._check(key, parts[0], (torch.uint8 if four else torch.int8,), -(-numel // (1 + four)))
        self._check(key, parts[1], (torch.float32,), -(-numel // BLOCK))
        if not bool(torch.isfinite(parts[1]).all()) or bool((parts[1] < 0).any()):
            raise ValueError(f"{self._path}: {key} has block scales that are no absolute maxima")
        return _decoded(encoding, parts[0], parts[1], shape, _FLOATS[row["dtype"]])

    def _check(self, key: str, part: Tensor, dtypes: tuple[torch.dtype, ...], numel: int) -> None:
        if part.dtype not in dtypes or part.numel() != numel:
            raise ValueError(
                f"{self._path}: {key} is stored as {part.numel()} x {part.dtype}, expected {numel} "
                f"x {' or '.join(map(str, dtypes))}"
            )
