"""Accelerate a model that PEFT has wrapped: the same numbers, by fused kernels, in place.

Needs ``pip install "peftkern[hf,peft]"``. A small Llama from a configuration; no download.
"""

from __future__ import annotations

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern as pk

ROUNDS = 7


def wrapped() -> torch.nn.Module:
    """A Llama of four layers with PEFT's LoRA on every linear layer, adapters not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Of one training step."""
    begin = time.perf_counter()
    step(model, ids)
    return time.perf_counter() - begin


def main() -> None:
    ids = torch.randint(256, (2, 128))
    model, plain = wrapped(), wrapped()
    names = set(model.state_dict())
    loss_before, grads_before = step(model, ids)

    handle = pk.accelerate(model)
    print(handle.report())
    loss_after, grads_after = step(model, ids)
    assert set(model.state_dict()) == names  # nothing was renamed, added or copied
    assert grads_before.keys() == grads_after.keys()

    worst = max(((grads_after[n] - g).norm() / g.norm()).item() for n, g in grads_before.items())
    print(f"loss: {loss_before:.4f} by PEFT, {loss_after:.4f} by the kernels")
    print(f"gradients of {len(grads_before)} tensors: {worst:.1%} apart at worst (bfloat16)")
    assert abs(loss_after - loss_before) < 0.01
    assert worst < 0.05

    verdict = handle.verify({"input_ids": ids, "labels": ids})
    print(f"verified against plain torch, module by module: {verdict.ok}")
    assert verdict.ok

    # In turns, so that a noisy machine is noisy for both.
    pairs = [(seconds(plain, ids), seconds(model, ids)) for _ in range(ROUNDS)]
    theirs, ours = (min(pair[i] for pair in pairs) for i in (0, 1))
    print(f"a step here: {theirs * 1e3:.0f} ms by PEFT, {ours * 1e3:.0f} ms accelerated")

    handle.unpatch()
    loss_undone, _ = step(model, ids)
    print(f"after unpatch the loss is PEFT's again, bit for bit: {loss_undone == loss_before}")
    assert loss_undone == loss_before


if __name__ == "__main__":
    main()
