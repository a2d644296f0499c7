# SPDX-License-Identifier: BSD-2-Clause
"""From power-on: a disk that is configured to be ours is taken before anybody else has it, and what
is on it is mounted and activated as from any other disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.guest import Guest
from lab.pvf import UNIT, Pvfront
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.disk, pytest.mark.pv]

STARTED = "/run/pvfront/started"
DEACTIVATES = "blk-availability.service"
"""LVM's, which takes volumes down at shutdown; masked in the image, since it costs time."""
FSTAB = (
    "/dev/pvfront/xvdb /srv/data ext4 defaults,x-systemd.requires=pvfront-vbd.service 0 2\n"
    "/dev/lab/volume /srv/volume ext4 defaults 0 2\n"
)


@pytest.fixture
def enabled(lab: Lab, guest: Guest) -> Iterator[Pvfront]:
    """The service is enabled; in the end it is not, and fstab is empty, as in the image."""
    pvf = Pvfront(lab, guest)
    pvf.start("--all")
    guest.run(f"systemctl enable -q {UNIT}")
    yield pvf
    if not guest.alive():
        guest.destroy()
        guest.create(cmdline="fstab=no")
    restore(guest)


def restore(guest: Guest) -> None:
    """Its next boot is the image's own."""
    guest.run(
        f"systemctl disable -q {UNIT}; systemctl mask -q {DEACTIVATES}; : >/etc/fstab; "
        f"touch {STARTED}; sync",  # the next start may be a destroy
        check=False,
    )


def properties(guest: Guest, node: str) -> dict[str, str]:
    """What udev knows of a device."""
    lines = guest.output(f"udevadm info -q property {node}").splitlines()
    return dict(line.split("=", 1) for line in lines)


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
    for disks, hides in (("xvdc", False), ("xvdc xvdb", True), ("--all", True)):
        guest.run(f"echo PVFRONT_DISKS={disks} >/etc/default/{UNIT} && {trigger}")
        assert ("ID_FS_TYPE" not in properties(guest, "/dev/xvdb")) is hides, disks
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


def test_at_boot_fstab_mounts_our_disk_and_lvm_finds_its_volume_on_it(
    enabled: Pvfront, guest: Guest, lab: Lab
) -> None:
    data, volume = lab.loop_disk(16), lab.loop_disk(32)
    specs = [data.spec("xvdb"), volume.spec("xvdc")]
    guest.run(f"systemctl unmask -q {DEACTIVATES} && systemctl start {DEACTIVATES}")
    for name, spec in zip(("xvdb", "xvdc"), specs, strict=True):
        guest.block_attach(spec)
        enabled.wait_served(name)
    guest.run(
        "mkfs.ext4 -q /dev/pvfront/xvdb && pvcreate -q -y /dev/pvfront/xvdc "
        "&& vgcreate -q lab /dev/pvfront/xvdc && lvcreate -q -y -L 16M -n volume lab "
        "&& mkfs.ext4 -q /dev/lab/volume && mkdir -p /srv/data /srv/volume "
        f"&& printf '%s' '{FSTAB}' >/etc/fstab && systemctl daemon-reload "
        "&& mount /srv/data && mount /srv/volume "
        "&& echo on the disk >/srv/data/f && echo on the volume >/srv/volume/f",
    )
    guest.shutdown()  # by systemd, which unmounts all
    assert lab.dom0.run(f"e2fsck -f -n {data.device}").ok, "it was not unmounted in order"
    guest.create(disks=specs)  # raises if a unit has failed: a mount, or a device that never came
    assert guest.output("cat /srv/data/f /srv/volume/f").splitlines() == [
        "on the disk", "on the volume"
    ]  # fmt: skip
    nodes = {name: guest.output(f"readlink -f /dev/pvfront/{name}") for name in ("xvdb", "xvdc")}
    assert guest.output("findmnt -n -o SOURCE /srv/data") == nodes["xvdb"]
    assert guest.output("pvs --noheadings -o pv_name").split() == [nodes["xvdc"]]
    for name in nodes:
        assert not guest.run(f"test -e /sys/block/{name}", check=False).ok, "the kernel has it"
    assert guest.run("systemctl is-active -q dev-pvfront-xvdb.device", check=False).ok
    for name in ("xvdb", "xvdc"):
        assert enabled.state(name)["phase"] == "connected"
    guest.run("umount /srv/data /srv/volume && vgremove -q -f -y lab")
    for name, backing in (("xvdb", data), ("xvdc", volume)):
        enabled.detach(name)
        backing.remove()
    guest.dirty = False  # it is now as if they had been attached while it ran
