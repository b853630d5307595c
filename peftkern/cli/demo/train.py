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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.cli.demo import memory
from peftkern.cli.demo.data import Example, TextDataset, batches
from peftkern.cli.demo.forgetting import measure, similarities
from peftkern.cli.demo.methods import HEAD, HEAD_LR, METHODS, Method
from peftkern.cli.demo.model import (
    TextClassifier,
    Tokenized,
    evaluate,
    frozen_features,
    linear_probe,
    load_classifier,
    quiet_offline,
    save_head,
)
from peftkern.optim import PagedAdamW8bit

PROBE = "probe"
PEEK = 200
LEAST_PAIRS = 20
HEAD_FILE, FEATURES_FILE = "head.safetensors", "features.safetensors"
FRACTIONS = (0.01, 0.1)
LOW_DATA_STEPS = 24
Emit = Callable[..., None]


@dataclass(frozen=True)
class Spec:
    """What a child is to do; travels as JSON.

    Args:
        method: a key of `METHODS`, or "probe".
        task: "method" (train it on all texts) or "low-data" (on a few of them).
        model: folder or id.
        data: file written by `TextDataset.save`.
        output: folder for the checkpoint.
        probe: folder of what the linear probe leaves: its head, with which every method starts,
            the frozen model's features, and its similarities on the base task.
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
    probe: str
    seed: int = 0
    epochs: int = 1
    batch_size: int = 16
    max_tokens: int = 32
    max_steps: int = 0
    threads: int = 0
    evaluations: int = 3
    task: str = "method"


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
        run = _probe if spec.method == PROBE else TASKS[spec.task]
        emit("result", **run(spec, emit))
        return 0
    except BrokenPipeError:
        return 1  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        emit("error", kind=type(error).__name__, message=str(error))
        return 1


def _probe(spec: Spec, emit: Emit) -> dict[str, Any]:
    from safetensors.torch import save_file

    begin = time.perf_counter()
    data = TextDataset.load(Path(spec.data))
    emit("phase", text="loading the model")
    model = load_classifier(spec.model, len(data.labels), spec.seed)
    emit("phase", text="reading the texts with the frozen model")
    train = Tokenized(spec.model, data.train, spec.max_tokens)
    held_out = Tokenized(spec.model, data.held_out, spec.max_tokens)
    features = frozen_features(model, train)
    held_out_features = frozen_features(model, held_out)
    base = _base_similarities(spec, data, model)
    emit("phase", text="fitting the linear probe")
    groups = [example.group for example in data.train]
    weight, bias, penalty = linear_probe(features, train.labels, groups, len(data.labels))
    answers = (held_out_features @ weight.T + bias).argmax(-1)
    folder = Path(spec.probe)
    folder.mkdir(parents=True, exist_ok=True)
    save_head(folder / HEAD_FILE, weight, bias)
    left = {"train": features, "held_out": held_out_features}
    if base is not None:
        left["similarities"] = base
    save_file(left, folder / FEATURES_FILE)
    return {
        "accuracy": _accuracy(answers.tolist(), held_out),
        "right": _right(answers.tolist(), held_out),
        "penalty": penalty,
        "base_task": None if base is None else measure(None, base),
        "seconds": time.perf_counter() - begin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {"train": sum(train.lengths), "held_out": sum(held_out.lengths)},
    }


def _train(spec: Spec, emit: Emit) -> dict[str, Any]:
    from safetensors.torch import load_file

    begin = time.perf_counter()
    method = METHODS[spec.method]
    data = TextDataset.load(Path(spec.data))
    emit("phase", text="loading the model")
    train = Tokenized(spec.model, data.train, spec.max_tokens)
    held_out = Tokenized(spec.model, data.held_out, spec.max_tokens)
    head = Path(spec.probe) / HEAD_FILE
    model, report = build(spec, method, train, head, len(data.labels))
    counts = _count(model)
    resettable = memory.reset_peak()
    loaded = memory.resident()

    history, losses, step_times, paging = _fit(
        spec, method, model, train, held_out.sample(PEEK), emit
    )
    peak = memory.peak()

    emit("phase", text="saving, reloading and measuring again")
    answers = evaluate(model, held_out)
    before = load_file(Path(spec.probe) / FEATURES_FILE).get("similarities")
    after = _base_similarities(spec, data, model)
    output = Path(spec.output)
    written = _save(method, model, output)
    peek = held_out.sample(PEEK)
    peeked = evaluate(model, peek)
    del model
    reloaded = evaluate(_reload(spec, method, len(data.labels), output), peek)
    return {
        "method": method.key,
        "accuracy": _accuracy(answers, held_out),
        "right": _right(answers, held_out),
        "reloaded_texts": len(reloaded),
        "reload_differs": sum(a != b for a, b in zip(peeked, reloaded, strict=True)),
        "held_out": len(answers),
        "base_task": None if after is None else measure(before, after),
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
        "paging": paging,
        "patch_report": report,
        "threads": torch.get_num_threads(),
    }


def _low_data(spec: Spec, emit: Emit) -> dict[str, Any]:
    """The method on small parts of the training half, each with a head probed on that part."""
    from safetensors.torch import load_file

    begin = time.perf_counter()
    method = METHODS[spec.method]
    data = TextDataset.load(Path(spec.data))
    held_out = Tokenized(spec.model, data.held_out, spec.max_tokens)
    features = load_file(Path(spec.probe) / FEATURES_FILE)
    place = {example.text: row for row, example in enumerate(data.train)}
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)
    points = []
    for fraction in FRACTIONS:
        part = data.part(fraction)
        train = Tokenized(spec.model, part.train, spec.max_tokens)
        rows = [place[example.text] for example in part.train]
        groups = [example.group for example in part.train]
        probe = linear_probe(features["train"][rows], train.labels, groups, len(data.labels))
        save_head(output / HEAD_FILE, *probe[:2])
        probed = (features["held_out"] @ probe[0].T + probe[1]).argmax(-1).tolist()
        emit("phase", text=f"{len(part.train)} texts")
        model, _ = build(spec, method, train, output / HEAD_FILE, len(data.labels))
        batch = min(spec.batch_size, max(4, len(rows) // 4))
        epochs = max(1, round(LOW_DATA_STEPS / max(1, len(rows) / batch)))
        few = replace(spec, epochs=epochs, batch_size=batch, max_steps=LOW_DATA_STEPS)
        _fit(replace(few, evaluations=1), method, model, train, held_out, emit)
        points.append(
            {
                "texts": len(rows),
                "probe": _accuracy(probed, held_out),
                "accuracy": _accuracy(evaluate(model, held_out), held_out),
            }
        )
    return {"points": points, "seconds": time.perf_counter() - begin}


TASKS = {"method": _train, "low-data": _low_data}


def _base_similarities(spec: Spec, data: TextDataset, model: TextClassifier) -> torch.Tensor | None:
    """The model's similarities on the base task; None where the texts are too few or too short."""
    pairs = data.sentence_pairs()
    if len(pairs[0]) < LEAST_PAIRS:
        return None
    firsts, rests = (
        Tokenized(spec.model, [Example(text, 0, "") for text in texts], spec.max_tokens)
        for texts in pairs
    )
    return similarities(model, firsts, rests)


