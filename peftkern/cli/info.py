"""`peftkern info`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.machine import human_bytes, machine, versions

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


def collect() -> dict[str, Any]:
    """Everything `peftkern info` knows, as plain values.

    Returns:
        `versions`, `machine`, `native` (see `peftkern.native.info`), `threads`, `backends`
        (name -> "ok" or the reason), `forced_backend`, `ops` (name -> what serves it per device),
        `warnings`.

    Raises:
        ValueError: PEFTKERN_CPU_ISA names an instruction set that cannot be used here.
        RuntimeError: PEFTKERN_BACKEND names a backend that cannot be used here.
    """
    import torch

    import peftkern as pk
    from peftkern import native, registry

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    ops: dict[str, dict[str, Any]] = {}
    for name in sorted(registry.specs()):
        ops[name] = {}
        for device in devices:
            rows = registry.explain(name, device)
            serving = next((backend for backend, reason in rows if reason is None), None)
            ops[name][device] = {
                "serves": serving,
                "refused": {backend: reason for backend, reason in rows if reason is not None},
            }
    facts: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "native": native.info(),
        "threads": torch.get_num_threads(),
        "backends": pk.backends(),
        "forced_backend": registry.forced_backend(),
        "devices": devices,
        "ops": ops,
    }
    facts["warnings"] = warnings_of(facts)
    return facts


def warnings_of(facts: dict[str, Any]) -> list[str]:
    """What a user should know about the `native` part of the facts; empty when all is well."""
    made: list[str] = []
    native = facts["native"]
    if not native["available"]:
        made.append(f"no native kernels, the slow reference serves every op: {native['reason']}")
        return made
    if native["openmp"] is None:
        made.append(f"the native kernels run on one thread: {native['openmp_reason']}")
    if len(native["openmp_loaded"]) > 1:
        made.append(
            f"{len(native['openmp_loaded'])} OpenMP runtimes are loaded "
            f"({', '.join(native['openmp_loaded'])}): their threads compete for the cores; the "
            "kernels use the first one that torch loaded"
        )
    return made


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
