"""``make gpu``: build, tests, benchmarks, tuning and sanitizer on a machine with an NVIDIA GPU.

``python -m bench.gpu.run [--set gpu|test|bench] [--parts NAME,...] [--dry] [--output FOLDER]
[--minutes 9]``. Installs nothing and needs no network. Exit status: 0 if every part ran and
passed, 1 if one failed or could not run, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu import machine
from bench.gpu.measure import AGAIN
from bench.gpu.parts import PARTS, Context, Part, root
from bench.gpu.results import Results


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Take a part and everything that it started down."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue


def _run(part: Part, context: Context, end: float) -> str:
    """Run one part until it ends or its time is over; how it went."""
    command = part.command(context)
    if isinstance(command, str):
        return f"{'skipped' if part.optional else 'cannot run'}: {command}"
    paths = [str(root()), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **part.environment(context)}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    environment.setdefault("HF_HUB_OFFLINE", "1")
    for _ in range(10):
        process = subprocess.Popen(
            command, cwd=root(), env=environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
        try:
            status = process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _ended(process)
            return "ended: over its budget"
        except BaseException:
            _ended(process)
            raise
        if not (part.again and status == AGAIN):
            break
    return "ok" if status == 0 else f"failed: exit status {status}"


def _path(folder: Path | None, dry: bool, facts: dict[str, str]) -> Path:
    if dry:
        return (folder or root() / "build") / "gpu-dry.json"
    slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    return (folder or root() / "bench" / "results") / f"{slug}-{facts['date']}.json"


def main() -> int:
    """Walk the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=("gpu", "test", "bench"), default="gpu")
    parser.add_argument("--parts", default="", help="only these, separated by commas")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU, tiny shapes")
    parser.add_argument("--output", type=Path, help="folder of the results file")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole run")
    given = parser.parse_args()
    names = [name for name in given.parts.split(",") if name]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"--parts: {', '.join(unknown)}; known: {', '.join(p.name for p in PARTS)}")
    start = time.monotonic()
    facts = machine.facts()
    if not given.dry and not facts["gpu"]:
        print("torch sees no NVIDIA GPU; `make gpu DRY=1` rehearses on a CPU", file=sys.stderr)
        return 2
    path = _path(given.output, given.dry, facts)
    if given.dry:
        path.unlink(missing_ok=True)
    results = Results(path)
    before = results.data.get("machine", {})
    if before and (before.get("gpu"), before.get("commit")) != (facts["gpu"], facts["commit"]):
        results.data.update(parts={}, rows=[])  # figures of another commit do not mix with these
    if given.dry:
        results.data["rehearsal"] = True
    results.set("machine", facts)
    print(f"{facts['gpu'] or 'rehearsal on a CPU'}: {path}", flush=True)
    outcomes: dict[str, str] = {}
    for part in PARTS:
        if part.name not in (names or [p.name for p in PARTS if given.set in p.sets]):
            continue
        begun = time.monotonic()
        left = 60 * given.minutes - (begun - start)
        seconds = min(part.budget * (3 if given.dry else 1), left)
        if seconds < 5:
            outcome = "not run: the time was over"
        else:
            print(f"== {part.name} ({seconds:.0f} s at most)", flush=True)
            outcome = _run(part, Context(path, given.dry, seconds), begun + seconds)
        outcomes[part.name] = outcome
        results = Results(path)  # the part may have written to it
        results.part(part.name, outcome, time.monotonic() - begun)
        print(f"== {part.name}: {outcome}, {time.monotonic() - begun:.0f} s", flush=True)
    print(path.with_suffix(".md").read_text())
    wrong = {n: o for n, o in outcomes.items() if not o.startswith(("ok", "skipped"))}
    for name, outcome in wrong.items():
        print(f"{name}: {outcome}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
