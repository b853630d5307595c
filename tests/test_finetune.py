"""`peftkern finetune`: rows, encoding, whole runs on tiny models, resuming, wrong options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from typer.testing import CliRunner  # noqa: E402

from peftkern.cli import make_app  # noqa: E402
from peftkern.cli.finetune import encode, rows  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(30)), "good", "bad"]


def tokenizer() -> Any:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    line = " ".join(f"w{i % 7}" for i in range(40))
    path.write_text("\n\n".join([line] * 40))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(make_app(), ["finetune", *map(str, arguments)])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


# rows and encoding


def test_rows_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n\n{"text": "y", "label": 0}\n')
    (tmp_path / "a.csv").write_text('Text,Label\n"x, y",1\n')
    (tmp_path / "a.tsv").write_text("text\tlabel\nx\t1\n")
    (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n\n\n")
    assert rows.read_rows(tmp_path / "a.jsonl")[0] == {"text": "x", "label": "1"}
    assert rows.read_rows(tmp_path / "a.csv") == [{"text": "x, y", "label": "1"}]
    assert rows.read_rows(tmp_path / "a.tsv") == [{"text": "x", "label": "1"}]
    assert [row["text"].strip() for row in rows.read_rows(tmp_path / "a.txt")] == [
        "one\nmore",
        "two",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{oops\n", "line 1"),
        ("a.jsonl", "[1]\n", "expected an object"),
        ("a.xml", "x", "expected a file ending in"),
        ("a.txt", "\n\n", "no rows"),
        ("a.csv", "", "no header"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        rows.read_rows(tmp_path / name)


def test_tasks_are_inferred_from_columns() -> None:
    assert rows.infer_task([{"text": "", "label": ""}], False) == "classification"
    assert rows.infer_task([{"text": ""}], False) == "causal-lm"
    assert rows.infer_task([{"prompt": "", "completion": ""}], False) == "causal-lm"
    assert rows.infer_task([{"source": "", "target": ""}], True) == "seq2seq"
    with pytest.raises(ValueError, match="got the columns x"):
        rows.infer_task([{"x": ""}], False)


def test_split_is_deterministic_and_leaves_both_halves() -> None:
    data = [{"text": str(i)} for i in range(10)]
    assert rows.split(data, 0.3, 1) == rows.split(data, 0.3, 1)
    train, held = rows.split(data, 0.3, 1)
    assert (len(train), len(held)) == (7, 3)
    assert rows.split(data[:2], 0.01, 0)[1]
    with pytest.raises(ValueError, match="one row only"):
        rows.split(data[:1], 0.5, 0)


def test_only_the_completion_is_learned_and_long_prompts_lose_their_start() -> None:
    row = {"prompt": "w1 w2 w3 w4", "completion": "w5 w6"}
    item = encode.encode([row], "causal-lm", tokenizer(), 64, [])[0]
    assert item["labels"][:4] == [-100] * 4
    assert item["labels"][4:] == item["input_ids"][4:]
    assert item["input_ids"][-1] == 2  # the end is learned, too
    short = encode.encode([row], "causal-lm", tokenizer(), 5, [])[0]
    assert short["input_ids"] == item["input_ids"][2:]


def test_texts_are_packed_into_whole_blocks() -> None:
    items = encode.encode([{"text": "w1 w2 w3"}] * 5, "causal-lm", tokenizer(), 8, [])
    assert [len(item["input_ids"]) for item in items] == [8, 8, 4]
    assert items[0]["input_ids"][3] == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_on_the_tokenizers_side(side: str) -> None:
    made = tokenizer()
    made.padding_side = side
    items = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    batch = encode.Collator(made)(items)
    short = [0, 7] if side == "left" else [7, 0]
    assert batch["input_ids"].tolist() == [[5, 6], short]
    assert batch["attention_mask"].tolist() == [[1, 1], [int(i > 0) for i in short]]
    assert batch["labels"].tolist()[1] == [i or -100 for i in short]


def test_unknown_and_missing_labels_are_named() -> None:
    with pytest.raises(ValueError, match="'maybe' is not in the training rows"):
        encode.encode([{"text": "w1", "label": "maybe"}], "classification", tokenizer(), 8, ["a"])
    with pytest.raises(ValueError, match="row 1 has no 'text'"):
        encode.encode([{"label": "a"}], "classification", tokenizer(), 8, ["a", "b"])
    with pytest.raises(ValueError, match="expected at least 2"):
        encode.label_names([{"text": "x", "label": "a"}])


# whole runs


def test_causal_lm_learns_and_resumes_exactly(llama: Path, text: Path, tmp_path: Path) -> None:
    common = ("--model", llama, "--data", text, "--method", "qlora", "--r", 4, "--lr", 5e-2)
    common += ("--max-length", 32, "--batch-size", 4, "--max-steps", 8, "--save-steps", 4)
    common += ("--dropout", 0.1, "--dtype", "float32")
    whole = run(*common, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "verify:" in whole.output
    report = report_of(tmp_path / "whole")
    losses = [row["loss"] for row in report["log"] if "loss" in row]
    assert report["held_out"]["loss"] < losses[0] - 0.2
    assert report["held_out"]["perplexity"] > 1
    assert "<svg" in (tmp_path / "whole" / "index.html").read_text()
    # As if the run had been cut after its first checkpoint.
    cut = tmp_path / "cut"
    cut.mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(cut / "checkpoint-4")
    (cut / "checkpoint-6").mkdir()  # a save that was killed: not whole, so not taken
    again = run(*common, "--output", cut, "--resume")
    assert again.exit_code == 0, again.output
    name = "final/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # A run that is at its end stays there.
    more = run(*common, "--output", cut, "--resume")
    assert more.exit_code == 0, more.output
    assert "nothing is left to train" in " ".join(more.output.split())
    assert report_of(cut)["steps"] == 8
    assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert report_of(cut)["held_out"] == report["held_out"]


def test_epochs_that_are_over_are_not_trained_again(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    common = ("--model", llama, "--data", text, "--method", "full", "--output", tmp_path)
    common += ("--max-length", 32, "--batch-size", 8, "--dtype", "float32")
    first = run(*common, "--epochs", 1)
    assert first.exit_code == 0, first.output
    steps = report_of(tmp_path)["steps"]
    weights = (tmp_path / "final" / "model.safetensors").read_bytes()
    again = run(*common, "--epochs", 1, "--resume")
    assert again.exit_code == 0, again.output
    assert report_of(tmp_path)["steps"] == steps
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == weights
    longer = run(*common, "--epochs", 2, "--resume")
    assert longer.exit_code == 0, longer.output
    assert report_of(tmp_path)["steps"] == 2 * steps


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "adapters", "ia3", "prefix", "prompt", "sparse"])
def test_every_method_trains_and_resumes(
    llama: Path, text: Path, tmp_path: Path, method: str
) -> None:
    common = ("--model", llama, "--data", text, "--method", method, "--max-length", 32)
    common += ("--batch-size", 4, "--dtype", "float32", "--save-steps", 2, "--r", 4)
    done = run(*common, "--max-steps", 2, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    again = run(*common, "--max-steps", 3, "--output", tmp_path, "--resume")
    assert again.exit_code == 0, again.output
    assert report_of(tmp_path)["steps"] == 3


def test_classification_reports_accuracy(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [
        {"text": f"w{i % 30} w{i % 11} {'good' if i % 2 else 'bad'}", "label": "ab"[i % 2]}
        for i in range(120)
    ]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    done = run(
        *("--model", llama, "--data", data, "--method", "lora", "--lr", 1e-2, "--epochs", 3),
        *("--r", 4, "--max-length", 8, "--dtype", "float32", "--output", tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path / "out")
    assert report["task"] == "classification"
    assert report["held_out"]["accuracy"] > 0.9
    assert report["labels"] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lorra"), "--method: got 'lorra'"),
        (("--optimizer", "sgd"), "--optimizer: got 'sgd'"),
        (("--dtype", "int4"), "--dtype: got 'int4'"),
        (("--task", "guess"), "--task: got 'guess'"),
        (("--resume",), "--resume: there is no whole checkpoint"),
    ],
)
def test_wrong_options_end_with_2(
    llama: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    base = ("--model", llama, "--data", text, "--output", tmp_path / "out", "--no-verify")
    done = run(*base, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_missing_model_and_data_are_named(llama: Path, text: Path, tmp_path: Path) -> None:
    done = run("--model", tmp_path / "none", "--data", text)
    assert done.exit_code == 2
    assert "--model: no such folder" in done.output
    done = run("--model", llama, "--data", tmp_path / "none.jsonl")
    assert done.exit_code == 2
    assert "--data: no such file" in done.output
