# SPDX-License-Identifier: BSD-2-Clause
"""From power-on to power-off: a disk that is configured to be ours is taken before anybody else has
it, what is on it is mounted and activated as from any other disk, and taken down before it goes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

import pytest
from lab.disks import BackingDisk, VolumeDisk
from lab.guest import Guest, Kind
from lab.pvf import UNIT, Pvfront
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.disk, pytest.mark.pv]

STARTED = "/run/pvfront/started"
PATIENT = "x-systemd.device-timeout=10min"  # the emulator takes its time
CONFIG = "/etc/pvfront/pvfront.toml"
WANTED = f"/etc/systemd/system/multi-user.target.wants/{UNIT}.service"


def enable(root: str = "") -> str:
    """`systemctl enable`, without its reload."""
    return f"ln -sfn /lib/systemd/system/{UNIT}.service {root}{WANTED}"


def claim(*patterns: str, root: str = "") -> str:
    """A command that names the disks to be served."""
    text = f"[disk]\nclaim = {json.dumps(patterns)}\n"
    return f"mkdir -p {root}/etc/pvfront && printf %s {shlex.quote(text)} >{root}{CONFIG}"


def fstab(volume: VolumeDisk) -> str:
    return (
        "/dev/pvfront/xvdb /srv/data ext4 "
        f"defaults,x-systemd.requires=pvfront-vbd.service,{PATIENT} 0 2\n"
        f"/dev/{volume.name}/disk /srv/volume ext4 defaults,{PATIENT} 0 2\n"
    )


@pytest.fixture
def enabled(lab: Lab, guest: Guest) -> Iterator[Pvfront]:
    """The service is enabled; in the end it is not, as in the image."""
    pvf = Pvfront(lab, guest)
    pvf.start("--all")
    guest.run(f"{claim('*')} && {enable()}")
    yield pvf
    # The next start may be a destroy.
    guest.run(f"rm -f {WANTED} {CONFIG}; touch {STARTED}; sync", check=False)


def with_files(lab: Lab) -> tuple[BackingDisk, VolumeDisk]:
    """A disk with a file system, and one with a volume group, which has one in its volume."""
    data, volume = lab.loop_disk(16), lab.volume(24)
    for device, what in ((data.device, "disk"), (volume.device, "volume")):
        lab.dom0.run(
            f"mkfs.ext4 -q {device} && mkdir -p /tmp/files && mount {device} /tmp/files "
            f"&& echo on the {what} >/tmp/files/f && umount /tmp/files"
        )
    volume.activate(False)  # who changes it now is the guest
    return data, volume


def properties(guest: Guest, node: str) -> dict[str, str]:
    """What udev knows of a device."""
    lines = guest.output(f"udevadm info -q property {node}").splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.long  # what it is for, at each run: the boot below
def test_until_the_service_has_started_a_disk_that_will_be_ours_is_hidden(
    enabled: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(16)
    guest.block_attach(backing.spec("xvdb"))
    enabled.wait_served()
    guest.run("pvcreate -q -y /dev/pvfront/xvdb && vgcreate -q lab /dev/pvfront/xvdb")
    wait_until(
        "udev's word of the physical volume",
        lambda: properties(guest, "/dev/pvfront/xvdb").get("ID_FS_TYPE") == "LVM2_member",
    )
    assert properties(guest, "/dev/pvfront/xvdb")["PVFRONT_NAME"] == "xvdb"
    assert guest.output("pvs --noheadings -o pv_name").split() == [
        guest.output("readlink -f /dev/pvfront/xvdb")
    ]
    enabled.stop()
    wait_until("the kernel's xvdb", lambda: guest.has("/dev/xvdb", "b"))

    # As it is while the guest boots: enabled, and not started yet.
    trigger = "udevadm trigger --settle --action=add --sysname-match=xvdb"
    guest.run(f"rm {STARTED} && {trigger}")
    hidden = properties(guest, "/dev/xvdb")
    assert hidden["SYSTEMD_READY"] == "0"
    assert hidden["UDISKS_IGNORE"] == "1"
    assert "ID_FS_TYPE" not in hidden
    wait_until(
        "systemd's forgetting it",
        lambda: not guest.run("systemctl is-active -q dev-xvdb.device", check=False).ok,
    )
    for disks, hides in ((["xvdc"], False), (["xvdc", "51728"], True), (["xvd[bd]"], True)):
        guest.run(f"{claim(*disks)} && {trigger}")
        assert ("ID_FS_TYPE" not in properties(guest, "/dev/xvdb")) is hides, disks
    guest.run(claim("*"))
    guest.run("udevadm trigger --settle --action=add --sysname-match=xvda")
    root = properties(guest, "/dev/xvda")
    assert root["ID_FS_TYPE"] == "ext4", "the root disk is in use, and so never becomes ours"
    assert root.get("SYSTEMD_READY") != "0"

    guest.run(f"touch {STARTED} && {trigger}")
    assert properties(guest, "/dev/xvdb")["ID_FS_TYPE"] == "LVM2_member"
    enabled.start("--all")
    enabled.wait_served()
    wait_until(
        "udev's word of the physical volume",
        lambda: properties(guest, "/dev/pvfront/xvdb").get("ID_FS_TYPE") == "LVM2_member",
    )
    guest.run("vgremove -q -y lab")
    enabled.detach()
    backing.remove()


@pytest.mark.first
def test_at_boot_fstab_mounts_our_disk_and_lvm_finds_its_volume_on_it(
    lab: Lab, pytestconfig: pytest.Config
) -> None:
    kind: Kind = pytestconfig.getoption("--guest")
    guest = lab.guest(kind)
    guest.destroy()
    data, volume = with_files(lab)
    specs = {"xvdb": data.spec("xvdb"), "xvdc": volume.below.spec("xvdc")}
    with guest.root_in_dom0() as root:
        lab.dom0.run(
            f"{enable(root)} && rm -f {root}/etc/default/{UNIT} && {claim('xvd[bc]', root=root)} "
            f"&& mkdir -p {root}/srv/data {root}/srv/volume "
            f"&& printf '%s' '{fstab(volume)}' >{root}/etc/fstab"
        )
    try:
        # Raises if a unit has failed: a mount, or a device that never came.
        guest.create(disks=list(specs.values()))
        said = guest.output("cat /srv/data/f /srv/volume/f").splitlines()
        assert said == ["on the disk", "on the volume"]
        nodes = {name: guest.output(f"readlink -f /dev/pvfront/{name}") for name in specs}
        assert guest.output("findmnt -n -o SOURCE /srv/data") == nodes["xvdb"]
        assert guest.output("pvs --noheadings -o pv_name").split() == [nodes["xvdc"]]
        for name in nodes:
            assert not guest.has(f"/sys/block/{name}"), "the kernel has it"
        assert guest.run("systemctl is-active -q dev-pvfront-xvdb.device", check=False).ok
        pvf = Pvfront(lab, guest)
        for name in nodes:
            assert pvf.state(name)["phase"] == "connected"
        guest.run(
            f"umount /srv/data /srv/volume && vgchange -q -an {volume.name} && : >/etc/fstab "
            f"&& rm {WANTED} {CONFIG} && systemctl daemon-reload && sync"
        )
        for name in nodes:
            pvf.detach(name)
    except BaseException:
        guest.destroy()
        with guest.root_in_dom0() as root:
            lab.dom0.run(f": >{root}/etc/fstab; rm -f {root}{WANTED} {root}{CONFIG}")
        raise
    for backing in (data, volume):
        backing.remove()
    guest.dirty = False  # it is now as if they had been attached while it ran
