"""From rows to token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.cli.finetune.rows import CLASSIFICATION, SEQ2SEQ, Row, pair_of

IGNORED = -100  # the label that cross entropy leaves out

Item = dict[str, Any]


def encode(
    rows: Sequence[Row], task: str, tokenizer: Any, max_length: int, labels: Sequence[str]
) -> list[Item]:
    """Items for a Trainer: `input_ids`, and `labels` where the collator does not make them.

    Args:
        rows: the rows.
        task: one of `TASKS`.
        tokenizer: of the model.
        max_length: tokens of an item; texts to continue are packed into blocks of it, everything
            else is cut there.
        labels: names of the classes.

    Raises:
        ValueError: a row lacks a column, has an unknown label, or there is nothing left to learn.
    """
    if task == CLASSIFICATION:
        items = _classified(rows, tokenizer, max_length, labels)
    elif (pair := pair_of(rows)) is not None:
        make = _to_sequence if task == SEQ2SEQ else _continued
        items = [
            make(
                _column(row, pair[0], number), _column(row, pair[1], number), tokenizer, max_length
            )
            for number, row in enumerate(rows, 1)
        ]
    else:
        items = _packed(rows, tokenizer, max_length)
    if not items:
        raise ValueError("--data: nothing is left to train on; the texts are empty")
    return items


def label_names(rows: Sequence[Row]) -> list[str]:
    """The classes of all rows, sorted.

    Raises:
        ValueError: fewer than two.
    """
    names = sorted({_column(row, "label", number) for number, row in enumerate(rows, 1)})
    if len(names) < 2:
        raise ValueError(f"--data: got {len(names)} label(s), expected at least 2")
    return names


class Collator:
    """Items to a batch: ids padded on the tokenizer's side, labels padded with -100."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = tokenizer.pad_token_id
        self.left = tokenizer.padding_side == "left"

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Tensors [batch, longest]; `labels` [batch] where they are classes."""
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._padded(ids, self.pad),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
        }
        labels = [item["labels"] for item in items]
        whole = isinstance(labels[0], int)
        batch["labels"] = torch.tensor(labels) if whole else self._padded(labels, IGNORED)
        return batch

    def _padded(self, rows: Sequence[list[int]], value: int) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        out = torch.full((len(rows), longest), value)
        for place, row in enumerate(rows):
            start = longest - len(row) if self.left else 0
            out[place, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        return out


def _classified(
    rows: Sequence[Row], tokenizer: Any, max_length: int, labels: Sequence[str]
) -> list[Item]:
    number_of = {name: index for index, name in enumerate(labels)}
    items = []
    for number, row in enumerate(rows, 1):
        label = _column(row, "label", number)
        if label not in number_of:
            raise ValueError(
                f"--eval-data: row {number}: the label {label!r} is not in the training rows "
                f"({', '.join(labels)})"
            )
        ids = tokenizer(_column(row, "text", number), truncation=True, max_length=max_length)
        items.append({"input_ids": list(ids["input_ids"]), "labels": number_of[label]})
    return items


def _continued(prompt: str, completion: str, tokenizer: Any, max_length: int) -> Item:
    """The prompt is read, only the completion is learned."""
    head = list(tokenizer(prompt)["input_ids"])
    if head and head[-1] == tokenizer.eos_token_id:
        head.pop()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tail = list(tokenizer(completion, add_special_tokens=False)["input_ids"]) + end
    # A long prompt is cut from its start, so that there is a completion to learn.
    head = head[-max(0, max_length - min(len(tail), max_length)) :] if head else head
    head = head if len(tail) < max_length else []
    tail = tail[: max_length - len(head)]
    return {"input_ids": head + tail, "labels": [IGNORED] * len(head) + tail}


def _to_sequence(source: str, target: str, tokenizer: Any, max_length: int) -> Item:
    ids = tokenizer(source, truncation=True, max_length=max_length)["input_ids"]
    wanted = tokenizer(text_target=target, truncation=True, max_length=max_length)["input_ids"]
    return {"input_ids": list(ids), "labels": list(wanted)}


def _packed(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Item]:
    """All texts in one stream, an end mark after each, cut into blocks."""
    stream: list[int] = []
    for number, row in enumerate(rows, 1):
        ids = tokenizer(_column(row, "text", number), add_special_tokens=False)["input_ids"]
        stream += [*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    blocks = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    return [{"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1]


def _column(row: Row, name: str, number: int) -> str:
    value = row.get(name, "")
    if not value.strip():
        raise ValueError(
            f"--data: row {number} has no {name!r} (its columns: {', '.join(row) or 'none'})"
        )
    return value
