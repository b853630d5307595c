"""Serve and train several adapters in one batch: each row goes through its own.

Needs ``pip install "peftkern[hf]"``. A small Llama from a configuration; no download.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern as pk

WORDS, LENGTH, STEPS = 64, 16, 80
STRIDE = {"ones": 1, "fives": 5}  # what each adapter learns: counting by ones, by fives


def rows(names: list[str]) -> torch.Tensor:
    """One sequence for each name, in that adapter's stride."""
    start = torch.randint(WORDS, (len(names), 1))
    stride = torch.tensor([[STRIDE.get(name, 0)] for name in names])
    return (start + stride * torch.arange(LENGTH)) % WORDS


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # nothing is pretrained: logits need room to move
    )
    model = LlamaForCausalLM(config)
    for name, rank in (("ones", 8), ("fives", 16)):  # ranks may differ
        pk.patch(model, pk.LoRAConfig(r=rank, lora_alpha=4 * rank), adapter_name=name)
    pk.set_adapter(model, ["ones", "fives"])  # both train
    model.train()

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = pk.optim.AdamW(trainable, lr=5e-3)
    names = ["ones", "fives"] * 8
    losses = []
    for _ in range(STEPS):
        ids = rows(names)
        loss = model(input_ids=ids, labels=ids, adapter_names=names).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"trained both in one batch: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 3

    # Serving: three tenants in one batch, one of them without an adapter.
    model.eval()
    ids, tenants = rows(["ones", "fives", "ones"]), ["ones", "fives", "__base__"]
    with torch.no_grad():
        mixed = model(ids, adapter_names=tenants).logits
        for row, name in enumerate(tenants):
            if name == "__base__":
                with pk.disable_adapter(model):
                    alone = model(ids[row : row + 1]).logits[0]
            else:
                pk.set_adapter(model, name)
                alone = model(ids[row : row + 1]).logits[0]
            apart = (mixed[row] - alone).abs().max().item()
            print(f"row {row} ({name}): {apart:.1e} from that adapter alone")
            assert apart < 1e-3
        pk.set_adapter(model, ["ones", "fives"])

    # Each adapter is right about its own rows, and wrong about the other's.
    test = rows(["ones"] * 32 + ["fives"] * 32)
    right = {}
    for name in STRIDE:
        with torch.no_grad(), pk.adapter_rows(model, [name] * 64):
            hits = (model(test).logits[:, 3:-1].argmax(-1) == test[:, 4:]).float().mean(1)
        right[name] = hits[:32].mean().item(), hits[32:].mean().item()
        print(
            f"{name:>5}: {right[name][0]:.0%} right counting by ones, {right[name][1]:.0%} by fives"
        )
    assert right["ones"][0] > 0.9 > 0.5 > right["ones"][1]
    assert right["fives"][1] > 0.9 > 0.5 > right["fives"][0]


if __name__ == "__main__":
    main()
