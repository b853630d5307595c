"""The command line: `peftkern`, or `python -m peftkern`. Needs the extra `cli`."""

from __future__ import annotations

import json
import sys
from typing import Any

from peftkern.cli import facts


def make_app() -> Any:
    """The typer application with every command.

    Raises:
        ImportError: typer or rich is not installed.
    """
    import typer

    from peftkern._version import __version__
    from peftkern.cli.bench import bench
    from peftkern.cli.convert import convert
    from peftkern.cli.demo.command import demo
    from peftkern.cli.finetune.command import finetune
    from peftkern.cli.info import info
    from peftkern.cli.plan import plan
    from peftkern.cli.tune import tune
    from peftkern.cli.verify import verify

    app = typer.Typer(
        name="peftkern",
        help="Fast, verified kernels for parameter-efficient fine-tuning.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"peftkern {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        show_version: bool = typer.Option(
            False, "--version", callback=version, is_eager=True, help="Print the version."
        ),
    ) -> None:
        """Fast, verified kernels for parameter-efficient fine-tuning."""

    app.command()(info)
    app.command()(demo)
    app.command()(finetune)
    app.command()(plan)
    app.command()(tune)
    app.command()(bench)
    app.command()(verify)
    app.command()(convert)
    return app


def main() -> None:
    """Entry point of the console script."""
    try:
        app = make_app()
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        need = (
            f"peftkern's command line needs {error.name}, which is not installed; "
            'run: pip install "peftkern[cli]"'
        )
        if sys.argv[1:2] != ["info"]:
            sys.exit(need)
        sys.stdout.write(json.dumps(facts.collect(), indent=1) + "\n")  # without tables
        sys.stderr.write(need + "\n")
        return
    app()
