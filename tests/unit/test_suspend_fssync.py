# SPDX-License-Identifier: BSD-2-Clause
"""Which file systems lie on a device, and writing them back."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from pvfront import fssync
from pvfront.fssync import mounts_on, stacked_on, sync_devices, syncfs


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    """nbd0 with a partition that a dm device uses; nbd1 plain; sda apart."""
    block = tmp_path / "sys/class/block"
    for name, number in (
        ("nbd0", "43:0"),
        ("nbd0p1", "43:1"),
        ("nbd1", "43:32"),
        ("dm-0", "253:0"),
        ("sda", "8:0"),
    ):
        (block / name / "holders").mkdir(parents=True)
        (block / name / "dev").write_text(f"{number}\n")
    (block / "nbd0/nbd0p1").mkdir()
    (block / "nbd0/nbd0p1/partition").write_text("1\n")
    (block / "nbd0p1/holders/dm-0").mkdir()
    return tmp_path / "sys"


def test_partitions_and_what_holds_them_lie_on_a_disk(sys: Path) -> None:
    assert sorted(stacked_on("/dev/nbd0", sys)) == [
        ("253:0", "dm-0"),
        ("43:0", "nbd0"),
        ("43:1", "nbd0p1"),
    ]


def test_a_device_that_is_not_there_carries_nothing(sys: Path) -> None:
    assert list(stacked_on("/dev/nbd9", sys)) == []


def line(number: str, where: str, kind: str, source: str) -> str:
    return f"40 1 {number} / {where} rw,relatime shared:1 - {kind} {source} rw\n"


def test_file_systems_are_found_by_number_through_every_layer(sys: Path) -> None:
    table = (
        line("8:0", "/", "ext4", "/dev/sda")
        + line("253:0", "/srv", "xfs", "/dev/mapper/data")
        + line("43:32", "/mnt/a\\040b", "ext4", "/dev/nbd1")
    )
    assert mounts_on(["/dev/nbd0", "/dev/nbd1"], table, sys) == {
        "/dev/mapper/data": "/srv",
        "/dev/nbd1": "/mnt/a b",
    }


def test_a_file_system_with_an_anonymous_number_is_found_by_its_source(sys: Path) -> None:
    table = line("0:45", "/btr", "btrfs", "/dev/nbd1")
    assert mounts_on(["/dev/nbd1"], table, sys) == {"/dev/nbd1": "/btr"}


def test_a_file_system_mounted_twice_is_written_back_once(sys: Path) -> None:
    table = line("43:32", "/a", "ext4", "/dev/nbd1") + line("43:32", "/b", "ext4", "/dev/nbd1")
    assert mounts_on(["/dev/nbd1"], table, sys) == {"/dev/nbd1": "/a"}


def test_no_devices_means_no_file_systems(sys: Path) -> None:
    assert mounts_on([], line("8:0", "/", "ext4", "/dev/sda"), sys) == {}


def test_syncfs_works_on_a_directory_and_reports_one_that_is_not_there(tmp_path: Path) -> None:
    syncfs(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        syncfs(str(tmp_path / "none"))


@pytest.fixture
def two_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fssync, "mounts_on", lambda *args: {"/dev/a": "/a", "/dev/b": "/b"})


async def test_file_systems_are_written_back_side_by_side(
    monkeypatch: pytest.MonkeyPatch, two_mounts: None
) -> None:
    loop = asyncio.get_running_loop()
    both, waiting = asyncio.Event(), []

    def meet(where: str) -> None:
        def arrived() -> None:
            waiting.append(where)
            if len(waiting) == 2:
                both.set()

        loop.call_soon_threadsafe(arrived)
        asyncio.run_coroutine_threadsafe(both.wait(), loop).result(60)

    monkeypatch.setattr(fssync, "syncfs", meet)
    assert await sync_devices(["/dev/x"], 60) == ["/a", "/b"]


async def test_a_file_system_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, two_mounts: None, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(where: str) -> None:
        if where == "/a":
            raise OSError(5, "Input/output error", where)

    monkeypatch.setattr(fssync, "syncfs", fail)
    assert await sync_devices(["/dev/x"], 60) == ["/a", "/b"]
    assert "/a: cannot be written back" in caplog.text


async def test_a_file_system_that_takes_too_long_is_named(
    monkeypatch: pytest.MonkeyPatch, two_mounts: None
) -> None:
    release = threading.Event()
    monkeypatch.setattr(fssync, "syncfs", lambda where: release.wait(60) if where == "/b" else None)
    with pytest.raises(TimeoutError, match=r"still being written back after 0\.1 s: /b"):
        await sync_devices(["/dev/x"], 0.1)
    release.set()
