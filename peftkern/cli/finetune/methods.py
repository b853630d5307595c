"""The methods of `finetune` by name: which configuration each one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HEADS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Options:
    """What the command line says about the method.

    Args:
        r: rank.
        alpha: lora_alpha; twice the rank when left out.
        dropout: on the adapters' input.
        targets: names of modules, separated by commas, or "all-linear".
        task: one of `TASKS`.
    """

    r: int
    alpha: float | None
    dropout: float
    targets: str
    task: str

    @property
    def target_modules(self) -> str | list[str]:
        """As configurations take it."""
        names = [name.strip() for name in self.targets.split(",") if name.strip()]
        return names[0] if len(names) == 1 and names[0] == "all-linear" else names


Config = Callable[[Options], Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        summary: one line for the help.
        lr: learning rate when none is given.
        config: makes the configuration; None trains every weight.
        load: options of `load_adapter` that the files do not hold.
    """

    summary: str
    lr: float
    config: Config | None
    load: dict[str, Any]


def _lora(**more: Any) -> Config:
    def make(options: Options) -> Any:
        import peftkern as pk

        return pk.LoRAConfig(
            r=options.r,
            lora_alpha=options.alpha if options.alpha is not None else 2 * options.r,
            lora_dropout=options.dropout,
            target_modules=options.target_modules,
            task_type=HEADS[options.task],
            **more,
        )

    return make


METHODS: dict[str, Method] = {
    "lora": Method("low-rank adapters, base as it is", 2e-4, _lora(), {}),
    "qlora": Method(
        "low-rank adapters over an NF4 base, double quantization",
        2e-4,
        _lora(quantize="nf4"),
        {"quantize": "nf4"},
    ),
    "qlora-int8": Method(
        "low-rank adapters over an INT8 base", 2e-4, _lora(quantize="int8"), {"quantize": "int8"}
    ),
    "full": Method("every weight", 2e-5, None, {}),
}


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"--method: got {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]
