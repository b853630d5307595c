"""The parent's side of a child: starts it, forwards its events, ends it on Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.cli.demo.train import Spec

OnEvent = Callable[[dict[str, Any]], None]


class ChildFailed(RuntimeError):
    """A child ended without a result; the message says why and where its log lies."""


def run_child(spec: Spec, folder: Path, on_event: OnEvent) -> dict[str, Any]:
    """Run one child to its end.

    A process of its own gives each method clean memory: no allocator has been warmed by the one
    before, and the peak belongs to it alone.

    Args:
        spec: what to do.
        folder: gets `NAME.json` (the spec) and `NAME.log` (whatever the child printed).
        on_event: called with every event before the result.

    Returns:
        The fields of the child's result event.

    Raises:
        ChildFailed: it reported an error or died.
        KeyboardInterrupt: passed on after the child has ended.
    """
    name = Path(spec.output).name
    spec_file, log_file = (folder / f"{name}.{end}" for end in ("json", "log"))
    spec_file.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "peftkern.cli.demo.train", str(spec_file)]
    # Threads that sleep at a barrier lose little on an idle machine; threads that spin there take
    # the cores from the ones they wait for as soon as anybody else computes too.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    result: dict[str, Any] | None = None
    failure = ""
    with log_file.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                event = json.loads(line)
                if event["event"] == "result":
                    result = event
                elif event["event"] == "error":
                    failure = f"{event['kind']}: {event['message']}"
                else:
                    on_event(event)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
    if result is None:
        how = failure or f"the process ended with exit status {code} and no result"
        raise ChildFailed(f"{how} (log: {log_file})")
    return result
