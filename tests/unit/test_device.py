# SPDX-License-Identifier: BSD-2-Clause
"""The device loop against a scripted backend: one walk for every beginning, and its end."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import pytest
from deviceworld import BACK, FRONT, World, world
from memstore import Refused
from vclock import VirtualLoop
from waiting import PATIENCE

from pvfront.device import Goal, Phase
from pvfront.errors import PvfrontError
from pvfront.states import XenbusState
from pvfront.trace import Kind
from pvfront.walk import Deadlines
from pvfront.xenbus import XenbusDevice

LOOP_FACTORY = VirtualLoop


@pytest.fixture(params=["vbd", "vif"])
def either(request: pytest.FixtureRequest, world: World) -> World:
    """Keys are published with Initialised, or with Connected, and the backend waits for that."""
    if request.param == "vif":
        as_a_network(world)
    return world


def as_a_network(world: World) -> None:
    world.disk.publish_state = XenbusState.CONNECTED
    world.backend.acts_on = ("4",)


@pytest.mark.parametrize("front", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("back", [1, 2, 4, 5, 6])
async def test_whatever_states_are_found_the_walk_ends_connected(
    either: World, front: int, back: int
) -> None:
    world = either
    world.nodes(front, back, **{"ring-ref": "99", "event-channel": "99"})
    loop = await world.start()
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.states() == ("4", "4")
    assert world.mem.value(f"{FRONT}/ring-ref") == b"1", "a stale key was left"
    assert world.disk.steps[-2:] == ["attach", "start"]


async def test_a_worker_that_dies_between_attach_and_start_begins_a_new_generation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend is Connected to a ring that nobody holds any more."""
    usual = world.disk.start

    async def start(device: XenbusDevice) -> None:
        if world.disk.generation == 1:
            world.disk.trouble = "pid 7 ended by signal 9"
            raise PvfrontError("there is no worker")
        await usual(device)

    monkeypatch.setattr(world.disk, "start", start)
    world.nodes(1, 2)
    loop = await world.start()
    await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.calls.count("attach") == world.disk.generation == 2
    assert world.states() == ("4", "4")


async def test_a_network_publishes_with_connected_and_starts_when_the_backend_is_too(
    world: World,
) -> None:
    as_a_network(world)
    world.nodes()
    world.backend.answers = False
    loop = await world.start()
    await world.eventually("the keys", lambda: world.states() == ("4", "2"))
    assert world.mem.value(f"{FRONT}/ring-ref") == b"1"
    assert world.disk.calls == ["attach"]
    assert loop.phase is Phase.CONNECTING, "Connected is ours to write, not yet true"
    await world.backend.write("4")
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.calls[-1] == "start"
    assert "3" not in world.backend.seen


async def test_a_network_whose_start_fails_is_started_again_on_the_same_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_network(world)
    usual, failures = world.disk.start, ["the TAP's name is taken"]

    async def start(device: XenbusDevice) -> None:
        if failures:
            raise PvfrontError(failures.pop())
        await usual(device)

    monkeypatch.setattr(world.disk, "start", start)
    world.nodes()
    loop = await world.start()
    await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.generation == 1
    assert world.states() == ("4", "4")


async def test_a_network_that_was_never_started_is_detached_in_order(world: World) -> None:
    as_a_network(world)
    world.nodes()
    world.backend.answers = False
    loop = await world.start()
    await world.eventually("the keys", lambda: world.states() == ("4", "2"))
    world.backend.answers = True
    loop.aim(Goal.CLOSED)
    await world.finished()
    assert world.states() == ("6", "6")
    assert not world.disk.held
    assert "start" not in world.disk.calls


async def test_a_network_refused_by_its_backend_goes_round_again(world: World) -> None:
    as_a_network(world)
    world.nodes()
    world.backend.refuses = 1
    loop = await world.start()
    await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.generation == 2
    assert world.disk.calls.count("start") == 1


async def test_keys_and_initialised_appear_together_and_start_follows_connected(
    world: World,
) -> None:
    world.nodes()
    found: list[bool] = []
    react = world.backend.react

    async def look(state: str) -> None:
        if state == "3":
            keys = await world.backend.store.directory(FRONT)
            found.append({"ring-ref", "event-channel"} <= set(keys))
        await react(state)

    world.backend.react = look  # type: ignore[method-assign]
    await world.connected()
    assert found == [True], "the backend saw Initialised without the keys, or never"
    assert world.disk.steps == ["attach", "start"]


