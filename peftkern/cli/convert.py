"""`peftkern convert`: adapters and quantized models from one library's files into another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_MODELS = ("peftkern", "bitsandbytes")


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a quantized model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="Adapters: peft, adapterhub, nf4 or int8 (few bytes, for peftkern alone). "
            "Models: peftkern or bitsandbytes."
        ),
    ],
    prefix: Annotated[
        str,
        typer.Option(help="Name of the bare model in the adapted one, such as bert or model."),
    ] = "",
    model: Annotated[
        Path | None, typer.Option(help="Folder of the base model, for AdapterHub's files.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Read a pickled .bin file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the same adapter, or the same quantized weights, in another layout."""
    from peftkern.checkpoint.convert import LAYOUTS, convert_adapter
    from peftkern.checkpoint.convert_model import convert_model

    try:
        if to in _MODELS:
            from rich.progress import Progress

            with Progress(transient=True, disable=as_json) as bar:
                task = bar.add_task("files", total=None)
                count = convert_model(
                    source,
                    output,
                    to,
                    lambda done, total, name: bar.update(task, completed=done, total=total),
                )
            facts = {"output": str(output), "to": to, "weights": count}
            line = f"{count} weights written to {output}, codes unchanged"
        elif to in LAYOUTS:
            report = convert_adapter(
                source, output, to, prefix=prefix, model=model, allow_pickle=allow_pickle
            )
            facts = {"output": str(output), "to": to}
            line = f"written to {output}"
            if report is not None:
                facts |= report.to_dict()
                line += f"; {report}"
        else:
            known = ", ".join((*LAYOUTS, *_MODELS))
            raise ValueError(f"--to: got {to!r}, expected one of {known}")
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(facts, indent=1) if as_json else line)
