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
        format: of `save_adapter`.
    """

    summary: str
    lr: float
    config: Config | None
    format: str = "peft"


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


def _adapters(options: Options) -> Any:
    import peftkern as pk

    return pk.BottleneckConfig.preset(
        "pfeiffer", dropout=options.dropout, task_type=HEADS[options.task]
    )


def _ia3(options: Options) -> Any:
    import peftkern as pk

    return pk.IA3Config(target_modules=options.target_modules, task_type=HEADS[options.task])


def _prefix(options: Options) -> Any:
    import peftkern as pk

    return pk.PrefixTuningConfig(num_virtual_tokens=20, task_type=HEADS[options.task])


def _prompt(options: Options) -> Any:
    import peftkern as pk

    return pk.PromptTuningConfig(
        num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB", task_type=HEADS[options.task]
    )


def _sparse(options: Options) -> Any:
    import peftkern as pk

    return pk.SparseDeltaConfig(
        density=0.01,
        pattern="magnitude",
        target_modules=options.target_modules,
        task_type=HEADS[options.task],
    )


METHODS: dict[str, Method] = {
    "lora": Method("low-rank adapters, base as it is", 2e-4, _lora()),
    "qlora": Method("low-rank adapters, NF4 base", 2e-4, _lora(quantize="nf4")),
    "qlora-int8": Method("low-rank adapters, INT8 base", 2e-4, _lora(quantize="int8")),
    "dora": Method("magnitude and direction apart", 2e-4, _lora(use_dora=True)),
    "adapters": Method("Pfeiffer's bottlenecks", 1e-4, _adapters, "adapterhub"),
    "ia3": Method("learned factors", 3e-3, _ia3),
    "prefix": Method("20 trained keys and values in every attention", 1e-2, _prefix),
    "prompt": Method("20 trained input embeddings", 3e-2, _prompt),
    "sparse": Method("the largest 1 % of the weights", 2e-4, _sparse),
    "full": Method("every weight", 2e-5, None),
}


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"--method: got {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]
