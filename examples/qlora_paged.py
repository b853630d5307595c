"""QLoRA with a paged optimizer: state in a budget of RAM, the rest in files that survive a kill.

Needs ``pip install "peftkern[hf]"``. A small Llama from a configuration; no download.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern as pk

BUDGET, STEPS = 1 << 20, 8


def adapted() -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """A Llama over NF4 with rank 64, the same each time, and its trainable parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    pk.patch(model, pk.LoRAConfig(r=64, lora_alpha=64, quantize="nf4", double_quant=True))
    return model.train(), [p for p in model.parameters() if p.requires_grad]


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> list[float]:
    """Losses of some steps; step i sees the same batch in every run."""
    losses = []
    for i in steps:
        ids = (torch.arange(4 * 64).view(4, 64) * (i % 3 + 1)) % 251
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    model, parameters = adapted()
    unpaged = pk.optim.AdamW8bit(parameters, lr=3e-3)
    expected = train(model, unpaged, range(STEPS))
    print(f"in memory:  losses {expected[0]:.4f} ... {expected[-1]:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = dict(
            lr=3e-3, ram_budget=BUDGET, page_dir=folder, keep_parameters=True
        )
        model, parameters = adapted()
        paged = pk.optim.PagedAdamW8bit(parameters, **options)
        half = train(model, paged, range(STEPS // 2))
        paged.sync()
        report = paged.paging_report()
        print(
            f"paged:      {report['total_bytes'] / 1e6:.1f} MB of state, "
            f"{report['resident_bytes'] / 1e6:.2f} MB of it in RAM (budget {BUDGET / 1e6:.2f})"
        )
        assert report["resident_bytes"] <= BUDGET < report["total_bytes"]
        paged.close()
        del model, paged, parameters  # as after a kill: only the files are left

        model, parameters = adapted()  # adapters as they began
        resumed = pk.optim.PagedAdamW8bit(parameters, resume=True, **options)
        rest = train(model, resumed, range(STEPS // 2, STEPS))
        resumed.close()
    print(f"resumed:    losses {half[0]:.4f} ... {rest[-1]:.4f}")
    print(f"every loss has the bits of the run in memory: {half + rest == expected}")
    assert half + rest == expected
    assert expected[-1] < expected[0]


if __name__ == "__main__":
    main()
