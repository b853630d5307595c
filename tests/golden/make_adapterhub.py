"""Makes and checks the golden files in ``tests/golden/adapterhub`` with AdapterHub's ``adapters``.

Run in an environment of its own, because ``adapters`` 1.3.0 needs transformers 4.57::

    pip install adapters==1.3.0 "transformers==4.57.*" torch==2.13.0
    python tests/golden/make_adapterhub.py              # writes the golden files
    python tests/golden/make_adapterhub.py --check DIR  # loads files that peftkern wrote

and in peftkern's environment, to make such files::

    python tests/golden/make_adapterhub.py --write DIR

For each architecture there is a tiny model with random weights; for each case an adapter with
random weights, as ``adapters`` saves it, and the model's output with it for fixed inputs.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GOLDEN = Path(__file__).parent / "adapterhub"
ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit")
NAME = "golden"

# Changes to the preset that a case starts from.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "seq_bn": ("seq_bn", {}),
    "double_seq_bn": ("double_seq_bn", {}),
    "par_bn": ("par_bn", {"reduction_factor": 8}),
    "scaled_par_bn": ("scaled_par_bn", {"reduction_factor": 16, "leave_out": [0]}),
    "adapter_plus": ("adapter_plus", {}),
    "norms": (
        "double_seq_bn",
        {
            "ln_before": True,
            "ln_after": True,
            "use_gating": True,
            "scaling": "learned",
            "cross_adapter": True,
            "non_linearity": "gelu_new",
            "reduction_factor": {"1": 4, "default": 16},
        },
    ),
    "inside": (
        "seq_bn",
        {
            "ln_after": True,
            "adapter_residual_before_ln": True,
            "residual_before_ln": False,
            "mh_adapter": True,
            "non_linearity": "leakyrelu",
            "scaling": "channel",
        },
    ),
    "alone": ("seq_bn", {"original_ln_after": False, "mh_adapter": True, "non_linearity": "tanh"}),
    "post_add": ("seq_bn", {"residual_before_ln": "post_add", "mh_adapter": True}),
}


def cases_of(architecture: str) -> list[str]:
    """ "post_add" exists only where the normalisation follows the residual."""
    return [case for case in CASES if case != "post_add" or architecture == "bert"]


def model_class(architecture: str) -> Any:
    import transformers

    names = {"bert": "BertModel", "gpt2": "GPT2Model", "llama": "LlamaModel", "t5": "T5Model"}
    return getattr(transformers, names.get(architecture, "ViTModel"))


def load_base(architecture: str) -> nn.Module:
    """One attention implementation, because the two transformers choose different ones."""
    folder = GOLDEN / architecture
    return model_class(architecture).from_pretrained(folder, attn_implementation="eager").eval()


def tiny(architecture: str) -> nn.Module:
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    configs = {
        "bert": lambda: transformers.BertConfig(
            vocab_size=40, max_position_embeddings=16, **sizes, **quiet
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, n_inner=40
        ),
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=40, max_position_embeddings=16, num_key_value_heads=1, **sizes
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=16, d_ff=40, num_layers=2, num_heads=2
        ),
        "vit": lambda: transformers.ViTConfig(image_size=8, patch_size=4, **sizes, **quiet),
    }
    torch.manual_seed(ARCHITECTURES.index(architecture))
    model = model_class(architecture)(configs[architecture]())
    # T5 does not scale its attention: larger weights than these make 3e-5 of the rounding of fp32,
    # which is another one on every processor.
    randomize(model, 0.1 if architecture == "t5" else 0.25)
    return model.eval()


@torch.no_grad()
def randomize(module: nn.Module, share: float) -> None:
    """Moves every parameter, so that no default hides an error; 8 bits of each, to pack well."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * share)
        parameter.copy_(parameter.bfloat16())


