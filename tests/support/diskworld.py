# SPDX-License-Identifier: BSD-2-Clause
"""What a disk's frontend needs around it, with the real worker on an embedded backend.

Made up are what a guest of Xen would give: event channel and granted pages (that the backend of
tests/worker/embedded.py has the other side of), the keys of the store, and the OS device: a target
that only hands out sockets.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "worker"))

import pytest
from embedded import Nbd
from ringbackend import Backend, Pages, Port
from waiting import PATIENCE

from pvfront import workerprogram
from pvfront.blkfront.features import DiskGeometry
from pvfront.blkfront.frontend import DiskFrontend
from pvfront.blkfront.settings import DiskSettings
from pvfront.blkfront.target import Clients, TargetError
from pvfront.gntalloc import GrantsExhausted
from pvfront.states import XenbusState
from pvfront.xenbus import View

NAME = "vbd-51728"
SECTORS = 2048
PORT, RING_GREF = 5, 6900
KEYS = {
    "sectors": str(SECTORS),
    "sector-size": "512",
    "info": "0",
    "mode": "w",
    "feature-flush-cache": "1",
    "feature-discard": "1",
}


class Refusing(Backend):
    """Offers flush and does not have it."""

    def execute(self, request: Any) -> int:
        return -2 if request.op == 3 else super().execute(request)


class Host:
    """What Xen would give to one guest: ports and pages, with a backend behind them."""

    def __init__(self) -> None:
        self.disk = bytearray(2 * SECTORS * 512)
        self.limit = 10000
        self.ring_pages = 1
        self.pages: Pages | None = None
        self.backend: Backend | None = None
        self.backend_class = Backend
        self.asked: list[int] = []
        self.open = 0

    def end_generation(self) -> None:
        if self.backend is not None:
            self.backend.stop()
            self.backend = None
        if self.pages is not None:
            self.pages.close()
            self.pages = None


class Channels:
    """`EventChannels` whose port leads to the backend."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.end_generation()
        self.port = Port(PORT)

    def __enter__(self) -> Channels:
        self.host.open += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.host.open -= 1
        self.port.theirs.close()
        if self.host.pages is None:
            self.port.close()
            return
        self.host.backend = self.host.backend_class(self.host.pages, self.port, self.host.disk)
        self.host.backend.start()

    def fileno(self) -> int:
        return self.port.theirs.fileno()

    def hand_over(self, port: int) -> int:
        assert port == PORT
        return self.fileno()

    def bind_unbound(self, domid: int) -> int:
        assert domid == 0
        return PORT


