"""The demo: its data, its checks, its report, and a whole tiny run."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from command_line import ROOT, cli, environment

from peftkern.cli import make_app
from peftkern.cli.demo import data as demo_data
from peftkern.cli.demo.checks import check, gain
from peftkern.cli.demo.forgetting import measure, spearman
from peftkern.cli.demo.methods import METHODS, parse_methods
from peftkern.cli.demo.report import html_page, summary_rows, summary_table
from peftkern.cli.plots import Bar, Line, Point, bars, curves, scatter_log_x, smooth

# data

SOURCE = '''"""A module docstring that is certainly longer than forty characters."""

if True:
    class Thing:
        """A class docstring that is certainly longer than forty characters."""

        async def act(self):
            """A method docstring that is certainly longer than forty characters."""

            def inner():
                """A nested function docstring, certainly longer than forty characters."""

        def short(self):
            """Too short."""

def work():
    """A function docstring that is certainly longer than forty characters."""
    class Local:
        """A local class docstring that is certainly longer than forty characters."""
'''


def test_labels_come_from_the_syntax_tree() -> None:
    found = {e.text.split(" docstring")[0]: e for e in demo_data.docstrings_of(SOURCE, "pkg")}
    labels = {name: demo_data.LABELS[example.label] for name, example in found.items()}
    assert labels == {
        "A module": "module",
        "A class": "class",
        "A method": "method",
        "A nested function": "function",
        "A function": "function",
        "A local class": "class",
    }
    assert {example.group for example in found.values()} == {"pkg"}


@pytest.fixture(scope="module")
def docstrings() -> demo_data.TextDataset:
    return demo_data.stdlib_docstrings()


def test_stdlib_split_leaks_nothing(docstrings: demo_data.TextDataset) -> None:
    first = docstrings
    train, held_out = ({e.group for e in half} for half in (first.train, first.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert not demo_data.TRAIN_PACKAGES & demo_data.HELD_OUT_PACKAGES
    texts = [e.text.casefold() for e in (*first.train, *first.held_out)]
    assert len(texts) == len(set(texts))
    assert min(map(len, texts)) > 40
    counts = first.counts()
    for name in ("class", "function", "method"):
        assert counts["train"][name] + counts["held_out"][name] <= demo_data.PER_LABEL
        assert counts["held_out"][name] == 200
    assert counts["held_out"]["module"] >= 80
    assert 0.2 < first.majority() < 0.35


def test_split_is_deterministic_without_tests_duplicates_and_clashes(tmp_path: Path) -> None:
    for place in ("abc.py", "json/__init__.py", "json/test/a.py", "csv.py", "other.py"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f'"""The module docstring of {place}, longer than forty characters."""',
            'def a():\n    """One text that stands in several files and is kept only once."""',
        ]
        for index in range(9):
            lines.append(f'def f{index}():\n    """Function {index} of {place}, {"words " * 9}"""')
        kind = "class Same:" if place == "csv.py" else "def same():"
        lines.append(f'{kind}\n    """This text documents two kinds, so it has no right answer."""')
        path.write_text("\n".join(lines))
    dataset = demo_data.stdlib_docstrings(tmp_path, per_label=15)
    assert dataset == demo_data.stdlib_docstrings(tmp_path, per_label=15)
    texts = [e.text for e in (*dataset.train, *dataset.held_out)]
    assert {e.group for e in dataset.train} == {"abc", "json"}
    assert {e.group for e in dataset.held_out} == {"csv"}
    assert dataset.counts()["train"] == {"module": 2, "class": 0, "function": 10, "method": 0}
    assert dataset.counts()["held_out"]["function"] == 5
    assert not [text for text in texts if "two kinds" in text or "json/test" in text]
    assert len(texts) == len(set(texts))


def test_stdlib_without_sources_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data FILE"):
        demo_data.stdlib_docstrings(tmp_path)


def test_dataset_survives_its_file_and_limit_keeps_labels(tmp_path: Path) -> None:
    dataset = demo_data.load_file(write_rows(tmp_path / "a.jsonl", 200))
    dataset.save(tmp_path / "data.json")
    assert demo_data.TextDataset.load(tmp_path / "data.json") == dataset
    small = dataset.limit(40, 20)
    assert 36 <= len(small.train) <= 40
    assert {e.label for e in small.train} == {e.label for e in dataset.train}
    assert small == dataset.limit(40, 20)


def write_rows(path: Path, count: int, noise: bool = False) -> Path:
    rng = random.Random(7)
    words = [f"w{i}" for i in range(40)]
    rows = []
    for index in range(count):
        label = index % 3
        body = rng.choices(words, k=8)
        if not noise:
            body += [f"mark{label}"] * 2
        rng.shuffle(body)
        rows.append((" ".join(body) + f" n{index}", label))
    if path.suffix == ".csv":
        path.write_text("Label,text\n" + "".join(f"{b},{a}\n" for a, b in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{b}\t{a}\n" for a, b in rows))
    else:
        path.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_files_of_every_kind_read_alike(tmp_path: Path, name: str) -> None:
    dataset = demo_data.load_file(write_rows(tmp_path / name, 90))
    assert dataset.labels == ("0", "1", "2")
    assert len(dataset.train) + len(dataset.held_out) == 90
    assert 10 < len(dataset.held_out) < 50


def test_a_split_column_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": f"t{i}", "label": "xy"[i % 2], "split": "test" if i > 7 else "train"}
        for i in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = demo_data.load_file(path)
    assert [e.text for e in dataset.held_out] == ["t8", "t9"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "body,label\nx,1\n", "expected a header line with 'text' and 'label'"),
        ("a.jsonl", '{"text": "x"}\n', "line 1: no 'label'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{oops\n', "line 2"),
        ("a.jsonl", "[1]\n", "got a list, expected an object"),
        ("a.txt", "no tab here\n", "line 1: no tab"),
        ("a.csv", "text,label\nx,1\ny,1\n", "expected at least 2"),
        ("a.parquet", "", "expected a file ending in"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        demo_data.load_file(path)


def test_batches_hold_every_text_once_and_waste_little() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(5, 64) for _ in range(500)]
    made = demo_data.batches(lengths, 16, seed=3, epoch=1)
    assert sorted(i for rows in made for i in rows) == list(range(500))
    assert made == demo_data.batches(lengths, 16, seed=3, epoch=1)
    assert made != demo_data.batches(lengths, 16, seed=3, epoch=2)
    padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in made)
    assert padded < 1.2 * sum(lengths)


# methods, checks, report


def test_methods_are_parsed_by_name() -> None:
    assert [m.key for m in parse_methods("lora, full,lora")] == ["lora", "full"]
    with pytest.raises(ValueError, match=r"'lorra'.*expected.*full, lora"):
        parse_methods("lorra")
    with pytest.raises(ValueError, match="nothing"):
        parse_methods(" , ")


PAGING = {
    "total_bytes": 48_000_000,
    "ram_budget": 8 << 20,
    "history": [
        {
            "step": step,
            "step_seconds": 0.02,
            "stall_seconds": 0.004,
            "resident_bytes": 7_000_000,
            "bytes_read": 40_000_000,
            "bytes_written": 40_000_000,
        }
        for step in range(1, 9)
    ],
}


def fake_results() -> dict[str, Any]:
    methods: list[dict[str, Any]] = []
    for index, method in enumerate(METHODS.values()):
        methods.append(
            {
                "method": method.key,
                "title": method.title,
                "summary": method.summary,
                "lr": method.lr,
                "status": "done",
                "accuracy": 0.70 - index / 200,
                "reloaded_texts": 200,
                "right": "1" * 480 + "0" * 220,
                "base_task": {"retrieval": 0.6, "pairs": 100, "order": 0.8},
                "reload_differs": 0,
                "held_out": 700,
                "trainable": 22_000_000 if method.config is None else 333_000,
                "share": 1.0 if method.config is None else 0.015,
                "weight_bytes": 90_000_000 - index * 10_000_000,
                "checkpoint_bytes": 90_000_000 if method.config is None else 1_300_000,
                "median_step_s": 0.4,
                "seconds": 90.0,
                "losses": [1.4 / (1 + step / 50) for step in range(170)],
                "history": [[85, 0.6]],
                "memory": {
                    "loaded": 500_000_000,
                    "peak": 900_000_000,
                    "over_loaded": 400_000_000,
                    "peak_is_of_training": True,
                },
                "paging": None if method.ram_budget is None else PAGING,
                "patch_report": "" if method.config is None else "module <b> now",
            }
        )
    return {
        "schema": 2,
        "command": "peftkern demo --data '<script>'",
        "started": "2026-01-01T00:00:00+00:00",
        "quick": False,
        "interrupted": False,
        "seed": 0,
        "seconds": 480.0,
        "settings": {"epochs": 2, "batch_size": 16, "max_tokens": 64, "optimizer": "AdamW"},
        "versions": {"peftkern": "0.1.0", "python": "3.11", "peft": None},
        "machine": {"cpu": "A & B", "cores": 2, "memory_bytes": None, "system": "Linux"},
        "model": {"source": "a <model>", "origin": "here", "parameters": 22_500_000},
        "data": {
            "name": "texts",
            "description": "Texts.",
            "counts": {"train": {"a": 700, "b": 700}, "held_out": {"a": 350, "b": 350}},
        },
        "baselines": {
            "majority": 0.25,
            "probe": 0.60,
            "probe_right": "1" * 420 + "0" * 280,
            "base_task": {"retrieval": 0.7, "pairs": 100, "order": 1.0},
        },
        "methods": methods,
        "low_data": [
            {
                "method": "full",
                "title": "Full fine-tuning",
                "points": [
                    {"texts": 16, "probe": 0.30, "accuracy": 0.31},
                    {"texts": 150, "probe": 0.45, "accuracy": 0.50},
                ],
            }
        ],
        "checks": [],
    }


def test_checks_pass_on_good_figures() -> None:
    lines = check(fake_results())
    assert len(lines) == 2 * len(METHODS) + 1
    assert all(line["passed"] for line in lines)


def test_checks_name_what_did_not_learn() -> None:
    results = fake_results()
    results["methods"][1]["right"] = "000" + "1" * 420 + "0" * 277
    results["methods"][2]["accuracy"] = 0.66
    results["methods"][3]["reload_differs"] = 3
    failed = [line for line in check(results) if not line["passed"]]
    assert [(line["required"], line["text"].split(":")[0]) for line in failed] == [
        (True, "LoRA"),
        (True, "QLoRA INT8"),
        (False, "QLoRA NF4 against full fine-tuning"),
    ]
    assert "did NOT learn" in failed[0]["text"]
    assert "-4.0 points" in failed[2]["text"]


def test_checks_of_a_reduced_run_ask_for_less() -> None:
    results = fake_results() | {"quick": True}
    results["methods"][0]["accuracy"] = 0.4
    assert all(line["passed"] for line in check(results) if line["required"])
    assert "majority" in check(results)[0]["text"]


def test_gain_counts_texts_that_one_of_two_has_right() -> None:
    assert gain("1110", "0011") == (2, 1, 1 / 3**0.5)
    assert gain("10", "10") == (0, 0, 0.0)


def test_forgetting_is_none_for_the_same_model_and_seen_in_a_shuffled_one() -> None:
    before = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    before.diagonal().copy_(torch.arange(9.0, 29.0))
    assert measure(before, before) == pytest.approx({"retrieval": 1.0, "pairs": 20, "order": 1.0})
    after = before.clone()
    after[0, 0] = -9.0
    assert measure(before, after)["retrieval"] == pytest.approx(0.95)
    assert measure(before, -before)["order"] == pytest.approx(-1.0)
    ranks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(ranks, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)


def test_sentence_pairs_are_cut_after_the_first_sentence(
    docstrings: demo_data.TextDataset,
) -> None:
    firsts, rests = docstrings.sentence_pairs(30)
    assert len(firsts) == len(rests) == 30
    assert all(first.endswith(".") and ". " not in first for first in firsts)


def test_a_part_keeps_every_label_and_the_held_out_half(
    docstrings: demo_data.TextDataset,
) -> None:
    whole = docstrings
    part = whole.part(0.01)
    assert part.held_out == whole.held_out
    assert {e.label for e in part.train} == {e.label for e in whole.train}
    assert len(part.train) <= 20


def test_a_failed_method_fails_the_run() -> None:
    results = fake_results()
    results["methods"][1] = {
        "method": "lora",
        "title": "LoRA",
        "summary": "",
        "lr": 1e-3,
        "status": "failed",
        "error": "ValueError: oops",
    }
    failed = [line for line in check(results) if not line["passed"]]
    assert [line["text"] for line in failed] == ["LoRA: failed: ValueError: oops"]
    assert html_page(results)


def test_report_renders_and_loads_nothing() -> None:
    results = fake_results()
    results["checks"] = check(results)
    page = html_page(results)
    assert not re.search(r"https?:|//[a-z]|src=|href=|@import|url\(", page)
    assert "<script>" not in page
    assert "module &lt;b&gt; now" in page
    assert page.count("<svg") == 9
    assert "of optimizer state, of which at most" in page
    assert "NaN" not in page.replace("NaNs", "")
    assert "nan" not in re.findall(r'[xyd]\d?="[^"]*"', page)
    for row in summary_rows(results):
        assert row[0] in page
    assert summary_table(results).row_count == 2 + len(METHODS)


def test_report_without_memory_figures_and_interrupted() -> None:
    results = copy.deepcopy(fake_results()) | {"interrupted": True, "quick": True}
    for row in results["methods"]:
        row["memory"] = dict.fromkeys(row["memory"])
    results["methods"][-1] = {
        "method": "qlora-int8",
        "title": "QLoRA INT8",
        "summary": "",
        "lr": 1e-3,
        "status": "interrupted",
    }
    page = html_page(results)
    assert page.count("<svg") == 7
    assert "interrupted" in page
    assert "reduced run" in page


def test_plots_take_single_and_extreme_values() -> None:
    assert "<svg" in scatter_log_x([Point("a", 100.0, 0.5, 0.0, 0)], [], "x", "y")
    assert "<svg" in curves([Line("a", (1.0,), (0.0,), 0)], "x", "y")
    assert "<svg" in bars([Bar("a", (0.0,), "0", 0)])
    assert smooth([1.0, 3.0, 5.0], 2) == (1.0, 2.0, 4.0)


def test_the_names_of_rules_stand_in_the_legend() -> None:
    picture = scatter_log_x([Point("a", 1.0, 0.6, 0.02, 0)], [("probe", 0.6)], "x", "y")
    drawing, legend = picture.split("</svg>")
    assert 'class="rule"' in drawing
    assert "probe" not in drawing
    assert "probe 60.0 %" in legend


def test_more_methods_than_colours_stay_apart() -> None:
    page = html_page(fake_results())
    marks = re.findall(r'<span class="key (s\d+)"><i></i>([^<]+)', page)
    named = {name: mark for mark, name in marks}
    assert len(set(named.values())) == len(named) > len(METHODS)
    assert all(f".{mark}{{--c:" in page for mark in named.values())


# the command


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights and a word tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(40)), "mark0", "mark1", "mark2"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_tiny_demo_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    data, output = write_rows(tmp_path / "a.csv", 400), tmp_path / "out"
    result = cli(
        *("demo", "--quick", "--methods", "full,qlora-nf4", "--model", str(tiny_model)),
        *("--data", str(data), "--output", str(output), "--epochs", "2", "--threads", "1"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((output / "results.json").read_text())
    full, nf4 = results["methods"]
    assert full["status"] == nf4["status"] == "done"
    assert full["reload_differs"] == nf4["reload_differs"] == 0
    assert nf4["trainable"] < full["trainable"]
    assert nf4["weight_bytes"] < full["weight_bytes"]
    assert full["share"] == 1.0
    assert len(full["losses"]) == len(nf4["losses"])
    assert full["losses"][-1] < full["losses"][0]
    assert (output / "index.html").stat().st_size > 10_000
    assert (output / "qlora-nf4" / "adapter_model.safetensors").is_file()
    assert "reduced run" in result.stdout
    assert "QLoRA NF4" in result.stdout


@pytest.mark.slow
def test_demo_says_when_a_method_did_not_learn(tiny_model: Path, tmp_path: Path) -> None:
    data, output = write_rows(tmp_path / "a.txt", 300, noise=True), tmp_path / "out"
    result = cli(
        *("demo", "--methods", "lora", "--model", str(tiny_model), "--threads", "1"),
        *("--data", str(data), "--output", str(output), "--epochs", "1"),
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "did NOT learn" in result.stdout
    assert (output / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_what_is_done(tiny_model: Path, tmp_path: Path) -> None:
    data, output = write_rows(tmp_path / "a.jsonl", 400), tmp_path / "out"
    command = [sys.executable, "-u", "-m", "peftkern", "demo", "--methods", "lora,full"]
    command += ["--model", str(tiny_model), "--data", str(data), "--output", str(output)]
    command += ["--epochs", "400", "--threads", "1"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
        # A shell starts its background jobs with SIGINT ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    seen = ""
    for line in child.stdout:
        seen += line
        if "LoRA: step" in line:
            child.send_signal(signal.SIGINT)
            break
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == 130, seen + rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    results = json.loads((output / "results.json").read_text())
    assert results["interrupted"] is True
    assert "probe" in results["baselines"]
    assert [row["status"] for row in results["methods"]] == ["interrupted"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "magic"], "'magic'"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--model", "."], "config.json"),
        (["--data", "missing.csv"], "no such file"),
    ],
)
def test_wrong_options_are_explained(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    if "--model" not in args:
        args = [*args, "--model", str(tmp_path)]
        (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(make_app(), ["demo", "--output", str(tmp_path / "out"), *args])
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.stderr)
