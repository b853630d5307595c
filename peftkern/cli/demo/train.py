"""One child of the demo: trains one method (or the linear probe) and reports over a pipe.

Started as `python -m peftkern.cli.demo.train SPEC.json`. Every line on its standard output is one
JSON event; whatever else is printed goes to standard error, which the parent keeps as a log.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.cli.demo import memory
from peftkern.cli.demo.data import TextDataset, batches
from peftkern.cli.demo.methods import HEAD_LR, METHODS, Method
from peftkern.cli.demo.model import (
    HEAD,
    TextClassifier,
    Tokenized,
    evaluate,
    frozen_features,
    linear_probe,
    load_classifier,
    quiet_offline,
)

PROBE = "probe"
PEEK = 200
Emit = Callable[..., None]


@dataclass(frozen=True)
class Spec:
    """What a child is to do; travels as JSON.

    Args:
        method: a key of `METHODS`, or "probe".
        model: folder or id.
        data: file written by `TextDataset.save`.
        output: folder for the checkpoint.
        seed, epochs, batch_size, max_tokens: of the training.
        max_steps: stop there; 0 means all epochs.
        threads: 0 leaves torch's own choice.
        evaluations: measurements of held-out accuracy; all but the last are made during training
            on `PEEK` texts only.
    """

    method: str
    model: str
    data: str
    output: str
    seed: int = 0
    epochs: int = 2
    batch_size: int = 16
    max_tokens: int = 48
    max_steps: int = 0
    threads: int = 0
    evaluations: int = 3


def main(argv: list[str] | None = None) -> int:
    """Run the spec named on the command line; 0 when a result was sent."""
    path = (argv or sys.argv[1:])[0]
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # prints of other libraries must not mix with the events

    def emit(event: str, **fields: Any) -> None:
        pipe.write(json.dumps({"event": event, **fields}) + "\n")

    try:
        spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
        quiet_offline(spec.model)
        if spec.threads:
            torch.set_num_threads(spec.threads)
        run = _probe if spec.method == PROBE else _train
        emit("result", **run(spec, emit))
        return 0
    except BrokenPipeError:
        return 1  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        emit("error", kind=type(error).__name__, message=str(error))
        return 1


def _probe(spec: Spec, emit: Emit) -> dict[str, Any]:
    begin = time.perf_counter()
    data = TextDataset.load(Path(spec.data))
    emit("phase", text="loading the model")
    model = load_classifier(spec.model, len(data.labels), spec.seed)
    emit("phase", text="reading the texts with the frozen model")
    train = Tokenized(spec.model, data.train, spec.max_tokens)
    held_out = Tokenized(spec.model, data.held_out, spec.max_tokens)
    features = frozen_features(model, train)
    groups = [example.group for example in data.train]
    emit("phase", text="fitting the linear probe")
    answers, penalty = linear_probe(
        features, train.labels, groups, frozen_features(model, held_out), len(data.labels)
    )
    return {
        "accuracy": _accuracy(answers, held_out),
        "penalty": penalty,
        "seconds": time.perf_counter() - begin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {"train": sum(train.lengths), "held_out": sum(held_out.lengths)},
    }


def _train(spec: Spec, emit: Emit) -> dict[str, Any]:
    begin = time.perf_counter()
    method = METHODS[spec.method]
    data = TextDataset.load(Path(spec.data))
    emit("phase", text="loading the model")
    train = Tokenized(spec.model, data.train, spec.max_tokens)
    held_out = Tokenized(spec.model, data.held_out, spec.max_tokens)
    model, report = build(spec, method, len(data.labels))
    counts = _count(model)
    resettable = memory.reset_peak()
    loaded = memory.resident()

    history, losses, step_times = _fit(spec, method, model, train, held_out.sample(PEEK), emit)
    peak = memory.peak()

    emit("phase", text="saving, reloading and measuring again")
    answers = evaluate(model, held_out)
    output = Path(spec.output)
    written = _save(method, model, output)
    del model
    again, _ = build(spec, method, len(data.labels))
    _load(method, again, output)
    reloaded = evaluate(again, held_out)
    return {
        "method": method.key,
        "accuracy": _accuracy(answers, held_out),
        "reloaded_accuracy": _accuracy(reloaded, held_out),
        "reload_differs": sum(a != b for a, b in zip(answers, reloaded, strict=True)),
        "held_out": len(answers),
        **counts,
        "memory": {
            "loaded": loaded,
            "peak": peak,
            "over_loaded": peak - loaded if peak is not None and loaded is not None else None,
            "peak_is_of_training": resettable,
        },
        "checkpoint_bytes": sum(file.stat().st_size for file in written),
        "checkpoint_files": [file.name for file in written],
        "median_step_s": statistics.median(step_times),
        "train_s": sum(step_times),
        "seconds": time.perf_counter() - begin,
        "losses": losses,
        "history": history,
        "answers": answers,
        "patch_report": report,
        "threads": torch.get_num_threads(),
    }


def build(spec: Spec, method: Method, labels: int) -> tuple[TextClassifier, str]:
    """The model prepared for a method, and the patch report ('' where nothing is patched)."""
    model = load_classifier(spec.model, labels, spec.seed)
    if method.config is None:
        return model, ""
    import peftkern as pk

    torch.manual_seed(spec.seed)  # the adapters' own initial values
    handle = pk.patch(model, method.config())
    return model, str(handle.report())


def _fit(
    spec: Spec,
    method: Method,
    model: TextClassifier,
    train: Tokenized,
    peek: Tokenized,
    emit: Emit,
) -> tuple[list[list[float]], list[float], list[float]]:
    plan = [
        rows
        for epoch in range(spec.epochs)
        for rows in batches(train.lengths, spec.batch_size, spec.seed, epoch)
    ]
    if spec.max_steps:
        plan = plan[: spec.max_steps]
    optimizer = _optimizer(method, model)
    warmup = max(1, len(plan) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (len(plan) - step) / (len(plan) - warmup + 1)),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    due = {round(len(plan) * part / spec.evaluations) for part in range(1, spec.evaluations)}
    history: list[list[float]] = []
    losses: list[float] = []
    times: list[float] = []
    torch.manual_seed(spec.seed)
    model.train()
    for step, rows in enumerate(plan, 1):
        ids, mask, labels = train.batch(rows)
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
        losses.append(float(loss.detach()))
        left = (sum(times) / step) * (len(plan) - step)
        emit("step", step=step, steps=len(plan), loss=losses[-1], eta=left)
        if step in due:
            accuracy = _accuracy(evaluate(model, peek), peek)
            history.append([step, accuracy])
            emit("accuracy", step=step, accuracy=accuracy)
            model.train()
    return history, losses, times


def _optimizer(method: Method, model: nn.Module) -> torch.optim.AdamW:
    head: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if HEAD in name.split(".") else rest).append(parameter)
    groups = [
        {"params": rest, "lr": method.lr, "weight_decay": method.weight_decay},
        {"params": head, "lr": max(method.lr, HEAD_LR), "weight_decay": method.weight_decay},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def _count(model: nn.Module) -> dict[str, Any]:
    """Parameters that train, their share of the original model, and the bytes of the rest."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        "trainable": trainable,
        "trainable_bytes": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "frozen_bytes": sum(p.nbytes for p in frozen),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
    }


def _save(method: Method, model: TextClassifier, output: Path) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    if method.config is None:
        from safetensors.torch import save_model

        save_model(model, str(output / "model.safetensors"))
    else:
        import peftkern as pk

        pk.save_adapter(model, output)
    return sorted(file for file in output.iterdir() if file.is_file())


def _load(method: Method, model: TextClassifier, output: Path) -> None:
    if method.config is None:
        from safetensors.torch import load_model

        load_model(model, str(output / "model.safetensors"))
    else:
        import peftkern as pk

        pk.load_adapter(model, output)


def _accuracy(answers: list[int], data: Tokenized) -> float:
    right = int((torch.tensor(answers) == data.labels).sum())
    return right / len(answers)


if __name__ == "__main__":
    sys.exit(main())
