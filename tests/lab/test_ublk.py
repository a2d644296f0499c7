# SPDX-License-Identifier: BSD-2-Clause
"""Disks as ublk devices, in a guest whose kernel has ublk: `make test-xen GUEST=pvh612`.

What a disk does for its users whatever is behind it is in test_disk.py, test_survive.py and
tests/functional, all of which find a ublk device there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab.guest import Guest
from lab.pvf import Pvfront, end_fio, fio
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.disk, pytest.mark.ublk]

LOAD = fio(depth=16, size="8M", extra="--time_based --runtime=1000 --verify_backlog=64")


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Iterator[Pvfront]:
    service = Pvfront(lab, guest)
    service.start("--all")
    yield service
    service.start("--all")


def _written(pvf: Pvfront) -> int:
    statistics: dict[str, Any] = pvf.status().get("statistics") or {"write": {"requests": 0}}
    return int(statistics["write"]["requests"])


def test_a_disk_is_a_ublk_device_where_the_kernel_has_it(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk() as backing:
        state = pvf.state()
        assert state["target"] == "ublk"
        assert state["os_device"] == "/dev/ublkb0"
        assert guest.output("readlink -f /dev/pvfront/xvdb") == "/dev/ublkb0"
        assert "disks are exported as ublk devices" in pvf.log()
        for bs, depth in (("512", 1), ("4k", 64), ("1M", 4)):
            guest.run(fio(bs=bs, depth=depth, size="512k" if bs == "512" else "16M"), timeout=300)
        mixed = "--bsrange=512-1M --blockalign=512 --fsync=16"
        guest.run(fio(depth=32, extra=mixed), timeout=300)
        guest.run(fio(rw="randtrimwrite", size="8M", extra="--fsync=32"), timeout=300)
        assert pvf.sha256() == backing.sha256()
    wait_until(
        "no ublk device left",
        lambda: not guest.run("ls /sys/class/ublk-char", check=False).stdout.strip(),
    )


def test_what_nbd_cannot_carry_is_the_devices_own(pvf: Pvfront, lab: Lab, guest: Guest) -> None:
    with pvf.disk(lab.loop_disk(64)):
        geometry = pvf.state()["geometry"]
        queue = "/sys/block/ublkb0/queue"
        names = "logical_block_size physical_block_size discard_granularity write_cache"
        seen = guest.output(f"cd {queue} && cat {names}").splitlines()
        assert seen == [
            str(geometry["sector_size"]),
            str(geometry["physical_sector_size"]),
            str(max(geometry["discard_granularity"], geometry["sector_size"])),
            "write back",
        ]
        assert guest.output("cat /sys/block/ublkb0/discard_alignment") == str(
            geometry["discard_alignment"]
        )


def test_workers_killed_under_load_are_replaced_and_no_request_is_lost(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk() as backing:
        load = guest.start(LOAD, unit="load")
        for _ in range(3):
            before = _written(pvf)
            wait_until("I/O", lambda before=before: _written(pvf) > before + 50)
            worker = pvf.worker()
            guest.run(f"kill -KILL {worker}")
            wait_until("another worker", lambda old=worker: pvf.state()["worker_pid"] != old)
            pvf.wait_served()
        wait_until("I/O", lambda: _written(pvf) > 50)
        end_fio(guest, load)
        assert guest.output("readlink -f /dev/pvfront/xvdb") == "/dev/ublkb0"
        assert pvf.sha256() == backing.sha256()
        assert "I/O error" not in guest.output("dmesg")


def test_a_worker_killed_with_every_request_held_loses_none(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.delayed_disk(32)) as backing:
        load = guest.start(LOAD, unit="load")
        wait_until("I/O", lambda: _written(pvf) > 50)
        backing.set_delay(600_000)
        wait_until("requests held in dom0", lambda: backing.in_flight() > 0)
        worker = pvf.worker()
        guest.run(f"kill -KILL {worker}")
        backing.clear_delay()
        wait_until("another worker", lambda: pvf.state()["worker_pid"] not in (None, worker))
        pvf.wait_served()
        before = _written(pvf)
        wait_until("I/O", lambda: _written(pvf) > before + 50)
        end_fio(guest, load)
        assert pvf.sha256() == backing.sha256()


def test_partitions_are_found_though_the_kernel_does_not_look(pvf: Pvfront, guest: Guest) -> None:
    backing = pvf.lab.loop_disk(64)
    with pvf.disk(backing):
        guest.run(
            "printf '2048,65536\\n,\\n' | sfdisk -q --no-reread --no-tell-kernel /dev/pvfront/xvdb"
        )
        guest.run("systemctl restart pvfront-vbd", timeout=180)
        wait_until("partitions", lambda: guest.run("test -b /dev/ublkb0p2", check=False).ok, 60)


def test_the_next_supervisor_keeps_the_device_whatever_it_is_told(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        guest.run("mkfs.ext4 -q /dev/pvfront/xvdb && mount /dev/pvfront/xvdb /mnt", timeout=120)
        worker = pvf.worker()
        try:
            pvf.start("--all --target nbd")
            pvf.wait_served()
            assert pvf.worker() == worker
            assert pvf.state()["target"] == "ublk"
            guest.run("echo kept >/mnt/file && sync")
        finally:
            guest.run("umount /mnt")
        guest.run("e2fsck -f -n /dev/pvfront/xvdb", timeout=120)


def test_with_target_nbd_it_is_an_nbd_device(pvf: Pvfront, guest: Guest) -> None:
    pvf.start("--all --target nbd")
    with pvf.disk():
        assert pvf.state()["target"] == "nbd"
        assert guest.output("readlink -f /dev/pvfront/xvdb") == "/dev/nbd0"
        guest.run(fio(size="4M"), timeout=300)


def test_a_disk_that_nobody_has_open_is_resized(pvf: Pvfront, lab: Lab, guest: Guest) -> None:
    with pvf.disk(lab.loop_disk(32)) as backing:
        backing.resize(64)
        wait_until(
            "the new size",
            lambda: (
                guest.run("blockdev --getsize64 /dev/pvfront/xvdb", check=False).stdout.strip()
                == str(64 << 20)
            ),
        )
        guest.run(fio(size="48M", bs="1M", depth=4), timeout=300)
