"""Writes what is supported into README.md and docs/support.md: ``python tools/support_table.py``.

Ops, backends and dtypes come from the registry. Methods and formats are tried: each cell is one
training step of a tiny Llama in which every adapter must get a finite gradient.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import peftkern as pk  # noqa: E402
from peftkern import registry  # noqa: E402

FORMATS = (None, "nf4", "fp4", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BEGIN, END = "<!-- support: written by tools/support_table.py -->", "<!-- /support -->"
_LAYERS = dict(target_modules="all-linear")


def methods() -> dict[str, tuple[Any, str]]:
    """Name of a method -> its configuration, and the op that carries it."""
    return {
        "LoRA, rsLoRA": (pk.LoRAConfig(r=4, use_rslora=True, **_LAYERS), "lora_linear"),
        "LoRA, mixed by row": (pk.LoRAConfig(r=4, **_LAYERS), "multi_lora_linear"),
        "DoRA": (pk.LoRAConfig(r=4, use_dora=True, **_LAYERS), "dora_linear"),
        "(IA)^3": (
            pk.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "",
        ),
        "bottleneck": (pk.BottleneckConfig.preset("houlsby"), "bottleneck_adapter"),
        "prefix tuning": (
            pk.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
            "prefix_attention",
        ),
        "prompt tuning": (
            pk.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
            "prompt_embedding",
        ),
        "sparse delta": (
            pk.SparseDeltaConfig(density=0.05, pattern="random", **_LAYERS),
            "sparse_delta_linear",
        ),
    }


def _llama(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def works(name: str, config: Any, quantize: str | None, dtype: torch.dtype) -> bool:
    """Whether a step trains every adapter tensor; a refusal by name counts as no."""
    import dataclasses

    model = _llama(dtype)
    ids = torch.arange(16).view(2, 8)
    rows = {}
    try:
        changes = {"quantize": quantize, "quantize_modules": "all-linear" if quantize else None}
        pk.patch(model, dataclasses.replace(config, **changes))
        if "mixed" in name:
            rows["adapter_names"] = ["default", "__base__"]
        model(input_ids=ids, labels=ids, **rows).loss.backward()
    except (NotImplementedError, ValueError):
        return False
    trained = [p for p in model.parameters() if p.requires_grad]
    return bool(trained) and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def short(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16, or torch's name."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def backends(op: str, device: str) -> str:
    """The implementations of an op, in the order in which they are tried."""
    return ", ".join(row.backend for row in registry.implementations(op, device))


def method_table() -> list[str]:
    """Methods by formats, with dtypes in the cells."""
    head = ["method", *(f or "dense" for f in FORMATS), "kernels on a CPU", "on an NVIDIA GPU"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, (config, op) in methods().items():
        cells = []
        for quantize in FORMATS:
            found = [short(d) for d in DTYPES if works(name, config, quantize, d)]
            cells.append(" ".join(found) or "no")
        where = [backends(op, d) if op else "those of its base" for d in ("cpu", "cuda")]
        lines.append(f"| {' | '.join([name, *cells, *where])} |")
    return lines


def op_table() -> list[str]:
    """Every op with its backends, dtypes and tolerance."""
    rules = {"exact": "bit-equal", "error_rule": "1.5 or 2 times eager's error"}
    lines = ["| op | CPU | CUDA | dtypes | held to |", "|---|---|---|---|---|"]
    for name, spec in sorted(registry.specs().items()):
        dtypes = " ".join(short(d) for d in spec.dtypes)
        where = f"{backends(name, 'cpu')} | {backends(name, 'cuda')}"
        lines.append(f"| `{name}` | {where} | {dtypes} | {rules[spec.tolerance]} |")
    return lines


def written(text: str, lines: list[str]) -> str:
    """A text with the part between the marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    warnings.simplefilter("ignore")
    made = method_table()
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), made))
    (ROOT / "docs" / "support.md").write_text(
        "# What is supported\n\nWritten by `tools/support_table.py`; tests hold it current.\n\n"
        "## Methods and formats of the base\n\nA cell names the dtypes in which one training step "
        "of a tiny Llama gave every adapter a finite gradient.\n\n"
        + "\n".join(made)
        + "\n\n## Ops and backends\n\nBackends are tried from left to right; one that cannot serve "
        "a call says why, and the next is tried.\n\n" + "\n".join(op_table()) + "\n"
    )
    print("wrote README.md and docs/support.md")


if __name__ == "__main__":
    main()