def inputs_of(architecture: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    if architecture == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids = torch.randint(1, 40, (3, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if architecture == "t5":
        batch["decoder_input_ids"] = torch.randint(1, 40, (3, 5), generator=generator)
    return batch


@torch.no_grad()
def run(model: nn.Module, architecture: str) -> Tensor:
    return model(**inputs_of(architecture)).last_hidden_state


def _without_torchvision() -> None:
    """``adapters`` takes stochastic depth from torchvision; it does nothing in evaluation."""
    import adapters.methods.modeling as modeling

    class StochasticDepth(nn.Identity):
        def __init__(self, p: float, mode: str) -> None:
            super().__init__()

    stand_in = types.ModuleType("torchvision.ops.stochastic_depth")
    stand_in.StochasticDepth = StochasticDepth
    for name in ("torchvision", "torchvision.ops"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[stand_in.__name__] = stand_in
    modeling.is_torchvision_available = lambda: True


def _adapterhub_model(architecture: str) -> Any:
    import adapters

    _without_torchvision()

    model = load_base(architecture)
    model.config._name_or_path = model.name_or_path = f"tiny-{architecture}"
    adapters.init(model)
    return model.eval()


def make() -> None:
    """Writes the golden files."""
    import adapters
    from safetensors.torch import save_file

    outputs = {}
    for number, architecture in enumerate(ARCHITECTURES):
        tiny(architecture).save_pretrained(GOLDEN / architecture)
        model = load_base(architecture)
        outputs[f"{architecture}.base"] = run(model, architecture)
        for case in cases_of(architecture):
            preset, changes = CASES[case]
            model = _adapterhub_model(architecture)
            plus = preset == "adapter_plus"  # the one preset that has no name there
            start = adapters.AdapterPlusConfig() if plus else adapters.AdapterConfig.load(preset)
            config = start.replace(**changes)
            model.add_adapter(NAME, config=config)
            model.set_active_adapters(NAME)
            torch.manual_seed(100 + number)
            for parameter_name, parameter in model.named_parameters():
                if f".{NAME}." in parameter_name:
                    holder = nn.ParameterList([parameter])
                    randomize(holder, 0.3)
            model.eval()
            folder = GOLDEN / architecture / case
            # adapters 1.3.0 cannot write the tensors that ln_before shares as safetensors.
            model.save_adapter(str(folder), NAME, use_safetensors="ln_before" not in changes)
            outputs[f"{architecture}.{case}"] = run(model, architecture)
            moved = (outputs[f"{architecture}.{case}"] - outputs[f"{architecture}.base"]).abs()
            print(f"{architecture} {case}: the adapter moves the output by {moved.max():.3f}")
    save_file(outputs, GOLDEN / "outputs.safetensors")


def write(root: Path) -> None:
    """Saves adapters of peftkern, with the outputs that it computes; run where peftkern is."""
    from safetensors.torch import save_file

    import peftkern as pk

    outputs = {}
    for architecture in ARCHITECTURES:
        for case in cases_of(architecture):
            preset, changes = CASES[case]
            model = load_base(architecture)
            pk.patch(model, pk.BottleneckConfig.preset(preset, **changes))
            torch.manual_seed(5)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    randomize(nn.ParameterList([parameter]), 0.3)
            pk.save_adapter(model, root / architecture / case, format="adapterhub")
            outputs[f"{architecture}.{case}"] = run(model.eval(), architecture)
    save_file(outputs, root / "outputs.safetensors")


def check(root: Path) -> int:
    """Loads what :func:`write` wrote into ``adapters``; 0 when every output agrees."""
    from safetensors.torch import load_file

    expected = load_file(root / "outputs.safetensors")
    worst = 0.0
    for architecture in ARCHITECTURES:
        for case in cases_of(architecture):
            model = _adapterhub_model(architecture)
            info: dict[str, Any] = {}
            name = model.load_adapter(
                str(root / architecture / case),
                use_safetensors=True,
                set_active=True,
                loading_info=info,
            )
            keys = info.get("missing_keys", []) + info.get("unexpected_keys", [])
            model.eval()
            error = float(
                (run(model, architecture) - expected[f"{architecture}.{case}"]).abs().max()
            )
            worst = max(worst, error if not keys else float("inf"))
            print(f"{architecture} {case} as {name!r}: largest difference {error:.2e}, keys {keys}")
    print(f"worst: {worst:.2e}")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.check is not None:
        sys.exit(check(arguments.check))
    elif arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)
        write(arguments.write)
    else:
        make()
