# SPDX-License-Identifier: BSD-2-Clause
"""The worker of a mounted, busy disk is replaced: a pause, and neither end of xenbus learns of it.

Each way once: asked for by name, and by a reload after another program was installed.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator

import pytest
from lab.client import Job
from lab.guest import Guest
from lab.pvf import UNIT, VDEV, Pvfront, end_fio
from lab.scenario import Lab, wait_until

pytestmark = pytest.mark.survive

# Ten rounds of ten in a soak.
UPGRADES = 10 if int(os.environ.get("PVFRONT_REPEATS", "1")) > 1 else 2
DELAY_MS = 400
MOUNT = "/mnt/xvdb"
LOAD = (
    f"fio --name=verify --directory={MOUNT} --rw=randwrite --bs=4k --size=8M --iodepth=32 "
    "--ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_backlog=64 "
    "--time_based --runtime=1000 --output-format=terse"
)
TEXT = re.compile(r"worker (\d+) took over from (\d+) with (\d+) requests .* pause of ([\d.]+) ms")


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


@pytest.fixture
def program(guest: Guest) -> Iterator[str]:
    """The path of the worker's program, which is put back at the end."""
    path = guest.output("ls /usr/lib/pvfront/lib/python3*/site-packages/pvfront/pvfront-worker")
    guest.run(f"cp -p {path} {path}.kept")
    yield path
    guest.run(f"mv {path}.kept {path}")


def goes_on(pvf: Pvfront) -> None:
    before = pvf.written()
    wait_until("I/O", lambda: pvf.written() > before + 50)


def fired(watch: Job) -> list[str]:
    watch.poll()
    return watch.stdout.split()


def upgraded(guest: Guest) -> re.Match[str]:
    while True:
        ended = guest.run(["pvfront", "upgrade", "xvdb"], check=False)
        found = TEXT.search(ended.stdout)
        if found and ended.ok:
            return found
        # A machine that is busy elsewhere for seconds: the old worker has gone on, as it should.
        assert "did not answer in time" in ended.stderr, ended


@pytest.mark.area  # at each run: the embedded host's, and a vif's in test_net.py
@pytest.mark.usefixtures("soak_round")
@pytest.mark.timeout(900)
def test_a_mounted_disk_at_depth_32_gets_other_workers_and_both_ends_stay_connected(
    pvf: Pvfront, guest: Guest, lab: Lab, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = lab.delayed_disk(64)
    with pvf.disk(slow):
        guest.run(
            f"mkfs.ext4 -q /dev/pvfront/xvdb && mkdir -p {MOUNT} && mount /dev/pvfront/xvdb {MOUNT}"
        )
        # So that the queue is always full, and the one processor has time for something else.
        slow.set_delay(DELAY_MS)
        load = guest.start(LOAD, unit="upgrades")
        goes_on(pvf)
        ends = [
            f"/local/domain/{guest.number}/device/vbd/{VDEV['xvdb']}/state",
            f"/local/domain/0/backend/vbd/{guest.number}/{VDEV['xvdb']}/state",
        ]
        watch = lab.dom0.start(["stdbuf", "-oL", "xenstore-watch", *ends])
        wait_until("the watches", lambda: sorted(fired(watch)) == sorted(ends))  # each fires once
        first = pvf.state()
        pids, pauses, flying = {first["worker_pid"]}, [], []
        for _ in range(UPGRADES):
            found = upgraded(guest)
            assert int(found[2]) in pids
            pids.add(int(found[1]))
            flying.append(int(found[3]))
            pauses.append(float(found[4]))
            goes_on(pvf)
        assert len(pids) == UPGRADES + 1
        # Another program, as a package manager installs one: it differs, and does the same.
        guest.run(f"cp -p {program} {program}.new && printf '\\0' >>{program}.new")
        guest.run(f"mv {program}.new {program}")
        assert pvf.status()["worker_outdated"] is True
        guest.run(f"systemctl reload {UNIT}")
        wait_until("the reload", lambda: pvf.state().get("upgrades") == UPGRADES + 1)
        last = pvf.state()
        pauses.append(last["upgrade_pause_ms"])
        goes_on(pvf)
        middle, longest = statistics.median(pauses), max(pauses)
        with capsys.disabled():
            print(
                f"\n{len(pauses)} upgrades of a mounted disk at depth 32, {flying} requests in "
                f"flight: median pause {middle:.1f} ms, longest {longest:.1f} ms"
            )
        assert any(flying)
        assert last["worker_pid"] not in pids
        assert last["worker_build"] != first["worker_build"]
        assert not guest.has(f"/proc/{first['worker_pid']}")
        assert (last["generation"], last["reconnects"]) == (first["generation"], 0)
        assert sorted(fired(watch)) == sorted(ends), "someone has written a state"
        watch.kill()
        slow.clear_delay()
        end_fio(guest, load)
        kernel = guest.output("dmesg")
        assert "I/O error" not in kernel
        assert "BUG" not in kernel
        guest.run(f"umount {MOUNT} && e2fsck -f -n /dev/pvfront/xvdb")
