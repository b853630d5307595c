"""``python -m bench.mutants``: is every mistake noticed by a unit test?

Draws small changes of kernels, codecs, gradients, quantizers and checkpoint code by a seed, applies
each to a copy of the sources, builds it where it is C++, and runs the unit tests of that file until
one fails. Mutants that no test can tell from the original are listed with the reason in
``equivalent.json``; every other one that survives needs a test. Results are kept as they come, so
that an interrupted run goes on where it was (``--fresh`` forgets them).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest  # noqa: F401  (imported before the forks, with what follows)
import torch

from bench import scratch
from bench.mutants import runner, targets
from bench.mutants.sites import Mutant, drawn

STATE = scratch.BUILD / "mutants" / "verdicts.jsonl"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
REPORT = scratch.ROOT / "bench" / "results" / "mutants.md"


def _kept() -> dict[str, runner.Verdict]:
    if not STATE.exists():
        return {}
    rows = [json.loads(line) for line in STATE.read_text().splitlines()]
    return {row.pop("name"): runner.Verdict(**row) for row in rows}


def _keep(name: str, verdict: runner.Verdict) -> int:
    """Append a verdict; how many there are."""
    line = json.dumps({"name": name, **asdict(verdict)}) + "\n"
    fd = os.open(STATE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)
    return len(STATE.read_text().splitlines())


def _suites(target: targets.Target) -> dict[str, targets.Target]:
    """Each of a target's test files alone, by name."""
    return {
        f"unchanged {target.isa} {test}": replace(target, tests=(test,)) for test in target.tests
    }


def _check_baseline(number: int, wanted: list[tuple[str, targets.Target]]) -> None:
    """Unchanged code passes: else nothing that follows means anything."""
    tree = runner.prepare(number)
    for name, target in wanted:
        verdict = runner.baseline(tree, target)
        text = f"FAILED {verdict.by}" if verdict.killed else "passed"
        print(f"          {text} {verdict.seconds:5.1f} s  {name}", flush=True)
        if verdict.killed:
            raise RuntimeError(f"tests of unchanged code fail: {verdict.by}")
        _keep(name, verdict)


def _work(number: int, mutants: list[Mutant], total: int) -> None:
    """One worker: judge, and append each verdict."""
    tree = runner.prepare(number)
    for mutant in mutants:
        verdict = runner.judge(tree, mutant, targets.TARGETS[mutant.path])
        done = _keep(mutant.name, verdict)
        state = "killed  " if verdict.killed else "SURVIVED"
        print(
            f"{done:4}/{total} {state} {verdict.seconds:5.1f} s  {mutant.path}:{mutant.line} "
            f"{mutant.kind}: {mutant.before[:60]} => {mutant.after[:60]}  [{verdict.by[:60]}]",
            flush=True,
        )


def _workers(work: Callable[[int], None], jobs: int) -> None:
    """Run ``work`` with the number of each of several processes."""
    pids = []
    for number in range(jobs):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                work(number)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1] != 0]
    if failed:
        raise SystemExit("a worker failed; what is done is kept")


