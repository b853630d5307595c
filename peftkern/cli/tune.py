"""`peftkern tune`: measure the tiles of the GPU kernels on this machine's GPU and keep them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer


def tune(
    shapes: Annotated[
        str, typer.Option(help="Layers as OUTxIN, separated by commas; default: Llama's.")
    ] = "",
    rows: Annotated[str, typer.Option(help="Row counts, separated by commas.")] = "",
    formats: Annotated[str, typer.Option(help="Storage formats: nf4, fp4, int8.")] = "nf4,int8",
    seconds: Annotated[float, typer.Option(help="No further product after this time.")] = 600.0,
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: where peftkern looks for it.")
    ] = None,
) -> None:
    """Measure tiles on this GPU against dequantizing for cuBLAS; later runs use what was faster."""
    import torch

    from peftkern.tuning import tables, tuner

    try:
        layers = [_shape(text) for text in _list(shapes)] or list(tuner.SHAPES)
        counts = [int(text) for text in _list(rows)] or list(tuner.ROWS)
        kinds = _list(formats)
        _check(counts, kinds)
        if not torch.cuda.is_available():
            raise ValueError("torch sees no NVIDIA GPU; without a table the heuristics serve")
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        path = output or tables.user_folder() / f"{tables.slug(name)}.json"
        entries: list[tables.LinearEntry] = []
        for found in tuner.tune(device, formats=kinds, shapes=layers, rows=counts, seconds=seconds):
            entries.append(found.entry)
            typer.echo(described(found))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tables.dump(entries, facts(name)), encoding="utf-8")
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    tables.forget()
    typer.echo(f"{len(entries)} products measured: {path}")


def facts(name: str) -> dict[str, Any]:
    """Where and when a table was measured."""
    import torch
    import triton

    return {
        "device": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def described(found: Any) -> str:
    """One line about a measured product."""
    entry = found.entry
    way = "dy W" if entry.transposed else "x Wᵀ"
    chosen = "dequantize + cuBLAS" if entry.config is None else f"fused, {entry.config}"
    return (
        f"{entry.format} {way} m{entry.m} {entry.rows}x{entry.cols}: {found.seconds * 1e6:.1f} us "
        f"({chosen}); library {found.library * 1e6:.1f} us; {found.tried} tried"
    )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    try:
        made = int(out_features), int(in_features)
    except ValueError as error:
        raise ValueError(f"--shapes: got {text!r}, expected OUTxIN such as 4096x4096") from error
    if min(made) < 1:
        raise ValueError(f"--shapes: got {text!r}, expected sizes above 0")
    return made


def _check(rows: list[int], formats: list[str]) -> None:
    for count in rows:
        if count < 16 or count & (count - 1):
            raise ValueError(f"--rows: got {count}, expected powers of two from 16 on")
    if unknown := set(formats) - {"nf4", "fp4", "int8"}:
        raise ValueError(f"--formats: got {', '.join(sorted(unknown))}, expected nf4, fp4, int8")
