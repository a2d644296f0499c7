# SPDX-License-Identifier: BSD-2-Clause
"""How often a device is connected again that does not stay connected. Time is the test's."""

from __future__ import annotations

import asyncio

import pytest
from paceworld import BACK, Disk, World, play

from pvfront.device import RETRY_FIRST, RETRY_LAST, Phase


async def a_minute(_: World) -> None:
    await asyncio.sleep(60)


def test_a_backend_that_breaks_a_rule_after_each_connect_is_met_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = play(monkeypatch, a_minute, Disk(lambda _: 0.03))
    pauses = [RETRY_FIRST]
    while sum(pauses) < 60:
        pauses.append(min(2 * pauses[-1], RETRY_LAST))
    assert len(disk.gaps) >= 7
    for gap, pause in zip(disk.gaps, pauses, strict=False):
        assert pause <= gap < pause + 0.1


def test_a_connection_that_had_lasted_is_made_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = play(monkeypatch, a_minute, Disk(lambda _: 5.0))
    assert len(disk.gaps) >= 10
    assert max(disk.gaps) < 5.1


def test_after_a_connection_that_lasted_the_pauses_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = play(monkeypatch, a_minute, Disk(lambda generation: 30.0 if generation == 4 else 0.03))
    first, second, third, lasted, again, *_ = disk.gaps
    assert first < second < third
    assert third >= 4 * RETRY_FIRST
    assert lasted < 30.1, "it had lasted: no pause"
    assert again == pytest.approx(first, abs=0.05)


def test_a_detach_is_not_kept_waiting_by_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[float] = []

    async def story(world: World) -> None:
        await asyncio.sleep(40)  # by now it pauses for RETRY_LAST
        while world.walk.phase is not Phase.RECONNECTING:  # noqa: ASYNC110 - of virtual time
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        start = asyncio.get_running_loop().time()
        world.mem.set(f"{BACK}/online", b"0", "n0,r5")
        world.mem.set(f"{BACK}/state", b"5", "n0,r5")
        await world.walk.until_phase(Phase.CLOSED, timeout=60)
        took.append(asyncio.get_running_loop().time() - start)

    play(monkeypatch, story, Disk(lambda _: 0.03))
    assert took[0] < 1.0
