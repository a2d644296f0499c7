# SPDX-License-Identifier: BSD-2-Clause
"""Networks from power-on to power-off: who configures interfaces at boot finds ours, and no other.

By the settings of an administrator (pvfront.toml), with networkd and ifupdown as Debian has them.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from lab.guest import Guest
from lab.pvf import UNIT as DISKS
from lab.scenario import Lab, wait_until
from lab.vifs import UNIT, Networks, Stream, Vif

pytestmark = [pytest.mark.net, pytest.mark.long]

WANTS = "etc/systemd/system/multi-user.target.wants"
SETTINGS = "etc/pvfront/pvfront.toml"


@contextlib.contextmanager
def down_with(
    lab: Lab, guest: Guest, files: Mapping[str, str], units: Sequence[str], leave: str = "true"
) -> Iterator[None]:
    """The guest is down, with these files and these units enabled; without them in the end, when
    `leave` is run in dom0 as well. Paths are relative to its root, which is where `leave` runs.
    """
    guest.shutdown()
    guest.dirty = True
    with guest.root_in_dom0() as root:
        for path, text in files.items():
            lab.dom0.write(f"{root}/{path}", text)
        lab.dom0.run(
            f"cd {root} && for s in {' '.join(units)}; do "
            f"ln -sfn /lib/systemd/system/$s.service {WANTS}/; rm -f etc/default/$s; done"
        )
    try:
        yield
    finally:
        guest.destroy()
        links = " ".join(f"{WANTS}/{unit}.service" for unit in units)
        with guest.root_in_dom0() as root:
            lab.dom0.run(f"cd {root} && rm -f {links} {' '.join(files)}; {leave}", check=False)


def spec(vif: Vif) -> str:
    """The vif for xl.cfg."""
    v4, v6 = vif.addresses(1)
    return f"type=vif,mac={vif.mac},script=vif-lab,ip={v4}/24 {v6}/64"


def since(guest: Guest, unit: str) -> int:
    """Microseconds from the boot to the unit's start, which 0 means it has not come to."""
    show = "systemctl show --value -p ActiveEnterTimestampMonotonic"
    return int(guest.output(f"{show} {unit}"))


def test_at_boot_networkd_configures_ours_and_a_power_off_with_it_in_use_is_in_order(
    lab: Lab, guest: Guest
) -> None:
    """Both services take all there is before anybody uses it, but what had the default route."""
    net = Networks(lab, guest)
    net.start("--all")  # so that it has seen whose the default route is
    vif = Vif(lab, guest, 1, "00:16:3e:77:63:63", 99, "eth1")
    ours = vif.addresses(2)
    backing = lab.loop_disk(16)
    files = {
        SETTINGS: '[disk]\nclaim = ["*"]\n[vif]\nclaim = ["*"]\n',
        "etc/systemd/network/10-lab.network": (
            f"[Match]\nMACAddress={vif.mac}\n[Network]\nLinkLocalAddressing=no\n"
            f"Address={ours[0]}/24\nAddress={ours[1]}/64\n"
        ),
    }
    with down_with(lab, guest, files, (DISKS, UNIT, "systemd-networkd")):
        guest.create(disks=[backing.spec("xvdb")], vifs=[spec(vif)])
        net.wait_served(vif)
        assert not vif.is_the_kernels()
        wait_until(
            "networkd's word that it is configured",
            lambda: "(configured)" in guest.output("networkctl --no-pager status eth1"),
        )
        said = guest.output("ip -o address show dev eth1")
        assert all(address in said for address in ours)
        assert 0 < since(guest, UNIT) < since(guest, "systemd-networkd")
        assert Vif(lab, guest, 0, guest.mac, 0, "eth0").is_the_kernels()
        wait_until("the disk", lambda: guest.has("/dev/pvfront/xvdb", "b"))
        vif.ping(56, 4000)
        vif.fetch(4)
        Stream(vif).goes_on()
        before = len(guest.console())
        guest.shutdown(timeout=180)
        assert not re.search(r"BUG|WARNING|Call Trace|hung task", guest.console()[before:])
        assert vif.states() == (None, None)
    backing.remove()


def ifupdown(directory: Path) -> Path:
    """Debian's package, from this machine's archive. Its dependencies are in every guest."""
    subprocess.run(["apt-get", "-q", "download", "ifupdown"], cwd=directory, check=True)
    (deb,) = directory.glob("ifupdown_*.deb")
    return deb


def test_ifupdown_configures_ours_at_boot_and_when_one_is_attached(
    lab: Lab, guest: Guest, tmp_path: Path
) -> None:
    net = Networks(lab, guest)
    net.start("--all")  # so that it has seen whose the default route is
    boot = Vif(lab, guest, 1, "00:16:3e:77:63:62", 98, "eth1")
    v4, v6 = boot.addresses(2)
    plugged = "10.98.98.98"
    files = {
        SETTINGS: '[vif]\nclaim = ["*"]\n',
        # IPv6 with ifupdown's own wait for the end of duplicate address detection: six seconds.
        "etc/network/interfaces.d/lab": (
            f"auto eth1\niface eth1 inet static\n  address {v4}/24\n"
            f"iface eth1 inet6 static\n  address {v6}/64\n"
            f"allow-hotplug eth2\niface eth2 inet static\n  address {plugged}/24\n"
        ),
    }
    guest.push(ifupdown(tmp_path), "/root/ifupdown.deb")
    guest.run("dpkg -i /root/ifupdown.deb", timeout=300)
    leave = "chroot . dpkg --purge ifupdown; rm -f root/ifupdown.deb etc/network/interfaces"
    with down_with(lab, guest, files, (UNIT,), leave):
        guest.create(vifs=[spec(boot)])  # raises if a unit has failed
        net.wait_served(boot)
        assert not boot.is_the_kernels()
        assert guest.output("ifquery --state eth1") == "eth1=eth1"
        said = guest.output("ip -o address show dev eth1")
        assert v4 in said
        assert v6 in said
        assert 0 < since(guest, UNIT) < since(guest, "networking")
        boot.ping(56, 4000)
        with net.vif() as vif:
            assert vif.name == "eth2"
            wait_until(
                "ifup@'s address",
                lambda: plugged in guest.output("ip -o address show dev eth2"),
            )
            assert guest.output("systemctl is-active ifup@eth2") == "active"
            vif.ping(56, 4000)
        net.stop()
        wait_until("the kernel's interface", boot.is_the_kernels)
        wait_until("its address", lambda: v4 in guest.output("ip -o address show dev eth1"))
        boot.ping(56, 4000)
        assert guest.output("systemctl --failed --no-legend") == ""
