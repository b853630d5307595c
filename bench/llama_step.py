"""A training step of a Llama-shaped model: peftkern against HF PEFT, time and peak memory.

``python -m bench.llama_step`` (``python -m peftkern.bench.llama_step`` where installed). Every
contender lives in a process of its own, so that its memory is its own, and they take their steps
in turns, one at a time. The model is random (8 layers, 1024 wide, bf16, 2 x 256 tokens); all start
from the same weights. "frozen" is the floor: the model without adapters, forward and backward to
the embeddings. Peak memory counts from before the model was built and leaves its building out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .measure import memory_status, reset_peak_memory
from .peers import bitsandbytes_layer

NAMES = {
    "frozen": "frozen model, backward to the embeddings",
    "peft-bf16": "HF PEFT, LoRA over bf16",
    "peft-nf4": "HF PEFT over bitsandbytes NF4",
    "pk-bf16": "peftkern, LoRA over bf16",
    "pk-nf4": "peftkern, LoRA over NF4",
}


def build(options: argparse.Namespace) -> Any:
    """The dense model in bf16."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=11 * options.width // 4 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def adapt(model: Any, kind: str, rank: int) -> Any:
    """The model with adapters on every projection, as the contender ``kind`` has them."""
    settings: dict[str, Any] = dict(r=rank, lora_alpha=rank, target_modules="all-linear")
    if kind.startswith("pk"):
        import peftkern as pk

        quantize = "nf4" if kind == "pk-nf4" else None
        pk.patch(model, pk.LoRAConfig(quantize=quantize, **settings))
        return model
    import peft

    if kind == "peft-nf4":
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                parent = model.model.get_submodule(name.rpartition(".")[0])
                new = bitsandbytes_layer("nf4", layer.weight.data, nested=True)
                setattr(parent, name.rpartition(".")[2], new)
        model.is_loaded_in_4bit = True  # by which PEFT learns of it
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def make_step(kind: str, options: argparse.Namespace) -> Callable[[], float]:
    """One training step; gives the loss."""
    model = build(options).train().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.tokens)
    ids = torch.randint(options.vocabulary, shape, generator=generator)
    if kind == "frozen":
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

        def floor() -> float:
            embeddings.grad = None
            loss = model(inputs_embeds=embeddings, labels=ids).loss
            loss.backward()
            return float(loss)

        return floor
    model = adapt(model, kind, options.rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def work(options: argparse.Namespace) -> None:
    """A contender: builds, then takes one step for each line that it reads."""
    warnings.simplefilter("ignore")
    import peft  # noqa: F401  what every contender has loaded counts for none
    import transformers

    import peftkern  # noqa: F401

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    before = memory_status("VmRSS")
    step = make_step(options.worker, options)
    reset_peak_memory()
    kept = memory_status("VmRSS") - before
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        row = {
            "seconds": time.perf_counter() - start,
            "loss": loss,
            "kept": kept,
            "peak": memory_status("VmHWM") - before,
        }
        print(json.dumps(row), flush=True)


def race(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What each contender measured; they take turns, the first two steps do not count."""
    flags = [f"--{k}={getattr(options, k)}" for k in _SIZES]
    module = f"{__package__}.{Path(__file__).stem}"
    workers = {
        kind: subprocess.Popen(
            [sys.executable, "-m", module, *flags, f"--worker={kind}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in options.contenders
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in workers}
    try:
        for kind, worker in workers.items():
            _line(worker, kind, "ready")
        for _ in range(options.rounds + 2):
            for kind, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("step\n")
                worker.stdin.flush()
                found[kind].append(json.loads(_line(worker, kind, "{")))
    finally:
        for worker in workers.values():
            worker.kill()
            with worker:  # closes the pipes and waits
                pass
    return {
        kind: {
            "median": statistics.median(row["seconds"] for row in rows[2:]),
            "min": min(row["seconds"] for row in rows[2:]),
            "kept": rows[-1]["kept"],
            "peak": rows[-1]["peak"],
            "loss": rows[0]["loss"],
        }
        for kind, rows in found.items()
    }


def _line(worker: subprocess.Popen[str], kind: str, start: str) -> str:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith(start):
            return line
    raise RuntimeError(f"{kind}: the process ended with status {worker.wait()}; see its message")


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """The results as the lines of a Markdown table."""
    head = ["contender", "median", "min", "over frozen", "weights MB", "peak MB", "first loss"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    floor = found.get("frozen", {}).get("median")
    for kind, row in found.items():
        over = f"{row['median'] / floor:.2f}x" if floor else ""
        cells = [NAMES[kind], f"{row['median'] * 1e3:.0f} ms", f"{row['min'] * 1e3:.0f} ms", over]
        cells += [f"{row[part] / 1e6:.0f}" for part in ("kept", "peak")] + [f"{row['loss']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_SIZES = {
    "layers": 8,
    "width": 1024,
    "vocabulary": 8192,
    "batch": 2,
    "tokens": 256,
    "rank": 16,
    "threads": 0,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.llama_step", description=__doc__)
    for name, value in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(argv)
    options.threads = options.threads or torch.get_num_threads()
    if options.worker:
        work(options)
        return 0
    found = race(options)
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
