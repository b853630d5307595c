"""`peftkern info`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.facts import collect
from peftkern.cli.machine import human_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Version, build, instruction sets, threads, backends, and which kernel serves each op."""
    from rich.console import Console

    try:
        facts = collect()
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    show(facts, Console())


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `collect` found as tables."""
    from rich.markup import escape

    native, host = facts["native"], facts["machine"]
    table = _table()
    found = facts["versions"]
    table.add_row("peftkern", str(found["peftkern"]))
    others = [f"{name} {version or 'not installed'}" for name, version in found.items()]
    table.add_row("with", ", ".join(others[1:]))
    table.add_row(
        "machine",
        f"{host['cpu']}, {host['cores']} core(s), {human_bytes(host['memory_bytes'])}; "
        f"{host['system']}",
    )
    if native["available"]:
        table.add_row("native module", f"built by {native['compiler']}")
        table.add_row("build flags", _flags(native["flags"]))
        table.add_row("CUDA in the build", str(native["cuda"]))
        table.add_row(
            "instruction set",
            f"{native['isa']} in use; this CPU runs: {', '.join(native['isas'])}; built: "
            f"{', '.join(native['isas_built'])}. Force one by name: "
            f"PEFTKERN_CPU_ISA={native['isas'][0]}",
        )
        table.add_row(
            "threads",
            f"{facts['threads']} (torch.set_num_threads or OMP_NUM_THREADS); OpenMP runtime: "
            f"{native['openmp'] or 'none: ' + str(native['openmp_reason'])}",
        )
    else:
        table.add_row("native module", f"absent: {native['reason']}")
        table.add_row("threads", f"{facts['threads']} (torch's own operations only)")
    console.print(table)
    console.print("\n[bold]Backends[/]")
    table = _table()
    for name, state in facts["backends"].items():
        mark = "[green]ok[/]" if state == "ok" else f"[yellow]absent[/]: {escape(state)}"
        table.add_row(name, mark)
    console.print(table)
    if facts["forced_backend"] != "auto":
        console.print(f"forced: {facts['forced_backend']} (PEFTKERN_BACKEND)", highlight=False)
    console.print("\n[bold]Ops[/] (what serves each)")
    table = _table()
    for name, places in facts["ops"].items():
        cells = []
        for device, place in places.items():
            cell = f"{device}: {place['serves'] or 'nothing'}"
            for backend, reason in place["refused"].items():
                cell += f" ({backend}: {reason})"
            cells.append(escape(cell))
        table.add_row(name, "; ".join(cells))
    console.print(table)
    for line in facts["warnings"]:
        console.print(f"[bold yellow]warning:[/] {escape(line)}", soft_wrap=True)


def _table() -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _flags(flags: object) -> str:
    if isinstance(flags, dict):
        return "; ".join(f"{name}: {value}" for name, value in flags.items())
    return str(flags)
