# SPDX-License-Identifier: BSD-2-Clause
"""One device's loop, whatever the backend, the toolstack and the worker do, in any order.

The store is in memory and time passes only when nothing else happens, so that every wait is exact
and costs nothing. What must hold at any moment stands in the invariants; what must hold in the end
in `teardown`: left alone, the loop settles within its deadlines, with a reason if it is not
Connected; an honest backend is connected again; and a close ends it. Nothing is ever held twice,
or after the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import pytest
from fakefrontend import FakeFrontend
from fuzzing import ODD, examples
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from memstore import MemStore, Refused
from memwire import connect
from vclock import VirtualLoop, keep_time

from pvfront.device import DeviceLoop, Goal, Phase
from pvfront.errors import PvfrontError
from pvfront.xenbus import XenbusDevice

FRONT = "/local/domain/5/device/vbd/51728"
BACK = "/local/domain/0/backend/vbd/5/51728"
MOVED = "/local/domain/0/backend/vbd/9/51728"
OURS, THEIRS = "n5,r0", "n0,r5"

SETTLED = 150.0
"""Seconds: longer than all deadlines of one walk and the longest pause together."""

RESTING = {Phase.CONNECTED, Phase.PARKED, Phase.CLOSED, Phase.FAILED, Phase.DETACH_REFUSED}
STATES = st.one_of(
    st.sampled_from([str(n) for n in range(9)]),
    ODD.filter(lambda text: len(text) < 4096),  # no store holds more in a node
)


NODES = [FRONT, BACK, f"{FRONT}/state", f"{FRONT}/backend", f"{BACK}/state"]
ERRORS = [PvfrontError("it cannot"), OSError(28, "No space left"), TimeoutError("late")]


class Disk(FakeFrontend):
    """Keeps account of what it holds, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.started = self.target = self.ended = False
        self.ports_kept = 0
        self.drains = True
        self.fails: dict[str, Exception] = {}

    def _may_fail(self, what: str) -> None:
        if what in self.fails:
            raise self.fails.pop(what)

    async def adopt(self, device: XenbusDevice) -> bool:
        if self.adopts:
            self.held = self.started = self.target = True
            self.generation += 1
        return self.adopts

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        assert not self.held, "attached twice without a detach"
        assert not self.ended, "attached after the worker's end"
        self.generation += 1
        self.held = True  # a worker and a port, even if what follows fails
        self._may_fail("attach")
        self.trouble = None
        return {"ring-ref": str(self.generation), "event-channel": "7"}

    async def start(self, device: XenbusDevice) -> None:
        assert self.held, "started without a connection"
        assert device.view.backend.value == 4, "the fence: the backend is not Connected"
        self._may_fail("start")
        self.started = self.target = True

    async def update(self, device: XenbusDevice) -> None:
        assert self.started
        self.pending = False
        self._may_fail("update")

    async def quiesce(self, timeout: float) -> bool:
        assert self.held, "asked to drain what is not there"
        if not self.drains:
            await asyncio.sleep(timeout)
        return self.drains

    async def detach(self, *, keep_target: bool) -> None:
        self.held = self.started = False
        self.target = self.target and keep_target

    async def close(self, *, drain: float = 10.0) -> None:
        self.target = False

    async def end(self) -> None:
        assert not self.held, "the worker was ended with a connection open"
        self.ended = True

    async def poisoned(self) -> None:
        assert self.held, "a port is kept that is not there"
        self.held = self.started = False
        self.ports_kept += 1


