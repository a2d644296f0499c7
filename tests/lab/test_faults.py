# SPDX-License-Identifier: BSD-2-Clause
"""Our processes are ended, killed and upgraded under load, also where memory or the log waits for
them, and backends let go of a disk or stop answering: applications notice a pause, and how long.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import paths, payload
from lab.guest import Guest
from lab.pvf import VDEV, Overlapping, Pvfront, end_fio, fio
from lab.scenario import Lab, Record, wait_until

import pvfront

pytestmark = pytest.mark.survive

# Ten rounds of ten in a soak.
KILLS = 10 if int(os.environ.get("PVFRONT_REPEATS", "1")) > 1 else 5
NEVER_MS = 600_000
"""A delay that no test waits for."""
DELAY_MS = 300
"""So that requests are always in flight, and the one processor has time for a new worker."""
NODE = "/dev/pvfront/xvdb"
MOUNT = "/mnt/xvdb"
MIB = 1 << 20
BLKBACK = "/sys/bus/xen-backend/drivers/vbd"


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


def goes_on(pvf: Pvfront, what: str) -> None:
    before = pvf.written()
    wait_until(f"I/O {what}", lambda: pvf.written() > before + 100)


def new_worker(pvf: Pvfront, old: int) -> None:
    wait_until("a new worker", lambda: pvf.state().get("worker_pid") not in (None, old))
    pvf.wait_served()


def nothing_was_noticed(guest: Guest) -> None:
    assert "I/O error" not in guest.output("dmesg")


@pytest.mark.usefixtures("soak_round")
def test_workers_killed_with_overlapping_writes_in_flight_lose_nothing_and_bring_back_nothing(
    lab: Lab, guest: Guest
) -> None:
    """One half of the disk is fio's, at depth 32; in the other, writes overlap all the time."""
    pvf = Pvfront(lab, guest)
    pvf.start("-o start_limit_burst=0 --all")
    backing = lab.delayed_disk(32)
    with pvf.disk(backing):
        backing.set_delay(DELAY_MS)
        extra = "--time_based --runtime=9000 --verify_backlog=64"
        load = guest.start(fio(depth=32, size="8M", extra=extra))
        overlapping = Overlapping(guest, NODE, 16 * MIB)
        goes_on(pvf, "before the first kill")
        for kill in range(KILLS):
            backing.set_delay(NEVER_MS)
            # fio waits for the last of a batch now and then; the threads are held for certain.
            wait_until("32 requests held", lambda: backing.in_flight() >= 32)
            old = pvf.worker()
            guest.run(f"kill -KILL {old}")
            wait_until(
                "a new worker", lambda old=old: pvf.state().get("worker_pid") not in (None, old)
            )
            assert backing.in_flight() >= 32, "the requests must still be in flight after the kill"
            backing.set_delay(DELAY_MS)  # what was held is let go
            pvf.wait_served()
            goes_on(pvf, f"after kill {kill + 1}")
        assert pvf.state()["generation"] > KILLS
        backing.clear_delay()
        overlapping.end()
        end_fio(guest, load)
        nothing_was_noticed(guest)
        assert pvf.sha256() == backing.sha256()


def restart(pvf: Pvfront) -> None:
    pvf.guest.run("systemctl restart pvfront-vbd", timeout=300)


def stop(pvf: Pvfront) -> None:
    """And, when it has been used without a supervisor, start."""
    pvf.stop()
    goes_on(pvf, "of the worker that is left")
    pvf.guest.run("systemctl start pvfront-vbd", timeout=300)


def kill_supervisor(pvf: Pvfront) -> None:
    pvf.guest.run(f"kill -KILL {pvf.pid()}")


def kill_worker(pvf: Pvfront) -> None:
    worker = pvf.worker()
    pvf.guest.run(f"kill -KILL {worker}")
    new_worker(pvf, worker)


def another_version() -> Path:
    """The package under test, but for its version."""
    version = pvfront.__version__
    other = f"{version}.post1"
    made = paths.BUILD / f"pvfront_{other}.deb"
    with tempfile.TemporaryDirectory(dir=paths.BUILD) as work:
        subprocess.run(["dpkg-deb", "-R", str(payload.find_deb()), work], check=True)
        (init,) = Path(work).glob("usr/lib/pvfront/lib/python3*/site-packages/pvfront/__init__.py")
        for path in (init, Path(work) / "DEBIAN/control"):
            path.write_text(path.read_text().replace(version, other))
        subprocess.run(["dpkg-deb", "-Znone", "-b", work, str(made)], check=True)
    return made


