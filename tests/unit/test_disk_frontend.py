# SPDX-License-Identifier: BSD-2-Clause
"""A disk's half of the device loop, with the real worker; around it tests/support/diskworld.py."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import logging
import os
import signal

import pytest
from diskworld import (
    NAME,
    PORT,
    RING_GREF,
    SECTORS,
    Refusing,
    World,
    descriptors,
    gone,
    world,
)
from embedded import Nbd
from ringbackend import RSP_PROD
from waiting import PATIENCE, eventually

from pvfront import workerside
from pvfront.blkfront import frontend as module
from pvfront.blkfront.features import GeometryError
from pvfront.blkfront.rings import Shape
from pvfront.blkfront.target import TargetError
from pvfront.errors import PvfrontError
from pvfront.gntalloc import GrantsExhausted
from pvfront.parking import CannotPark
from pvfront.states import XenbusState
from pvfront.worker import WorkerError
from pvfront.xenbus import View

# -- a generation ----------------------------------------------------------------------------------


async def test_attach_publishes_port_ring_and_protocol_and_keeps_no_descriptor(
    world: World,
) -> None:
    keys = await world.attach()
    assert keys == {
        "event-channel": str(PORT),
        "ring-ref": str(RING_GREF),
        "protocol": "x86_64-abi",
        "feature-persistent": "1",
    }
    assert world.disk.generation == 1
    assert world.host.asked == [1 + 32 * 11]
    assert world.host.open == 0, "the worker is the only holder"
    assert all(world.disk.stale_key(key) for key in keys)
    assert world.target.calls == [], "nothing is served before the backend is Connected"


async def test_start_gives_the_worker_a_socket_and_publishes_the_disk(world: World) -> None:
    disk = await world.running()
    assert world.target.calls == ["attach", "publish"]
    assert world.target.published[0].sectors == SECTORS
    await world.write(4096, b"x" * 512)
    assert world.host.disk[4096:4608] == b"x" * 512
    assert await world.read(4096, 512) == b"x" * 512
    assert disk.trouble is None
    assert not disk.pending
    details = disk.details()
    assert details["geometry"]["size"] == SECTORS * 512
    assert details["geometry"]["flush"] is True
    assert (details["rings"]["pool_pages"], details["rings"]["ring_pages"]) == (352, 1)
    assert (details["os_device"], details["link"]) == ("/dev/nbd0", "/dev/pvfront/xvdb")
    assert (disk.busy(), disk.in_flight(), disk.os_path) == ("mounted at /srv", 7, "/dev/nbd0")


async def test_a_read_only_disk_refuses_writes(world: World) -> None:
    world.device.keys["mode"] = "r"
    disk = await world.running()
    assert disk.details()["geometry"]["read_only"] is True
    with pytest.raises(Exception, match="NBD error 1"):
        await world.write(0, bytes(512))
    assert not world.backend.log


async def test_pages_are_cleared_for_a_backend_that_is_not_trusted(world: World) -> None:
    world.device.front["trusted"] = "0"
    await world.running()
    await world.write(0, b"s" * 4096)
    await world.read(8192, 512)
    assert world.host.pages is not None
    assert b"s" * 512 not in world.host.pages.pool()


async def test_a_new_generation_with_the_socket_kept_asks_for_no_other(world: World) -> None:
    disk = await world.running()
    assert await disk.quiesce(PATIENCE)
    await disk.detach(keep_target=True)
    await world.running()
    assert disk.generation == 2
    assert world.target.calls == ["attach", "publish", "publish"]
    await world.write(0, b"2" * 512)
    assert world.host.disk[:512] == b"2" * 512


async def test_a_new_generation_without_the_socket_gets_another(world: World) -> None:
    disk = await world.running()
    pid = world.pid()
    await disk.detach(keep_target=False)
    await world.running()
    assert world.target.calls == ["attach", "publish", "attach", "publish"]
    assert world.pid() == pid, "the worker is the same"
    await world.write(0, b"2" * 512)


async def test_end_ends_the_worker_and_removes_its_socket(world: World) -> None:
    disk = await world.running()
    pid = world.pid()
    await disk.detach(keep_target=False)
    await disk.end()
    await disk.end()
    assert gone(pid)
    assert not (world.run_dir / f"{NAME}.sock").exists()
    assert disk.details()["worker_pid"] is None
    assert disk.trouble is None, "an end that was asked for is no trouble"


# -- keys that make no sense -----------------------------------------------------------------------


async def test_problems_of_single_keys_are_said_and_the_disk_is_served(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.device.keys.update({"discard-granularity": "700", "physical-sector-size": "-1"})
    disk = await world.running()
    assert "vbd-51728: backend key discard-granularity" in caplog.text
    assert "physical-sector-size" in caplog.text
    assert disk.details()["geometry"]["discard"] is False
    assert disk.details()["geometry"]["physical_sector_size"] == 512


@pytest.mark.parametrize("field", ["sectors", "sector-size", "info"])
async def test_a_missing_key_that_a_disk_needs_is_named_and_no_device_made(
    world: World, field: str
) -> None:
    await world.attach()
    del world.device.keys[field]
    with pytest.raises(GeometryError, match=field):
        await world.disk.start(world.device)
    assert world.target.calls == []
    assert world.disk.geometry is None


async def test_a_cdrom_is_refused_by_its_type_or_by_its_flag(world: World) -> None:
    await world.attach()
    world.device.front["device-type"] = "cdrom"
    with pytest.raises(PvfrontError, match="xvdb: it is a cdrom, not a disk") as refused:
        await world.disk.start(world.device)
    assert refused.value.hint
    world.device.front.clear()
    world.device.keys["info"] = "1"
    with pytest.raises(PvfrontError, match="it is a cdrom"):
        await world.disk.start(world.device)
    assert world.target.calls == []


# -- grants ----------------------------------------------------------------------------------------


async def test_without_room_the_pool_is_halved_said_and_served(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.host.limit = 100
    disk = await world.running()
    assert world.host.asked == [353, 176, 88]
    rings = disk.details()["rings"]
    assert rings["pool_pages"] == 87
    assert rings["granted"]["asked"] == 353
    assert rings["granted"]["got"] == 88
    assert "no room for 176 granted pages" in rings["granted"]["why"]
    assert "no room for 176 granted pages" in caplog.text
    data = os.urandom(256 * 1024)  # more than the pool holds
    await world.write(0, data)
    assert await world.read(0, len(data)) == data


async def test_the_least_pool_still_carries_one_request(world: World) -> None:
    world.host.limit = 12
    disk = await world.running()
    assert disk.details()["rings"]["pool_pages"] == 11
    await world.write(0, b"x" * 131072)
    assert world.host.disk[:131072] == b"x" * 131072


async def test_without_room_for_the_least_pool_the_limit_is_named(world: World) -> None:
    world.host.limit = 11
    with pytest.raises(GrantsExhausted, match="no room for 12 granted pages") as refused:
        await world.attach()
    assert "16384" in str(refused.value.hint)
    assert world.host.open == 0
    pid = world.pid()
    world.host.limit = 1000
    assert await world.disk.quiesce(PATIENCE), "nothing is held, so it is drained"
    await world.disk.detach(keep_target=False)
    await world.running()
    assert world.pid() == pid, "the worker knew nothing of it and goes on"
    await world.write(0, bytes(512))


async def test_an_attach_that_fails_between_generations_keeps_worker_and_socket(
    world: World,
) -> None:
    disk = await world.running()
    pid = world.pid()
    assert await disk.quiesce(PATIENCE)
    await disk.detach(keep_target=True)
    world.host.limit = 11
    with pytest.raises(GrantsExhausted):
        await world.attach()
    await disk.detach(keep_target=False)
    world.host.limit = 1000
    await world.running()
    assert world.pid() == pid
    assert world.target.calls == ["attach", "publish", "publish"]
    await world.write(0, b"2" * 512)
    assert disk.trouble is None


async def test_a_worker_that_refused_an_attach_still_ends_when_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = world.disk
    with monkeypatch.context() as wrong:
        wrong.setattr(Shape, "ring_pages", 3)
        wrong.setattr(module.features, "queue_keys", lambda *_, **__: {})
        with pytest.raises(WorkerError, match="ring_pages"):
            await world.attach()
    await disk.detach(keep_target=False)
    pid = world.pid()
    await disk.end()
    assert gone(pid)
    assert "killing it" not in caplog.text, "EXIT was of a generation that it knows"


# -- what the worker tells -------------------------------------------------------------------------


async def test_a_feature_that_is_refused_is_taken_from_the_device(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.host.backend_class = Refusing
    disk = await world.running()
    assert world.target.client is not None
    world.target.nbd.request(Nbd.FLUSH)
    await eventually("the worker's word", lambda: disk.pending)
    assert world.pokes == 1
    assert "flush off" not in world.target.calls, "events only poke; update acts"
    await disk.update(world.device)
    assert world.target.calls[-1] == "flush off"
    assert not disk.pending
    assert disk.trouble is None
    assert disk.details()["geometry"]["flush"] is False
    assert disk.details()["geometry"]["discard"] is True
    assert "does not support flush" in caplog.text


async def test_a_resize_restarts_the_worker_and_publishes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    disk = await world.running()
    caplog.set_level(logging.INFO)
    world.device.keys["sectors"] = str(2 * SECTORS)
    await disk.update(world.device)
    assert world.target.calls == ["attach", "publish", "publish"]
    assert world.target.published[-1].sectors == 2 * SECTORS
    assert disk.generation == 1
    assert f"resize: from {SECTORS} to {2 * SECTORS} sectors" in caplog.text
    await world.write(SECTORS * 512, b"beyond".ljust(512))
    assert world.host.disk[SECTORS * 512 :][:6] == b"beyond"


async def test_a_resize_that_waits_is_shown_and_tried_until_users_have_closed_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESIZE_POLL", 0.01)
    disk = await world.running()
    pokes: list[int] = []
    disk.on_poke(lambda: pokes.append(1))
    world.target.resize_waits = True
    world.device.keys["sectors"] = str(2 * SECTORS)
    for looks in range(1, 4):
        await disk.update(world.device)
        assert disk.pending
        assert disk.details()["resize_waits_for_last_close"] is True
        await eventually("another look", lambda looks=looks: len(pokes) >= looks)
    world.target.resize_waits = False
    await disk.update(world.device)
    assert world.target.calls == ["attach", *["publish"] * 4]
    assert not disk.pending
    assert "resize_waits_for_last_close" not in disk.details()


async def test_an_update_that_changes_nothing_does_nothing(world: World) -> None:
    disk = await world.running()
    await disk.update(world.device)
    assert world.target.calls == ["attach", "publish"]


async def test_the_death_of_the_worker_is_trouble_and_the_next_attach_starts_another(
    world: World,
) -> None:
    disk = await world.running()
    pid = world.pid()
    os.kill(pid, 9)
    await eventually("trouble", lambda: disk.trouble)
    assert "signal 9" in str(disk.trouble)
    assert world.pokes == 1
    assert gone(pid)
    assert not await disk.quiesce(1.0)
    await disk.detach(keep_target=True)
    await world.running()
    assert disk.trouble is None
    assert disk.generation == 2
    assert world.target.calls == ["attach", "publish"] * 2
    await world.write(0, b"2" * 512)


async def test_requests_that_a_ring_ended_with_are_with_the_backend_until_it_is_connected_again(
    world: World,
) -> None:
    disk = await world.running()
    os.kill(world.pid(), 9)
    await eventually("trouble", lambda: disk.trouble)
    await disk.detach(keep_target=False)
    assert str(disk.unfenced()).startswith("xvdb: its backend has not answered all requests")
    world.target.waiting = 0
    assert disk.unfenced() is None, "whoever had asked has all answers"
    world.target.waiting = 7
    await world.attach()
    assert await disk.quiesce(PATIENCE), "nothing was put into this ring"
    assert disk.unfenced() is not None, "nor did its backend say that it is Connected"
    await disk.detach(keep_target=True)
    await world.running()
    assert await disk.quiesce(PATIENCE)
    assert disk.unfenced() is None, "what waits now was never sent"


async def test_a_ring_that_did_not_drain_is_remembered_where_nobody_counts_requests(
    world: World,
) -> None:
    world.target.waiting = 0  # as of a socket's client, and of a program that has the disk
    disk = await world.running()
    world.backend.hold = True
    world.target.nbd.request(Nbd.WRITE, 0, 512, bytes(512))
    await eventually("the request with the backend", lambda: world.backend.held)
    assert not await disk.quiesce(0.1)
    await disk.detach(keep_target=False)
    assert disk.unfenced() is not None
    await world.running()
    assert disk.unfenced() is None


async def test_when_the_machine_stops_sigterm_ends_the_worker(world: World) -> None:
    disk = await world.running()
    await disk.fail_after(10.0)
    assert world.target.calls[-1] == "fail after 10"
    os.kill(world.pid(), signal.SIGTERM)
    await eventually("its end", lambda: disk.trouble)
    assert f"signal {signal.SIGALRM.value}" in str(disk.trouble)


async def test_the_end_of_the_socket_is_trouble_and_the_worker_is_kept(world: World) -> None:
    disk = await world.running()
    pid = world.pid()
    assert world.target.client is not None
    world.target.client.close()
    await eventually("trouble", lambda: disk.trouble)
    assert "NBD socket is gone" in str(disk.trouble)
    await disk.detach(keep_target=True)
    await world.running()
    assert world.pid() == pid
    assert world.target.calls == ["attach", "publish"] * 2
    await world.write(0, b"2" * 512)


async def test_a_backend_that_breaks_a_rule_is_trouble_that_names_it(world: World) -> None:
    disk = await world.running()
    assert world.host.pages is not None
    world.host.pages.set(RSP_PROD, 4711)
    world.backend.event()
    await eventually("trouble", lambda: disk.trouble)
    assert "the backend broke rule" in str(disk.trouble)
    assert not await disk.quiesce(PATIENCE), "a broken ring cannot be drained"
    await disk.detach(keep_target=True)
    await world.running()
    assert disk.trouble is None
    await world.write(0, b"2" * 512)


async def test_a_stall_is_shown_until_it_ends(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 1)
    caplog.set_level(logging.INFO)
    disk = await world.running()
    world.backend.hold = True
    world.target.nbd.request(Nbd.READ, 0, 512)
    await eventually("the stall", lambda: disk.stalled)
    assert disk.details()["stalled_seconds"] >= 1
    assert "1 requests outstanding" in caplog.text
    world.backend.release()
    await eventually("its end", lambda: not disk.stalled)
    assert "answers again" in caplog.text
    assert disk.trouble is None


@pytest.mark.parametrize("killed", [True, False], ids=["its worker dies", "a detach"])
async def test_a_stall_ends_with_the_rings_that_it_was_of(
    world: World, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Else a detach of the next ones would not wait for requests that are answered."""
    monkeypatch.setattr(module, "STALL_SECONDS", 1)
    disk = await world.running()
    world.backend.hold = True
    world.target.nbd.request(Nbd.READ, 0, 512)
    await eventually("the stall", lambda: disk.stalled)
    if killed:
        os.kill(world.pid(), 9)
        await eventually("trouble", lambda: disk.trouble)
    else:
        await disk.detach(keep_target=False)
    assert not disk.stalled
    await disk.detach(keep_target=False)
    await world.running()
    assert not disk.stalled


