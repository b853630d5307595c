"""Patch a Hugging Face model: QLoRA on every linear layer, trained, saved, and undone.

Needs ``pip install "peftkern[hf,peft]"``. The model is a small Llama from a configuration, the
text this file: nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern as pk

STEPS, WIDTH = 40, 128


def small_llama() -> LlamaForCausalLM:
    """Two layers over bytes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,  # nothing is pretrained: logits need room to move
        )
    )


def batches(rows: int, length: int) -> torch.Tensor:
    """Pieces of this file, as bytes."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    starts = torch.randint(len(text) - length, (rows,))
    return torch.stack([text[start : start + length] for start in starts.tolist()])


def main() -> None:
    model = small_llama()
    probe = batches(2, 64)
    before = model(probe).logits.detach()

    handle = pk.patch(model, pk.LoRAConfig(r=16, lora_alpha=32, lora_dropout=0.05, quantize="nf4"))
    print(handle.report())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trainable: {trainable:,} parameters")

    # Is what the kernels compute right, on this model and this batch? Module by module, by the
    # plain torch reference.
    verdict = handle.verify({"input_ids": probe, "labels": probe})
    print(f"verified: {verdict.ok}")
    assert verdict.ok

    optimizer = pk.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(STEPS):
        ids = batches(4, 64)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"loss: {first:.3f} -> {last:.3f} in {STEPS} steps")
    assert last < first - 1.0

    model.eval()
    trained = model(probe).logits.detach()
    with tempfile.TemporaryDirectory() as folder:
        pk.save_adapter(model, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"adapter: {size / 1e3:.0f} kB in PEFT's files")
        handle.unpatch()
        undone = model(probe).logits.detach()
        print(f"after unpatch the outputs are the same bits: {torch.equal(undone, before)}")
        assert torch.equal(undone, before)

        # The real PEFT opens the file. Its base is the dense one here, so only the rounding to
        # 4 bits stands between the two.
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(model, folder)(probe).logits.detach()
    far, near = (trained - before).norm().item(), (trained - theirs).norm().item()
    print(f"PEFT over the dense base: {near:.2f} from ours; the training moved it by {far:.2f}")
    assert near < 0.5 * far


if __name__ == "__main__":
    main()
