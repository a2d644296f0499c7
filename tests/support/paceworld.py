# SPDX-License-Identifier: BSD-2-Clause
"""A device whose connections do not last, an honest backend, and time that is the test's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest
from fakefrontend import FakeFrontend
from memstore import MemStore, Refused
from memwire import connect
from vclock import VirtualLoop, keep_time

from pvfront.device import DeviceLoop, Goal, Phase
from pvfront.xenbus import XenbusDevice

FRONT = "/local/domain/5/device/vbd/51728"
BACK = "/local/domain/0/backend/vbd/5/51728"


class Disk(FakeFrontend):
    """A frontend whose connections last as long as the test says."""

    def __init__(self, lasts: Callable[[int], float | None]) -> None:
        """`lasts`: seconds of a generation's connection; None, until somebody ends it."""
        super().__init__()
        self.held = False
        self.began: list[float] = []
        self.lasts = lasts

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        self.held = True
        return await super().attach(device)

    async def start(self, device: XenbusDevice) -> None:
        loop = asyncio.get_running_loop()
        self.began.append(loop.time())
        lasts = self.lasts(self.generation)
        if lasts is not None:
            loop.call_later(lasts, self._breaks)

    def _breaks(self) -> None:
        self.trouble = "the backend broke rule 1"
        self.poke()

    async def detach(self, *, keep_target: bool) -> None:
        self.held = False

    async def end(self) -> None:
        assert not self.held
        await super().end()

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
        try:
            mine = self.value(f"{BACK}/state").decode()
            theirs = self.value(f"{FRONT}/state").decode()
        except Refused:
            return
        answer = {"1": "2", "3": "4", "5": "5", "6": "6"}.get(theirs)
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


def play(
    monkeypatch: pytest.MonkeyPatch, story: Callable[[World], Coroutine[Any, Any, None]], disk: Disk
) -> Disk:
    """Serves a disk while `story` runs."""
    loop = VirtualLoop()
    keep_time(monkeypatch, loop)

    async def run() -> Disk:
        mem = Store()
        mem.set("/local/domain/5", b"", "n5,r0")
        mem.set(f"{FRONT}/backend", BACK.encode(), "n5,r0")
        mem.set(f"{FRONT}/backend-id", b"0", "n5,r0")
        mem.set(f"{BACK}/online", b"1", "n0,r5")
        mem.set(f"{BACK}/state", b"2", "n0,r5")
        mem.set(f"{FRONT}/state", b"1", "n5,r0")
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
