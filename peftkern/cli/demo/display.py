"""Live progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class Display:
    """Shows the events of one child after another.

    Args:
        console: where to; when it is no terminal, plain lines are printed every few seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._accuracy = ""
        self._last = 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        """A new child starts."""
        self._title, self._accuracy, self._last = title, "", 0.0
        self._task = self._progress.add_task(f"{title:<18}", total=None, state="starting")

    def event(self, event: dict[str, Any]) -> None:
        """One event of the running child."""
        assert self._task is not None
        if event["event"] == "phase":
            self._progress.update(self._task, state=event["text"])
            self._line(event["text"], at_least=0.0)
        elif event["event"] == "accuracy":
            self._accuracy = f" held-out ~{event['accuracy']:.2f}"
        elif event["event"] == "step":
            state = (
                f"{event['step']}/{event['steps']} loss {event['loss']:.3f}{self._accuracy} "
                f"{int(event['eta']) // 60}:{int(event['eta']) % 60:02d} left"
            )
            self._progress.update(
                self._task, total=event["steps"], completed=event["step"], state=state
            )
            self._line(f"step {state}", at_least=10.0)

    def end(self, state: str) -> None:
        """The running child has ended, well or not."""
        assert self._task is not None
        self._progress.update(self._task, total=1, completed=1, state=state)
        self._line(state, at_least=0.0)

    def _line(self, text: str, at_least: float) -> None:
        now = time.monotonic()
        if not self._live and now - self._last >= at_least:
            self._last = now
            self.console.print(f"{self._title}: {text}", highlight=False)
