# SPDX-License-Identifier: BSD-2-Clause
"""The package from its installation to its purge, by apt, in a guest that never had it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from lab import payload
from lab.guest import Guest, Kind
from lab.pvf import Pvfront
from lab.scenario import Lab, wait_until
from lab.vifs import Vif

pytestmark = [pytest.mark.services, pytest.mark.long]

INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get -o Dpkg::Use-Pty=0 -y"
CONFIG = '[disk]\nclaim = ["xvdb"]\n[vif]\nclaim = ["vif1"]\n'
# The emulator takes more than the 90 s that systemd waits for a device.
FSTAB = (
    "/dev/pvfront/xvdb /srv ext4 "
    "defaults,x-systemd.requires=pvfront-vbd.service,x-systemd.device-timeout=10min 0 2\n"
)
NETWORK = "[Match]\nMACAddress={mac}\n[Network]\nLinkLocalAddressing=no\nAddress={address}/24\n"
ENABLED = "/etc/systemd/system/multi-user.target.wants"
OURS = "/etc/systemd/network/10-lab.network"


def small_files() -> str:
    """What the lab's payload has copied into a guest's root file system, but for the conffile."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(payload.find_deb())], stdout=subprocess.PIPE
    ) as archive:
        names = subprocess.run(
            ["tar", "-t"], stdin=archive.stdout, capture_output=True, text=True, check=True
        ).stdout
    return " ".join(
        name.removeprefix("./")
        for name in names.splitlines()
        if not name.endswith("/") and not name.startswith("./usr/lib/pvfront/")
    )


@pytest.fixture
def fresh(lab: Lab, pytestconfig: pytest.Config) -> Iterator[Guest]:
    """The guest, down, and as if it had never seen pvfront."""
    kind: Kind = pytestconfig.getoption("--guest")
    guest = lab.guest(kind)
    guest.destroy()
    settings = "etc/systemd/system/pvfront-*.service.d etc/pvfront etc/default/pvfront-*"
    with guest.root_in_dom0() as root:
        lab.dom0.run(f"cd {root} && rm -rf {settings} && rm -f {small_files()}")
    disk, guest.payload = guest.payload, None
    yield guest
    guest.payload = disk
    guest.destroy()
    guest.dirty = True
    with guest.root_in_dom0() as root:
        lab.dom0.run(
            f"cd {root} && : >etc/fstab && rm -rf .{OURS} .{ENABLED}/systemd-networkd.service "
            f".{ENABLED}/pvfront-* {settings}"
        )


def test_a_guest_gets_the_package_uses_it_and_is_the_kernels_again_after_a_purge(
    lab: Lab, fresh: Guest
) -> None:
    guest = fresh
    vif = Vif(lab, guest, 1, "00:16:3e:77:64:64", 100, "eth1")
    theirs, ours = vif.addresses(1), vif.addresses(2)
    backing = lab.loop_disk(16)
    lab.dom0.run(
        f"mkfs.ext4 -q {backing.device} && mkdir -p /tmp/files && "
        f"mount {backing.device} /tmp/files && echo on the disk >/tmp/files/f && umount /tmp/files"
    )
    disks = [backing.spec("xvdb")]
    vifs = [f"type=vif,mac={vif.mac},script=vif-lab,ip={theirs[0]}/24 {theirs[1]}/64"]

    guest.create(disks=disks, vifs=vifs)
    guest.push(payload.find_deb(), "/root/pvfront.deb")
    guest.run(f"{INSTALL} install /root/pvfront.deb", timeout=900)
    assert guest.output("pvfront config check").endswith("nothing is wrong")
    assert guest.output("systemctl --failed --no-legend") == ""
    assert guest.has("/sys/block/xvdb"), "nothing is taken that is not named"
    assert guest.output("readlink /sys/class/net/eth1/device/driver").endswith("/vif")

    guest.write("/etc/pvfront/pvfront.toml", CONFIG)
    guest.write("/etc/fstab", FSTAB)
    guest.write(OURS, NETWORK.format(mac=vif.mac, address=ours[0]))
    guest.run(f"ln -s /lib/systemd/system/systemd-networkd.service {ENABLED}/; sync")
    guest.shutdown()
    guest.create(disks=disks, vifs=vifs)  # raises if a unit has failed
    pvf = Pvfront(lab, guest)
    assert guest.output("cat /srv/f") == "on the disk"
    node = guest.output("readlink -f /dev/pvfront/xvdb")
    assert guest.output("findmnt -n -o SOURCE /srv") == node
    wait_until(
        "the address", lambda: ours[0] in guest.output("ip -o address show dev eth1")
    )
    vif.ping(56, 4000)
    owners = {device["name"]: device["owner"] for device in pvf.list()}
    assert {owners["xvdb"], owners["vif1"]} == {"pvfront"}
    assert guest.output("systemctl --failed --no-legend") == ""

    said = guest.run(f"{INSTALL} purge pvfront", timeout=900).stdout
    assert "vbd-51728 (xvdb) is in use: its worker goes on serving it" in said
    assert guest.output("cat /srv/f") == "on the disk", "it goes on"
    assert not guest.has("/etc/pvfront")
    guest.run("echo '/dev/xvdb /srv ext4 defaults 0 2' >/etc/fstab; sync")
    guest.shutdown()
    guest.create(disks=disks, vifs=vifs)
    assert guest.output("findmnt -n -o SOURCE /srv") == "/dev/xvdb"
    assert guest.output("cat /srv/f") == "on the disk"
    assert guest.output("readlink /sys/class/net/eth1/device/driver").endswith("/vif")
    wait_until(
        "the address", lambda: ours[0] in guest.output("ip -o address show dev eth1")
    )
    assert guest.output("systemctl --failed --no-legend") == ""
    guest.destroy()
    backing.remove()
