"""``python -m bench.gpu.step RESULTS.json``: a QLoRA training step of a Llama-3-8B shape.

Two decoder layers of the real width over one and over four sequences of 2048 tokens, without
gradient checkpointing: our patch against HF PEFT over bitsandbytes. Each contender reports the peak
memory of its own step. With one sequence a slow host decides as much as the GPU does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.results import Results
from bench.gpu.timing import Contender, Ruler

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _model(device: torch.device, dry: bool) -> Any:
    import transformers

    shape: dict[str, Any] = dict(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )
    if dry:
        shape |= dict(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return model.to(torch.bfloat16).train()


def _ours(device: torch.device, dry: bool) -> Any:
    import peftkern as pk

    model = _model(device, dry)
    pk.patch(model, pk.LoRAConfig(r=16, target_modules=_TARGETS, quantize="nf4"))
    return model


def _theirs(device: torch.device, dry: bool) -> Any:
    import bitsandbytes as bnb
    import peft

    model = _model(device, dry)
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] not in _TARGETS:
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data.cpu(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=layer,
        )
        model.get_submodule(name.rsplit(".", 1)[0])._modules[name.rsplit(".", 1)[-1]] = layer.to(
            device
        )
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=_TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def _step(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> object:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return torch.autograd.grad(loss, trained)

    return step


def _peak(step: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        step()
        return 1
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    # Activations and workspace of the step; the frozen weights are the same for everyone.
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    """Measure the step of everyone present."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=40.0)
    given = parser.parse_args()
    results = Results(given.results)
    device = torch.device("cpu" if given.dry else "cuda")
    length, status = 16 if given.dry else 2048, 0
    models: dict[str, Any] = {}
    for name, make in (("peftkern", _ours), ("hf-peft", _theirs)):
        try:
            models[name] = make(device, given.dry)
        except Exception as error:
            absent = "absent: " if isinstance(error, ImportError) else ""
            text = f"{absent}{type(error).__name__}: {error}"[:300]
            results.add({"case": "qlora step", "contender": name, "error": text})
            status |= name == "peftkern"
    ruler = Ruler(device, seconds=min(10.0, given.seconds / 5))
    for batch in (1, 4):
        tokens = torch.randint(0, 1024, (batch, length), device=device)
        case = "qlora step" if batch == 1 else f"qlora step, {batch} sequences"
        steps = {name: _step(model, tokens) for name, model in models.items()}
        peaks = {name: _peak(step, device) for name, step in steps.items()}
        contenders = [Contender(name, [step]) for name, step in steps.items()]
        for name, timing in ruler.compare(contenders, graph=False).items():
            row: dict[str, Any] = {"case": case, "contender": name}
            if timing.error:
                row["error"] = timing.error
                status |= name == "peftkern"
            else:
                row |= {"events_s": timing.seconds("events"), "least_s": min(timing.events)}
                row |= {"rounds": len(timing.events), "peak_bytes": peaks[name]}
            results.add(row)
            print(row, flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
