# SPDX-License-Identifier: BSD-2-Clause
"""What an administrator does when something is wrong, and what they are told."""

from __future__ import annotations

import json
import time

import pytest
from lab.guest import Guest
from lab.pvf import UNIT, VDEV, Pvfront, fio
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.disk, pytest.mark.long]

PATIENCE = 10  # seconds, dead_conn_timeout

KILLS = f"""
last= kills=0
while ! grep -q '"gave_up_at": [0-9]' /run/pvfront/vbd-{VDEV["xvdb"]}.json; do
    pid=$(pgrep -x pvfront-worker) && [ "$pid" != "$last" ] && kill -9 $pid &&
        last=$pid kills=$((kills + 1))
    sleep 0.1
done
echo $kills
"""


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


def test_while_no_service_runs_list_and_status_say_so(pvf: Pvfront, guest: Guest, lab: Lab) -> None:
    with pvf.disk(lab.loop_disk(16)):
        guest.run("mkfs.ext4 -q /dev/pvfront/xvdb && mkdir -p /mnt/xvdb")
        guest.run(f"mount /dev/pvfront/xvdb /mnt/xvdb && systemctl stop {UNIT}")
        for question in ("pvfront list", "pvfront status xvdb"):
            said = guest.run(question).stderr
            assert "the disk service does not run: xvdb: served by what it has left" in said
            assert f"systemctl start {UNIT}" in said
        guest.run(f"systemctl start {UNIT}; cp /etc/passwd /mnt/xvdb; umount /mnt/xvdb")
        assert guest.run("pvfront list").stderr == ""
        assert pvf.state()["generation"] == 1, "the worker was not adopted"


def test_a_worker_that_always_dies_is_given_up_until_the_service_is_restarted(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    # The time is for a guest whose processor is emulated: an attempt takes seconds there.
    pvf.start(f"-o dead_conn_timeout={PATIENCE} -o start_limit_interval=300 --all")
    with pvf.disk(lab.loop_disk(16)):
        guest.run(fio(size="1M"))
        assert int(guest.output(KILLS, timeout=300)) >= 5
        read = "dd if=/dev/pvfront/xvdb of=/dev/null bs=4k count=1 iflag=direct"
        assert not guest.run(read, check=False).ok
        wait_until("both ends at rest", lambda: lab.vbd_state(guest) == ("6", "6"))
        status = guest.output("pvfront status xvdb")
        assert "its worker died" in status
        assert guest.output("pgrep -c -x pvfront-worker || true") == "0"
        assert json.loads(guest.output("pvfront trace xvdb --json"))
        guest.run(f"systemctl restart {UNIT}")
        pvf.wait_served()
        guest.run(fio(size="1M"))


def test_a_power_off_with_an_encrypted_volume_in_use_on_the_disk_waits_for_no_worker(
    pvf: Pvfront, guest: Guest, lab: Lab, request: pytest.FixtureRequest
) -> None:
    """The disk is in use until the end, and so has its worker: it ends with the last processes,
    when systemd tells them all to, and not when it kills who is left (DefaultTimeoutStopSec=, 90 s
    elsewhere). What is written after that fails 10 s later.
    """
    guest.run(
        "mkdir -p /run/systemd/system.conf.d "
        "&& printf '[Manager]\\nDefaultTimeoutStopSec=1h\\n' >/run/systemd/system.conf.d/late.conf "
        "&& systemctl daemon-reexec"
    )
    backing = lab.loop_disk(64)
    guest.block_attach(backing.spec("xvdb"))
    pvf.wait_served()
    key = "0123456789abcdef" * 4
    guest.run(
        "set -e; pvcreate -q -y /dev/pvfront/xvdb; vgcreate -q lab /dev/pvfront/xvdb; "
        "lvcreate -q -y -L 40M -n data lab; "
        "size=$(blockdev --getsz /dev/lab/data); "
        f'table="0 $size crypt aes-cbc-essiv:sha256 {key} 0 /dev/lab/data 0"; '
        'dmsetup create secret --table "$table"; '
        "mkfs.ext4 -q /dev/mapper/secret; mkdir -p /mnt/secret; "
        "mount /dev/mapper/secret /mnt/secret"
    )
    guest.start("while :; do dd if=/dev/zero of=/mnt/secret/x bs=64k count=99 conv=fsync; done")
    began = time.monotonic()
    guest.shutdown(timeout=300)
    took = f"{time.monotonic() - began:.0f} s"
    request.node.user_properties.append(("power-off over dm-crypt in use", took))
    assert "reboot: Power down" in guest.console()
    backing.remove()
