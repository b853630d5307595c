"""A Trainer whose checkpoints are adapters. Imports transformers: load it only when it is used."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import peftkern as pk

# A checkpoint without one of these was cut short.
_WHOLE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


class AdapterTrainer(Trainer):
    """Saves and loads the adapter alone; a save is never cut by Ctrl-C.

    Args:
        format: of :func:`peftkern.save_adapter`.
        args, kwargs: of the Trainer.
    """

    def __init__(self, *args: Any, format: str = "peft", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.format = format
        self.patched = "_peftkern_handle" in self.model.__dict__

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.patched:
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        pk.save_adapter(self.model, folder, format=self.format)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.patched:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        pk.load_adapter(self.model, resume_from_checkpoint)
        return None

    def train_from(self, checkpoint: Path | None) -> bool:
        """Train to the end, from a checkpoint on where one is given.

        Returns:
            False where the checkpoint is the end already. It is loaded then; ``train`` would make
            one step more.
        """
        if checkpoint is not None:
            reached = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            limit = self.args.max_steps
            steps_left = reached.global_step < limit
            if not (steps_left if limit > 0 else (reached.epoch or 0) < self.args.num_train_epochs):
                self._load_from_checkpoint(str(checkpoint))
                self.state = reached
                return False
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with uninterrupted():
            super()._save_checkpoint(*args, **kwargs)


class Progress(TrainerCallback):
    """Feeds a display: called as ``show(step, steps, logs)`` after each step and each log."""

    def __init__(self, show: Any) -> None:
        self.show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """After each optimizer step."""
        self.show(state.global_step, state.max_steps, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """After each log: losses, evaluations."""
        self.show(state.global_step, state.max_steps, dict(logs or {}))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C within the block takes effect at its end."""
    pressed: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    except ValueError:  # not the main thread: there is nothing to hold back
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step below a folder."""
    found: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rsplit("-", 1)[-1]
        if number.isdigit() and all((path / name).is_file() for name in _WHOLE):
            found[int(number)] = path
    return found[max(found)] if found else None


def keep_predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Class numbers instead of logits, so that evaluation keeps little."""
    scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(-1)


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur."""
    answers = torch.as_tensor(prediction.predictions)
    labels = torch.as_tensor(prediction.label_ids)
    scores = []
    for name in labels.unique().tolist():
        hit = int(((answers == name) & (labels == name)).sum())
        scores.append(2 * hit / (int((answers == name).sum()) + int((labels == name).sum())))
    accuracy = float((answers == labels).double().mean())
    return {"accuracy": accuracy, "macro_f1": sum(scores) / len(scores)}


def token_metrics(prediction: Any) -> dict[str, float]:
    """Share of target tokens that the model puts first, given the right ones before."""
    answers = torch.as_tensor(prediction.predictions)
    labels = torch.as_tensor(prediction.label_ids)
    counted = labels != -100
    return {"token_accuracy": float((answers[counted] == labels[counted]).double().mean())}
