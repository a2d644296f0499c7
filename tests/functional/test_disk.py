# SPDX-License-Identifier: BSD-2-Clause
"""What a disk does for its users, whoever is behind it: on the embedded host and in a guest on Xen.

Tools that we did not write look at the disk, through the installed package. What needs a kernel
(file systems, its own driver, suspend) is in tests/lab.
"""

from __future__ import annotations

import time

import pytest
from world import Disk, World

pytestmark = pytest.mark.disk


def sixteen_held(disk: Disk) -> bool:
    """Holds what is under way; lets go of it again if that is less and stays so.

    fio begins nothing new while it waits for the last of a batch.
    """
    disk.backing.hold()
    before = -1
    while (now := disk.backing.in_flight()) != before:
        if now >= 16:
            return True
        before = now
        time.sleep(0.5)
    disk.backing.release()
    return False


@pytest.mark.parametrize(
    ("bs", "depth", "extra"),
    [
        pytest.param("512", 1, "--size=512k", marks=pytest.mark.embedded),
        pytest.param("4k", 1, "--size=2M --fsync=16", marks=pytest.mark.embedded),
        pytest.param("4k", 64, "--size=2M", marks=pytest.mark.core),
        pytest.param("64k", 16, "--fsync=8", marks=pytest.mark.embedded),
        pytest.param("1M", 4, "--size=48M", marks=pytest.mark.embedded),
        pytest.param(
            "512-1M",
            32,
            "--bsrange=512-1M --blockalign=512",
            marks=pytest.mark.kinds("hvm", "pvh612"),  # by nbd, and by ublk
        ),
    ],
)
def test_what_fio_writes_it_reads_back(world: World, bs: str, depth: int, extra: str) -> None:
    with world.disk() as disk:
        disk.fio(bs=bs.split("-")[-1], depth=depth, extra=extra)


@pytest.mark.embedded  # in the lab: tests/lab/test_backends.py
def test_fio_verifies_with_trims_between(world: World) -> None:
    with world.disk() as disk:
        assert disk.state()["geometry"]["discard"] is True
        disk.fio(rw="randtrimwrite", bs="4k", depth=8, size="8M", extra="--fsync=32")
        disk.discard()
        disk.fio(size="4M")


@pytest.mark.embedded
def test_after_a_discard_the_whole_disk_is_zeroes(world: World) -> None:
    with world.disk(16) as disk:
        fresh = disk.sha256()
        disk.fio(size="8M")
        assert disk.sha256() == disk.backing.sha256() != fresh
        disk.discard()
        assert disk.sha256() == disk.backing.sha256() == fresh


@pytest.mark.embedded  # in the lab: tests/lab/test_backends.py
def test_the_reported_features_are_the_negotiated_ones(world: World) -> None:
    with world.disk(discard=False) as disk:
        geometry, keys, seen = disk.state()["geometry"], disk.backend_keys(), disk.seen()
        assert geometry["size"] == disk.backing.size == seen.size
        assert geometry["sectors"] == int(keys["sectors"])
        assert geometry["flush"] == (keys["feature-flush-cache"] == "1") == seen.flush
        assert geometry["discard"] == (keys.get("feature-discard") == "1") == seen.discard
        assert not geometry["read_only"]
        assert not seen.read_only


@pytest.mark.embedded  # in the lab: tests/lab/test_backends.py
def test_a_read_only_disk_refuses_writes_and_says_so(world: World) -> None:
    with world.disk(mode="r") as disk:
        assert disk.seen().read_only
        assert not disk.can_be_written()
        assert disk.sha256()


@pytest.mark.kinds("pv")  # whose guests boot fastest, and which shows no other list
def test_list_shows_every_device_with_its_owner_and_status_one_in_full(world: World) -> None:
    with world.disk(stock=True) as disk:
        rows = world.devices()
        ours = next(row for row in rows if (row["class"], row["name"]) == ("vbd", disk.name))
        assert ours["owner"] == "pvfront"
        assert ours["os_device"] == disk.os_device()
        assert ours["frontend_state"] == ours["backend_state"] == "Connected (4)"
        for klass in world.kernel_has:
            assert any(row["class"] == klass and row["owner"] == "kernel" for row in rows)
        plain = world.pvfront("list").stdout
        assert disk.name in plain
        assert "pvfront" in plain
        plain = world.pvfront("status", disk.name).stdout
        answer = disk.status()
        assert answer["phase"] == "connected"
        assert answer["geometry"] == disk.state()["geometry"]
        assert answer["rings"] == disk.state()["rings"]
        assert str(answer["worker_pid"]) in plain
        assert world.running()


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pvfront vbd serve xvdq", "there is no disk"),
        ("pvfront status xvdq", "xvdq"),
        ("pvfront release vbd xvdq", "xvdq"),
        ("pvfront store read no/such/key", "ENOENT"),
    ],
)
def test_a_mistake_is_answered_with_one_clear_line(world: World, command: str, said: str) -> None:
    result = world.pvfront(*command.split()[1:])
    assert result.code != 0
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()  # a service may have logged something before
    (complaint,) = [line for line in lines if line.startswith("pvfront: ")]
    assert said in complaint
    assert complaint is lines[-1]


