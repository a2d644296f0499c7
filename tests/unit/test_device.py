# SPDX-License-Identifier: BSD-2-Clause
"""The device loop against a scripted backend on a store in memory: one walk for every beginning.

The backend reacts as blkback's frontend_changed() does, and can be told to misbehave. The frontend
records what the loop asks of it. Time is the loop's own (vclock.py): no deadline passes while
anything happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from fakefrontend import FakeFrontend
from memstore import MemStore, Refused
from memwire import both_ends
from vclock import VirtualLoop, keep_time
from waiting import PATIENCE

from pvfront.device import DeviceLoop, Goal, Phase
from pvfront.errors import PvfrontError
from pvfront.states import XenbusState
from pvfront.trace import Kind
from pvfront.walk import Deadlines
from pvfront.xenbus import XenbusDevice
from pvfront.xenstore import Xenstore

LOOP_FACTORY = VirtualLoop
FRONT = "/local/domain/5/device/vbd/51728"
BACK = "/local/domain/0/backend/vbd/5/51728"
QUICK = Deadlines(init_wait=0.6, connected=0.6, closing=0.6, drain=0.5, detach=0.5, busy_poll=0.02)


class Disk(FakeFrontend):
    """Refuses what no frontend may be asked, and what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.held = False
        self.target = False
        self.fail_attach: Exception | None = None
        self.drains = True

    async def adopt(self, device: XenbusDevice) -> bool:
        self.held = self.adopts
        return self.adopts

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        assert not self.held, "attached twice without a detach"
        if self.fail_attach is not None:
            self.calls.append("attach")
            error, self.fail_attach = self.fail_attach, None
            raise error
        self.held = True
        return await super().attach(device)

    async def start(self, device: XenbusDevice) -> None:
        assert device.view.backend.value == 4, "started before the backend was Connected"
        await super().start(device)
        self.target = True

    async def quiesce(self, timeout: float) -> bool:
        await super().quiesce(timeout)
        return self.drains

    async def detach(self, *, keep_target: bool) -> None:
        await super().detach(keep_target=keep_target)
        self.held = False
        self.target = self.target and keep_target

    async def close(self, *, drain: float = 10.0) -> None:
        await super().close(drain=drain)
        self.target = False

    async def poisoned(self) -> None:
        await super().poisoned()
        self.held = False


class Backend:
    """blkback's side of the handshake."""

    def __init__(self, store: Xenstore) -> None:
        self.store = store
        self.answers = True
        self.acts_on = ("3", "4")  # blkback's; netback acts on nothing before Connected
        self.refuses = 0  # how many times "pending I/O" is said instead of Connected
        self.seen: list[str] = []

    async def run(self) -> None:
        async with self.store.watch(f"{FRONT}/state") as watch:
            async for _ in watch:
                state = await self.store.read_opt(f"{FRONT}/state")
                if state is None:
                    return
                self.seen.append(state)
                if self.answers:
                    await self.react(state)

    async def react(self, state: str) -> None:
        mine = await self.store.read(f"{BACK}/state")
        match state:
            case "1" if mine in ("6", "1"):
                await self.write("2")
            case "3" | "4" if mine != "4" and state in self.acts_on:
                if self.refuses:
                    self.refuses -= 1
                    await self.write("5")
                else:
                    assert await self.store.read_opt(f"{FRONT}/ring-ref")
                    await self.write("4")
            case "5":
                await self.write("5")
            case "6":
                await self.write("6")

    async def write(self, state: str) -> None:
        await self.store.write(f"{BACK}/state", state)