class Store(MemStore):
    """Tells of each change, as a watch would, only sooner."""

    on_change: Callable[[bytes], None] = staticmethod(lambda path: None)

    def fire(self, path: bytes) -> None:
        super().fire(path)
        self.on_change(path)


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.patches = pytest.MonkeyPatch()
        keep_time(self.patches, self.loop)
        self.mem = Store()
        self.mem.on_change = self.changed  # type: ignore[method-assign]
        self.honest = False
        self.disk = Disk()
        self.device: XenbusDevice | None = None
        self.walk: DeviceLoop | None = None
        self.task: asyncio.Task[None] | None = None
        self.store = self.loop.run_until_complete(connect(self.mem, domid=5))
        self.visited: list[Phase] = []
        self.leaving = False  # parking begins while it still says connected

    # -- the world ---------------------------------------------------------------------------

    def value(self, path: str) -> str | None:
        try:
            return self.mem.value(path).decode("utf-8", "surrogateescape")
        except Refused:
            return None

    def set(self, path: str, value: str, perms: str) -> None:
        self.mem.set(path, value.encode("utf-8", "surrogateescape"), perms)

    def remove(self, path: str) -> None:
        if path.encode() in self.mem.tree.nodes:
            self.mem.tree.drop(path.encode(), 0)
            self.mem.fire(path.encode())

    def front_node(self, state: str, backend: str = BACK) -> None:
        self.mem.set("/local/domain/5", b"", OURS)
        for key, value in {"backend": backend, "backend-id": "0", "state": state}.items():
            self.set(f"{FRONT}/{key}", value, OURS)

    def back_node(self, state: str, where: str = BACK, online: str = "1") -> None:
        self.set(f"{where}/online", online, THEIRS)
        self.set(f"{where}/state", state, THEIRS)

    def changed(self, path: bytes) -> None:
        if self.honest and path == f"{FRONT}/state".encode():
            self.loop.call_soon(self.react)

    def react(self) -> None:
        """As blkback's frontend_changed()."""
        where = self.value(f"{FRONT}/backend") or BACK
        mine = self.value(f"{where}/state")
        if not self.honest or mine is None:
            return
        answer = {"1": "2", "3": "4", "4": "4", "5": "5", "6": "6"}.get(
            self.value(f"{FRONT}/state") or ""
        )
        if answer == "2" and mine not in ("1", "6"):
            return
        if answer is not None and answer != mine:
            self.set(f"{where}/state", answer, THEIRS)

    def pass_time(self, seconds: float) -> None:
        """At the least, all that needs no time is done."""
        self.loop.run_until_complete(asyncio.sleep(seconds or 0.001))
        if self.task is not None and self.task.done():
            self.task.result()

    def phase_changed(self, walk: DeviceLoop) -> None:
        self.visited.append(walk.phase)
        self.leaving = False

    async def open(self) -> None:
        self.device = await XenbusDevice.open(self.store, "vbd", 51728)
        self.walk = DeviceLoop(self.device, self.disk, on_change=self.phase_changed)
        self.task = asyncio.create_task(self.walk.run())

    def serve(self) -> None:
        """What a supervisor does with a device that it finds."""
        generation, kept = self.disk.generation, self.disk.ports_kept
        self.disk = Disk()
        self.disk.generation, self.disk.ports_kept = generation, kept
        try:
            self.loop.run_until_complete(self.open())
        except PvfrontError:
            self.task = None
        self.pass_time(0)

    def connected(self) -> bool:
        return self.walk is not None and self.walk.phase is Phase.CONNECTED

    def connected_both(self) -> bool:
        """Not only by what the loop says, which may not have seen yet that its nodes are new."""
        ends = self.value(f"{FRONT}/state"), self.value(f"{BACK}/state")
        return self.connected() and ends == ("4", "4")

    def finished(self) -> bool:
        return self.task is None or self.task.done()

    # -- what happens ------------------------------------------------------------------------

    @initialize(front=st.integers(0, 8), back=st.integers(0, 8), adopts=st.booleans(),
                honest=st.booleans())  # fmt: skip
    def found(self, front: int, back: int, adopts: bool, honest: bool) -> None:
        self.front_node(str(front))
        self.back_node(str(back))
        self.honest = honest
        self.disk.adopts = adopts
        if adopts:
            self.set(f"{FRONT}/ring-ref", "1", OURS)
        self.loop.run_until_complete(self.open())
        self.pass_time(0)

    @rule(state=STATES)
    def backend_writes(self, state: str) -> None:
        if self.value(f"{BACK}/state") is not None:
            self.set(f"{BACK}/state", state, THEIRS)
        self.pass_time(0)

    @rule(online=st.sampled_from(["0", "1", "", "2", "yes"]))
    def toolstack_says_online(self, online: str) -> None:
        if self.value(f"{BACK}/state") is not None:
            self.set(f"{BACK}/online", online, THEIRS)
        self.pass_time(0)

    @rule()
    def toolstack_asks_for_a_detach(self) -> None:
        if self.value(f"{BACK}/state") is not None:
            self.back_node("5", online="0")
        self.pass_time(0)

    @rule(what=st.sampled_from(NODES))
    def nodes_vanish(self, what: str) -> None:
        self.remove(what)
        self.pass_time(0)

    @rule(state=st.sampled_from("1256"))
    def nodes_return(self, state: str) -> None:
        self.front_node("1")
        self.back_node(state)
        self.pass_time(0)

    @rule(state=STATES)
    def somebody_writes_the_frontend_state(self, state: str) -> None:
        if self.value(f"{FRONT}/state") is not None:
            self.set(f"{FRONT}/state", state, OURS)
        self.pass_time(0)

    @rule(where=st.sampled_from([MOVED, BACK, "", "nonsense", "/local/domain/0/none"]),
          there=st.booleans())  # fmt: skip
    def frontend_names_another_backend(self, where: str, there: bool) -> None:
        if there and where.startswith("/"):
            self.back_node("2", where)
        if self.value(f"{FRONT}/state") is not None:
            self.set(f"{FRONT}/backend", where, OURS)
        self.pass_time(0)

    @rule(text=st.sampled_from(["0", "", "-1", "99999", "x"]))
    def backend_id_changes(self, text: str) -> None:
        if self.value(f"{FRONT}/state") is not None:
            self.set(f"{FRONT}/backend-id", text, OURS)

    @rule(honest=st.booleans())
    def backend_becomes(self, honest: bool) -> None:
        self.honest = honest
        self.react()
        self.pass_time(0)

    @precondition(lambda self: self.walk is not None and not self.finished())
    @rule(goal=st.sampled_from([Goal.CONNECTED, Goal.CONNECTED, Goal.PARKED, Goal.CLOSED]))
    def the_goal_is(self, goal: Goal) -> None:
        assert self.walk is not None
        self.leaving |= goal is not Goal.CONNECTED
        self.walk.aim(goal)
        self.pass_time(0)

    @precondition(lambda self: self.walk is not None and not self.finished())
    @rule()
    def the_domain_slept(self) -> None:
        assert self.walk is not None
        self.walk.poison()
        self.pass_time(0)

    @rule(trouble=st.sampled_from([None, "the worker has ended", "rule 5 was broken"]))
    def the_worker_has(self, trouble: str | None) -> None:
        self.disk.trouble = trouble
        self.disk.poke()
        self.pass_time(0)

    @rule(what=st.sampled_from(["attach", "start", "update"]), how=st.sampled_from(ERRORS))
    def the_next_call_fails(self, what: str, how: Exception) -> None:
        self.disk.fails[what] = how

    @rule(drains=st.booleans(), in_use=st.sampled_from([None, "mounted at /mnt"]),
          pending=st.booleans())  # fmt: skip
    def users_are(self, drains: bool, in_use: str | None, pending: bool) -> None:
        self.disk.drains, self.disk.in_use, self.disk.pending = drains, in_use, pending
        self.disk.poke()
        self.pass_time(0)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 7.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.pass_time(seconds)

    @precondition(lambda self: self.finished())
    @rule()
    def the_device_is_found_again(self) -> None:
        self.serve()

    # -- what holds --------------------------------------------------------------------------

    @invariant()
    def what_it_says_is_true(self) -> None:
        walk, disk = self.walk, self.disk
        if walk is None or self.task is None:
            return
        if self.task.done():
            assert walk.phase is Phase.CLOSED
            assert disk.ended
            assert not disk.target
        if walk.phase in (Phase.CLOSED, Phase.PARKED):
            assert not disk.held, "something is held after the end"
        if walk.phase is Phase.CONNECTED and not self.leaving:
            assert disk.held
            assert disk.started
        if walk.phase is Phase.FAILED:
            assert walk.reason, "failed without a reason"
            assert len(walk.reason) < 1000

    def settles(self, what: str, holds: Callable[[], bool]) -> None:
        end = self.loop.time() + SETTLED
        while not holds():
            walk = self.walk
            assert self.loop.time() < end, (
                f"{what} never came; {walk and walk.phase}: {walk and walk.reason}"
            )
            self.pass_time(0.5)

    def teardown(self) -> None:
        try:
            if self.walk is not None:
                self.it_ends_well()
        finally:
            self.loop.run_until_complete(self.clean())
            self.loop.close()
            self.patches.undo()

    def it_ends_well(self) -> None:
        assert self.walk is not None
        # Nobody does anything any more.
        self.honest = False
        self.visited = [self.walk.phase]
        self.settles("a phase that can last", lambda: bool(RESTING & set(self.visited)))
        # A backend that does what it should, and nothing in the way.
        self.honest = True
        self.disk.fails.clear()
        self.disk.trouble = self.disk.in_use = None
        self.disk.drains = True
        self.remove(FRONT)
        self.pass_time(0)
        self.front_node("1")
        self.back_node("2")
        self.walk.aim(Goal.CONNECTED)
        if self.finished():
            self.serve()
        self.settles("Connected", lambda: self.finished() or self.connected_both())
        if self.finished():  # it saw that its nodes had gone
            self.serve()
            self.settles("Connected", self.connected_both)
        self.walk.aim(Goal.CLOSED)
        self.settles("the end", self.finished)
        self.what_it_says_is_true()
        assert (self.value(f"{FRONT}/state"), self.value(f"{BACK}/state")) == ("6", "6")
        assert self.value(f"{FRONT}/ring-ref") is None

    async def clean(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        if self.device is not None:
            await self.device.close()
        await self.store.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def test_whatever_happens_a_device_is_connected_or_closed_and_holds_nothing_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    run_state_machine_as_test(Walk, settings=examples(120, stateful_step_count=25))
