# SPDX-License-Identifier: BSD-2-Clause
"""The package from its installation to its purge, by apt, in a guest that never had it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from lab import payload
from lab.guest import Guest, Kind
from lab.pvf import Pvfront
from lab.scenario import Lab, wait_until
from lab.vifs import Vif

# Three boots, and apt twice: half an hour where the machine is slow.
pytestmark = [pytest.mark.services, pytest.mark.long, pytest.mark.timeout(3600)]

INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get -o Dpkg::Use-Pty=0 -y"
CONFIG = '[disk]\nclaim = ["xvd[bc]"]\n[vif]\nclaim = ["vif1"]\n'
# The emulator takes more than the 90 s that systemd waits for a device.
FSTAB = (
    "/dev/pvfront/xvdb /srv ext4 "
    "defaults,x-systemd.requires=pvfront-vbd.service,x-systemd.device-timeout=10min 0 2\n"
)
NETWORK = """[Match]
MACAddress={mac}
[Network]
LinkLocalAddressing=no
Address={v4}/24
[Address]
Address={v6}/64
DuplicateAddressDetection=none
"""
HOOKS = "/etc/pvfront/hooks.d"
LOG = "/root/hooks.log"
HOOK = f'#!/bin/sh\necho "$PVFRONT_EVENT $PVFRONT_KIND" >>{LOG}; sync {LOG}\n'
ENABLED = "/etc/systemd/system/multi-user.target.wants"
ALIAS = "/etc/systemd/system/dbus-org.pvfront.Xeniface1.service"
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


def wait_addresses(guest: Guest, *addresses: str) -> None:
    said = "ip -o address show dev eth1"
    wait_until("the addresses", lambda: set(addresses) <= set(re.split("[ /]", guest.output(said))))


@pytest.fixture
def fresh(lab: Lab, pytestconfig: pytest.Config) -> Iterator[Guest]:
    """The guest, down, and as if it had never seen pvfront."""
    kind: Kind = pytestconfig.getoption("--guest")
    guest = lab.guest(kind)
    guest.destroy()
    settings = "etc/systemd/system/pvfront-*.service.d etc/pvfront etc/default/pvfront-*"
    with guest.root_in_dom0() as root:
        # What a guest left that was ended in the middle of this test: half a package, perhaps.
        lab.dom0.run(
            f"chroot {root} sh -c "
            "'dpkg --configure -a; dpkg --force-remove-reinstreq --purge pvfront'",
            check=False,
        )
        lab.dom0.run(
            f"cd {root} && : >etc/fstab && rm -rf {settings} .{ENABLED}/pvfront-* "
            f".{ENABLED}/systemd-networkd.service .{ALIAS} && rm -f {small_files()}"
        )
    disk, guest.payload = guest.payload, None
    yield guest
    guest.payload = disk
    guest.destroy()
    guest.dirty = True
    with guest.root_in_dom0() as root:
        lab.dom0.run(
            f"cd {root} && : >etc/fstab && rm -rf .{OURS} .{LOG} root/pvfront.deb {settings} "
            f".{ENABLED}/systemd-networkd.service .{ENABLED}/pvfront-* .{ALIAS}"
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
    spare = lab.loop_disk(16)
    disks = [backing.spec("xvdb"), spare.spec("xvdc")]
    vifs = [f"type=vif,mac={vif.mac},script=vif-lab,ip={theirs[0]}/24 {theirs[1]}/64"]

    guest.create(disks=disks, vifs=vifs)
    guest.push(payload.find_deb(), "/root/pvfront.deb")
    guest.run(f"{INSTALL} install /root/pvfront.deb", timeout=900)
    assert guest.output("pvfront config check").endswith("nothing is wrong")
    assert guest.output("systemctl --failed --no-legend") == ""
    for disk in ("xvdb", "xvdc"):
        assert guest.has(f"/sys/block/{disk}"), "nothing is taken that is not named"
    assert guest.output("readlink /sys/class/net/eth1/device/driver").endswith("/vif")

    guest.write("/etc/pvfront/pvfront.toml", CONFIG)
    for moment in ("pre-shutdown", "post-shutdown"):
        guest.run(f"mkdir -p {HOOKS}/{moment}.d")
        guest.write(f"{HOOKS}/{moment}.d/log", HOOK, 0o755)
    guest.write("/etc/fstab", FSTAB)
    guest.write(OURS, NETWORK.format(mac=vif.mac, v4=ours[0], v6=ours[1]))
    guest.run(f"ln -s /lib/systemd/system/systemd-networkd.service {ENABLED}/; sync")
    guest.shutdown()
    guest.create(disks=disks, vifs=vifs)  # raises if a unit has failed
    pvf = Pvfront(lab, guest)
    assert guest.output(f"cat {LOG}") == "pre-shutdown poweroff\npost-shutdown poweroff"
    assert guest.output("cat /srv/f") == "on the disk"
    node = guest.output("readlink -f /dev/pvfront/xvdb")
    assert guest.output("findmnt -n -o SOURCE /srv") == node
    wait_addresses(guest, *ours)
    vif.ping(56, 4000)
    owners = {device["name"]: device["owner"] for device in pvf.list()}
    assert {owners[name] for name in ("xvdb", "xvdc", "vif1")} == {"pvfront"}
    assert guest.output("systemctl --failed --no-legend") == ""
    number = f"/local/domain/{guest.number}"
    wait_until("the agent's keys", lambda: lab.xenstore_read(f"{number}/data/updated"))
    assert lab.xenstore_read(f"{number}/attr/PVAddons/Installed") == "1"

    enable = "systemctl enable --quiet --now pvfront-metrics.timer"
    guest.run(f"{enable} && systemctl enable --quiet pvfront-getty@login")
    # So that it cannot be unmounted, as systemd does before it stops what the mount requires.
    user = guest.start("exec tail -f /srv/f")
    said = guest.run(f"{INSTALL} purge pvfront", timeout=900).stdout
    assert "vbd-51728 (xvdb) is in use: its worker goes on serving it" in said
    assert "vbd-51744 (xvdc) is released" in said
    assert guest.output("cat /srv/f") == "on the disk", "it goes on"
    assert not guest.has("/etc/pvfront")
    assert guest.output("find /etc/systemd/system -name 'pvfront-*'") == ""
    assert guest.output("systemctl --failed --no-legend") == ""
    assert guest.output("systemctl list-units --no-legend 'pvfront-*.timer'") == ""
    wait_until("the kernel's eth1", lambda: guest.has("/sys/class/net/eth1/device/driver"))
    wait_addresses(guest, *ours)
    vif.ping(56)
    user.kill()
    guest.run("echo '/dev/xvdb /srv ext4 defaults 0 2' >/etc/fstab; sync")
    guest.shutdown()
    guest.create(disks=disks, vifs=vifs)
    assert guest.output("findmnt -n -o SOURCE /srv") == "/dev/xvdb"
    assert guest.output("cat /srv/f") == "on the disk"
    assert guest.output("readlink /sys/class/net/eth1/device/driver").endswith("/vif")
    wait_addresses(guest, *ours)
    assert guest.output("systemctl --failed --no-legend") == ""
    assert guest.has("/sys/block/xvdc")
    guest.destroy()
    for disk in (backing, spare):
        disk.remove()
