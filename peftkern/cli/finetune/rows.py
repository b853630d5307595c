"""Rows of a user's file, and which task their columns mean."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, str]

CLASSIFICATION, CAUSAL_LM, SEQ2SEQ = "classification", "causal-lm", "seq2seq"
TASKS = (CLASSIFICATION, CAUSAL_LM, SEQ2SEQ)

# Pairs of columns that hold what goes in and what shall come out.
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("source", "target"),
    ("input", "output"),
)


def read_rows(path: Path, option: str = "--data") -> list[Row]:
    """The rows of a file as dicts of strings.

    Args:
        path: `.jsonl` (an object a line), `.csv` or `.tsv` (with a header line), or `.txt` (one
            text, cut at empty lines).
        option: what the file was given as, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be read, or there are no rows; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no such file: {path}")
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".txt": _text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{option}: got {path.name!r}, expected a file ending in .jsonl, .csv, .tsv or .txt"
        )
    try:
        rows = list(reader(path, option))
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path.name} is not UTF-8 text: {error}") from error
    if not rows:
        raise ValueError(f"{option}: {path.name} has no rows")
    return rows


def infer_task(rows: Sequence[Row], encoder_decoder: bool) -> str:
    """The task that the columns mean.

    Raises:
        ValueError: they mean none; the message lists the columns found and understood.
    """
    columns = set(rows[0])
    if {"text", "label"} <= columns:
        return CLASSIFICATION
    if encoder_decoder:
        if pair_of(rows) is not None:
            return SEQ2SEQ
    elif pair_of(rows) is not None or "text" in columns:
        return CAUSAL_LM
    raise ValueError(
        f"--data: got the columns {', '.join(sorted(columns))}; expected text and label (to "
        "classify), text (to continue), or one of " + ", ".join(f"{a} and {b}" for a, b in _PAIRS)
    )


def pair_of(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The columns of input and output; None where there are none."""
    return next((pair for pair in _PAIRS if set(pair) <= set(rows[0])), None)


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, drawn by the seed; at least one row of each.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError("--data: one row only; give more rows, or --eval-data")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(order[:count])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for index, row in enumerate(rows):
        parts[index in held].append(row)
    return parts


def _jsonl(path: Path, option: str) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{option}: {path.name}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{option}: {path.name}, line {number}: got a {type(row).__name__}, expected "
                    'an object such as {"text": "..."}'
                )
            yield {key: str(value) for key, value in row.items() if value is not None}


def _csv(path: Path, option: str) -> Iterator[Row]:
    tab = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if tab else ",")
        if not reader.fieldnames:
            raise ValueError(f"{option}: {path.name} has no header line")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames]
        for row in reader:
            yield {key: value for key, value in row.items() if key and value is not None}


def _text(path: Path, option: str) -> Iterator[Row]:
    for part in path.read_text(encoding="utf-8").split("\n\n"):
        if part.strip():
            yield {"text": part}
