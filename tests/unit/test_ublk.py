# SPDX-License-Identifier: BSD-2-Clause
"""The ublk target against a model of the kernel's driver (drivers/block/ublk_drv.c of 6.12)."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from pvfront.blkfront import ublk, ublkcontrol
from pvfront.blkfront.features import DiskGeometry
from pvfront.blkfront.target import TargetError
from pvfront.blkfront.ublk import UblkTarget
from pvfront.blkfront.ublkcontrol import DEAD, LIVE, QUIESCED, UblkDisk, UblkError, UblkInfo
from pvfront.sysfs import Roots

XVDB = 51728
DISK = DiskGeometry(
    sectors=131072,
    flush=True,
    discard=True,
    physical_sector_size=4096,
    discard_granularity=8192,
    discard_alignment=512,
)
PID = os.getpid()  # a worker that lives
NOBODY = 2**22 + 1  # past pid_max


@dataclass
class Device:
    info: UblkInfo
    disk: UblkDisk | None = None
    server: int = 0
    opened: int = 0
    collecting: int = 0  # commands until the kernel has let go of a dead server
    prepared: bool = False


class Kernel:
    """Every device there is."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.devices: dict[int, Device] = {}
        self.log: list[str] = []
        roots.dev.mkdir(parents=True)
        (roots.dev / "ublk-control").touch()
        (roots.proc / str(PID)).mkdir(parents=True)

    def put(self, index: int, name: str, value: object) -> None:
        path = self.roots.sys / "block" / f"ublkb{index}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    def get(self, index: int, name: str) -> str:
        return (self.roots.sys / "block" / f"ublkb{index}" / name).read_text().strip()

    def inode(self, node: str) -> int:
        return (self.roots.dev / node).stat().st_ino

    def link(self, target: UblkTarget) -> str | None:
        path = Path(target.link)
        return os.fspath(path.readlink()) if path.is_symlink() else None

    def state(self, index: int, state: int) -> None:
        self.devices[index].info = replace(self.devices[index].info, state=state)

    def worker_dies(self, index: int, *, noticed_after: int = 0) -> None:
        self.devices[index].collecting = noticed_after
        self.devices[index].prepared = False
        if not noticed_after:
            self.state(index, QUIESCED)


class Control:
    """Stands for ublkcontrol.UblkControl."""

    kernel: Kernel

    def __init__(self, roots: Roots) -> None:
        assert roots == self.kernel.roots

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def _device(self, operation: str, index: int) -> Device:
        self.kernel.log.append(operation)
        device = self.kernel.devices.get(index)
        if device is None:
            raise UblkError(operation, errno.ENODEV)
        if device.collecting:
            device.collecting -= 1
            if not device.collecting:
                self.kernel.state(index, QUIESCED)
        return device

    def features(self) -> int:
        return int(ublkcontrol.lib.pvf_ublk_wanted())

    def add(self, *, queues: int, owner: int) -> UblkInfo:
        index = len(self.kernel.devices)
        info = UblkInfo(index, DEAD, queues, 128, self.features(), owner)
        self.kernel.devices[index] = Device(info)
        (self.kernel.roots.dev / f"ublkc{index}").touch()
        (self.kernel.roots.sys / "class" / "ublk-char" / f"ublkc{index}").mkdir(parents=True)
        return info

    def info(self, index: int) -> UblkInfo:
        self._device("info", index)
        return self.kernel.devices[index].info

    def set_disk(self, index: int, disk: UblkDisk) -> None:
        self._device("set_disk", index).disk = disk

    def start(self, index: int, pid: int) -> None:
        device = self._device("start", index)
        disk = device.disk
        assert disk is not None
        device.server = pid
        put = self.kernel.put
        put(index, "size", disk.sectors)
        put(index, "inflight", "       0        0")
        put(index, "queue/logical_block_size", disk.sector_size)
        put(index, "queue/io_timeout", 30000)
        put(index, "queue/max_hw_sectors_kb", 1024)
        put(index, "queue/max_sectors_kb", 1024)
        put(index, "queue/write_cache", "write back" if disk.flush else "write through")
        put(index, "queue/discard_max_bytes", 1 << 30 if disk.discard_granularity else 0)
        self.kernel.state(index, LIVE)

    def recover(self, index: int) -> None:
        device = self._device("recover", index)
        if device.info.state != QUIESCED:
            raise UblkError("recover", errno.EBUSY)
        if device.prepared:
            raise UblkError("recover", errno.EINVAL)
        device.prepared = True

    def recovered(self, index: int, pid: int) -> None:
        device = self._device("recovered", index)
        assert device.info.state == QUIESCED
        assert device.prepared
        device.server = pid
        self.kernel.state(index, LIVE)

    def stop(self, index: int) -> None:
        self._device("stop", index)
        self.kernel.state(index, DEAD)

    def delete(self, index: int) -> None:
        self._device("delete", index)
        del self.kernel.devices[index]
        (self.kernel.roots.sys / "class" / "ublk-char" / f"ublkc{index}").rmdir()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel(Roots(tmp_path))
    control = type("BoundControl", (Control,), {"kernel": kernel})
    monkeypatch.setattr(ublk, "UblkControl", control)
    monkeypatch.setattr(ublkcontrol, "UblkControl", control)
    monkeypatch.setattr(ublk, "POLL", 0.001)
    monkeypatch.setattr(ublk, "LAST_CLOSE", 0.01)
    monkeypatch.setattr(UblkTarget, "open_anywhere", lambda self: None)
    return kernel


