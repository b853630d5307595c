"""Loading the model and its tokenizer for a task. Imports transformers when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftkern.cli.finetune.rows import CAUSAL_LM, CLASSIFICATION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(model: str) -> Any:
    """The model's configuration.

    Raises:
        ValueError: transformers cannot read it.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~"))):
        raise ValueError(
            f"--model: no such folder: {model}; expected a Hugging Face model folder or an id such "
            "as 'org/name'"
        )
    try:
        return AutoConfig.from_pretrained(str(path) if path.is_dir() else model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: transformers cannot read {model!r}: {error}") from error


def load_tokenizer(model: str) -> Any:
    """The tokenizer, with a padding token.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: {model!r} has no tokenizer: {error}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"--model: the tokenizer of {model!r} has no padding and no end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str, config: Any, task: str, labels: Sequence[str], dtype: torch.dtype, tokenizer: Any
) -> Any:
    """The model with the head of a task.

    Args:
        model: folder or id.
        config: of :func:`load_config`.
        task: one of `TASKS`.
        labels: names of the classes, for classification.
        dtype: of its weights.
        tokenizer: tells the padding token to heads that need it.

    Raises:
        ValueError: transformers cannot load it with this head.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind: Any
    if task == CLASSIFICATION:
        kind = transformers.AutoModelForSequenceClassification
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        config.pad_token_id = tokenizer.pad_token_id
    elif task == CAUSAL_LM:
        kind = transformers.AutoModelForCausalLM
    else:
        kind = transformers.AutoModelForSeq2SeqLM
    try:
        return kind.from_pretrained(model, config=config, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model: transformers cannot load {model!r} for {task}: {error}"
        ) from error


def default_dtype() -> str:
    """bfloat16 where the machine multiplies it fast, else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
