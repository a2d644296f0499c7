# SPDX-License-Identifier: BSD-2-Clause
"""A worker that dies again and again: the device fails for good, and in the end its users know."""

from __future__ import annotations

import asyncio

import pytest
from paceworld import BACK, FRONT, Disk, World, play

from pvfront.device import Phase
from pvfront.startlimit import Deaths, Limits
from pvfront.trace import Kind

LIMITS = Limits(start_limit_burst=4, start_limit_interval=10, dead_conn_timeout=60)


class Dying(Disk):
    """Its worker dies a little after each start."""

    start_limits = LIMITS

    def _breaks(self) -> None:
        self.trouble = "the worker (pid 7) has ended; pid 7 ended by signal 11"
        self.note(Kind.DIED, self.trouble)
        self.poke()


@pytest.mark.parametrize(
    ("burst", "gap", "loop"), [(5, 2.0, True), (5, 3.0, False), (1, 99.0, True), (0, 0.1, False)]
)
def test_so_many_deaths_within_the_interval_are_a_crash_loop(
    burst: int, gap: float, loop: bool
) -> None:
    deaths = Deaths(Limits(start_limit_burst=burst, start_limit_interval=10))
    for turn in range(8):
        deaths.died(gap * turn, "SIGSEGV")
    assert (deaths.verdict is not None) is loop
    assert not loop or "SIGSEGV" in str(deaths.verdict)


def test_deaths_that_are_far_apart_are_forgotten() -> None:
    deaths = Deaths(Limits(start_limit_burst=3, start_limit_interval=10))
    for now in (0, 1, 50, 51, 100):
        deaths.died(now, "killed")
    assert deaths.verdict is None
    deaths.died(109, "killed")
    assert deaths.verdict is None, "the third of the last ten seconds is to come"
    deaths.died(110, "killed")
    assert deaths.verdict == "its worker died 3 times within 10 s, the last time: killed"


def test_a_crash_loop_is_failed_with_its_reason_and_nothing_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(30)
        walk, disk = world.walk, world.disk
        assert walk.phase is Phase.FAILED
        assert walk.reason == (
            "its worker died 4 times within 10 s, the last time: the worker (pid 7) has ended; "
            "pid 7 ended by signal 11; requests fail 60 s later unless it is served again"
        )
        assert walk.gave_up_at is not None
        assert len(disk.began) == 4, "no worker is started any more"
        assert not disk.held
        assert "close" not in disk.calls, "requests wait"
        assert world.mem.value(f"{FRONT}/state") == b"6", "the backend is let go of"

    play(monkeypatch, story, Dying(lambda _: 0.03))


def test_after_the_time_that_was_set_users_get_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        loop = asyncio.get_running_loop()
        await world.walk.until_phase(Phase.FAILED, timeout=60)
        failed = loop.time()
        while "close" not in world.disk.calls:  # noqa: ASYNC110 - of virtual time
            await asyncio.sleep(0.1)
        assert loop.time() - failed == pytest.approx(LIMITS.dead_conn_timeout, abs=0.5)
        assert world.walk.phase is Phase.FAILED
        assert "its users have got I/O errors" in world.walk.reason
        await asyncio.sleep(600)
        assert world.disk.calls.count("close") == 1
        assert len(world.disk.began) == 4

    play(monkeypatch, story, Dying(lambda _: 0.03))


def test_deaths_now_and_then_are_no_crash_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(300)
        assert world.walk.gave_up_at is None
        assert len(world.disk.began) > 50

    play(monkeypatch, story, Dying(lambda _: 4.0))


@pytest.mark.parametrize("after", [20.0, 200.0], ids=["while requests wait", "after the errors"])
def test_a_device_in_a_crash_loop_is_detached_at_once(
    monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    async def story(world: World) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(after)
        assert world.walk.phase is Phase.FAILED
        world.mem.set(f"{BACK}/online", b"0", "n0,r5")
        world.mem.set(f"{BACK}/state", b"5", "n0,r5")
        before = loop.time()
        await world.walk.until_phase(Phase.CLOSED, timeout=60)
        assert loop.time() - before < 2
        assert world.mem.value(f"{BACK}/state") == b"6"
        assert world.disk.calls[-1] == "end"

    play(monkeypatch, story, Dying(lambda _: 0.03))


def test_nodes_that_vanish_end_a_crash_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(20)
        world.mem.tree.drop(FRONT.encode(), 0)
        world.mem.fire(FRONT.encode())
        await world.walk.until_phase(Phase.CLOSED, timeout=60)
        assert world.disk.calls[-1] == "end"

    play(monkeypatch, story, Dying(lambda _: 0.03))