class World:
    """A store with one vbd, a backend, and the loop under test."""

    def __init__(self, mem: MemStore, guest: Xenstore, dom0: Xenstore) -> None:
        self.mem = mem
        self.guest = guest
        self.backend = Backend(dom0)
        self.disk = Disk()
        self.deadlines = QUICK
        self.tasks: list[asyncio.Task[None]] = []
        self.loop: DeviceLoop | None = None
        self.told: list[list[str]] = []  # the disk's calls, each time that status has changed

    def nodes(self, front: int = 1, back: int = 2, **keys: str) -> None:
        domain = "n5,r0"
        self.mem.set("/local/domain/5", b"", domain)
        for key, value in {
            "backend": BACK,
            "backend-id": "0",
            "state": str(front),
            **keys,
        }.items():
            self.mem.set(f"{FRONT}/{key}", value.encode(), domain)
        for key, value in {"state": str(back), "online": "1"}.items():
            self.mem.set(f"{BACK}/{key}", value.encode(), "n0,r5")

    async def start(self) -> DeviceLoop:
        self.tasks.append(asyncio.create_task(self.backend.run()))
        device = await XenbusDevice.open(self.guest, "vbd", 51728)
        self.loop = DeviceLoop(
            device,
            self.disk,
            deadlines=self.deadlines,
            on_change=lambda _: self.told.append(list(self.disk.calls)),
        )
        self.tasks.append(asyncio.create_task(self.loop.run()))
        return self.loop

    async def connected(self) -> DeviceLoop:
        loop = await self.start()
        await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
        return loop

    def states(self) -> tuple[str, str]:
        return (
            self.mem.value(f"{FRONT}/state").decode(),
            self.mem.value(f"{BACK}/state").decode(),
        )

    async def eventually(self, what: str, holds: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not holds():  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"never came: {what}; calls {self.disk.calls}") from None

    async def finished(self) -> None:
        """The loop returned by itself, without an error."""
        await asyncio.wait_for(asyncio.shield(self.tasks[1]), PATIENCE)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    keep_time(monkeypatch, asyncio.get_running_loop())
    async with both_ends() as (mem, guest, dom0):
        made = World(mem, guest, dom0)
        try:
            yield made
        finally:
            for task in reversed(made.tasks):
                task.cancel()
            await asyncio.gather(*made.tasks, return_exceptions=True)
            if made.loop is not None:
                await made.loop.device.close()


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


async def test_a_detach_ends_within_the_toolstacks_10_s_though_no_request_is_ever_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    world.mem.set(f"{BACK}/online", b"0", "n0,r5")
    began = asyncio.get_running_loop().time()
    await world.backend.write("5")
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    assert asked[0] > 0
    assert sum(asked) <= asyncio.get_running_loop().time() - began < 10
    assert world.states() == ("6", "6")


