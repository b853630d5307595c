"""Adapters saved over others while the process dies or the disk is full."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkern as pk
from bench import crash_files
from peftkern.checkpoint import files


@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
@pytest.mark.parametrize("kind", ["lora", pytest.param("bottleneck", marks=pytest.mark.hf)])
def test_old_or_new_at_every_call(kind: str, full: bool) -> None:
    calls, wrong = crash_files.simulated(crash_files.Adapters(kind), full)
    assert not wrong, "\n".join(wrong)
    assert calls >= 10


def test_a_second_adapter_without_a_copy_removes_the_first_ones(tmp_path: Path) -> None:
    """The file of copies of the adapter before would be loaded into the next one."""
    pytest.importorskip("transformers")
    adapters = crash_files.Adapters("bottleneck")
    adapters.save(1, tmp_path)
    adapters.save(0, tmp_path)
    assert adapters.found(tmp_path) == 0


@pytest.mark.parametrize(
    "journal",
    [
        {"new": {"adapter_config.json": "../../etc/passwd"}, "gone": []},
        {"new": {"../adapter_config.json": "a"}, "gone": []},
        {"new": {"adapter_config.json": "a"}, "gone": ["../x"]},
        {"new": {"adapter_config.json": 3}, "gone": []},
        {"new": {}, "gone": []},
        {"new": ["a"], "gone": []},
        {},
    ],
)
def test_a_journal_reaches_nothing_outside_its_folder(tmp_path: Path, journal: object) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pk.patch(model, pk.LoRAConfig(r=2, target_modules=["0"]))
    pk.save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / files.JOURNAL).write_text(json.dumps(journal))
    for act in (pk.load_adapter, pk.save_adapter):
        with pytest.raises(ValueError, match="not the journal of a save"):
            act(model, tmp_path / "a")


def test_permissions_follow_the_umask_and_nothing_changes_it(tmp_path: Path) -> None:
    """A mask that is put aside for a moment would hold for files of other threads."""
    before = os.umask(0o027)
    try:
        seen, ends = set(), threading.Event()

        def watch() -> None:
            while not ends.is_set():
                fd = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT, 0o666)
                seen.add(stat.S_IMODE(os.fstat(fd).st_mode))
                os.close(fd)
                (tmp_path / "other").unlink()

        thread = threading.Thread(target=watch)
        thread.start()
        for i in range(200):
            files.write_atomically(tmp_path / "file", bytes([i]))
        ends.set()
        thread.join()
        assert seen == {0o640}
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    files.write_atomically(target, b"old")
    for dies_at in (1, 2, 3):
        with pytest.raises(OSError, match="no space"), crash_files.Dying(dies_at, full=True):
            files.write_atomically(target, b"new content")
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_tensors_that_share_memory_are_written_out(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    files.write_safetensors(tmp_path / "f", {"a": whole, "b": whole[1:], "c": whole.t()})
    with files.open_safetensors(tmp_path / "f") as file:
        assert torch.equal(file.get_tensor("b"), whole[1:])
        assert torch.equal(file.get_tensor("c"), whole.t())
