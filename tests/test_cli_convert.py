"""`peftkern convert` and `peftkern verify`, and the conversions behind them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern as pk
from peftkern.checkpoint.convert import convert_adapter
from peftkern.checkpoint.convert_model import convert_model

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
import transformers  # noqa: E402
from hf_models import VOCABULARY, batch, build, randomize_adapters  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from peftkern.cli import make_app  # noqa: E402

pytestmark = pytest.mark.hf


def run(*args: str) -> Any:
    return CliRunner().invoke(make_app(), list(args), env={"COLUMNS": "200", "NO_COLOR": "1"})


def logits(model: Any, kind: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(kind)).logits


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter on the Llama-shaped model, and the logits with it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = build("llama")
    pk.patch(model, pk.LoRAConfig(r=8, lora_alpha=12, target_modules=["q_proj", "up_proj"]))
    randomize_adapters(model)
    pk.save_adapter(model, folder)
    return folder, logits(model)


def test_adapters_into_few_bytes_and_back(
    adapted: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    source, want = adapted
    result = run("convert", str(source), str(tmp_path / "small"), "--to", "int8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes_after"] < 0.4 * facts["bytes_before"]
    assert 0 < facts["max_error"] < 0.01
    again = run("convert", str(tmp_path / "small"), str(tmp_path / "plain"), "--to", "peft")
    assert again.exit_code == 0, again.output
    outputs = []
    for folder in ("small", "plain"):
        model = build("llama")
        pk.load_adapter(model, tmp_path / folder)
        outputs.append(logits(model))
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], want, rtol=0, atol=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    torch.testing.assert_close(logits(theirs), outputs[0], rtol=1e-4, atol=1e-5)


def test_pickled_adapters_need_consent(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    source.mkdir()
    shutil.copy(adapted[0] / "adapter_config.json", source)
    tensors = safetensors_torch.load_file(adapted[0] / "adapter_model.safetensors")
    torch.save(tensors, source / "adapter_model.bin")
    args = ("convert", str(source), str(tmp_path / "out"), "--to", "peft")
    refused = run(*args)
    assert refused.exit_code == 2
    assert "pickled" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert run(*args, "--allow-pickle").exit_code == 0
    model = build("llama")
    pk.load_adapter(model, tmp_path / "out")
    assert torch.equal(logits(model), adapted[1])


def test_lora_of_adapterhub_and_back(tmp_path: Path) -> None:
    """Names, layout and scaling are those that adapters 1.3.0 writes."""
    model = build("bert")
    model.bert.save_pretrained(tmp_path / "base")
    targets = r"bert\.encoder\..*\.(query|value|intermediate\.dense|(?<!attention\.)output\.dense)"
    pk.patch(model, pk.LoRAConfig(r=4, lora_alpha=12, target_modules=targets))
    randomize_adapters(model)
    want = logits(model, "bert")
    pk.save_adapter(model, tmp_path / "peft")
    hub, back = tmp_path / "hub", tmp_path / "back"
    convert_adapter(tmp_path / "peft", hub, "adapterhub", prefix="bert", model=tmp_path / "base")
    fields = json.loads((hub / "adapter_config.json").read_text())
    assert (
        fields["config"]
        | {
            "architecture": "lora",
            "attn_matrices": ["q", "v"],
            "intermediate_lora": True,
            "output_lora": True,
            "selfattn_lora": True,
            "leave_out": [],
            "r": 4,
            "alpha": 12,
        }
        == fields["config"]
    )
    stored = safetensors_torch.load_file(hub / "adapter.safetensors")
    assert stored["encoder.layer.0.attention.self.query.loras.default.lora_A"].shape == (4, 64)
    assert run("convert", str(hub), str(back), "--to", "peft", "--prefix", "bert").exit_code == 0
    again = build("bert")
    pk.load_adapter(again, back)
    assert torch.equal(logits(again, "bert"), want)


def test_merged_matrices_of_adapterhub(tmp_path: Path) -> None:
    """GPT-2's c_attn: A of q and v on top of each other, B of each below the other."""
    a, b = torch.randn(4, 64), torch.randn(2 * 64, 2)
    safetensors_torch.save_file(
        {
            f"h.{i}.attn.c_attn.loras.x.lora_{name}": value.clone()
            for i in (0, 1)
            for name, value in (("A", a), ("B", b))
        },
        tmp_path / "adapter.safetensors",
    )
    config = {"architecture": "lora", "alpha": 6, "r": 2, "attn_matrices": ["q", "v"]}
    about = {"config": config, "name": "x", "model_type": "gpt2", "model_name": "tiny"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    convert_adapter(tmp_path, tmp_path / "peft", "peft", prefix="transformer")
    model = build("gpt2")
    pk.load_adapter(model, tmp_path / "peft")
    layer = model.transformer.h[0].attn.c_attn
    delta = layer.delta_weight("default")
    want = torch.zeros(3 * 64, 64)
    want[:64], want[128:] = 3.0 * b[:64] @ a[:2], 3.0 * b[64:] @ a[2:]
    torch.testing.assert_close(delta, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition_mode": "scale"}, "composition_mode='scale' has no counterpart"),
        ({"use_gating": True}, "use_gating=True has no counterpart"),
        ({"use_dora": True}, "use_dora"),
        ({"architecture": None}, "bottleneck adapter, which PEFT's layout cannot hold"),
    ],
)
def test_what_peft_cannot_say_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"architecture": "lora", "alpha": 6, "r": 2, "attn_matrices": ["q"]} | changes
    about = {"config": config, "name": "x", "model_type": "bert"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    safetensors_torch.save_file({"w": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_explained(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    for args, message in (
        ((str(tmp_path), "x", "--to", "peft"), "holds no adapter_config.json"),
        ((str(adapted[0]), "x", "--to", "gguf"), "expected one of peft"),
        ((str(adapted[0]), str(adapted[0]), "--to", "peft"), "is the source folder"),
        ((str(adapted[0]), str(tmp_path / "y"), "--to", "adapterhub"), "give its folder"),
    ):
        result = run("convert", *args)
        assert result.exit_code == 2
        assert message in result.stderr


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's files."""
    files = folder.glob("*.safetensors")
    return {k: v for path in files for k, v in safetensors_torch.load_file(path).items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_models_change_hands(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dense, theirs = tmp_path / "dense", tmp_path / "bnb"
    build("llama").save_pretrained(dense)
    bits: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings = transformers.BitsAndBytesConfig(**bits)
    auto = transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto.from_pretrained(dense, quantization_config=settings, device_map="cpu").save_pretrained(
            theirs, max_shard_size="60KB"
        )
    assert len(list(theirs.glob("*.safetensors"))) > 1
    seen: list[str] = []
    count = convert_model(theirs, tmp_path / "ours", "peftkern", lambda *a: seen.append(a[2]))
    assert count == 14
    assert len(seen) == len(list(theirs.glob("*.safetensors")))
    from peftkern.hf import quantizer  # noqa: F401  registers the method

    got = auto.from_pretrained(tmp_path / "ours")
    want = auto.from_pretrained(theirs, device_map="cpu")
    pk.accelerate(want)
    torch.testing.assert_close(logits(got), logits(want), rtol=1e-5, atol=1e-5)
    back = run("convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "bitsandbytes")
    assert back.exit_code == 0, back.output
    assert "14 weights" in back.output
    one, two = everything(theirs), everything(tmp_path / "back")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if "quant_state" in key:  # JSON, of another spelling
            facts = [json.loads(bytes(t.tolist())) for t in (tensor, two[key])]
            assert facts[0] | {"dtype": None} == facts[1] | {"dtype": None}
        else:
            assert torch.equal(tensor, two[key]), key
    with pytest.raises(ValueError, match="is not quantized"):
        convert_model(dense, tmp_path / "no", "peftkern")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = ["[UNK]", "[PAD]", "[EOS]", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    build("llama").save_pretrained(folder)
    return folder


def test_verify_tells_what_it_compared(
    text_model: Path, adapted: tuple[Path, torch.Tensor]
) -> None:
    texts = ("--text", "w1 w2 w3 w4", "--text", "w5 w6")
    result = run("verify", str(text_model), "--quantize", "nf4", "--dtype", "float32", *texts)
    assert result.exit_code == 0, result.output
    assert "agree" in result.output
    assert "14 modules" in result.output
    facts = run("verify", str(text_model), "--adapter", str(adapted[0]), "--json", *texts)
    assert facts.exit_code == 0, facts.output
    found = json.loads(facts.stdout)
    assert found["ok"] is True
    assert {row["module"].rsplit(".", 1)[-1] for row in found["rows"]} == {"q_proj", "up_proj"}


def test_verify_fails_when_a_kernel_is_wrong(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern import functional, registry

    right = functional.lora_linear

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(*args, **kwargs)
        return y if registry.forced_backend() == "reference" else y * 1.01

    monkeypatch.setattr(functional, "lora_linear", wrong)
    result = run("verify", str(text_model), "--dtype", "float32", "--text", "w1 w2 w3")
    assert result.exit_code == 1
    assert "DIFFER" in result.output
    missing = run("verify", "/no/such/model")
    assert missing.exit_code == 2
    assert "no such folder" in missing.stderr