def upgrade(pvf: Pvfront) -> None:
    """What dpkg does with another version's package, then a restart."""
    before, worker = pvf.guest.output("pvfront --version"), pvf.worker()
    pvf.guest.dirty = True  # later tests want the version that is tested
    deb = another_version()
    payload.install(pvf.guest, deb)
    deb.unlink()
    assert pvf.guest.output("pvfront --version") != before
    restart(pvf)
    new_worker(pvf, worker)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(restart, marks=pytest.mark.long),
        pytest.param(stop, marks=pytest.mark.long),
        pytest.param(kill_supervisor, marks=pytest.mark.long),
        pytest.param(kill_worker, marks=pytest.mark.long),
        pytest.param(upgrade, marks=pytest.mark.long),
    ],
)
def test_a_busy_file_system_notices_a_pause_when_our_processes_are_ended_and_begun_again(
    pvf: Pvfront,
    guest: Guest,
    end: Callable[[Pvfront], None],
    record: Record,
) -> None:
    with pvf.disk():
        guest.run(f"mkfs.ext4 -q {NODE} && mkdir -p {MOUNT} && mount {NODE} {MOUNT}")
        guest.run(f"fallocate -l 64k {MOUNT}/blocks")
        overlapping = Overlapping(guest, f"{MOUNT}/blocks")
        # Its journal is written all the time; what costs more takes the one processor.
        churn = guest.start(
            f"while sleep 0.1; do date >{MOUNT}/$((++n % 50)) && sync -f {MOUNT} || exit; done"
        )
        goes_on(pvf, "before")
        pid, generation = pvf.pid(), pvf.state()["generation"]
        overlapping.measure()
        end(pvf)
        if end is not kill_worker:
            pvf.wait_restarted(pid)
            assert pvf.status()["generation"] == generation, "the data path was not to end"
        goes_on(pvf, "after")
        record(f"busy file system, {end.__name__}", f"pause {overlapping.end()['pause']:.2f} s")
        assert churn.running, "it must not have failed"
        churn.kill()
        churn.wait()
        guest.run(f"umount {MOUNT} && e2fsck -f -n {NODE}")
        nothing_was_noticed(guest)


def meminfo(guest: Guest) -> dict[str, int]:
    """/proc/meminfo in MiB."""
    (seen,) = guest.look("/proc/meminfo")
    lines = (line.split() for line in (seen.text or "").splitlines()) if seen else ()
    return {words[0].rstrip(":"): int(words[1]) >> 10 for words in lines}


@pytest.mark.long
def test_dirty_pages_reach_the_disk_with_128_mib_left_and_a_worker_killed_meanwhile(
    pvf: Pvfront, guest: Guest, lab: Lab, record: Record
) -> None:
    """Memory is short, what would free it is on our disk, and a process of ours must start."""
    hog = "/mnt/hog"
    with pvf.disk(lab.loop_disk(384)):
        guest.run(f"mkfs.ext4 -q {NODE} && mkdir -p {MOUNT} && mount {NODE} {MOUNT}")
        before = guest.output("sysctl vm.dirty_ratio vm.dirty_background_ratio")
        guest.run("sysctl -q vm.dirty_ratio=80 vm.dirty_background_ratio=60")
        try:
            guest.run(f"mkdir -p {hog} && mount -t tmpfs -o size=100% hog {hog}")
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            take = meminfo(guest)["MemAvailable"] - 128
            guest.run(f"head -c {take}M /dev/zero >{hog}/pages")
            left = meminfo(guest)["MemAvailable"]
            assert left < 144, meminfo(guest)
            load = guest.start(
                f"fio --name=dirty --directory={MOUNT} --rw=write --bs=256k --size=256M "
                "--ioengine=psync --end_fsync=1 --verify=crc32c --verify_fatal=1 "
                "--output-format=terse"
            )
            wait_until(
                "writeback",
                lambda: (
                    (now := meminfo(guest))["Dirty"] + now["Writeback"] > 32
                    and now["Writeback"] > 0
                ),
            )
            old = pvf.worker()
            guest.run(f"kill -KILL {old}")
            new_worker(pvf, old)
            result = load.wait(600)
            assert result.ok, result
            record(f"256 MiB with {left} MiB left", f"{result.seconds:.0f} s")
            assert "Out of memory" not in guest.output("dmesg")
            nothing_was_noticed(guest)
        finally:
            guest.run(f"umount {hog}", check=False)
            guest.run(["sysctl", "-q", *before.replace(" = ", "=").split()])
        guest.run(f"umount {MOUNT} && e2fsck -f -n {NODE}")


JOURNAL = "/var/log/journal"
PERSISTENT = "/run/systemd/journald.conf.d/zz-persistent.conf"  # the lab's guests keep it in memory


