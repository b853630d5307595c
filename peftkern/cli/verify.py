"""`peftkern verify`: the kernels against plain torch on a model of the user's."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

_TEXT = (
    "The rain had stopped, and the road shone.",
    "A short one.",
    "Nobody had asked for a third sentence, but here it is, longer than the other two together.",
)


def verify(
    model: Annotated[str, typer.Argument(help="Folder or id of a causal language model.")],
    adapter: Annotated[
        str | None, typer.Option(help="Folder of an adapter; else a fresh LoRA with random values.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Quantize the base: nf4, fp4 or int8.")
    ] = None,
    r: Annotated[int, typer.Option(help="Rank of the fresh LoRA.")] = 8,
    text: Annotated[list[str] | None, typer.Option(help="A row of the batch; repeatable.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row at most.")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the machine's by default.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; cuda where there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run one training step, and compare every module's output and gradients with plain torch.

    Exit status 0: all agree. 1: some module differs by more than its dtype allows. 2: wrong use.
    """
    try:
        report, patched = _verified(model, adapter, quantize, r, text, length, dtype, device)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except ImportError as error:
        if error.name != "transformers":
            raise
        typer.echo('error: verify needs transformers: pip install "peftkern[hf]"', err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        typer.echo(f"{patched}\n\n{report}")
    if not report.ok:
        raise typer.Exit(1)


def _verified(
    model: str,
    adapter: str | None,
    quantize: str | None,
    r: int,
    text: list[str] | None,
    length: int,
    dtype: str | None,
    device: str | None,
) -> tuple[Any, str]:
    import torch

    import peftkern as pk
    from peftkern.cli.finetune.model import (
        DTYPES,
        default_dtype,
        load_config,
        load_model,
        load_tokenizer,
    )
    from peftkern.cli.finetune.rows import CAUSAL_LM

    name = dtype or default_dtype()
    if name not in DTYPES:
        raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config, tokenizer = load_config(model), load_tokenizer(model)
    loaded = load_model(model, config, CAUSAL_LM, (), DTYPES[name], tokenizer).to(place)
    if adapter is not None:
        options: dict[str, Any] = {} if quantize is None else {"quantize": quantize}
        handle = pk.load_adapter(loaded, adapter, **options)
    else:
        lora = pk.LoRAConfig(r=r, quantize=quantize, init_lora_weights=False, keep_original=False)
        handle = pk.patch(loaded, lora)
    rows = list(text or _TEXT)
    batch = tokenizer(
        rows, return_tensors="pt", padding=True, truncation=True, max_length=length
    ).to(place)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    report = handle.verify({**inputs, "labels": labels})
    return report, handle.report().summary