def target(kernel: Kernel) -> UblkTarget:
    made = UblkTarget(XVDB, "xvdb", roots=kernel.roots)
    made.server_pid = PID
    return made


async def serve(made: UblkTarget, geometry: DiskGeometry = DISK) -> None:
    for fd in await made.attach(geometry):
        os.close(fd)
    await made.publish(geometry)


async def served(kernel: Kernel) -> UblkTarget:
    made = target(kernel)
    await serve(made)
    return made


async def test_the_disk_appears_when_the_worker_serves(kernel: Kernel) -> None:
    made = target(kernel)
    fds = await made.attach(DISK)
    assert [os.fstat(fd).st_ino for fd in fds] == [kernel.inode("ublkc0")]
    assert "start" not in kernel.log
    await made.publish(DISK)
    assert kernel.devices[0].server == PID
    assert (made.name, made.path) == ("ublkb0", str(kernel.roots.dev / "ublkb0"))
    assert kernel.link(made) == "../ublkb0"
    assert kernel.get(0, "queue/io_timeout") == "2000"
    for fd in fds:
        os.close(fd)


async def test_what_nbd_cannot_carry_reaches_the_kernel(kernel: Kernel) -> None:
    await served(kernel)
    assert kernel.devices[0].disk == UblkDisk(131072, 512, 4096, 8192, 512, False, True)


async def test_a_disk_without_discard_has_no_granularity(kernel: Kernel) -> None:
    await serve(target(kernel), replace(DISK, discard=False, read_only=True, flush=False))
    disk = kernel.devices[0].disk
    assert disk is not None
    assert (disk.discard_granularity, disk.read_only, disk.flush) == (0, True, False)


async def test_a_generation_that_ends_asks_nothing_of_the_kernel(kernel: Kernel) -> None:
    made = await served(kernel)
    kernel.log.clear()
    await made.publish(DISK)
    assert set(kernel.log) == {"info"}


async def test_a_dead_worker_is_replaced_once_the_kernel_has_let_go_of_it(kernel: Kernel) -> None:
    made = await served(kernel)
    kernel.worker_dies(0, noticed_after=9)
    await serve(made)
    assert kernel.devices[0].info.state == LIVE
    assert kernel.log.count("recover") > 1
    assert len(kernel.devices) == 1


async def test_a_worker_that_died_before_it_served_is_replaced_too(kernel: Kernel) -> None:
    made = await served(kernel)
    kernel.worker_dies(0)
    os.close((await made.attach(DISK))[0])
    await serve(made)
    assert kernel.devices[0].info.state == LIVE


async def test_a_worker_that_lives_cannot_be_replaced(kernel: Kernel) -> None:
    made = await served(kernel)
    with pytest.raises(TargetError, match="did not let go of its former worker"):
        await made.attach(DISK, deadline=0.05)


async def test_a_device_that_was_stopped_is_made_anew(kernel: Kernel) -> None:
    made = await served(kernel)
    kernel.state(0, DEAD)
    await serve(made)
    assert [d.info.state for d in kernel.devices.values()] == [LIVE]


async def test_a_later_supervisor_finds_the_disk_by_its_number(kernel: Kernel) -> None:
    other = UblkTarget(51744, "xvdc", roots=kernel.roots)
    await serve(other)
    made = await served(kernel)
    found = target(kernel)
    assert await found.adopt()
    assert found.name == made.name == "ublkb1"
    assert not await UblkTarget(51760, "xvdd", roots=kernel.roots).adopt()