async def test_a_worker_that_does_not_obey_is_ended_and_detach_never_raises(
    world: World,
) -> None:
    disk = await world.running()
    pid = world.pid()
    disk._generation += 5  # the worker refuses a DETACH of a generation that it never had
    await disk.detach(keep_target=True)
    assert gone(pid)
    await disk.detach(keep_target=True)
    await world.running()
    assert world.target.calls == ["attach", "publish"] * 2


async def test_a_device_that_cannot_be_closed_costs_the_worker(world: World) -> None:
    disk = await world.running()
    pid = world.pid()
    world.target.refuses_close = TargetError("nbd disconnect did not end within 15 s")
    await disk.close()
    assert world.target.calls[-2:] == ["close 10", "close 0"]
    await eventually("the end of the worker", lambda: gone(pid))


# -- other supervisors, and a suspend that nobody asked for ----------------------------------------


async def test_a_serving_worker_is_adopted_and_nothing_is_done_to_it(world: World) -> None:
    first = await world.running()
    await world.write(0, b"1" * 512)
    pid = world.pid()
    assert first._worker is not None
    first._worker.close()
    world.disk = world.frontend()
    assert await world.disk.adopt(world.device)
    assert (world.pid(), world.disk.generation) == (pid, 1)
    assert world.target.calls == ["attach", "publish", "publish"]
    assert await world.read(0, 512) == b"1" * 512
    assert await world.disk.quiesce(PATIENCE)
    await world.disk.detach(keep_target=True)
    await world.running()
    assert world.disk.generation == 2
    assert world.target.calls == ["attach", "publish", "publish", "publish"]


