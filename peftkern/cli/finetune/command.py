"""`peftkern finetune`: the options, the order of events, the exit status."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.finetune.methods import METHODS, Method, Options, method_named
from peftkern.cli.finetune.rows import CAUSAL_LM, CLASSIFICATION, SEQ2SEQ, TASKS
from peftkern.cli.machine import human_bytes, human_seconds, machine, versions

if TYPE_CHECKING:
    from rich.console import Console

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130

_METHOD_HELP = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw-8bit": "AdamW8bit",
    "paged-adamw": "PagedAdamW",
    "paged-adamw-8bit": "PagedAdamW8bit",
    "lion-8bit": "Lion8bit",
}


def finetune(
    model: Annotated[str, typer.Option(help="Hugging Face folder or id.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Rows to train on: .jsonl, .csv, .tsv with columns text and label (to classify), "
            "text (to continue), or prompt and completion, source and target; or a .txt."
        ),
    ],
    method: Annotated[str, typer.Option(help=_METHOD_HELP)] = "qlora",
    output: Annotated[Path, typer.Option(help="Folder for adapter, checkpoints, report.")] = Path(
        "peftkern-finetune"
    ),
    task: Annotated[
        str | None, typer.Option(help=", ".join(TASKS), show_default="what the columns mean")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Rows to evaluate on.")] = None,
    eval_share: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of --data held out without --eval-data.")
    ] = 0.1,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the rows.")] = 1.0,
    max_steps: Annotated[int, typer.Option(min=0, help="Stop there; 0: after all epochs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of one optimizer step.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the method's")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of one item.")] = 256,
    r: Annotated[int, typer.Option(min=1, help="Rank.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="lora_alpha.", show_default="twice the rank")
    ] = None,
    dropout: Annotated[float, typer.Option(help="On the adapters' input.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Names of modules, by commas.")] = "all-linear",
    optimizer: Annotated[str, typer.Option(help=", ".join(_OPTIMIZERS))] = "adamw",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16.", show_default="what the machine does fast"),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    save_steps: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: every epoch.")
    ] = 0,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints kept.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last one.")] = False,
    verify: Annotated[
        bool, typer.Option(help="First compare the kernels with the reference on one batch.")
    ] = True,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Fine-tune a Hugging Face model on your own rows.

    Ends with the adapter, a table, a page with pictures (index.html) and the figures
    (report.json) in the output folder. Exit status: 0 done, 2 for a wrong option, 130 after
    Ctrl-C (the last checkpoint is kept; go on with --resume).
    """
    from rich.console import Console

    console = Console()
    settings = dict(locals())
    settings.pop("Console")
    settings.pop("console")
    try:
        code = run(console, settings)
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False)
        code = EXIT_USAGE
    raise typer.Exit(code)