async def test_what_was_never_started_is_removed_when_it_is_found(kernel: Kernel) -> None:
    os.close((await target(kernel).attach(DISK))[0])
    assert not await target(kernel).adopt()
    assert kernel.devices == {}


async def test_a_feature_that_was_taken_away_stays_away(kernel: Kernel) -> None:
    made = await served(kernel)
    await made.feature_off("flush")
    await made.feature_off("discard")
    assert kernel.get(0, "queue/write_cache") == "write through"
    assert kernel.get(0, "queue/discard_max_bytes") == "0"
    found = target(kernel)
    assert await found.adopt()
    await found.publish(DISK)
    assert kernel.get(0, "queue/write_cache") == "write through"


async def test_a_disk_that_nobody_has_open_is_made_anew_with_its_new_size(kernel: Kernel) -> None:
    made = await served(kernel)
    larger = replace(DISK, sectors=262144)
    await made.publish(larger)
    assert kernel.devices == {}
    await serve(made, larger)
    assert kernel.get(0, "size") == "262144"
    assert not made.resize_waits


async def test_a_resize_of_an_open_disk_is_said_once_and_waits_for_its_close(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = await served(kernel)
    users = ["ublkb0 is open in fio (4711)"]
    monkeypatch.setattr(UblkTarget, "open_anywhere", lambda self: users[0] if users else None)
    larger = replace(DISK, sectors=262144)
    with caplog.at_level(logging.WARNING):
        await made.publish(larger)
        await made.publish(larger)
    assert kernel.devices[0].info.state == LIVE
    assert made.resize_waits
    assert caplog.text.count("open in fio") == 1
    users.clear()
    await made.publish(larger)
    assert kernel.devices == {}
    assert not made.resize_waits


async def test_a_size_that_comes_back_waits_for_nobody(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await served(kernel)
    monkeypatch.setattr(UblkTarget, "open_anywhere", lambda self: "ublkb0 is mounted at /srv")
    await made.publish(replace(DISK, sectors=262144))
    await made.publish(DISK)
    assert not made.resize_waits


async def test_another_sector_size_of_a_disk_in_use_is_refused(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await served(kernel)
    monkeypatch.setattr(UblkTarget, "open_anywhere", lambda self: "ublkb0 is mounted at /srv")
    with pytest.raises(TargetError, match="sector size changed from 512 to 4096"):
        await made.publish(replace(DISK, sector_size=4096))


async def test_close_ends_the_device_and_its_link(kernel: Kernel) -> None:
    made = await served(kernel)
    await made.close()
    assert kernel.devices == {}
    assert kernel.link(made) is None
    assert made.name == ""
    await made.close()


async def test_close_does_not_stop_a_disk_whose_worker_answers_nothing(kernel: Kernel) -> None:
    made = await served(kernel)
    kernel.put(0, "inflight", "       1        2")
    with pytest.raises(TargetError, match="3 requests did not end"):
        await made.close(drain=0.01)
    assert "stop" not in kernel.log


async def test_close_fails_the_requests_of_a_worker_that_has_ended(kernel: Kernel) -> None:
    made = await served(kernel)
    kernel.put(0, "inflight", "       1        2")
    made.server_pid = NOBODY
    kernel.worker_dies(0, noticed_after=5)
    await made.close(drain=0.0)
    assert kernel.devices == {}


def test_a_kernel_with_io_uring_switched_off_is_not_used(kernel: Kernel) -> None:
    assert ublkcontrol.unusable(kernel.roots) is None
    setting = kernel.roots.proc / "sys" / "kernel"
    setting.mkdir(parents=True)
    (setting / "io_uring_disabled").write_text("1\n")
    problem = ublkcontrol.unusable(kernel.roots)
    assert problem is not None
    assert "io_uring" in problem


def test_a_kernel_without_the_driver_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ublkcontrol, "load_module", lambda: "modprobe: no such module")
    problem = ublkcontrol.unusable(Roots(tmp_path))
    assert problem is not None
    assert "no such module" in problem


def test_commands_name_what_the_kernel_refused(tmp_path: Path) -> None:
    """On a file that takes no io_uring commands, through the real C code."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "ublk-control").touch()
    with ublkcontrol.UblkControl(Roots(tmp_path)) as control:
        with pytest.raises(UblkError, match=r"ublk add failed: E.*not supported") as refused:
            control.add(queues=1, owner=1)
        assert refused.value.errno == errno.EOPNOTSUPP
        with pytest.raises(UblkError, match="stop of ublkb7"):
            control.stop(7)
