"""What goes wrong with disks and processes: nothing is lost, and every error says what to do."""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import crash
from peftkern import native, optim
from peftkern.optim import files
from peftkern.optim.files import Disk, NativeDisk, newest_record
from peftkern.testing import assert_same_bits

SMALL = {"ram_budget": 4 * 8192, "bucket_bytes": 8192}


class FlakyDisk(Disk):
    """Fails with ``error`` from the ``after``-th write or read on, until it is mended."""

    def __init__(self) -> None:
        self.fail: str | None = None
        self.short = False

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        if self.fail == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fail == "nothing written":
            return 0
        return super().write(fd, data[: len(data) // 3 + 1] if self.short else data, offset)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        if self.fail == "read":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(fd, into[: len(into) // 3 + 1] if self.short else into, offset)


def start(n: int = 9000) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, n))]


def one_step(optimizer: Any, params: list[nn.Parameter], step: int) -> None:
    make = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=make)
    optimizer.step()


def unpaged(steps: int, n: int = 9000) -> torch.Tensor:
    params = start(n)
    optimizer = optim.AdamW(params)
    for step in range(steps):
        one_step(optimizer, params, step)
    return params[0].detach()


@pytest.mark.parametrize("kind", ["fp32", "8bit"])
def test_kills_leave_a_whole_step(kind: str) -> None:
    truth = crash.golden(kind)
    begun = set()
    for seed in range(8):
        problem, steps = crash.simulated_kill(kind, seed, truth)
        assert not problem, f"seed {seed}: {problem}"
        begun.add(steps)
    assert len(begun) > 2, "the kills came at few places"


@pytest.mark.slow
def test_two_hundred_random_kills() -> None:
    assert crash.run(simulated=196, processes=4, seed=1000) == []


@pytest.mark.parametrize("fail", ["write", "nothing written"])
@pytest.mark.parametrize("persistent", [False, True], ids=["scratch", "directory"])
def test_a_full_disk_loses_nothing(fail: str, persistent: bool, tmp_path: Path) -> None:
    disk, params = FlakyDisk(), start()
    where: dict[str, Any] = {"page_dir": tmp_path, "keep_parameters": True} if persistent else {}
    optimizer = optim.PagedAdamW(params, disk=disk, **SMALL, **where)
    one_step(optimizer, params, 0)
    one_step(optimizer, params, 1)
    optimizer.pager.settle()
    disk.fail = fail
    one_step(optimizer, params, 2)  # is done in memory
    assert_same_bits(params[0].detach(), unpaged(3))
    with pytest.raises(optim.PagingError, match="whole in memory"):
        one_step(optimizer, params, 3)
    assert_same_bits(params[0].detach(), unpaged(3))
    if persistent:
        record = newest_record(tmp_path)[1]
        assert record is not None
        assert record.steps == [2]
    disk.fail = None
    one_step(optimizer, params, 3)
    one_step(optimizer, params, 4)
    optimizer.close()
    assert_same_bits(params[0].detach(), unpaged(5))
    if persistent:
        again = start()
        with optim.PagedAdamW(again, **SMALL, **where, resume=True) as optimizer:
            one_step(optimizer, again, 5)
        assert_same_bits(again[0].detach(), unpaged(6))


