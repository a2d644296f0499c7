# SPDX-License-Identifier: BSD-2-Clause
"""Several devices on a store in memory, for the tests of their supervisor; its fixtures.

The class of devices is made up: it records what it is asked, and its frontends hold nothing. The
backend of each device answers as blkback does.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakefrontend import FakeFrontend
from memstore import MemStore
from memwire import both_ends
from vclock import keep_time
from waiting import PATIENCE, eventually

from pvfront import supervisor as supervisor_module
from pvfront.device import Phase
from pvfront.errors import PvfrontError
from pvfront.supervisor import Served, Supervisor
from pvfront.xenbus import XenbusDevice
from pvfront.xenstore import Xenstore
from pvfront.xswire import Permission

B, C, D = 51728, 51744, 51760
LABELS = {B: "xvdb", C: "xvdc", D: "xvdd"}


def front(devid: int) -> str:
    return f"/local/domain/5/device/vbd/{devid}"


def back(devid: int) -> str:
    return f"/local/domain/0/backend/vbd/5/{devid}"


class Disk(FakeFrontend):
    """One whose end can be held up."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.os_path = f"/dev/{name}"
        self.hangs = False

    def details(self) -> dict[str, Any]:
        return {"os_device": self.os_path}

    async def quiesce(self, timeout: float) -> bool:
        if self.hangs:
            await asyncio.sleep(3600)
        return await super().quiesce(timeout)


class Class:
    """A `DeviceClass` that writes down what it is asked."""

    klass = "vbd"
    kept_over_restart = False

    def __init__(self) -> None:
        self.first_within: float | None = None
        self.left: set[str] = set()  # taken by an earlier supervisor
        self.calls: list[tuple[str, str]] = []
        self.refuses: dict[str, Exception] = {}
        self.disks: dict[str, Disk] = {}
        self.taking: asyncio.Event | None = None
        self.stuck: set[str] = set()  # whose driver never lets go
        self.prepare: Callable[[Disk], None] = lambda disk: None

    def label(self, devid: int) -> str:
        return LABELS.get(devid, str(devid))

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        self.calls.append(("force" if force else "take", device.name))
        if device.name in self.stuck:
            await asyncio.Event().wait()
        if self.taking is not None:
            await self.taking.wait()
        if device.name in self.refuses:
            raise self.refuses[device.name]

    def has(self, name: str) -> bool:
        return name in self.left

    def patience(self, name: str) -> float | None:
        return self.first_within

    def frontend(self, device: XenbusDevice) -> Disk:
        disk = self.disks[device.name] = Disk(device.name)
        self.prepare(disk)
        return disk

    async def give_back(self, device: XenbusDevice) -> str:
        self.calls.append(("give back", device.name))
        return f"{device.name}: given back to the kernel"

    def forget(self, name: str) -> None:
        self.calls.append(("forget", name))

    def repair(self) -> None:
        self.calls.append(("repair", ""))

    def hold_hot_plug(self) -> None:
        self.calls.append(("hold", ""))

    def release_hot_plug(self) -> None:
        self.calls.append(("release", ""))

    def pass_on_others(self) -> None:
        self.calls.append(("pass on others", ""))

    def pass_on(self, name: str) -> None:
        self.calls.append(("pass on", name))
        if name in self.refuses:
            raise PvfrontError(f"{name}: no such device")

    def count(self, verb: str, devid: int) -> int:
        return self.calls.count((verb, f"vbd-{devid}"))