def run(console: Console, settings: dict[str, Any]) -> int:
    """The command itself; the exit status.

    Args:
        console: where to report.
        settings: the options by name.

    Raises:
        ValueError, FileNotFoundError: an option is wrong; the message names it.
    """
    from peftkern.cli.finetune import encode, rows
    from peftkern.cli.finetune.model import (
        DTYPES,
        default_dtype,
        load_config,
        load_model,
        load_tokenizer,
    )

    for module in ("transformers", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"finetune needs {module}, which is not installed; run: "
                'pip install "peftkern[finetune]"'
            )
    chosen = method_named(settings["method"])
    if settings["optimizer"] not in _OPTIMIZERS:
        raise ValueError(
            f"--optimizer: got {settings['optimizer']!r}, expected one of {', '.join(_OPTIMIZERS)}"
        )
    dtype = settings["dtype"] or default_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    if settings["task"] not in (None, *TASKS):
        raise ValueError(f"--task: got {settings['task']!r}, expected one of {', '.join(TASKS)}")
    name = settings["model"]
    all_rows = rows.read_rows(settings["data"])
    config = load_config(name)
    task = settings["task"] or rows.infer_task(all_rows, bool(config.is_encoder_decoder))
    if settings["eval_data"] is not None:
        train_rows = all_rows
        eval_rows = rows.read_rows(settings["eval_data"], "--eval-data")
    elif settings["eval_share"]:
        train_rows, eval_rows = rows.split(all_rows, settings["eval_share"], settings["seed"])
    else:
        train_rows, eval_rows = all_rows, []
    tokenizer = load_tokenizer(name)
    labels = encode.label_names(all_rows) if task == CLASSIFICATION else []
    items = encode.encode(train_rows, task, tokenizer, settings["max_length"], labels)
    held = (
        encode.encode(eval_rows, task, tokenizer, settings["max_length"], labels)
        if eval_rows
        else []
    )
    console.print(
        f"{task}: {len(items)} items to train on, {len(held)} held out, at most "
        f"{settings['max_length']} tokens each",
        highlight=False,
    )
    net = load_model(name, config, task, labels, DTYPES[dtype], tokenizer)
    report = _prepare(console, net, chosen, settings, task)
    if settings["verify"] and chosen.config is not None:
        report["verify"] = _verified(console, net, encode.Collator(tokenizer), items)
    report |= {
        "task": task,
        "labels": labels,
        "dtype": dtype,
        "items": {"train": len(items), "held_out": len(held)},
        "settings": {key: _plain(value) for key, value in settings.items()},
        "versions": versions(),
        "machine": machine(),
    }
    return _train(console, net, tokenizer, items, held, chosen, settings, task, report)


def _prepare(
    console: Console, net: Any, method: Method, settings: dict[str, Any], task: str
) -> dict[str, Any]:
    import torch

    import peftkern as pk

    if settings["checkpointing"]:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(settings["seed"])
    if method.config is None:
        net.requires_grad_(True)
        count = sum(p.numel() for p in net.parameters())
        return {"summary": f"every one of {count:,} parameters trains", "patch": ""}
    names = ("r", "alpha", "dropout", "targets")
    options = Options(**{key: settings[key] for key in names}, task=task)
    handle = pk.patch(net, method.config(options))
    found = handle.report()
    console.print(found.summary, highlight=False)
    return {"summary": found.summary, "patch": str(found)}


def _verified(console: Console, net: Any, collate: Any, items: list[dict[str, Any]]) -> str:
    from peftkern.hf.patching import handle_of

    handle = handle_of(net)
    assert handle is not None
    checked = handle.verify(collate(items[:2]))
    console.print(f"verify: {checked.summary}", highlight=False, markup=False)
    if not checked.ok:
        raise ValueError(
            "--verify: the kernels and the reference differ on this model by more than rounding "
            f"explains; please report it:\n{checked}"
        )
    return str(checked.summary)


