# SPDX-License-Identifier: BSD-2-Clause
"""Why a disk is in use, on trees that look like /sys, /proc and /dev."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from pvfront.blkfront import inuse
from pvfront.blkfront.inuse import InUse, Use
from pvfront.sysfs import Roots


class FakeSystem:
    """A file system root with block devices, mounts and swap."""

    def __init__(self, root: Path) -> None:
        self.roots = Roots(root)
        self.mounts: list[str] = []
        self.swaps: list[str] = []
        (root / "proc/self").mkdir(parents=True)
        (root / "dev/mapper").mkdir(parents=True)
        self._write()

    def disk(self, name: str, number: str) -> Path:
        return self._device(self.roots.sys / "devices" / name, name, number)

    def partition(self, disk: str, name: str, number: str) -> Path:
        directory = self.roots.sys / "devices" / disk / name
        made = self._device(directory, name, number)
        (made / "partition").write_text("1\n")
        return made

    def _device(self, directory: Path, name: str, number: str) -> Path:
        (directory / "holders").mkdir(parents=True)
        (directory / "dev").write_text(f"{number}\n")
        classes = self.roots.sys / "class/block"
        classes.mkdir(parents=True, exist_ok=True)
        (classes / name).symlink_to(directory)
        (self.roots.dev / name).touch()
        return directory

    def dm(self, holder: str, number: str, name: str, uuid: str, below: str) -> None:
        directory = self.disk(holder, number)
        (directory / "dm").mkdir()
        (directory / "dm/name").write_text(f"{name}\n")
        (directory / "dm/uuid").write_text(f"{uuid}\n")
        (self.roots.dev / "mapper" / name).symlink_to(f"../{holder}")
        self.hold(below, holder)

    def hold(self, below: str, holder: str) -> None:
        (self.roots.block(below) / "holders" / holder).touch()

    def mount(self, source: str, point: str, number: str, kind: str = "ext4") -> None:
        index = len(self.mounts) + 30
        self.mounts.append(
            f"{index} 1 {number} / {point} rw,relatime shared:{index} - {kind} {source} rw\n"
        )
        self._write()

    def swap(self, path: str) -> None:
        self.swaps.append(f"{path} partition 1048572 0 -2\n")
        self._write()

    def _write(self) -> None:
        proc = self.roots.proc
        (proc / "self/mountinfo").write_text("".join(self.mounts))
        (proc / "swaps").write_text("Filename Type Size Used Priority\n" + "".join(self.swaps))

    def uses(self, name: str = "xvdb") -> list[str]:
        return [str(use) for use in inuse.find(name, self.roots)]


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    made = FakeSystem(tmp_path)
    made.disk("xvda", "202:0")
    made.mount("/dev/xvda", "/", "202:0")
    made.mount("proc", "/proc", "0:5", "proc")
    made.disk("xvdb", "202:16")
    made.partition("xvdb", "xvdb1", "202:17")
    made.partition("xvdb", "xvdb2", "202:18")
    return made


def test_a_disk_that_nobody_uses_has_no_use(system: FakeSystem) -> None:
    assert system.uses() == []
    assert inuse.in_use("xvdb", system.roots) is None


def test_a_mounted_disk_is_named_with_its_mount_point(system: FakeSystem) -> None:
    system.mount("/dev/xvdb", "/srv", "202:16")
    assert system.uses() == ["xvdb is mounted at /srv"]


def test_a_mounted_partition_counts_for_its_disk(system: FakeSystem) -> None:
    system.mount("/dev/xvdb1", "/srv", "202:17")
    assert system.uses() == ["xvdb1 is mounted at /srv"]


def test_escaped_mount_points_are_shown_as_they_are(system: FakeSystem) -> None:
    system.mount("/dev/xvdb", r"/mnt/a\040b\134c", "202:16")
    assert system.uses() == [r"xvdb is mounted at /mnt/a b\c"]


def test_the_root_file_system_is_marked_as_such(system: FakeSystem) -> None:
    (use,) = inuse.find("xvda", system.roots)
    assert use.root
    assert str(use) == "xvda is the root file system"


def test_a_file_system_with_an_anonymous_number_is_found_by_its_source(system: FakeSystem) -> None:
    system.mount("/dev/xvdb2", "/data", "0:44", "btrfs")
    assert system.uses() == ["xvdb2 is mounted at /data"]


def test_swap_is_a_use(system: FakeSystem) -> None:
    system.swap("/dev/xvdb2")
    assert system.uses() == ["xvdb2 is swap space"]


def test_an_lvm_volume_names_itself_and_its_mount(system: FakeSystem) -> None:
    system.dm("dm-0", "254:0", "vg-data", "LVM-abc", "xvdb1")
    system.mount("/dev/mapper/vg-data", "/srv", "254:0")
    assert system.uses() == [
        "dm-0 is mounted at /srv (on xvdb1)",
        "xvdb1 is part of LVM volume vg-data (dm-0)",
    ]


def test_root_on_lvm_makes_the_disk_below_it_root(system: FakeSystem) -> None:
    system.dm("dm-0", "254:0", "vg-root", "LVM-abc", "xvdb1")
    system.mount("/dev/mapper/vg-root", "/", "254:0")
    assert any(use.root for use in inuse.find("xvdb", system.roots))


def test_holders_of_holders_are_followed(system: FakeSystem) -> None:
    system.disk("md0", "9:0")
    system.hold("xvdb1", "md0")
    system.hold("xvdb2", "md0")
    system.dm("dm-1", "254:1", "home", "CRYPT-LUKS2-x", "md0")
    system.swap("/dev/mapper/home")
    assert system.uses() == [
        "dm-1 is swap space (on md0)",
        "xvdb1 is part of MD array md0",
        "md0 is part of encrypted device home (dm-1)",
    ]


def test_a_ring_of_holders_ends(system: FakeSystem) -> None:
    system.disk("md0", "9:0")
    system.hold("xvdb", "md0")
    system.hold("md0", "xvdb")
    assert "xvdb is part of MD array md0" in system.uses()


def test_damaged_mount_tables_do_no_harm(system: FakeSystem) -> None:
    system.mounts = ["\n", "1 2\n", "1 2 3:4 / /x rw\n", "1 2 202:16 / /y rw - ext4\n"]
    system.swap("")
    assert system.uses() == []


def test_a_disk_that_is_not_there_has_no_use(system: FakeSystem) -> None:
    assert system.uses("xvdz") == []
    assert inuse.in_use("xvdz", system.roots) is None


def test_the_kernels_refusal_counts_when_no_reason_is_known(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, flags: int) -> int:
        assert flags & os.O_EXCL
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(inuse.os, "open", busy)  # type: ignore[attr-defined]
    text = inuse.in_use("xvdb", system.roots)
    assert text == "xvdb is claimed by the kernel or another program (EBUSY)"


def test_a_disk_that_does_not_answer_an_open_counts_as_used(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    def dead(*_: Any) -> int:
        answer.wait(30)
        raise OSError(errno.EIO, "dead")

    monkeypatch.setattr(inuse.os, "open", dead)  # type: ignore[attr-defined]
    use = inuse.claim_probe("xvdb", system.roots, deadline=0.05)
    answer.set()
    assert use is not None
    assert "not answering" in str(use)


def test_who_merely_has_a_partition_open_is_found_by_its_descriptor(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors = system.roots.proc / "4711" / "fd"
    descriptors.mkdir(parents=True)
    (descriptors.parent / "comm").write_text("postgres\n")
    for number in range(3):
        (descriptors / str(number)).touch()
    kinds = {"1": (stat.S_IFBLK, 202, 17), "2": (stat.S_IFCHR, 202, 17)}

    honest = Path.stat

    def status(path: Path, **how: Any) -> os.stat_result:
        if path.parent != descriptors or path.name not in kinds:
            return honest(path, **how)
        mode, major, minor = kinds[path.name]
        return os.stat_result([mode, *[0] * 9], {"st_rdev": os.makedev(major, minor)})

    monkeypatch.setattr(Path, "stat", status)
    assert inuse.opened_by("xvdb", system.roots) == "xvdb is open in postgres (4711)"
    kinds.clear()
    assert inuse.opened_by("xvdb", system.roots) is None


def test_in_use_says_each_reason_once_and_what_helps() -> None:
    uses = [Use("xvdb1", "mounted at /srv"), Use("xvdb1", "mounted at /srv"), Use("xvdb2", "swap")]
    error = InUse("xvdb", uses)
    assert str(error) == "xvdb is in use: xvdb1 is mounted at /srv; xvdb2 is swap"
    assert error.hint is not None
    assert "--force" in error.hint


def test_for_the_root_disk_force_is_not_suggested() -> None:
    error = InUse("xvda", [Use("xvda", "the root file system", root=True)])
    assert error.hint is not None
    assert "--force" not in error.hint
