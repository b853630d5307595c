"""The methods of the demo: adding one is adding one entry to `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from peftkern.cli.demo.model import Tokenized

HEAD = "classifier"
SCORED_TEXTS = 160  # that importance scores look at

# Peak learning rate of the head that every method trains beside its own parameters.
HEAD_LR = 1e-3


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        key: name on the command line and of its folder.
        title: name in tables and pictures.
        summary: one sentence for the report.
        lr: peak learning rate of its parameters (AdamW, linear warm-up and decay).
        config: makes the configuration for `peftkern.patch` from the model and the texts to train
            on; None trains every weight.
        weight_decay: of its parameters.
        load: options of `peftkern.load_adapter` that the adapter's files do not hold.
        format: of `peftkern.save_adapter`.
        ram_budget: bytes of optimizer state that stay in memory, the rest of it on disk
            (`PagedAdamW8bit`); None: torch's AdamW.
        part: what `peftkern.patch` is given, where that must be a transformers model; the head then
            trains and is saved beside it. Empty: the whole classifier.
        small: why it may stay near the linear probe in so short a run; empty: it must beat it.
        b_ratio: how many times as fast the B matrices of LoRA learn (LoRA+).
    """

    key: str
    title: str
    summary: str
    lr: float
    config: Callable[[nn.Module, Tokenized], Any] | None
    weight_decay: float = 0.0
    load: dict[str, Any] = field(default_factory=dict)
    small: str = ""
    format: str = "peft"
    part: str = ""
    ram_budget: int | None = None
    b_ratio: float = 1.0


def _lora(**options: Any) -> Callable[[nn.Module, Tokenized], Any]:
    def make(model: nn.Module, train: Tokenized) -> Any:
        import peftkern as pk

        return pk.LoRAConfig(
            r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=[HEAD], **options
        )

    return make


def _bottleneck(preset: str, **options: Any) -> Callable[[nn.Module, Tokenized], Any]:
    def make(model: nn.Module, train: Tokenized) -> Any:
        import peftkern as pk

        return pk.BottleneckConfig.preset(preset, modules_to_save=[HEAD], **options)

    return make


def _ia3(model: nn.Module, train: Tokenized) -> Any:
    import peftkern as pk

    return pk.IA3Config(target_modules="all-linear", modules_to_save=[HEAD])


def _prefix(model: nn.Module, train: Tokenized) -> Any:
    import peftkern as pk

    return pk.PrefixTuningConfig(num_virtual_tokens=20)


def _prompt(model: nn.Module, train: Tokenized) -> Any:
    import peftkern as pk

    return pk.PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")


