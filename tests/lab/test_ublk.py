# SPDX-License-Identifier: BSD-2-Clause
"""Disks as ublk devices, in a guest whose kernel has ublk: `make test-xen GUEST=pvh612`.

What a disk does for its users whatever is behind it is in test_disk.py, test_backends.py,
test_survive.py and tests/functional, all of which find a ublk device there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab.guest import Guest
from lab.pvf import Pvfront, end_fio, fio
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.disk, pytest.mark.ublk]

NODE = "/dev/pvfront/xvdb"
LOAD = fio(depth=16, size="8M", extra="--time_based --runtime=1000 --verify_backlog=64")
DELAY_MS = 200
"""So that the queue is full, and the one processor has time for what the load goes through."""
ON_EXT4 = LOAD.replace(f"--filename={NODE}", "--directory=/mnt/xvdb")


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Iterator[Pvfront]:
    service = Pvfront(lab, guest)
    service.start("--all")
    yield service
    service.start("--all")


def _requests(pvf: Pvfront, operation: str = "write") -> int:
    statistics: dict[str, Any] = pvf.status().get("statistics") or {operation: {"requests": 0}}
    return int(statistics[operation]["requests"])


def _goes_on(pvf: Pvfront, what: str) -> None:
    """Waits for 20 more writes."""
    before = pvf.written()
    wait_until(f"I/O {what}", lambda: pvf.written() > before + 20)


def _size(guest: Guest) -> int:
    return int(guest.run(f"blockdev --getsize64 {NODE}", check=False).stdout.strip() or 0)


def _is_block(guest: Guest, node: str) -> bool:
    return guest.run(f"test -b {node}", check=False).ok


def _mount(guest: Guest) -> None:
    guest.run(f"mkfs.ext4 -q {NODE} && mkdir -p /mnt/xvdb && mount {NODE} /mnt/xvdb")


def test_a_disk_is_a_ublk_device_where_the_kernel_has_it(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.loop_disk(16)) as backing:
        state = pvf.state()
        assert state["target"] == "ublk"
        assert state["os_device"] == "/dev/ublkb0"
        assert guest.output(f"readlink -f {NODE}") == "/dev/ublkb0"
        assert "disks are exported as ublk devices" in pvf.log()
        guest.run(fio(depth=64, size="4M"), timeout=300)
        mixed = "--bsrange=512-1M --blockalign=512 --fsync=16"
        guest.run(fio(depth=32, size="8M", extra=mixed), timeout=300)
        assert pvf.sha256() == backing.sha256()
    wait_until(
        "no ublk device left",
        lambda: not guest.run("ls /sys/class/ublk-char", check=False).stdout.strip(),
    )


def test_it_carries_what_nbd_cannot_and_flushes_what_must_be_on_the_disk(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.loop_disk(16)):
        geometry = pvf.state()["geometry"]
        queue = "/sys/block/ublkb0/queue"
        names = "logical_block_size physical_block_size discard_granularity write_cache fua"
        seen = guest.output(f"cd {queue} && cat {names} ../discard_alignment").splitlines()
        assert seen == [
            str(geometry["sector_size"]),
            str(geometry["physical_sector_size"]),
            str(max(geometry["discard_granularity"], geometry["sector_size"])),
            "write back",
            "0",  # a write that must be on the disk is followed by a flush
            str(geometry["discard_alignment"]),
        ]
        before = _requests(pvf, "flush")
        guest.run(fio(depth=1, size="64k", extra="--sync=dsync"))
        assert _requests(pvf, "flush") >= before + 16


@pytest.mark.long
def test_partitions_come_and_go_with_their_table_though_the_kernel_never_reads_it(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.loop_disk(16)):
        # By BLKRRPART, which the kernel refuses here, sfdisk would find them itself.
        guest.run(f"printf 'label: gpt\\n,4M\\n,\\n' | sfdisk -q {NODE}", check=False)
        wait_until("two partitions", lambda: _is_block(guest, "/dev/ublkb0p2"))
        wait_until("a partition's link", lambda: _is_block(guest, f"{NODE}1"))
        guest.run("mkfs.ext4 -q -L found /dev/ublkb0p1")
        wait_until("a label's link", lambda: _is_block(guest, "/dev/disk/by-label/found"))
        guest.run(f"sfdisk -q --delete {NODE} 2", check=False)
        wait_until("one partition", lambda: not _is_block(guest, "/dev/ublkb0p2"))
        assert _is_block(guest, "/dev/ublkb0p1")
        guest.run(f"wipefs -q -a {NODE}", check=False)
        wait_until("no partition", lambda: not _is_block(guest, "/dev/ublkb0p1"))


@pytest.mark.long
def test_partitions_are_there_when_the_disk_is_served_again(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.loop_disk(16)):
        guest.run(f"printf '2048,8192\\n,\\n' | sfdisk -q --no-reread --no-tell-kernel {NODE}")
        guest.run("systemctl restart pvfront-vbd")
        pvf.wait_served()
        assert _is_block(guest, "/dev/ublkb0p2")


@pytest.mark.long
def test_a_volume_group_on_it_comes_up_by_itself(pvf: Pvfront, lab: Lab, guest: Guest) -> None:
    with pvf.disk(lab.loop_disk(16)) as backing:
        guest.run(
            f"pvcreate -q -y {NODE} && vgcreate -q lab_ublk {NODE} "
            "&& lvcreate -q -y -n volume -l 100%FREE lab_ublk && vgchange -q -an lab_ublk",
        )
        pvf.detach()
        guest.block_attach(backing.spec("xvdb"))
        wait_until("its volume", lambda: _is_block(guest, "/dev/lab_ublk/volume"))
        guest.run("vgremove -q -f -y lab_ublk")


def test_a_worker_killed_with_every_request_held_loses_none(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.delayed_disk(16)) as backing:
        backing.set_delay(DELAY_MS)
        load = guest.start(LOAD, unit="load")
        _goes_on(pvf, "at first")
        backing.set_delay(600_000)
        wait_until("requests held in dom0", lambda: backing.in_flight() > 0)
        worker = pvf.worker()
        guest.run(f"kill -KILL {worker}")
        backing.clear_delay()
        wait_until("another worker", lambda: pvf.state()["worker_pid"] not in (None, worker))
        pvf.wait_served()
        _goes_on(pvf, "by the other worker")
        end_fio(guest, load)
        assert pvf.sha256() == backing.sha256()
        assert "I/O error" not in guest.output("dmesg")


@pytest.mark.long
def test_workers_killed_under_load_are_replaced_and_no_request_is_lost(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.loop_disk(16)) as backing:
        load = guest.start(LOAD, unit="load")
        for _ in range(5):
            _goes_on(pvf, "before the kill")
            worker = pvf.worker()
            guest.run(f"kill -KILL {worker}")
            wait_until(
                "another worker",
                lambda old=worker: pvf.state()["worker_pid"] not in (None, old),
            )
            pvf.wait_served()
        _goes_on(pvf, "after the last kill")
        end_fio(guest, load)
        assert guest.output(f"readlink -f {NODE}") == "/dev/ublkb0"
        assert pvf.sha256() == backing.sha256()
        assert "I/O error" not in guest.output("dmesg")


@pytest.mark.area
def test_the_next_supervisor_keeps_the_device_whatever_became_of_the_last(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    slow = lab.delayed_disk(32)
    with pvf.disk(slow):
        _mount(guest)
        worker = pvf.worker()
        slow.set_delay(DELAY_MS)
        load = guest.start(ON_EXT4, unit="load")
        _goes_on(pvf, "at first")
        supervisor = pvf.pid()
        guest.run(f"kill -KILL {supervisor}")
        pvf.wait_restarted(supervisor)
        pvf.wait_served()
        _goes_on(pvf, "after the supervisor was killed")
        pvf.start("--all --target nbd")
        pvf.wait_served()
        assert pvf.state()["target"] == "ublk"
        _goes_on(pvf, "after the service was restarted for nbd")
        assert pvf.worker() == worker
        slow.clear_delay()
        end_fio(guest, load)
        guest.run(f"umount /mnt/xvdb && e2fsck -f -n {NODE}")


@pytest.mark.long
def test_with_target_nbd_it_is_an_nbd_device(pvf: Pvfront, lab: Lab, guest: Guest) -> None:
    pvf.start("--all --target nbd")
    with pvf.disk(lab.loop_disk(16)):
        assert pvf.state()["target"] == "nbd"
        assert guest.output(f"readlink -f {NODE}") == "/dev/nbd0"
        guest.run(fio(size="4M"), timeout=300)


@pytest.mark.long
def test_a_read_only_disk_refuses_writes_and_says_so(pvf: Pvfront, lab: Lab, guest: Guest) -> None:
    with pvf.disk(lab.loop_disk(16), mode="r") as backing:
        assert guest.output(f"blockdev --getro {NODE}") == "1"
        assert not guest.run(
            f"dd if=/dev/zero of={NODE} bs=4k count=1 oflag=direct", check=False
        ).ok
        assert pvf.sha256() == backing.sha256()


@pytest.mark.long
def test_discards_between_writes_reach_the_disk(pvf: Pvfront, lab: Lab, guest: Guest) -> None:
    with pvf.disk(lab.loop_disk(16)) as backing:
        guest.run(fio(rw="randtrimwrite", size="1M", extra="--fsync=32"), timeout=300)
        guest.run(f"blkdiscard {NODE}")
        assert _requests(pvf, "discard") >= 256
        zeroes = guest.output("head -c 16M /dev/zero | sha256sum").split()[0]
        assert pvf.sha256() == backing.sha256() == zeroes


@pytest.mark.long
def test_a_resize_waits_for_the_last_close_of_a_disk_in_use(
    pvf: Pvfront, lab: Lab, guest: Guest
) -> None:
    with pvf.disk(lab.loop_disk(16)) as backing:
        # Open only: nothing claims it, and its I/O must not fail.
        load = guest.start(LOAD, unit="load")
        _goes_on(pvf, "before the resize")
        backing.resize(24)
        wait_until(
            "the resize waiting", lambda: pvf.state().get("resize_waits_for_last_close") is True
        )
        assert pvf.state()["geometry"]["size"] == 24 << 20
        assert _size(guest) == 16 << 20
        _goes_on(pvf, "while the resize waits")
        end_fio(guest, load)
        wait_until("the new size", lambda: _size(guest) == 24 << 20)
        pvf.wait_served()
        assert "resize_waits_for_last_close" not in pvf.state()
        guest.run(fio(size="4M", extra="--offset=18M"))
        assert pvf.sha256() == backing.sha256()