def build(
    spec: Spec, method: Method, train: Tokenized, head: Path, labels: int
) -> tuple[TextClassifier, str]:
    """The model prepared for a method, and the patch report ('' where nothing is patched).

    Args:
        spec: what the child is to do.
        method: the method.
        train: what it will train on; methods that choose parameters look at a part of it.
        head: file of the head to start with.
        labels: number of labels.
    """
    model = load_classifier(spec.model, labels, spec.seed, head)
    if method.config is None:
        return model, ""
    import peftkern as pk

    torch.manual_seed(spec.seed)  # the adapters' own initial values
    handle = pk.patch(model.get_submodule(method.part), method.config(model, train))
    return model, str(handle.report())


def _fit(
    spec: Spec,
    method: Method,
    model: TextClassifier,
    train: Tokenized,
    peek: Tokenized,
    emit: Emit,
) -> tuple[list[list[float]], list[float], list[float], dict[str, Any] | None]:
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
    paging = None
    if isinstance(optimizer, PagedAdamW8bit):
        paging = optimizer.paging_report()
        optimizer.close()
    return history, losses, times, paging


def _optimizer(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    import peftkern as pk

    head = [p for name, p in model.named_parameters() if HEAD in name.split(".")]
    every = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": every, "lr": method.lr}]
    if method.b_ratio != 1.0:
        groups = pk.optim.lora_plus_groups(model, method.lr, method.b_ratio)
    taken = {id(p) for p in head}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
        group["weight_decay"] = method.weight_decay
    trained = [p for p in head if p.requires_grad]
    groups.append(
        {"params": trained, "lr": max(method.lr, HEAD_LR), "weight_decay": method.weight_decay}
    )
    groups = [group for group in groups if group["params"]]
    if method.ram_budget is not None:
        return PagedAdamW8bit(groups, ram_budget=method.ram_budget)
    return torch.optim.AdamW(groups, fused=True)


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

        pk.save_adapter(model.get_submodule(method.part), output, format=method.format)
        if method.part:
            head = model.classifier
            save_head(output / HEAD_FILE, head.weight.detach(), head.bias.detach())
    return sorted(file for file in output.iterdir() if file.is_file())


def _reload(spec: Spec, method: Method, labels: int, output: Path) -> TextClassifier:
    """A fresh model with what was saved: all that the checkpoint needs is the pretrained model."""
    head = output / HEAD_FILE if method.part else None
    model = load_classifier(spec.model, labels, spec.seed, head)
    if method.config is None:
        from safetensors.torch import load_model

        load_model(model, str(output / "model.safetensors"))
    else:
        import peftkern as pk

        pk.load_adapter(model.get_submodule(method.part), output, **method.load)
    return model


def _right(answers: list[int], data: Tokenized) -> str:
    """One character a text: 1 where the answer is right."""
    return "".join(str(int(a == b)) for a, b in zip(answers, data.labels.tolist(), strict=True))


def _accuracy(answers: list[int], data: Tokenized) -> float:
    right = int((torch.tensor(answers) == data.labels).sum())
    return right / len(answers)


if __name__ == "__main__":
    sys.exit(main())