def _report(
    mutants: list[Mutant], drawn_count: int, verdicts: dict[str, runner.Verdict], seed: int
) -> str:
    """The table of files, and every survivor with its reason."""
    reasons: dict[str, str] = json.loads(EQUIVALENT.read_text())
    lines = [
        "# Mutants",
        "",
        f"`python -m bench.mutants --count {drawn_count} --seed {seed}`: small changes of the "
        "code, each of which must make a unit test fail. "
        f"{len(mutants)} of {drawn_count} that were drawn have been judged.",
        "",
        "| file | mutants | killed | equivalent | survived |",
        "|---|---|---|---|---|",
    ]
    survived = [m for m in mutants if not verdicts[m.name].killed]
    for path in targets.TARGETS:
        mine = [m for m in mutants if m.path == path]
        left = [m for m in survived if m.path == path]
        same = [m for m in left if m.name in reasons]
        if mine:
            row = (len(mine), len(mine) - len(left), len(same), len(left) - len(same))
            lines.append(f"| {path} | " + " | ".join(map(str, row)) + " |")
    same = [m for m in survived if m.name in reasons]
    killed, real = len(mutants) - len(survived), len(mutants) - len(same)
    lines += [
        "",
        f"{killed} of {real} mutants that change a result were killed "
        f"({100 * killed / max(1, real):.1f} %); {len(same)} change none.",
        "",
    ]
    for title, group in (("Survived", [m for m in survived if m.name not in reasons]),
                         ("Equivalent", same)):  # fmt: skip
        if not group:
            continue
        lines += [f"## {title}", "", "| name | place | change | why |", "|---|---|---|---|"]
        for m in group:
            change = f"`{m.before}` → `{m.after}`".replace("|", "\\|")
            lines.append(f"| {m.name} | {m.path}:{m.line} | {change} | {reasons.get(m.name, '')} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Status 0 where at least 98 % of the mutants that change a result were killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=205)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="files whose path has this text in it")
    parser.add_argument("--again", action="store_true", help="judge survivors again")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--report", action="store_true", help="what is judged so far; no more runs")
    parser.add_argument("--list", action="store_true", help="name them, and do nothing else")
    options = parser.parse_args()
    if absent := targets.missing(scratch.ROOT):
        parser.error(f"targets.py names files that do not exist: {', '.join(absent)}")
    native = round(options.count * 0.42)
    mutants = [
        *drawn(scratch.ROOT, [t.path for t in targets.CPP], native, options.seed),
        *drawn(
            scratch.ROOT, [t.path for t in targets.PYTHON], options.count - native, options.seed
        ),
    ]
    if options.list:
        for m in mutants:
            print(f"{m.name} {m.path}:{m.line} {m.kind}: {m.before} => {m.after}")
        return 0
    STATE.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        STATE.unlink(missing_ok=True)
    verdicts = _kept()
    if options.again:
        kept = {n: v for n, v in verdicts.items() if v.killed or n.startswith("unchanged ")}
        rows = [json.dumps({"name": name, **asdict(v)}) + "\n" for name, v in kept.items()]
        STATE.write_text("".join(rows))
        verdicts = kept
    reasons = json.loads(EQUIVALENT.read_text())
    left = [m for m in mutants if m.name not in verdicts and options.only in m.path]
    if options.again:
        left = [m for m in left if m.name not in reasons]
    random.Random(options.seed).shuffle(left)  # a run that is cut short has seen every file
    start = time.monotonic()
    if left and not options.report:
        print(f"== building; then {len(left)} mutants, {options.jobs} at a time", flush=True)
        runner.build_native()
        jobs = options.jobs
        suites: dict[str, targets.Target] = {}
        for m in left:
            suites |= _suites(targets.TARGETS[m.path])
        wanted = [row for row in suites.items() if row[0] not in verdicts]
        _workers(lambda n: _check_baseline(n, wanted[n::jobs]), jobs)
        _workers(lambda n: _work(n, left[n::jobs], len(left)), jobs)
    verdicts = _kept()
    for m in mutants:  # known to change nothing: not tried again
        if m.name in reasons and m.name not in verdicts:
            verdicts[m.name] = runner.Verdict(False, "", 0.0)
    judged = [m for m in mutants if m.name in verdicts]
    text = _report(judged, len(mutants), verdicts, options.seed)
    print(text[text.index("| file") :])
    print(f"{time.monotonic() - start:.0f} s")
    survivors = [m for m in judged if not verdicts[m.name].killed and m.name not in reasons]
    if not options.only:
        REPORT.write_text(text)
    real = sum(1 for m in judged if verdicts[m.name].killed) + len(survivors)
    return 1 if len(survivors) > 0.02 * real else 0


if __name__ == "__main__":
    sys.exit(main())
