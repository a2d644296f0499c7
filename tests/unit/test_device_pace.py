# SPDX-License-Identifier: BSD-2-Clause
"""How often a device is connected again that does not stay connected. Time is the test's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest
from memstore import MemStore
from memwire import connect
from vclock import Clock, VirtualLoop

from pvfront import device as device_module
from pvfront import xenbus as xenbus_module
from pvfront.device import RETRY_FIRST, RETRY_LAST, DeviceLoop, Goal, Phase
from pvfront.xenbus import XenbusDevice

FRONT = "/local/domain/5/device/vbd/51728"
BACK = "/local/domain/0/backend/vbd/5/51728"


class Disk:
    """A frontend whose connections last as long as the test says."""

    pending = False
    os_path = ""

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.generation = 0
        self.began: list[float] = []
        self.lasts: Callable[[int], float | None] = lambda generation: None
        self.poke: Callable[[], None] = lambda: None

    def on_poke(self, poke: Callable[[], None]) -> None:
        self.poke = poke

    def details(self) -> dict[str, Any]:
        return {}

    def in_flight(self) -> int:
        return 0

    def stale_key(self, key: str) -> bool:
        return key == "ring-ref"

    def stolen(self) -> bool:
        return False

    async def adopt(self, device: XenbusDevice) -> bool:
        return False

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        self.trouble = None
        self.generation += 1
        return {"ring-ref": "8"}

    async def start(self, device: XenbusDevice) -> None:
        loop = asyncio.get_running_loop()
        self.began.append(loop.time())
        lasts = self.lasts(self.generation)
        if lasts is not None:
            loop.call_later(lasts, self._breaks)

    def _breaks(self) -> None:
        self.trouble = "the backend broke rule 1"
        self.poke()

    async def update(self, device: XenbusDevice) -> None: ...

    async def quiesce(self, timeout: float) -> bool:
        return True

    async def detach(self, *, keep_target: bool) -> None: ...

    def busy(self) -> str | None:
        return None

    async def close(self) -> None: ...

    async def end(self) -> None: ...

    async def poisoned(self) -> None: ...

    @property
    def gaps(self) -> list[float]:
        """Seconds between the beginnings of two connections."""
        return [later - earlier for earlier, later in itertools.pairwise(self.began)]


class Store(MemStore):
    """Answers a frontend as blkback does."""

    def fire(self, path: bytes) -> None:
        super().fire(path)
        if path == f"{FRONT}/state".encode():
            asyncio.get_running_loop().call_soon(self.react)

    def react(self) -> None:
        mine = self.value(f"{BACK}/state").decode()
        answer = {"1": "2", "3": "4", "5": "5", "6": "6"}.get(
            self.value(f"{FRONT}/state").decode()
        )
        if answer is not None and answer != mine:
            self.set(f"{BACK}/state", answer.encode(), "n0,r5")


class World:
    def __init__(self, mem: Store, disk: Disk, walk: DeviceLoop) -> None:
        self.mem = mem
        self.disk = disk
        self.walk = walk

    async def closed(self) -> None:
        self.walk.aim(Goal.CLOSED)
        await self.walk.until_phase(Phase.CLOSED, timeout=60)


def play(monkeypatch: pytest.MonkeyPatch, story: Callable[[World], Coroutine[Any, Any, None]],
         lasts: Callable[[int], float | None]) -> Disk:  # fmt: skip
    """Serves a disk whose connections last `lasts(generation)` seconds, while `story` runs."""
    loop = VirtualLoop()
    for module in (device_module, xenbus_module):
        monkeypatch.setattr(module, "time", Clock(loop))

    async def run() -> Disk:
        mem = Store()
        mem.set("/local/domain/5", b"", "n5,r0")
        mem.set(f"{FRONT}/backend", BACK.encode(), "n5,r0")
        mem.set(f"{FRONT}/backend-id", b"0", "n5,r0")
        mem.set(f"{BACK}/online", b"1", "n0,r5")
        mem.set(f"{BACK}/state", b"2", "n0,r5")
        mem.set(f"{FRONT}/state", b"1", "n5,r0")
        disk = Disk()
        disk.lasts = lasts
        async with await connect(mem, domid=5) as store:
            device = await XenbusDevice.open(store, "vbd", 51728)
            walk = DeviceLoop(device, disk)
            task = asyncio.create_task(walk.run())
            world = World(mem, disk, walk)
            try:
                await story(world)
                await world.closed()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await device.close()
        return disk

    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


async def a_minute(_: World) -> None:
    await asyncio.sleep(60)


def test_a_backend_that_breaks_a_rule_after_each_connect_is_met_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = play(monkeypatch, a_minute, lambda _: 0.03)
    pauses = [RETRY_FIRST]
    while sum(pauses) < 60:
        pauses.append(min(2 * pauses[-1], RETRY_LAST))
    assert len(disk.gaps) >= 7
    for gap, pause in zip(disk.gaps, pauses, strict=False):
        assert pause <= gap < pause + 0.1


def test_a_connection_that_had_lasted_is_made_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = play(monkeypatch, a_minute, lambda _: 5.0)
    assert len(disk.gaps) >= 10
    assert max(disk.gaps) < 5.1


def test_after_a_connection_that_lasted_the_pauses_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = play(monkeypatch, a_minute, lambda generation: 30.0 if generation == 4 else 0.03)
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

    play(monkeypatch, story, lambda _: 0.03)
    assert took[0] < 1.0
