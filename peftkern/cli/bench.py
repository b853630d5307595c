"""`peftkern bench`: the CPU benchmarks, from an installed package as from the source tree."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer


def folder() -> Path:
    """Where the benchmarks lie: ``peftkern/bench`` when installed, ``bench`` beside the sources.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "bench", package.parent / "bench"):
        if (place / "conftest.py").is_file():
            return place
    raise FileNotFoundError(f"no benchmarks in {package / 'bench'}; install peftkern again")


def bench(
    op: Annotated[
        str, typer.Option(help="An op, or a family of cells such as qlora_layer; default: all.")
    ] = "",
    level: Annotated[str, typer.Option(help="quick, standard or full.")] = "standard",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, fp16; auto: bf16 where the processor multiplies it.")
    ] = "auto",
    seconds: Annotated[float, typer.Option(help="Seconds a cell is measured.")] = 1.0,
    select: Annotated[str, typer.Option("--select", "-k", help="As pytest's -k.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
) -> None:
    """Measure the kernels against their peers and this machine's floor, taking turns in rounds."""
    for module in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            typer.echo(
                f'error: the benchmarks need {module}; run: pip install "peftkern[bench]"', err=True
            )
            raise typer.Exit(2)
    import pytest

    place = folder()
    arguments = [str(place), "-q", "--benchmark-only", "--import-mode=prepend"]
    # No settings but ours: neither those of a project around it nor a cache folder in the package.
    arguments += ["-c", os.devnull, "--rootdir", str(place), "-p", "no:cacheprovider"]
    arguments += ["-o", "python_files=bench_*.py"]
    arguments += [f"--bench-level={level}", f"--bench-dtype={dtype}", f"--bench-seconds={seconds}"]
    if op:
        arguments += [f"--bench-op={op}"]
    if select:
        arguments += ["-k", select]
    if json is not None:
        arguments += [f"--benchmark-json={json}"]
    raise typer.Exit(int(pytest.main(arguments)))