async def test_without_a_worker_nothing_is_adopted(world: World) -> None:
    assert not await world.disk.adopt(world.device)
    await world.running()


@pytest.mark.parametrize("what", ["backend", "target"])
async def test_a_worker_of_a_connection_that_is_over_serves_the_next_one(
    world: World, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = await world.running()
    pid = world.pid()
    assert first._worker is not None
    first._worker.close()
    world.disk = world.frontend()
    if what == "backend":
        world.device.view = View(XenbusState.CONNECTED, XenbusState.CLOSED, True, True)
    else:
        world.target.exists = False
    assert not await world.disk.adopt(world.device)
    assert "cannot be adopted as it is" in caplog.text
    await world.running()
    assert world.pid() == pid
    assert world.disk.generation == 2
    await world.write(0, b"2" * 512)
    assert world.host.disk[:512] == b"2" * 512


async def test_a_worker_left_over_from_before_a_restore_is_parked_not_detached(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await world.running()
    pid = world.pid()
    assert first._worker is not None
    first._worker.close()
    parked: list[int] = []

    async def park(of: int) -> tuple[int, int]:
        assert any("[eventfd]" in link for link in descriptors(of)), "it was detached before"
        parked.append(of)
        return 4711, 1

    monkeypatch.setattr(workerside, "park", park)
    world.disk = world.frontend()
    world.device.view = View(XenbusState.INITIALISING, XenbusState.INIT_WAIT, True, True)
    assert not await world.disk.adopt(world.device)
    assert parked == [pid]
    os.waitpid(pid, 0)  # noqa: ASYNC222 - killed; an adopted worker is no child, but here it is
    await world.running()
    await world.write(0, b"2" * 512)


async def test_after_a_suspend_the_ports_are_parked_before_the_worker_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await world.running()
    pid = world.pid()
    parked: list[int] = []

    async def park(of: int) -> tuple[int, int]:
        assert not gone(of), "the worker had let go already"
        parked.append(of)
        return 4711, 1

    monkeypatch.setattr(workerside, "park", park)
    await disk.poisoned()
    assert parked == [pid]
    assert gone(pid)
    assert "suspended" in str(disk.trouble)
    await world.running()
    assert disk.trouble is None
    assert world.target.calls == ["attach", "publish"] * 2
    await world.write(0, b"2" * 512)


async def test_ports_that_cannot_be_parked_keep_their_worker_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await world.running()
    pid = world.pid()

    async def park(of: int) -> tuple[int, int]:
        raise CannotPark("no permission")

    monkeypatch.setattr(workerside, "park", park)
    try:
        await disk.poisoned()
        await world.running()
        assert world.pid() != pid
        assert not gone(pid), "its end would unbind the port"
        assert not any("memfd:grants" in link for link in descriptors(pid)), "it holds more"
        await world.write(0, b"2" * 512)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)  # noqa: ASYNC222 - it is dead
