# SPDX-License-Identifier: BSD-2-Clause
"""Suspends of every sort under load: applications notice nothing but a pause."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from lab.guest import FILES, Guest
from lab.pvf import VDEV, Overlapping, Pvfront, end_fio, fio
from lab.scenario import Lab, Record, wait_until
from lab.vifs import Networks, Stream

pytestmark = pytest.mark.survive

DIRECT = fio(depth=32, size="8M", extra="--time_based --runtime=1000 --verify_backlog=128")
MOUNT = "/mnt/xvdc"
BUFFERED = (
    f"fio --name=buffered --directory={MOUNT} --rw=randwrite --bs=4k --size=4M --fsync=1 "
    "--time_based --runtime=1000 --verify=crc32c --verify_fatal=1 "
    "--verify_backlog=64 --output-format=terse"
)
SOAK = int(os.environ.get("PVFRONT_REPEATS", "1")) > 1
DISKS = ("xvdb", "xvdc")
DELAY_MS = 300
"""So that the queue is full, and the one processor has time for what the load goes through."""
NEVER_MS = 600_000
"""A delay that no test waits for."""
MIB = 1 << 20


def suspend(guest: Guest) -> dict[str, Any]:
    """What the owner of suspend last said of itself, {} if nothing."""
    (seen,) = guest.look("/run/pvfront/suspend.json")
    answer: dict[str, Any] = json.loads(seen.text) if seen and seen.text else {}
    return answer


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    watched(guest)
    return service


def watched(guest: Guest) -> None:
    wait_until(
        "suspend being watched for",
        lambda: (now := suspend(guest)).get("stage") == "watching" and now["armed"],
    )


def goes_on(pvf: Pvfront, *names: str) -> None:
    """Returns once each disk has answered some more writes."""
    before = {name: pvf.written(name) for name in names}
    for name, old in before.items():
        wait_until(f"I/O on {name}", lambda name=name, old=old: pvf.written(name) > old + 20)


def overlapping(guest: Guest) -> Overlapping:
    """Writes that overlap on the part of xvdb that fio has not: few, for the one processor."""
    return Overlapping(guest, "/dev/pvfront/xvdb", 16 * MIB, blocks=2, writers=6, readers=2)


def pause(load: Overlapping) -> str:
    """Ends `load`; what it noticed, by both clocks."""
    figures = load.end()
    return f"pause {figures['pause']:.1f} s, {figures['away']:.1f} s with the time asleep"


def nothing_was_noticed(guest: Guest) -> None:
    kernel = guest.output("dmesg")
    assert "I/O error" not in kernel
    assert "BUG" not in kernel


@pytest.mark.kinds("hvm", "pv", "pvh612")  # pvh612 is a PVH guest
@pytest.mark.usefixtures("soak_round")
@pytest.mark.timeout(1800)
def test_direct_and_buffered_loads_run_through_save_and_restore_without_an_error(
    pvf: Pvfront, guest: Guest, lab: Lab, record: Record
) -> None:
    """The kernel cannot freeze who waits for an fsync: both ways of freezing are needed."""
    boot, domid = guest.boot_id(), guest.number
    slow = [lab.delayed_disk(64) for _ in DISKS]
    with pvf.disk(slow[0], "xvdb"), pvf.disk(slow[1], "xvdc"):
        guest.run(
            f"mkfs.ext4 -q /dev/pvfront/xvdc && mkdir -p {MOUNT} && mount /dev/pvfront/xvdc {MOUNT}"
        )
        for backing, ms in zip(slow, (DELAY_MS, 50), strict=True):  # an fsync is several requests
            backing.set_delay(ms)
        loads = [guest.start(DIRECT, unit="direct"), guest.start(BUFFERED, unit="buffered")]
        both = overlapping(guest)
        goes_on(pvf, *DISKS)
        both.measure()
        guest.save()
        assert not guest.running()
        guest.restore()
        assert guest.boot_id() == boot
        assert guest.number != domid
        for name in DISKS:
            pvf.wait_served(name)
        for load in loads:
            assert load.running, "the load must have been under way during the suspend"
        goes_on(pvf, *DISKS)
        record(f"{guest.kind}: saved and restored", pause(both))
        for backing in slow:
            backing.clear_delay()
        end_fio(guest, *loads)
        nothing_was_noticed(guest)
        guest.run(f"umount {MOUNT} && e2fsck -f -n /dev/pvfront/xvdc")
        if guest.kind == "hvm" or SOAK:  # 20 s, and nothing of it is the guest's kind's
            guest.run("systemctl restart pvfront-vbd", timeout=300)
            for name in DISKS:
                pvf.wait_served(name)


@pytest.mark.area
@pytest.mark.timeout(1800)
def test_a_paused_and_a_checkpointed_guest_go_on_with_their_disk(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.delayed_disk(64)
    with pvf.disk(backing):
        backing.set_delay(DELAY_MS)
        load = guest.start(DIRECT, unit="direct")
        goes_on(pvf, "xvdb")
        lab.xl("pause", guest.kind)
        assert not guest.alive(), "a paused guest must not answer"
        lab.xl("unpause", guest.kind)
        goes_on(pvf, "xvdb")
        assert pvf.state()["generation"] == 1
        # -c: the domain goes on after it was saved; for the guest that is a cancelled suspend.
        checkpoint = f"{FILES}/{guest.kind}.checkpoint"
        lab.xl("save", "-c", guest.kind, checkpoint, timeout=300)
        lab.dom0.run(["rm", "-f", checkpoint])
        pvf.wait_served()
        assert pvf.state()["generation"] >= 2, "the ports must have been let go for the suspend"
        goes_on(pvf, "xvdb")
        backing.clear_delay()
        end_fio(guest, load)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_guest_that_migrates_to_its_own_host_goes_on_with_its_disk(
    pvf: Pvfront, guest: Guest, lab: Lab, record: Record
) -> None:
    if guest.kind == "pv":
        pytest.skip("Debian's Xen has no shadow paging, without which no PV guest migrates live")
    backing = lab.delayed_disk(64)
    with pvf.disk(backing):
        backing.set_delay(DELAY_MS)
        boot, domid = guest.boot_id(), guest.number
        load = guest.start(DIRECT, unit="direct")
        both = overlapping(guest)
        goes_on(pvf, "xvdb")
        both.measure()
        # With an empty -s xl's "host" is the command that receives.
        lab.xl("migrate", "-s", "", guest.kind, "xl migrate-receive", timeout=900)
        guest.close()
        assert guest.domid() not in (None, domid)
        guest.wait_agent()
        assert guest.boot_id() == boot
        pvf.wait_served()
        assert load.running, "the load must have been under way during the migration"
        goes_on(pvf, "xvdb")
        record(f"{guest.kind}: migrated", pause(both))
        backing.clear_delay()
        end_fio(guest, load)
        nothing_was_noticed(guest)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_one_suspend_covers_two_services_a_disk_and_a_network_under_load(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    """Whichever of them owns it: the other one's ports are let go of in the same stages."""
    net = Networks(lab, guest)
    net.start("--all")
    wait_until("the other service in it", lambda: len(suspend(guest).get("services", [])) == 1)
    backing = lab.delayed_disk(64)
    with pvf.disk(backing), net.vif() as vif:
        backing.set_delay(DELAY_MS)
        load = guest.start(DIRECT, unit="direct")
        vif.ping()
        stream = Stream(vif)
        goes_on(pvf, "xvdb")
        stream.goes_on()
        asked = suspend(guest)["suspended"]
        before = pvf.state()["generation"], net.state(vif)["generation"]
        guest.save()
        guest.restore()
        pvf.wait_served()
        net.wait_served(vif)
        goes_on(pvf, "xvdb")
        stream.goes_on()
        after = pvf.state()["generation"], net.state(vif)["generation"]
        assert after == (before[0] + 1, before[1] + 1)
        now = suspend(guest)
        assert (now["suspended"], now["unprepared"]) == (asked + 1, 0)
        stream.end()
        backing.clear_delay()
        end_fio(guest, load)
        nothing_was_noticed(guest)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_guest_of_two_processors_is_saved_and_restored_with_a_disk_of_two_queues(
    guest: Guest, lab: Lab, record: Record
) -> None:
    """While one processor puts things away the other one still runs programs."""
    guest.destroy()
    guest.create(options={"vcpus": 2})
    pvf = Pvfront(lab, guest)
    pvf.start("-o max_queues=2 --all")
    watched(guest)
    backing = lab.delayed_disk(64)
    with pvf.disk(backing):
        assert pvf.state()["rings"]["queues"] == 2
        backing.set_delay(DELAY_MS)
        load = guest.start(DIRECT, unit="direct")
        both = overlapping(guest)
        goes_on(pvf, "xvdb")
        both.measure()
        guest.save()
        guest.restore()
        pvf.wait_served()
        assert load.running
        goes_on(pvf, "xvdb")
        record(f"{guest.kind} of two processors: saved and restored", pause(both))
        assert pvf.state()["rings"]["queues"] == 2
        assert suspend(guest)["refused"] == 0
        backing.clear_delay()
        end_fio(guest, load)
        nothing_was_noticed(guest)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_suspend_waits_for_a_disk_that_answers_after_five_seconds(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.delayed_disk(64)
    with pvf.disk(backing):
        load = guest.start(DIRECT, unit="direct")
        goes_on(pvf, "xvdb")
        backing.set_delay(5_000)
        wait_until("requests held", lambda: backing.in_flight() >= 16)
        guest.save()
        backing.clear_delay()
        guest.restore()
        pvf.wait_served()
        assert load.running
        goes_on(pvf, "xvdb")
        end_fio(guest, load)
        nothing_was_noticed(guest)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_suspend_is_refused_with_the_reason_while_a_backend_stalls_and_the_next_succeeds(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.delayed_disk(64)
    with pvf.disk(backing):
        boot = guest.boot_id()
        load = guest.start(DIRECT, unit="direct")
        goes_on(pvf, "xvdb")
        backing.set_delay(NEVER_MS)
        wait_until("requests held", lambda: backing.in_flight() >= 16)
        image = f"{FILES}/{guest.kind}.refused"
        refused = lab.xl("save", guest.kind, image, check=False, timeout=300)
        assert not refused.ok
        lab.dom0.run(["rm", "-f", image])
        wait_until("the refusal", lambda: suspend(guest).get("refused"))
        assert "xvdb: its backend has not answered" in suspend(guest)["last_refusal"]
        assert guest.boot_id() == boot
        backing.clear_delay()
        pvf.wait_served()
        goes_on(pvf, "xvdb")
        watched(guest)
        guest.save()
        guest.restore()
        pvf.wait_served()
        goes_on(pvf, "xvdb")
        end_fio(guest, load)
        nothing_was_noticed(guest)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_guest_that_slept_without_asking_gets_its_disk_back_and_can_be_switched_off(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    """The ports that were bound meanwhile are parked: closing one would be a bug of the kernel's,
    and a process that could not end."""
    with pvf.disk():
        load = guest.start(DIRECT, unit="direct")
        goes_on(pvf, "xvdb")
        worker = pvf.worker()
        # A wrong number is refused, and turns the veto off without anybody's knowing.
        guest.run("echo 1 >/sys/power/wakeup_count", check=False)
        guest.save()
        guest.restore()
        wait_until("its being seen", lambda: suspend(guest).get("unprepared"))
        wait_until("another worker", lambda: pvf.state().get("worker_pid") not in (None, worker))
        pvf.wait_served()
        assert load.running
        goes_on(pvf, "xvdb")
        end_fio(guest, load)
        nothing_was_noticed(guest)
    guest.shutdown()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_program_that_a_disk_is_lent_to_notices_a_pause_when_the_guest_is_saved_and_restored(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    """The lender owns suspend, and the program's library closes the port whatever it is doing."""
    pvf.stop()
    guest.run("rm -f /run/pvfront/suspend.json")  # so that what is read there is the lender's
    lent = lab.loop_disk(16)
    guest.block_attach(lent.spec("xvdb"))
    program = guest.start(
        "pvfront vbd lend xvdb -- pvfront-disk-bench --rw randwrite --bs 4k --iodepth 8 "
        "--runtime 100000",
        unit="lent",
    )

    def connected() -> bool:
        return lab.vbd_state(guest, VDEV["xvdb"]) == ("4", "4")

    def completed() -> int:
        return int(pvf.status()["statistics"]["write"]["requests"])

    wait_until("the lent disk connected", connected)
    watched(guest)
    guest.save()
    guest.restore()
    wait_until("the lent disk connected again", connected)
    before = completed()
    wait_until("I/O of the program", lambda: completed() > before + 50)
    assert program.running, "the program must not have noticed"
    program.kill(15)
    program.wait()
    nothing_was_noticed(guest)
    guest.block_detach("xvdb")
    lent.remove()
