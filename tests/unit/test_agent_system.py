# SPDX-License-Identifier: BSD-2-Clause
"""What the system is, read from its files; file systems, and how full they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentworld import AgentWorld, agent_world
from waiting import eventually

from pvfront.agent.board import Board
from pvfront.agent.keys import Volume, VolumeKeys
from pvfront.agent.settings import AgentSettings
from pvfront.agent.system import System, emulated, feature_keys, meminfo, os_release
from pvfront.agent.volumes import Volumes, extents, look, mounts
from pvfront.sysfs import Roots

INFO = """\
22 1 202:1 / / rw,relatime shared:1 - ext4 /dev/xvda1 rw
23 22 202:1 /var/lib/x /run/y rw shared:1 - ext4 /dev/xvda1 rw
24 22 0:20 / /proc rw shared:2 - proc proc rw
25 22 43:0 / /srv/my\\040data rw shared:3 - ext4 /dev/nbd0 rw
26 22 202:1 / /a/longer/place rw shared:1 - ext4 /dev/xvda1 rw
nonsense
"""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path) as made:
        yield made


def test_mounts_are_read_with_their_places_and_binds_left_out() -> None:
    assert mounts(INFO) == {
        "/dev/xvda1": ("ext4", ("/", "/a/longer/place")),
        "/dev/nbd0": ("ext4", ("/srv/my data",)),
    }


def test_a_volume_knows_its_disk_as_the_toolstack_calls_it(tmp_path: Path) -> None:
    roots = Roots(tmp_path)
    disk = roots.sys / "devices" / "vbd-51712" / "block" / "xvda"
    for where, sectors in ((disk, "8192"), (disk / "xvda1", "4096")):
        where.mkdir(parents=True)
        (where / "size").write_text(sectors)
    (disk / "xvda1" / "partition").write_text("1")
    (disk / "device").mkdir()
    (disk / "device" / "nodename").write_text("device/vbd/51712")
    nbd = roots.sys / "devices" / "nbd0"
    nbd.mkdir()
    (nbd / "size").write_text("100")
    for directory, names in (("block", ("xvda", "nbd0")), ("class/block", ("xvda", "nbd0"))):
        (roots.sys / directory).mkdir(parents=True)
        for name in names:
            (roots.sys / directory / name).symlink_to(disk if name == "xvda" else nbd)
    (roots.sys / "class/block/xvda1").symlink_to(disk / "xvda1")
    roots.run.mkdir(parents=True)
    (roots.run / "vbd-51728.json").write_text('{"id": 51728, "os_device": "/dev/nbd0"}')
    (roots.run / "vbd-1.json").write_text("no json")
    assert extents(roots) == {"xvda": "xvda", "nbd0": "xvdb"}
    assert look(INFO, roots, usage=lambda place: len(place)) == [
        Volume("/dev/nbd0", 51200, 12, "ext4", ("/srv/my data",), ("xvdb",)),
        Volume("/dev/xvda1", 4096 * 512, 1, "ext4", ("/", "/a/longer/place"), ("xvda",)),
    ]


def test_a_volume_of_lvm_or_md_names_the_disks_below_it(tmp_path: Path) -> None:
    """vg-root is on a partition of xvda and on md0, which is xvdb and xvda once more."""
    roots = Roots(tmp_path)
    block = roots.sys / "class" / "block"
    disk = roots.sys / "devices" / "xvda"
    for where in (disk, disk / "xvda2", block / "xvdb", block / "dm-0", block / "md0"):
        where.mkdir(parents=True)
        (where / "size").write_text("8")
    (disk / "xvda2" / "partition").write_text("2")
    (block / "xvda").symlink_to(disk)
    (block / "xvda2").symlink_to(disk / "xvda2")
    for name, number in (("xvda", 51712), ("xvdb", 51728)):
        (block / name / "device").mkdir()
        (block / name / "device" / "nodename").write_text(f"device/vbd/{number}")
    (roots.sys / "block").symlink_to(block)
    for above, below in (("dm-0", "xvda2"), ("dm-0", "md0"), ("md0", "xvdb"), ("md0", "xvda2"),
                         ("md0", "dm-0")):  # fmt: skip
        (block / above / "slaves" / below).mkdir(parents=True)
    line = "22 1 253:0 / / rw shared:1 - ext4 /dev/dm-0 rw"
    ((found),) = look(line, roots, usage=lambda _: 1)
    assert sorted(found.extents) == ["xvda", "xvdb"]
    keys = VolumeKeys().keys([found])
    assert {keys[f"data/volumes/0/extents/{n}"] for n in (0, 1)} == {"xvda", "xvdb"}


def test_os_release_is_read_with_its_quotes_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert os_release(tmp_path) == {}
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text(
        '# comment\nID=debian\nPRETTY_NAME="Debian \\"12\\""\nVERSION_ID=\'12\'\nnonsense\n'
    )
    assert os_release(tmp_path) == {
        "ID": "debian",
        "PRETTY_NAME": 'Debian "12"',
        "VERSION_ID": "12",
    }


def test_memory_is_what_programs_could_still_have(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n")
    assert meminfo(tmp_path) == (1000, 400)
    (tmp_path / "meminfo").write_text("MemTotal:  much\n")
    assert meminfo(tmp_path) is None


def test_features_are_those_of_this_kernel(tmp_path: Path) -> None:
    roots = Roots(tmp_path)
    assert set(feature_keys(roots).values()) == {"0"}
    (roots.sys / "power").mkdir(parents=True)
    (roots.sys / "power" / "state").write_text("freeze mem\n")
    (roots.sys / "devices" / "system" / "xen_memory").mkdir(parents=True)
    assert feature_keys(roots) == {
        "control/feature-balloon": "1",
        "control/feature-s3": "1",
        "control/feature-s4": "0",
    }


def test_emulated_devices_are_named_unless_they_were_unplugged(tmp_path: Path) -> None:
    roots = Roots(tmp_path)
    assert emulated(roots) == {}
    (roots.sys / "hypervisor").mkdir(parents=True)
    (roots.sys / "hypervisor/type").write_text("xen")
    (roots.sys / "hypervisor/guest_type").write_text("HVM")
    ide = roots.sys / "devices/pci0000:00/0000:00:01.1"
    for name, kind in (("sda", "0"), ("sr0", "5")):
        (ide / "ata1/block" / name / "device").mkdir(parents=True)
        (ide / "ata1/block" / name / "device" / "type").write_text(kind)
    (ide / "vendor").write_text("0x8086\n")
    (ide / "device").write_text("0x7010\n")
    for directory in ("block", "class/net"):
        (roots.sys / directory).mkdir(parents=True)
    (roots.sys / "block/sr0").symlink_to(ide / "ata1/block/sr0")
    assert emulated(roots) == {"disks": "unplugged", "networks": "unplugged"}
    (roots.sys / "block/sda").symlink_to(ide / "ata1/block/sda")
    assert emulated(roots) == {"disks": "sda", "networks": "unplugged"}


async def test_the_board_has_the_system_and_which_services_run(world: AgentWorld) -> None:
    world.file("etc/os-release", "ID=debian\nPRETTY_NAME=Debian\n")
    world.file("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 400 kB\n")
    world.file("run/pvfront/supervisor-vbd.sock", "")
    board = Board()
    async with world.running(System(board)):
        await eventually("the memory", lambda: "data/meminfo_free" in board.wanted())
    found = board.wanted()
    assert found["data/os_distro"] == "debian"
    assert found["attr/PVAddons/Installed"] == "1"
    assert found["drivers/0"].startswith("pvfront XENIFACE ")
    assert found["drivers/1"].startswith("pvfront XENVBD ")


async def test_volumes_are_looked_at_unless_the_admin_says_no(
    world: AgentWorld, tmp_path: Path
) -> None:
    world.file("proc/self/mountinfo", INFO)
    world.file("sys/class/block/xvda1/size", "8")
    board = Board()
    async with world.running(Volumes(board, VolumeKeys(), usage=lambda _: 7)):
        await eventually("the volume", lambda: "data/volumes/0/free" in board.wanted())
    world.context.settings = AgentSettings(volumes=False)
    silent = Board()
    volumes = Volumes(silent, VolumeKeys(), usage=lambda _: 7)
    async with world.running(volumes):
        assert volumes.status() == {"mounted": 0}
    assert not silent.wanted()
