# SPDX-License-Identifier: BSD-2-Clause
"""A store in memory with one vbd, a scripted backend, and the device loop under test.

The backend reacts as blkback's frontend_changed() does, and can be told to misbehave. The frontend
records what the loop asks of it. Time is the loop's own (vclock.py; a test module sets LOOP_FACTORY
to VirtualLoop): no deadline passes while anything happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from fakefrontend import FakeFrontend
from memstore import MemStore
from memwire import both_ends
from vclock import keep_time
from waiting import PATIENCE, eventually

from pvfront.device import DeviceLoop, Phase
from pvfront.walk import Deadlines
from pvfront.xenbus import XenbusDevice
from pvfront.xenstore import Xenstore

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
        await eventually(what, holds, why=lambda: f"calls {self.disk.calls}")

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
