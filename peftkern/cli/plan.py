"""`peftkern plan`: the memory of a training run before it starts."""

from __future__ import annotations

import gc
import json
from typing import Annotated

import typer


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with config.json, or llama-3-8b, llama-3-70b, qwen3-30b-a3b."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="lora, qlora, bottleneck, prefix, prompt or full.")
    ] = "qlora",
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Budget, such as 24GB: tells the largest batch that fits.")
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(help="adamw, adamw8bit, paged_adamw, paged_adamw8bit, lion8bit or sgd."),
    ] = "adamw",
    r: Annotated[int, typer.Option(help="Rank of LoRA.")] = 16,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Keep the inputs of the layers only.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu: whose kernels to assume.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict weights, gradients, optimizer state, activations and workspace, without weights."""
    # Nearly all of the time goes into importing transformers, an eighth of that into the cyclic
    # collector, which finds nothing there.
    gc.disable()
    try:
        from peftkern.memory import plan as predict

        found = predict(
            model,
            method,
            batch,
            seq,
            gpu_memory,
            optimizer=optimizer,
            gradient_checkpointing=gradient_checkpointing,
            device=device,
            r=r,
        )
    except (ValueError, TypeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except ImportError as error:
        if error.name != "transformers":
            raise
        typer.echo('error: plan needs transformers: pip install "peftkern[hf]"', err=True)
        raise typer.Exit(2) from error
    finally:
        gc.enable()
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