def test_no_room_shows_at_once(tmp_path: Path) -> None:
    class Full(Disk):
        def allocate(self, fd: int, size: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(optim.PagingError, match=r"no room for \d+ buckets of 8192 bytes"):
        optim.PagedAdamW(start(), disk=Full(), page_dir=tmp_path, **SMALL)


def test_short_reads_and_writes_are_continued(tmp_path: Path) -> None:
    disk, params = FlakyDisk(), start()
    disk.short = True
    with optim.PagedAdamW(params, disk=disk, page_dir=tmp_path, **SMALL) as optimizer:
        for step in range(3):
            one_step(optimizer, params, step)
    assert_same_bits(params[0].detach(), unpaged(3))


def test_a_read_error_stops_the_optimizer() -> None:
    disk, params = FlakyDisk(), start()
    optimizer = optim.PagedAdamW(params, disk=disk, **SMALL)
    one_step(optimizer, params, 0)
    disk.fail = "read"
    with pytest.raises(optim.PagingError, match="cannot be read back"):
        one_step(optimizer, params, 1)
    disk.fail = None
    with pytest.raises(optim.PagingError, match="load a checkpoint"):
        one_step(optimizer, params, 1)


def test_damage_is_noticed(tmp_path: Path) -> None:
    params = start()
    settings: dict[str, Any] = {"page_dir": tmp_path, "keep_parameters": True, **SMALL}
    with optim.PagedAdamW(params, **settings) as optimizer:
        for step in range(3):
            one_step(optimizer, params, step)
    data = tmp_path / "state.bin"
    whole = data.read_bytes()
    damaged = bytearray(whole)
    for at in range(100, len(whole), 8192):
        damaged[at] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(optim.PagingError, match="checksum differs"):
        optim.PagedAdamW(start(), **settings, resume=True)
    data.write_bytes(whole)

    # Every bit of either journal: the other one, or an error, but never other state.
    journals = [tmp_path / "journal.0", tmp_path / "journal.1"]
    sequence, newest = newest_record(tmp_path)
    file = journals[sequence % 2]
    content = file.read_bytes()
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        file.write_bytes(flipped)
        assert newest_record(tmp_path)[0] == sequence - 1
    for length in range(0, len(content), 11):
        file.write_bytes(content[:length])
        assert newest_record(tmp_path)[0] == sequence - 1
    file.write_bytes(content)
    assert newest_record(tmp_path) == (sequence, newest)
    for journal in journals:
        journal.write_bytes(journal.read_bytes()[:-1])
    with pytest.raises(optim.PagingError, match="both journals"):
        optim.PagedAdamW(start(), **settings, resume=True)


def test_a_directory_belongs_to_one_run(tmp_path: Path) -> None:
    params = start()
    first = optim.PagedAdamW(params, page_dir=tmp_path, **SMALL)
    with pytest.raises(optim.PagingError, match="in use by another optimizer"):
        optim.PagedAdamW(start(), page_dir=tmp_path, resume=True, **SMALL)
    one_step(first, params, 0)
    first.close()
    with pytest.raises(ValueError, match="pass resume=True"):
        optim.PagedAdamW(start(), page_dir=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="belongs to other parameters"):
        optim.PagedAdamW(start(8999), page_dir=tmp_path, resume=True, **SMALL)
    optim.PagedAdamW(start(), page_dir=tmp_path, resume=True, **SMALL).close()


def test_commits_every_few_steps_and_sync(tmp_path: Path) -> None:
    params = start()
    with optim.PagedAdamW(params, page_dir=tmp_path, commit_every=3, **SMALL) as optimizer:
        found = []
        for step in range(7):
            one_step(optimizer, params, step)
            optimizer.pager.settle()
            record = newest_record(tmp_path)[1]
            assert record is not None
            found.append(record.steps[0])
        assert found == [-1, -1, 3, 3, 3, 6, 6]
        optimizer.sync()
        record = newest_record(tmp_path)[1]
        assert record is not None
        assert record.steps == [7]
        assert optimizer.paging_report()["commits"] == 4
    assert_same_bits(params[0].detach(), unpaged(7))


def test_a_forked_child_leaves_the_pager_alone(tmp_path: Path) -> None:
    params = start()
    optimizer = optim.PagedAdamW(params, page_dir=tmp_path, **SMALL)
    one_step(optimizer, params, 0)
    optimizer.pager.settle()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            optimizer.close()  # does nothing here
            one_step(optimizer, params, 1)
        except optim.PagingError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as answer:
        assert "forked process" in answer.read()
    one_step(optimizer, params, 1)
    optimizer.close()
    assert_same_bits(params[0].detach(), unpaged(2))


@pytest.mark.native
def test_checksums_follow_the_standard() -> None:
    """RFC 3720's example, and the instruction against tables over every remainder of a stretch."""
    crc = native.kernels().crc32c
    assert crc(b"123456789") == 0xE3069283
    assert crc(bytes(32)) == 0x8A9136AA
    data = torch.randint(0, 256, (20_000,), dtype=torch.uint8).numpy()
    for n in (*range(40), 2047, 6143, 6144, 6145, 12_288, 12_301, 20_000):
        assert (
            crc(data[:n]) == crc(data[:n], 0, False) == crc(data[n // 3 : n], crc(data[: n // 3]))
        )


@pytest.mark.native
def test_native_pages_are_those_of_the_portable_code(tmp_path: Path) -> None:
    data = memoryview(torch.randint(0, 256, (3 << 20,), dtype=torch.uint8).numpy())[: (3 << 20) - 5]
    fd = os.open(tmp_path / "page", os.O_RDWR | os.O_CREAT)
    for write, read in ((Disk(), NativeDisk()), (NativeDisk(), Disk())):
        for name in ("crc32", "crc32c"):
            value = write.write_page(fd, data, 4096, name)
            into = memoryview(bytearray(len(data)))
            assert read.read_page(fd, into, 4096, name) == value
            assert into == data
    with pytest.raises(OSError, match=r"short read: .* bytes at offset 4096"):
        NativeDisk().read_page(fd, memoryview(bytearray(4 << 20)), 4096, "crc32c")
    os.close(fd)
    for call in (NativeDisk().read_page, NativeDisk().write_page):
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            call(fd, memoryview(bytearray(8)), 0, "crc32c")
        assert raised.value.errno == errno.EBADF


def test_a_directory_keeps_the_checksum_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installations with and without the native module share directories where they can."""
    params = start()
    settings: dict[str, Any] = {"page_dir": tmp_path, "keep_parameters": True, **SMALL}
    with monkeypatch.context() as without:
        without.setattr(files, "preferred_checksum", lambda: "crc32")
        with optim.PagedAdamW(params, **settings) as optimizer:
            one_step(optimizer, params, 0)
    again = start()
    with optim.PagedAdamW(again, **settings, resume=True) as optimizer:
        one_step(optimizer, again, 1)
    record = newest_record(tmp_path)[1]
    assert record is not None
    assert record.checksum == "crc32"
    assert_same_bits(again[0].detach(), unpaged(2))
    with pytest.raises(ValueError, match="checksum: got 'md5'"):
        files.find_checksum("md5")
    monkeypatch.setattr(files.native, "available", lambda: False)
    with pytest.raises(ValueError, match="'crc32c' needs the native module"):
        files.find_checksum("crc32c")


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    """They had another magic, and no name of a checksum because it was zlib's."""
    params = start()
    settings: dict[str, Any] = {"page_dir": tmp_path, "keep_parameters": True, **SMALL}
    with pytest.MonkeyPatch.context() as old:
        old.setattr(files, "preferred_checksum", lambda: "crc32")
        old.setattr(files, "_MAGICS", files._MAGICS[::-1])
        with optim.PagedAdamW(params, **settings) as optimizer:
            one_step(optimizer, params, 0)
    for journal in tmp_path.glob("journal.*"):
        magic, sequence, _, _ = files._HEADER.unpack_from(journal.read_bytes())
        assert magic == b"PKPAGES1"
        payload = journal.read_bytes()[files._HEADER.size :]
        payload = payload.replace(b', "checksum": "crc32"', b"")
        rest = struct.pack("<QQ", sequence, len(payload)) + payload
        header = files._HEADER.pack(magic, sequence, len(payload), zlib.crc32(rest))
        journal.write_bytes(header + payload)
    again = start()
    with optim.PagedAdamW(again, **settings, resume=True) as optimizer:
        one_step(optimizer, again, 1)
    assert_same_bits(again[0].detach(), unpaged(2))


def test_commits_go_on_while_the_next_step_runs(tmp_path: Path) -> None:
    """A sync under way does not hold up the next step; when it fails, no state is lost."""

    class GatedDisk(Disk):
        fail = False

        def sync(self, fd: int) -> None:
            assert gate.wait(60)
            if self.fail:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().sync(fd)

    gate = threading.Event()
    gate.set()
    disk, params = GatedDisk(), start()
    where: dict[str, Any] = {"page_dir": tmp_path, "keep_parameters": True}
    optimizer = optim.PagedAdamW(params, disk=disk, bucket_bytes=8192, **where)
    gate.clear()
    one_step(optimizer, params, 0)
    one_step(optimizer, params, 1)
    record = newest_record(tmp_path)[1]
    assert record is not None
    assert record.steps == [-1], "neither step can be durable yet"
    disk.fail = True
    gate.set()
    with pytest.raises(optim.PagingError, match="whole in memory"):
        optimizer.sync()
    disk.fail = False
    one_step(optimizer, params, 2)
    optimizer.close()
    record = newest_record(tmp_path)[1]
    assert record is not None
    assert record.steps == [3]
    assert_same_bits(params[0].detach(), unpaged(3))
