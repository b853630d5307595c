"""The results file: every row is on disk as soon as it is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.gpu.targets import table


class Results:
    """A JSON file that is replaced whole at each change, and its Markdown table beside it.

    The parts of a run are processes that follow one another, so nobody else writes meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": {}, "parts": {}, "rows": []}
        if path.exists():
            self.data = json.loads(path.read_text())

    def set(self, key: str, value: Any) -> None:
        """Replace a top-level entry."""
        self.data[key] = value
        self._save()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in place of one with the same case and contender."""
        same = (row["case"], row["contender"])
        kept = [r for r in self.data["rows"] if (r["case"], r["contender"]) != same]
        self.data["rows"] = [*kept, row]
        self._save()

    def part(self, name: str, outcome: str, seconds: float, **facts: Any) -> None:
        """Note how a part ended."""
        known = self.data["parts"].get(name, {})
        self.data["parts"][name] = {**known, "outcome": outcome, "seconds": seconds, **facts}
        self._save()

    def done(self, case: str) -> bool:
        """Whether a case has a row, measured or failed."""
        return any(row["case"] == case for row in self.data["rows"])

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps(self.data, indent=1)),
            (self.path.with_suffix(".md"), table(self.data)),
        ):
            new = path.with_name(path.name + ".new")
            new.write_text(text)
            os.replace(new, path)