class Allocator:
    """`GrantAllocator` of `host.limit` pages."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.connection: socket.socket | None = None

    def __enter__(self) -> Allocator:
        self.host.open += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.host.open -= 1
        if self.connection is not None:
            self.connection.close()

    def fileno(self) -> int:
        assert self.connection is not None
        return self.connection.fileno()

    def hand_over(self) -> int:
        return self.fileno()

    def alloc(self, domid: int, pages: int) -> Any:
        assert domid == 0
        self.host.asked.append(pages)
        if pages > self.host.limit:
            raise GrantsExhausted(wanted=pages, held=0, limit=self.host.limit)
        ring = self.host.ring_pages
        made = self.host.pages = Pages(ring, pages - ring)
        self.connection = made.hand_over()
        refs = (*range(RING_GREF, RING_GREF + ring), *made.grefs)
        return SimpleNamespace(offset=made.ring_offset, pages=pages, grefs=refs)


class OsDevice:
    """A `Target` that hands out sockets and notes what it is told."""

    kind = "nbd"
    stays = resize_waits = False

    def __init__(self) -> None:
        self.name = self.path = ""
        self.clients: Clients | None = None
        self.link = "/dev/pvfront/xvdb"
        self.exists = False
        self.calls: list[str] = []
        self.published: list[DiskGeometry] = []
        self.client: socket.socket | None = None
        self.refuses_close: TargetError | None = None
        self.max_queues = self.usual_queues = 1
        self.server_pid = 0
        self.waiting = 7

    async def adopt(self) -> bool:
        return self.exists

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        self.calls.append("attach")
        if self.client is not None:
            self.client.close()
        self.client, theirs = socket.socketpair()
        self.client.settimeout(PATIENCE)
        self.exists, self.path = True, "/dev/nbd0"
        return [theirs.detach()]

    async def publish(self, geometry: DiskGeometry) -> None:
        self.calls.append("publish")
        self.published.append(geometry)

    async def feature_off(self, feature: str) -> None:
        self.calls.append(f"{feature} off")

    async def fail_after(self, seconds: float) -> None:
        self.calls.append(f"fail after {seconds:g}")

    def busy(self) -> str | None:
        return "mounted at /srv"

    def in_flight(self) -> int:
        return self.waiting

    async def close(self, *, drain: float = 10.0) -> None:
        self.calls.append(f"close {drain:g}")
        error, self.refuses_close = self.refuses_close, None
        if error is not None:
            raise error
        self.exists = False
        if self.client is not None:
            self.client.close()

    @property
    def nbd(self) -> Nbd:
        assert self.client is not None
        return Nbd(self.client)


class Device:
    """The store's view of the disk."""

    def __init__(self) -> None:
        self.keys = dict(KEYS)
        self.front: dict[str, str] = {}
        self.path = "device/vbd/51728"
        self.backend = "/local/domain/0/backend/vbd/5/51728"
        self.backend_id = 0
        self.view = View(XenbusState.CONNECTED, XenbusState.CONNECTED, True, True)
        self.store = self

    async def backend_keys(self, wanted: Collection[str] | None = None) -> dict[str, str]:
        return {k: v for k, v in self.keys.items() if wanted is None or k in wanted}

    async def read_opt(self, path: str) -> str | None:
        return self.front.get(path.removeprefix(f"{self.path}/"))


class World:
    """A frontend and everything around it; its `platform` too."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.host = Host()
        self.name = "xen"
        self.grants: int | None = None
        self.target: Any = OsDevice()
        self.device: Any = Device()
        self.settings = DiskSettings()
        self.pokes = 0
        self.frontends: list[DiskFrontend] = []
        self.disk = self.frontend()

    def grant_limit(self) -> int | None:
        return self.grants

    def event_channels(self) -> Channels:
        return Channels(self.host)

    def grant_allocator(self) -> Allocator:
        return Allocator(self.host)

    def frontend(self) -> DiskFrontend:
        platform: Any = self
        made = DiskFrontend(NAME, 51728, "xvdb", platform, self.target, settings=self.settings)

        def poke() -> None:
            self.pokes += 1

        made.on_poke(poke)
        self.frontends.append(made)
        return made

    async def attach(self) -> dict[str, str]:
        return dict(await self.disk.attach(self.device))

    async def running(self) -> DiskFrontend:
        await self.attach()
        await self.disk.start(self.device)
        return self.disk

    @property
    def backend(self) -> Backend:
        assert self.host.backend is not None
        return self.host.backend

    def pid(self) -> int:
        pid = self.disk.details()["worker_pid"]
        assert isinstance(pid, int)
        return pid

    async def read(self, at: int, length: int) -> bytes:
        return await asyncio.to_thread(self.target.nbd.read, at, length)

    async def write(self, at: int, data: bytes) -> None:
        await asyncio.to_thread(self.target.nbd.write, at, data)


def descriptors(pid: int) -> list[str]:
    return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def end(world: World) -> None:
    """Ends whatever of it lives."""
    for frontend in world.frontends:
        worker = frontend._worker
        if worker is not None:
            worker.kill()
            await worker.ended(PATIENCE)
            frontend._forget()
    world.host.end_generation()


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path)
    monkeypatch.setattr(workerprogram, "USER", "nobody")
    yield made
    await end(made)
    if made.target.client is not None:
        made.target.client.close()