async def test_a_backend_with_pending_io_is_asked_again(world: World) -> None:
    world.nodes()
    world.backend.refuses = 2
    loop = await world.start()
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.calls.count("attach") == 3
    assert world.disk.generation == 3
    assert world.disk.calls.count("start") == 1


async def test_a_silent_backend_is_named_and_holds_nothing_of_ours(world: World) -> None:
    world.nodes(4, 4)
    world.backend.answers = False
    loop = await world.start()
    await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
    assert "backend Closing never came" in loop.reason
    assert "Connected (4)" in loop.reason
    assert not world.disk.held
    world.backend.answers = True
    await world.backend.write("5")
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)


async def test_trouble_in_the_data_path_begins_a_new_generation(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    world.disk.trouble = "the worker has ended"
    world.disk.poke()
    await world.eventually("generation 2", lambda: world.disk.generation == 2)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert "detach" in world.disk.calls, "the target's socket must not be kept"
    assert "detach keep" not in world.disk.calls
    assert loop.reconnects == 1


async def test_a_restarted_backend_is_connected_again(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    await world.backend.write("6")
    await world.eventually("generation 2", lambda: world.disk.generation == 2)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.states() == ("4", "4")


async def test_a_device_that_cannot_be_opened_leaves_nobody_watching(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(device: XenbusDevice) -> None:
        raise PvfrontError("the store refuses")

    world.nodes()
    monkeypatch.setattr(XenbusDevice, "refresh", refuses)
    with pytest.raises(PvfrontError, match="the store refuses"):
        await XenbusDevice.open(world.guest, "vbd", 51728)
    assert not [task for task in asyncio.all_tasks() if "vbd" in task.get_name()]


async def test_a_resize_is_an_update_not_a_reconnect(world: World) -> None:
    world.nodes()
    await world.connected()
    await world.backend.write("4")
    await world.eventually("an update", lambda: "update" in world.disk.calls)
    await world.eventually("status of it", lambda: "update" in world.told[-1])
    assert world.disk.generation == 1


async def test_a_backend_that_stalls_is_told_to_status_though_no_state_has_changed(
    world: World,
) -> None:
    world.nodes()
    await world.connected()
    before = len(world.told)
    world.disk.note(Kind.STALL, "no answer for 10 s", seconds=10, in_flight=1)
    assert len(world.told) > before


async def test_a_detach_closes_both_ends_and_ends_the_loop(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    world.mem.set(f"{BACK}/online", b"0", "n0,r5")
    await world.backend.write("5")
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    await world.finished()
    assert world.states() == ("6", "6")
    # A request that comes to a quiet worker would be waited for: the end of all comes first.
    assert world.disk.calls[-4:] == ["close", "quiesce", "detach keep", "end"]
    with pytest.raises(Refused):
        world.mem.value(f"{FRONT}/ring-ref")


async def test_a_detach_asked_for_at_the_end_of_the_walk_waits_for_the_end_of_use(
    world: World,
) -> None:
    world.nodes()
    world.disk.in_use = "mounted at /mnt"
    react = world.backend.react

    async def detach(state: str) -> None:
        if state == "4":  # just now
            await world.backend.store.write(f"{BACK}/online", "0")
            await world.backend.write("5")
            world.backend.react = react  # type: ignore[method-assign]
        else:
            await react(state)

    write_state = XenbusDevice.write_state

    async def connected_is_seen(device: XenbusDevice, state: XenbusState, **how: bool) -> None:
        await write_state(device, state, **how)
        if state is XenbusState.CONNECTED:
            await world.eventually("the detach", lambda: world.states()[1] == "5")
            await device.refresh()

    world.backend.react = detach  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XenbusDevice, "write_state", connected_is_seen)
        loop = await world.start()
        await loop.until_phase(Phase.DETACH_REFUSED, timeout=PATIENCE)
    assert world.disk.held
    assert "detach" not in world.disk.calls
    world.disk.in_use = None
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    assert world.states() == ("6", "6")


@pytest.mark.parametrize("first", ["online", "state"])
async def test_a_detach_waits_for_the_end_of_use_and_the_disk_works_on(
    world: World, first: str
) -> None:
    """Whichever event comes first: libxl writes both keys in one transaction."""
    world.nodes()
    loop = await world.connected()
    world.disk.in_use = "mounted at /mnt"
    world.mem.set(f"{BACK}/online", b"0", "n0,r5", fired=first == "online")
    await world.backend.write("5")
    await loop.until_phase(Phase.DETACH_REFUSED, timeout=PATIENCE)
    assert "mounted at /mnt" in loop.reason
    assert world.disk.held
    assert "close" not in world.disk.calls
    world.disk.in_use = None
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)


@pytest.mark.parametrize(("stalled", "limit"), [(0, 10), (12, 3)], ids=["", "known to be stalled"])
async def test_a_detach_ends_within_the_toolstacks_10_s_though_no_request_is_ever_answered(
    world: World, monkeypatch: pytest.MonkeyPatch, stalled: int, limit: float
) -> None:
    """Long before them where that is known: on a starved machine the rest takes its time, too."""
    asked: list[float] = []

    async def close(*, drain: float = 10.0) -> None:
        asked.append(drain)
        await asyncio.sleep(drain)

    async def quiesce(timeout: float) -> bool:
        asked.append(timeout)
        await asyncio.sleep(timeout)
        return False

    monkeypatch.setattr(world.disk, "close", close)
    monkeypatch.setattr(world.disk, "quiesce", quiesce)
    world.nodes()
    world.deadlines = Deadlines()
    loop = await world.connected()
    world.disk.stalled = stalled
    world.mem.set(f"{BACK}/online", b"0", "n0,r5")
    began = asyncio.get_running_loop().time()
    await world.backend.write("5")
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    assert asked[0] > 0
    assert sum(asked) <= asyncio.get_running_loop().time() - began < limit
    assert world.states() == ("6", "6")


async def test_vanished_nodes_end_the_loop_with_nothing_held(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    await world.backend.store.remove(FRONT)
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    await world.finished()
    assert not world.disk.held
    assert world.disk.calls[-3:] == ["detach", "close", "end"]


async def test_an_adopted_device_is_connected_without_a_walk(world: World) -> None:
    world.nodes(4, 4)
    world.disk.adopts = True
    await world.connected()
    assert world.disk.steps == []
    assert world.backend.seen in ([], ["4"])


async def test_a_failed_attach_is_tried_again_and_said(world: World) -> None:
    world.nodes()
    world.disk.fail_attach = PvfrontError("no room for 353 granted pages")
    loop = await world.start()
    await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
    assert loop.reason == "no room for 353 granted pages"
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert loop.reason == ""
    assert loop.last_trouble is not None
    assert loop.last_trouble[1] == "no room for 353 granted pages", "what a retry hides"


async def test_the_log_has_why_a_walk_fails_once_for_as_long_as_it_is_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = world.disk.attach
    reasons = ["mac=x: no address"] * 4 + ["no room"] * 3 + ["mac=x: no address"] * 2

    async def attach(device: XenbusDevice) -> Mapping[str, str]:
        if reasons:
            raise PvfrontError(f"{device.name}: {reasons.pop(0)}")
        return await usual(device)

    monkeypatch.setattr(world.disk, "attach", attach)
    world.nodes()
    caplog.set_level(logging.INFO, logger="pvfront.device")
    loop = await world.connected()
    reasons.append("mac=x: no address")  # later, it is news again
    world.disk.trouble = "the worker has ended"
    world.disk.poke()
    await world.eventually("generation 2", lambda: world.disk.generation == 2)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert [record.getMessage().removeprefix("vbd-51728: ") for record in caplog.records] == [
        "connecting",
        "failed: mac=x: no address",
        "failed: no room",
        "failed: mac=x: no address",
        "connected",
        "reconnecting: the worker has ended",
        "reconnecting",
        "failed: mac=x: no address",
        "connected",
    ]


async def test_closing_closes_the_os_device_first_so_that_its_users_end(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    world.disk.calls.clear()
    loop.aim(Goal.CLOSED)
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    assert world.disk.steps == ["close", "quiesce", "detach keep", "end"]
    assert world.states() == ("6", "6")


async def test_a_new_goal_interrupts_a_walk_that_waits(world: World) -> None:
    world.nodes(1, 1)
    world.backend.answers = False
    loop = await world.start()
    await loop.until_phase(Phase.CONNECTING, timeout=PATIENCE)
    loop.aim(Goal.CLOSED)
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)


async def test_a_backend_that_jumps_at_random_never_leaves_the_loop_stuck(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    for state in ("7", "0", "nonsense", "", "99999999999999999999", "5", "3", "6", "2", "8"):
        await world.backend.store.write(f"{BACK}/state", state)
        await asyncio.sleep(0.05)
    await world.backend.write("6")
    await world.eventually("both Connected", lambda: world.states() == ("4", "4"))
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