async def test_vanished_nodes_end_the_loop_with_nothing_held(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    await world.backend.store.remove(FRONT)
    await loop.until_phase(Phase.CLOSED, timeout=PATIENCE)
    await world.finished()
    assert not world.disk.held
    assert world.disk.calls[-3:] == ["detach", "close", "end"]


async def test_parked_holds_nothing_and_resumes_to_connected(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    assert not world.disk.held
    assert world.disk.target, "the OS device keeps its socket: its clients only wait"
    assert "close" not in world.disk.calls
    loop.aim(Goal.CONNECTED)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.generation == 2


async def test_parking_lets_go_even_of_a_silent_backend(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    world.backend.answers = False
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    assert not world.disk.held


async def test_what_does_not_drain_loses_its_socket_so_that_it_is_sent_again(
    world: World,
) -> None:
    world.nodes()
    loop = await world.connected()
    world.disk.drains = False
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    assert not world.disk.target


async def test_after_a_restore_under_another_id_the_new_backend_is_followed(
    world: World,
) -> None:
    world.nodes()
    loop = await world.connected()
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    moved = "/local/domain/0/backend/vbd/9/51728"
    world.mem.set(f"{moved}/state", b"4", "n0,r5")
    world.mem.set(f"{moved}/online", b"1", "n0,r5")
    world.mem.set(f"{FRONT}/backend", moved.encode(), "n5,r0")
    world.mem.set(f"{FRONT}/state", b"1", "n5,r0")
    loop.aim(Goal.CONNECTED)
    await world.eventually("the new backend opened", lambda: loop.device.backend == moved)
    assert "close" not in world.disk.calls, "the OS device must outlive the move"


async def test_nonsense_that_names_the_backend_after_a_resume_is_said_until_it_is_put_right(
    world: World,
) -> None:
    world.nodes()
    loop = await world.connected()
    for key, nonsense in (("backend", b"nonsense"), ("backend-id", b"")):
        loop.aim(Goal.PARKED)
        await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
        world.mem.set(f"{FRONT}/{key}", nonsense, "n5,r0")
        loop.aim(Goal.CONNECTED)
        if key == "backend":
            await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
            assert "no absolute path" in loop.reason
            world.mem.set(f"{FRONT}/backend", BACK.encode(), "n5,r0")
        await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    # and it is watched again
    await world.backend.write("6")
    await world.eventually("generation 4", lambda: world.disk.generation == 4)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)


@pytest.mark.parametrize("first", ["frontend", "backend"])
async def test_a_suspend_that_nobody_announced_never_unbinds_the_old_port(
    world: World, first: str
) -> None:
    """Whichever event comes first: the toolstack makes both nodes in one transaction."""
    world.nodes()
    loop = await world.connected()
    world.disk.calls.clear()
    if first == "backend":
        world.mem.set(f"{FRONT}/state", b"1", "n5,r0", fired=False)
        world.mem.set(f"{BACK}/state", b"2", "n0,r5")
    else:
        world.mem.set(f"{BACK}/state", b"2", "n0,r5", fired=False)
        world.mem.set(f"{FRONT}/state", b"1", "n5,r0")
    await world.eventually("generation 2", lambda: world.disk.generation == 2)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.steps[0] == "poisoned"
    assert not any(call.startswith("detach") for call in world.disk.steps[:2])


@pytest.mark.parametrize("where", [BACK, "/local/domain/0/backend/vbd/9/51728"])
async def test_a_suspend_in_the_midst_of_a_walk_never_unbinds_the_old_port(
    world: World, where: str
) -> None:
    """The ring is published, the backend is not Connected yet; then it is another backend."""
    world.nodes()
    world.backend.answers = False
    loop = await world.start()
    await world.eventually("Initialised", lambda: world.states() == ("3", "2"))
    world.disk.calls.clear()
    for key, value in {f"{where}/state": b"2", f"{where}/online": b"1"}.items():
        world.mem.set(key, value, "n0,r5", fired=False)
    world.mem.set(f"{FRONT}/state", b"1", "n5,r0", fired=where == BACK)
    world.mem.set(f"{FRONT}/backend", where.encode(), "n5,r0", fired=where != BACK)
    await world.eventually("a new ring", lambda: "attach" in world.disk.calls)
    assert loop.device.backend == where
    assert world.disk.steps == ["poisoned", "attach"]


@pytest.mark.parametrize("where", [BACK, "/local/domain/0/backend/vbd/9/51728"])
async def test_a_suspend_while_a_detach_is_refused_takes_the_disk_from_nobody(
    world: World, where: str
) -> None:
    world.nodes()
    loop = await world.connected()
    world.disk.in_use = "mounted at /mnt"
    world.mem.set(f"{BACK}/online", b"0", "n0,r5")
    await world.backend.write("5")
    await loop.until_phase(Phase.DETACH_REFUSED, timeout=PATIENCE)
    world.disk.calls.clear()
    world.backend.answers = False
    for key, value in {f"{where}/state": b"2", f"{where}/online": b"1"}.items():
        world.mem.set(key, value, "n0,r5")
    world.mem.set(f"{FRONT}/backend", where.encode(), "n5,r0")
    world.mem.set(f"{FRONT}/state", b"1", "n5,r0")
    await world.eventually("a new ring", lambda: "attach" in world.disk.calls)
    assert world.disk.steps == ["poisoned", "attach"]


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