class Notified:
    """systemd's end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)
        self._seen: list[str] = []

    def lines(self) -> list[str]:
        while True:
            try:
                self._seen += self.sock.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self._seen


class World:
    """Store, toolstack, backends, and the supervisors under test."""

    def __init__(self, mem: MemStore, guest: Xenstore, dom0: Xenstore, run_dir: Path) -> None:
        self.mem = mem
        self.guest = guest
        self.dom0 = dom0
        self.run_dir = run_dir
        self.klass = Class()
        self.powers_off = False
        self.restarts = False  # whether systemd is to start the service again
        self.supervisor: Supervisor
        self.run: asyncio.Task[int]
        self.backends: dict[int, asyncio.Task[None]] = {}
        self.supervisors: list[asyncio.Task[int]] = []

    # -- the toolstack ---------------------------------------------------------------------

    def plug(self, *devids: int, state: str = "1") -> None:
        domain = "n5,r0"
        self.mem.set("/local/domain/5", b"", domain)
        for devid in devids:
            for key, value in {"state": "2", "online": "1"}.items():
                self.mem.set(f"{back(devid)}/{key}", value.encode(), "n0,r5")
            for key, value in {"backend-id": "0", "state": state, "backend": back(devid)}.items():
                self.mem.set(f"{front(devid)}/{key}", value.encode(), domain)
            self.mem.set(front(devid), b"", domain)  # libxl makes the directory, not only keys
            self.backends[devid] = asyncio.create_task(self._backend(devid))

    async def unplug(self, devid: int) -> None:
        """The forced kind: the nodes vanish."""
        self.backends.pop(devid).cancel()
        async for attempt in self.dom0.transaction():
            async with attempt as t:
                await t.remove(front(devid))
                await t.remove(back(devid))

    async def detached(self, devid: int) -> Served:
        """Asks for the device in order, and waits for the end of its loop, which it returns."""
        served = self.supervisor.served[devid]
        await self.dom0.write(f"{back(devid)}/online", "0")
        await self.dom0.write(f"{back(devid)}/state", "5")
        await self.eventually("the end of the loop", served.task.done)
        return served

    async def replace(self, devid: int) -> None:
        """A detach's end and an attach of the same id that nobody can see apart."""
        ends = {
            back(devid): (
                {"state": "2", "online": "1", "frontend": front(devid)},
                [Permission(0), Permission(5, read=True)],
            ),
            front(devid): (
                {"state": "1", "backend-id": "0", "backend": back(devid)},
                [Permission(5), Permission(0, read=True)],
            ),
        }
        async for attempt in self.dom0.transaction():
            async with attempt as t:
                for path, (keys, permissions) in ends.items():
                    await t.remove(path)
                    await t.mkdir(path)
                    await t.set_permissions(path, permissions)
                    for key, value in keys.items():
                        await t.write(f"{path}/{key}", value)
                        await t.set_permissions(f"{path}/{key}", permissions)

    async def _backend(self, devid: int) -> None:
        async with self.dom0.watch(f"{front(devid)}/state") as watch:
            async for _ in watch:
                state = await self.dom0.read_opt(f"{front(devid)}/state")
                mine = await self.dom0.read_opt(f"{back(devid)}/state")
                answer = {"1": "2", "3": "4", "5": "5", "6": "6"}.get(state or "")
                if answer and mine and answer != mine:
                    await self.dom0.write(f"{back(devid)}/state", answer)

    # -- the supervisor --------------------------------------------------------------------

    def serve(self, named: Collection[int] = (), **options: Any) -> Supervisor:
        hot_plug = options.pop("hot_plug", not named)
        wanted = options.pop("wanted", lambda devid: devid in named if named else True)
        self.supervisor = Supervisor(
            self.guest, options.pop("klass", self.klass), wanted,
            named=named, hot_plug=hot_plug, run_dir=self.run_dir, **options,
        )  # fmt: skip
        self.run = asyncio.create_task(self.supervisor.run())
        self.supervisors.append(self.run)
        return self.supervisor

    async def connected(self, *devids: int) -> None:
        await self.eventually(
            f"{devids} connected",
            lambda: all(
                d in self.supervisor.served
                and self.supervisor.served[d].loop.phase is Phase.CONNECTED
                for d in devids
            ),
        )

    async def stopped(self) -> int:
        self.supervisor.stop()
        return await asyncio.wait_for(asyncio.shield(self.run), PATIENCE)

    async def ask(self, request: object, *, raw: bytes | None = None) -> dict[str, Any]:
        path = str(self.run_dir / "supervisor-vbd.sock")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(raw if raw is not None else json.dumps(request).encode() + b"\n")
        writer.write_eof()
        try:
            line = await asyncio.wait_for(reader.readline(), PATIENCE)
        finally:
            writer.close()
            await writer.wait_closed()
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    async def eventually(self, what: str, holds: Callable[[], Any]) -> None:
        def look() -> Any:
            if self.run.done() and not self.run.cancelled() and self.run.exception():
                raise AssertionError("the supervisor failed") from self.run.exception()
            return holds()

        await eventually(what, look, why=lambda: f"calls {self.klass.calls}")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """In virtual time: the module sets LOOP_FACTORY."""

    async def running() -> bool:
        return made.powers_off

    async def restarts() -> bool:
        return made.restarts

    keep_time(monkeypatch, asyncio.get_running_loop())
    monkeypatch.setattr(supervisor_module, "system_is_stopping", running)
    monkeypatch.setattr(supervisor_module, "service_restarts", restarts)
    async with both_ends() as (mem, guest, dom0):
        made = World(mem, guest, dom0, tmp_path / "run")
        yield made
        tasks = [*made.supervisors, *made.backends.values()]
        if made.supervisors:
            tasks += [s.task for s in made.supervisor.served.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notified]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    made = Notified(tmp_path / "notify")
    yield made
    made.sock.close()
