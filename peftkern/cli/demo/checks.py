"""What the demo claims, checked on its own figures."""

from __future__ import annotations

import math
from typing import Any

from peftkern.cli.demo.methods import METHODS

NF4_POINTS = 2.0


def sigma(accuracy: float, count: int) -> float:
    """Binomial standard deviation of an accuracy measured on `count` texts."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / count) if count else 0.0


def check(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a finished run.

    Args:
        results: the content of results.json with `methods`, `baselines`, `quick`.

    Returns:
        One dict a check: `passed`, `required` (a failure makes the exit status 1) and `text`.
    """
    made: list[dict[str, Any]] = []
    done = {row["method"]: row for row in results["methods"] if row["status"] == "done"}
    for row in results["methods"]:
        if row["status"] == "failed":
            made.append(_line(False, True, f"{_title(row)}: failed: {row['error']}"))
    for row in done.values():
        made.append(_learned(row, results["baselines"], results["quick"]))
    for row in done.values():
        same = row["reload_differs"] == 0
        how = "the same answers" if same else f"{row['reload_differs']} different answers"
        text = (
            f"{_title(row)}: saved, loaded into a fresh model and measured again: {how} on "
            f"{row['reloaded_texts']} texts"
        )
        made.append(_line(same, True, text))
    if {"full", "qlora-nf4"} <= done.keys():
        gap = round(100 * (done["qlora-nf4"]["accuracy"] - done["full"]["accuracy"]), 6)
        text = (
            f"QLoRA NF4 against full fine-tuning: {gap:+.1f} points of held-out accuracy "
            f"(expected: no more than {NF4_POINTS:.0f} below)"
        )
        if results["quick"]:
            text += "; a reduced run is too short to judge this"
        made.append(_line(gap >= -NF4_POINTS, False, text))
    return made


def gain(right: str, baseline: str) -> tuple[int, int, float]:
    """Two classifiers on the same texts, by McNemar's test.

    Args:
        right: one character a text, 1 where the method is right.
        baseline: the same for what it must beat.

    Returns:
        Texts that only the method has right, texts that only the baseline has right, and how many
        standard deviations they differ by (positive: the method is better).
    """
    pairs = list(zip(right, baseline, strict=True))
    won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return won, lost, (won - lost) / math.sqrt(won + lost) if won + lost else 0.0


def _learned(row: dict[str, Any], baselines: dict[str, Any], quick: bool) -> dict[str, Any]:
    accuracy, count = row["accuracy"], row["held_out"]
    small = METHODS[row["method"]].small
    if quick:
        baseline = baselines["majority"]
        limit = baseline + 2 * sigma(baseline, count)
        passed = accuracy > limit
        against = f"{limit:.3f} (majority class {baseline:.3f} + 2 sigma)"
    else:
        won, lost, sigmas = gain(row["right"], baselines["probe_right"])
        passed = sigmas > 2
        against = (
            f"{baselines['probe']:.3f} of the frozen linear probe: {won} texts won, {lost} lost, "
            f"{sigmas:+.1f} sigma"
        )
    learned = "learned" if passed else "did NOT learn enough"
    text = f"{_title(row)}: {learned}: held-out accuracy {accuracy:.3f} against {against}"
    if not passed and small:
        text += f" ({small})"
    return _line(passed, not small, text)


def _line(passed: bool, required: bool, text: str) -> dict[str, Any]:
    return {"passed": passed, "required": required, "text": text}


def _title(row: dict[str, Any]) -> str:
    method = METHODS.get(row["method"])
    return method.title if method else str(row["method"])