def _sparse(model: nn.Module, train: Tokenized) -> Any:
    from torch.nn.functional import cross_entropy

    import peftkern as pk

    def loss(model: nn.Module, batch: Any) -> Any:
        ids, mask, labels = batch
        return cross_entropy(model(ids, mask), labels)

    rows = range(0, len(train.ids), max(1, len(train.ids) // SCORED_TEXTS))
    loader = [train.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    scores = pk.importance(model, loader, score="taylor", loss_fn=loss, exclude_modules=[HEAD])
    chosen = pk.top_k(scores, density=0.01)
    return pk.SparseDeltaConfig(selection=chosen, modules_to_save=[HEAD])


METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method(
            key="full",
            title="Full fine-tuning",
            summary="every weight of the model is trained",
            lr=1e-4,
            config=None,
            weight_decay=0.01,
        ),
        Method(
            key="lora",
            title="LoRA",
            summary="rank 8 on every linear layer, base frozen in float32",
            lr=1e-3,
            config=_lora(),
        ),
        Method(
            key="qlora-nf4",
            title="QLoRA NF4",
            summary="rank 8 on every linear layer, base frozen in 4-bit NF4, double quantization",
            lr=1e-3,
            config=_lora(quantize="nf4", double_quant=True),
            load={"quantize": "nf4"},
        ),
        Method(
            key="qlora-int8",
            title="QLoRA INT8",
            summary="rank 8 on every linear layer, base frozen in row-wise INT8",
            lr=1e-3,
            config=_lora(quantize="int8"),
            load={"quantize": "int8"},
        ),
        Method(
            key="dora",
            title="DoRA",
            summary="rank 8 on every linear layer, direction and magnitude apart",
            lr=1e-3,
            config=_lora(use_dora=True),
        ),
        Method(
            key="rslora",
            title="rsLoRA",
            summary="as LoRA, scaled by the root of the rank",
            lr=5e-4,
            config=_lora(use_rslora=True),
        ),
        Method(
            key="lora-plus",
            title="LoRA+",
            summary="as LoRA, the B matrices with 8 times the learning rate of the A matrices",
            lr=3e-4,
            config=_lora(),
            b_ratio=8.0,
        ),
        Method(
            key="pissa",
            title="PiSSA",
            summary="as LoRA, started from the largest singular values of each weight",
            lr=5e-4,
            config=_lora(init_lora_weights="pissa"),
        ),
        Method(
            key="olora",
            title="OLoRA",
            summary="as LoRA, started from an orthonormal basis of each weight",
            lr=3e-4,
            config=_lora(init_lora_weights="olora"),
        ),
        Method(
            key="loftq",
            title="LoftQ",
            summary="as QLoRA NF4, started from what rounding to 4 bits lost",
            lr=1e-3,
            config=_lora(init_lora_weights="loftq", quantize="nf4"),
            load={"quantize": "nf4"},
        ),
        Method(
            key="houlsby",
            title="Adapters, Houlsby",
            summary="bottlenecks of a sixteenth of the width after attention and feed-forward",
            lr=1e-3,
            config=_bottleneck("houlsby"),
            format="adapterhub",
        ),
        Method(
            key="pfeiffer",
            title="Adapters, Pfeiffer",
            summary="bottlenecks of a sixteenth of the width after the feed-forward, NF4 base",
            lr=2e-3,
            config=_bottleneck("pfeiffer", quantize="nf4"),
            load={"quantize": "nf4"},
            format="adapterhub",
        ),
        Method(
            key="parallel",
            title="Adapters, parallel",
            summary="bottlenecks of a sixteenth of the width beside the feed-forward",
            lr=1e-3,
            config=_bottleneck("parallel", reduction_factor=16),
            format="adapterhub",
        ),
        Method(
            key="adapter-plus",
            title="AdapterPlus",
            summary="bottlenecks of 4 after the feed-forward, a learned scale for each channel",
            lr=5e-3,
            config=_bottleneck("adapter_plus"),
            format="adapterhub",
        ),
        Method(
            key="sparse",
            title="Sparse delta",
            summary="1 % of the weights, those with the highest Taylor scores on the texts",
            lr=1e-3,
            config=_sparse,
        ),
        Method(
            key="ia3",
            title="(IA)³",
            summary="one learned factor for each output of every linear layer",
            lr=1e-2,
            config=_ia3,
            small="it trains too few numbers for one short epoch",
        ),
        Method(
            key="prefix",
            title="Prefix tuning",
            summary="20 trained keys and values in front of every attention layer",
            lr=1e-2,
            config=_prefix,
            part="encoder",
            small="it trains too few numbers for one short epoch",
        ),
        Method(
            key="prompt",
            title="Prompt tuning",
            summary="20 trained embeddings in front of every text",
            lr=1e-1,
            config=_prompt,
            part="encoder",
            small="it trains too few numbers for one short epoch",
        ),
        Method(
            key="full-paged",
            title="Full, paged AdamW",
            summary="every weight is trained, 8-bit optimizer state, all but 8 MiB of it on disk",
            lr=1e-4,
            config=None,
            weight_decay=0.01,
            ram_budget=8 << 20,
        ),
    )
}
DEFAULT_METHODS = tuple(METHODS)
LOW_DATA_METHODS = ("full", "lora", "qlora-nf4", "houlsby")


def parse_methods(text: str) -> list[Method]:
    """The methods named in a comma-separated list, in that order, each once.

    Raises:
        ValueError: a name is unknown or the list is empty.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(
            f"--methods: got {', '.join(map(repr, unknown)) or 'nothing'}, expected a "
            f"comma-separated list out of: {', '.join(METHODS)}"
        )
    return [METHODS[name] for name in names]