def _train(
    console: Console,
    net: Any,
    tokenizer: Any,
    items: list[dict[str, Any]],
    held: list[dict[str, Any]],
    method: Method,
    settings: dict[str, Any],
    task: str,
    report: dict[str, Any],
) -> int:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from peftkern.cli.finetune import training
    from peftkern.cli.finetune.encode import Collator
    from peftkern.hf.trainer import PeftkernCallback, peak_memory_bytes

    output: Path = settings["output"]
    output.mkdir(parents=True, exist_ok=True)
    start = training.last_checkpoint(output) if settings["resume"] else None
    if settings["resume"] and start is None:
        raise ValueError(f"--resume: there is no whole checkpoint below {output}")
    metrics = None
    if task == CLASSIFICATION:
        metrics = training.classification_metrics
    elif task == SEQ2SEQ:
        metrics = training.token_metrics
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("training", total=None, state="")

        def show(step: int, steps: int, logs: dict[str, Any]) -> None:
            text = " ".join(
                f"{key} {logs[key]:.4g}" for key in ("loss", "eval_loss") if key in logs
            )
            bar.update(line, completed=step, total=steps)
            if text:
                bar.update(line, state=text)
            if text and not console.is_terminal:
                console.print(f"step {step}/{steps}: {text}", highlight=False)

        trainer = training.AdapterTrainer(
            model=net,
            format=method.format,
            args=_arguments(settings, output, method, bool(held), metrics is not None),
            train_dataset=items,
            eval_dataset=held or None,
            data_collator=Collator(tokenizer),
            processing_class=tokenizer,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=training.keep_predictions if metrics else None,
            optimizers=(_optimizer(net, method, settings), None),
            callbacks=[PeftkernCallback(), training.Progress(show)],
        )
        trainer.remove_callback(_printer())
        begin = time.monotonic()
        try:
            if not trainer.train_from(start):
                console.print(f"{start} is the end of this run: nothing is left to train")
        except KeyboardInterrupt:
            kept = training.last_checkpoint(output)
            where = f"the last checkpoint is {kept}; go on with --resume" if kept else "none saved"
            console.print(f"[bold]interrupted[/] at step {trainer.state.global_step}: {where}")
            return EXIT_INTERRUPTED
    report["seconds"] = time.monotonic() - begin
    report["steps"] = trainer.state.global_step
    report["log"] = trainer.state.log_history
    report["peak_memory_bytes"] = peak_memory_bytes()
    if held:
        report["held_out"] = _held_out(trainer.evaluate(), task)
    with training.uninterrupted():
        trainer.save_model(str(output / "final"))
    _finish(console, report, output)
    return 0


def _arguments(
    settings: dict[str, Any], output: Path, method: Method, evaluate: bool, predict: bool
) -> Any:
    import transformers

    steps = settings["save_steps"]
    when = "steps" if steps else "epoch"
    return transformers.TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulate"],
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        learning_rate=settings["lr"] or method.lr,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        eval_strategy=when if evaluate else "no",
        eval_steps=steps or None,
        save_strategy=when,
        save_steps=steps or 500,
        save_total_limit=settings["keep"],
        logging_steps=5,
        logging_first_step=True,
        prediction_loss_only=not predict,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
        data_seed=settings["seed"],
    )


def _optimizer(net: Any, method: Method, settings: dict[str, Any]) -> Any:
    import peftkern as pk

    kind = getattr(pk.optim, _OPTIMIZERS[settings["optimizer"]])
    trained = [p for p in net.parameters() if p.requires_grad]
    return kind(trained, lr=settings["lr"] or method.lr)


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _held_out(measured: dict[str, float], task: str) -> dict[str, float]:
    found = {
        key.removeprefix("eval_"): value
        for key, value in measured.items()
        if key.startswith("eval_") and isinstance(value, float)
    }
    kept = {k: v for k, v in found.items() if k in ("loss", "accuracy", "macro_f1")}
    if "token_accuracy" in found:
        kept["token_accuracy"] = found["token_accuracy"]
    if task == CAUSAL_LM:
        kept["perplexity"] = math.exp(min(kept["loss"], 50.0))
    return kept


def _finish(console: Console, report: dict[str, Any], output: Path) -> None:
    from peftkern.checkpoint.files import write_atomically
    from peftkern.cli.finetune.report import html_page

    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_atomically(output / "report.json", text.encode())
    write_atomically(output / "index.html", html_page(report).encode())
    measured = ", ".join(f"{key} {value:.4g}" for key, value in report.get("held_out", {}).items())
    console.print(
        f"{report['steps']} steps in {human_seconds(report['seconds'])}, peak memory "
        f"{human_bytes(report['peak_memory_bytes'])}"
        + (f"; held out: {measured}" if measured else ""),
        highlight=False,
    )
    console.print(f"saved: {output / 'final'}", highlight=False, soft_wrap=True)
    console.print(f"report: {output / 'index.html'}", highlight=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