def test_a_killed_supervisor_costs_no_io_and_the_next_adopts_the_worker(world: World) -> None:
    with world.disk(32) as disk:
        worker = disk.worker()
        load = disk.load(depth=16)
        world.wait_until("I/O", lambda: disk.written() > 50)
        world.kill_supervisor()
        world.wait_until("the adoption", lambda: disk.state().get("worker_pid") == worker)
        done = disk.written()
        world.wait_until("I/O after the adoption", lambda: disk.written() > done + 50)
        load.end()
        assert disk.state()["generation"] == 1
        assert disk.sha256() == disk.backing.sha256()


@pytest.mark.embedded  # in the lab: tests/lab/test_faults.py
def test_a_worker_killed_with_16_requests_in_flight_loses_nothing(world: World) -> None:
    with world.disk(32, slow=True) as disk:
        load = disk.load(depth=32, size="8M", reconnects=True)
        world.wait_until("I/O", lambda: disk.written() > 50)
        world.wait_until("16 requests held", lambda: sixteen_held(disk))
        old = disk.worker()
        world.kill(old)
        world.wait_until("a new worker", lambda: disk.state().get("worker_pid") not in (None, old))
        assert disk.backing.in_flight() >= 16, "the requests must still be in flight after the kill"
        disk.backing.release()
        world.wait_until("the new worker serving", disk.served)
        done = disk.written()
        world.wait_until("I/O of the new worker", lambda: disk.written() > done + 50)
        load.end()
        assert disk.state()["generation"] >= 2
        assert disk.sha256() == disk.backing.sha256()
        world.assert_no_io_errors()


@pytest.mark.embedded
def test_a_stopped_service_gives_everything_back_and_the_next_serves_the_same_data(
    world: World,
) -> None:
    with world.disk(16) as disk:
        disk.fio(size="8M")
        before = disk.sha256()
        world.stop()
        try:
            row = next(r for r in world.devices() if (r["class"], r["name"]) == ("vbd", disk.name))
            assert row["owner"] == world.given_to
            assert not any(world.held().values())
        finally:
            world.start()
        world.wait_until("the disk served again", disk.served)
        assert disk.sha256() == before == disk.backing.sha256()


@pytest.mark.embedded
def test_a_disk_that_grows_is_larger_for_its_next_user(world: World) -> None:
    with world.disk(16) as disk:
        disk.fio(size="8M")
        before = disk.seen().size
        disk.backing.resize(24)
        disk.sha256()  # Linux's blkback looks at the size when it has something to do
        world.wait_until("the new size", lambda: disk.seen().size == disk.backing.size)
        assert disk.backing.size == before + (8 << 20)
        assert disk.state()["geometry"]["size"] == disk.backing.size
        disk.fio(size="8M", extra="--offset=16M")
        assert disk.sha256() == disk.backing.sha256()


@pytest.mark.area
def test_an_idle_disk_costs_no_cpu_and_no_events(world: World) -> None:
    with world.disk() as disk:
        pids = (disk.worker(), world.supervisor())
        # What the attach set going (udev's probes, the log, the state file) ends first.
        world.wait_until("the end of what the attach began", lambda: world.cpu(pids, 2) == [0, 0])

        def idle() -> bool:
            before = disk.status()["statistics"]["events"]
            rested = world.cpu(pids, world.idle_seconds) == [0, 0]
            return rested and disk.status()["statistics"]["events"] == before

        world.wait_until(f"{world.idle_seconds} s without CPU and events", idle)


@pytest.mark.usefixtures("soak_round")
def test_attach_and_detach_again_and_again_leaks_nothing(world: World) -> None:
    backing = world.backing(16, discard=False)
    half = world.cycles // 2
    try:
        before: tuple[dict[str, int], int, int] | None = None
        for cycle in range(world.cycles):
            disk = world.attach(backing)
            if cycle % 5 == 0:
                disk.sha256()
            disk.detach()
            if cycle == half - 1:  # by then Python's and libc's arenas have what a cycle needs
                before = world.held(), *world.supervisor_holds()
    finally:
        backing.remove()
    assert before is not None
    held, descriptors, kib = before

    def no_more() -> bool:
        now = world.held()
        fewer = all(now[what] <= count for what, count in held.items())
        return fewer and world.supervisor_holds()[0] <= descriptors

    world.wait_until(f"no more than {held} and {descriptors} descriptors", no_more)
    memory = world.supervisor_holds()[1] - kib
    assert memory < 512, f"{memory} KiB more after {half} cycles"
    world.grant_every_page()
