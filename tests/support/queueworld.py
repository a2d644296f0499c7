# SPDX-License-Identifier: BSD-2-Clause
"""A disk with several queues on an embedded host; frontend, device loop and worker are ours.

The target stands for the kernel's nbd device with a socket for each queue: what arrives at one is
sent by the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "worker"))

from embedded import Nbd
from waiting import PATIENCE, eventually

from pvfront.abi import read_all_stats
from pvfront.blkfront.features import DiskGeometry
from pvfront.blkfront.frontend import DiskFrontend
from pvfront.blkfront.settings import DiskSettings
from pvfront.blkfront.target import Clients
from pvfront.device import DeviceLoop, Goal, Phase
from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.platform import Embedded
from pvfront.xenbus import XenbusDevice

BLOCK = 4096
SIZE = 4 << 20


class Device:
    """A `Target` with `max_queues` sockets, whose other ends are `ends`."""

    kind = "nbd"
    stays = False
    resize_waits = False
    server_pid = 0
    name = "nbd0"
    path = "/dev/nbd0"
    link = "/dev/pvfront/xvdb"
    clients: Clients | None = None

    def __init__(self, max_queues: int) -> None:
        self.max_queues = self.usual_queues = max_queues
        self.ends: list[socket.socket] = []
        self.attached = 0
        self.published: list[DiskGeometry] = []

    async def adopt(self) -> bool:
        return bool(self.ends)

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        self.hang_up()
        pairs = [socket.socketpair() for _ in range(queues)]
        self.ends = [mine for mine, _ in pairs]
        for end in self.ends:
            end.settimeout(PATIENCE)
        self.attached += 1
        return [theirs.detach() for _, theirs in pairs]

    async def publish(self, geometry: DiskGeometry) -> None:
        self.published.append(geometry)

    async def feature_off(self, feature: str) -> None:
        pass

    def busy(self) -> str | None:
        return None

    def in_flight(self) -> int:
        return 0

    async def close(self, *, drain: float = 10.0) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        for end in self.ends:
            end.close()
        self.ends.clear()


class Place:
    def __init__(self, host: Host, backend: BlkBackend, device: Device) -> None:
        self.host, self.backend, self.target = host, backend, device
        self.loop: DeviceLoop
        self.frontend: DiskFrontend

    async def serve(self, settings: DiskSettings) -> asyncio.Task[None]:
        on = Embedded(self.host.directory)
        on.require()
        self.store = await on.store()
        device = await XenbusDevice.open(self.store, "vbd", 51728)
        self.frontend = DiskFrontend(device.name, 51728, "xvdb", on, self.target, settings=settings)
        self.loop = DeviceLoop(device, self.frontend)
        self.task = asyncio.create_task(self.loop.run())
        return self.task

    async def connected(self, generation: int) -> None:
        def is_connected() -> bool:
            if self.task.done():
                self.task.result()  # why it ended
            return self.loop.phase is Phase.CONNECTED and self.frontend.generation >= generation

        await eventually(
            f"generation {generation} or a later one, connected",
            is_connected,
            why=lambda: f"{self.frontend.generation}, {self.loop.phase}: {self.loop.reason}",
        )

    async def exchange(self) -> None:
        """Each socket writes and reads back a block of its own, and reads the others'."""
        await asyncio.to_thread(self._exchange)

    def _exchange(self) -> None:
        users = [Nbd(end) for end in self.target.ends]
        blocks = [os.urandom(BLOCK) for _ in users]
        for number, (user, block) in enumerate(zip(users, blocks, strict=True)):
            user.write(number * BLOCK, block)
        for user in users:
            for number, block in enumerate(blocks):
                assert user.read(number * BLOCK, BLOCK) == block

    def requests(self) -> list[int]:
        """Of each queue of the worker."""
        worker = self.frontend._worker
        assert worker is not None
        return [queue.read.requests for queue in read_all_stats(worker.stats_fd)]

    async def keys(self) -> set[str]:
        return set(await self.store.directory("device/vbd/51728"))


@contextlib.asynccontextmanager
async def place(
    queues: int, target: int, settings: DiskSettings | None = None, limit: int = 16384
) -> AsyncIterator[Place]:
    directory = Path(tempfile.mkdtemp(prefix="pvf-"))
    (directory / "disk").touch()
    os.truncate(directory / "disk", SIZE)
    try:
        async with await Host.start(directory, gntalloc_limit=limit) as host:
            await host.create_domain(1)
            await host.attach_disk(1, f"format=raw, vdev=xvdb, target={directory / 'disk'}")
            backend = await BlkBackend.start(host, queues=queues)
            made = Place(host, backend, Device(target))
            task = await made.serve(settings or DiskSettings())
            try:
                await made.connected(1)
                yield made
                made.loop.aim(Goal.CLOSED)
                await asyncio.wait_for(task, PATIENCE)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if made.frontend._worker is not None:
                    made.frontend._worker.kill()
                    await made.frontend._worker.ended(PATIENCE)
                await made.loop.device.close()
                await made.store.close()
                await made.backend.stop()
                made.target.hang_up()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