@pytest.mark.long
def test_a_journal_on_our_disk_goes_on_when_worker_and_supervisor_die_one_by_one_and_together(
    pvf: Pvfront, guest: Guest
) -> None:
    def logged(text: str) -> None:
        """Is written, and read back from the disk."""
        guest.run(["logger", "-t", "onourdisk", text])
        wait_until(
            f"{text!r} in the journal",
            lambda: text in guest.output("journalctl --sync; journalctl -b -t onourdisk -n 5"),
        )

    with pvf.disk():
        guest.run(
            f"mkfs.ext4 -q {NODE} && mkdir -p {MOUNT} {JOURNAL} && mount {NODE} {MOUNT} "
            f"&& mkdir {MOUNT}/journal && mount --bind {MOUNT}/journal {JOURNAL} "
            f"&& mkdir -p {PERSISTENT.rpartition('/')[0]} "
            f"&& printf '[Journal]\\nStorage=persistent\\n' >{PERSISTENT} "
            "&& systemctl restart systemd-journald && journalctl --flush"
        )
        try:
            assert guest.output(f"ls {MOUNT}/journal/*/system.journal")
            chatter = guest.start("while sleep 0.02; do echo text; done | systemd-cat -t chatter")
            logged("before")
            worker = pvf.worker()
            guest.run(f"kill -KILL {worker}")
            new_worker(pvf, worker)
            logged("after the worker")
            supervisor = pvf.pid()
            guest.run(f"kill -KILL {supervisor}")
            pvf.wait_restarted(supervisor)
            logged("after the supervisor")
            worker = pvf.worker()
            guest.run(f"kill -KILL {pvf.pid()} {worker}")
            new_worker(pvf, worker)
            logged("after both")
            assert "adopted" in pvf.log() or "took over" in pvf.log()
            chatter.kill()
        finally:
            guest.run(
                f"rm -f {PERSISTENT}; umount -l {JOURNAL}; "
                f"rmdir --ignore-fail-on-non-empty {JOURNAL}; "
                "systemctl restart systemd-journald"
            )
        guest.run(f"umount {MOUNT} && e2fsck -f -n {NODE}")
        nothing_was_noticed(guest)


@pytest.mark.long  # at each run: the embedded host's, dozens of times among its absences
def test_a_backend_whose_driver_is_unbound_and_bound_again_costs_a_pause(
    pvf: Pvfront, guest: Guest, lab: Lab, record: Record
) -> None:
    """As a reload of its module, which cannot be had here: the guest's root disk needs it too.

    Linux's blkback leaves its state Connected, and goes on with the ring where it had stopped.
    """
    with pvf.disk():
        overlapping = Overlapping(guest, NODE, 16 * MIB)
        goes_on(pvf, "before")
        overlapping.measure()
        device = f"vbd-{guest.number}-{VDEV['xvdb']}"
        lab.dom0.run(f"echo {device} >{BLKBACK}/unbind && ! test -e {BLKBACK}/{device}")
        lab.dom0.run(f"echo {device} >{BLKBACK}/bind")
        goes_on(pvf, "after")
        pvf.wait_served()
        record("backend unbound and bound again", f"pause {overlapping.end()['pause']:.2f} s")
        nothing_was_noticed(guest)


@pytest.mark.long
def test_a_stalled_backend_is_named_and_its_disk_can_be_unplugged_in_the_toolstacks_time(
    pvf: Pvfront, guest: Guest, lab: Lab, record: Record
) -> None:
    backing = lab.delayed_disk(16)
    guest.block_attach(backing.spec("xvdb"))
    pvf.wait_served()
    guest.run("udevadm settle")  # the request that stalls is to be the reader's, and not its probe
    # Not even what waits in its queue is let go, as a change of the delay would.
    lab.dom0.run(["dmsetup", "suspend", "--noflush", "--nolockfs", backing.name])
    try:
        reader = guest.start(f"exec dd if={NODE} of=/dev/null bs=4k count=1 iflag=direct")
        wait_until("the stall in status", lambda: pvf.state().get("stalled_seconds"))
        said = guest.output("pvfront status xvdb").splitlines()
        assert any(line.startswith("stalled seconds") for line in said), said
        assert reader.running
        ended = lab.xl("block-detach", guest.kind, "xvdb")  # fails if it took libxl's 10 s
        record("unplug from a stalled backend", f"{ended.seconds:.1f} s")
        wait_until(
            "its end in the store", lambda: lab.vbd_state(guest, VDEV["xvdb"]) == (None, None)
        )
        assert not reader.wait().ok, "what was never read must not be taken for read"
        assert not guest.has(NODE)
    finally:
        guest.run("dmesg -C")  # of the read that failed, for the tests that look for such
        lab.dom0.run(["dmsetup", "resume", backing.name])
    wait_until("the disk let go of", lambda: lab.dom0.output(
        f"dmsetup info -c --noheadings -o open {backing.name}") == "0")  # fmt: skip
    backing.remove()
