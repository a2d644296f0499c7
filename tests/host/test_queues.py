# SPDX-License-Identifier: BSD-2-Clause
"""A disk with several queues: the frontend and its worker on an embedded host.

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
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "worker"))

from embedded import Nbd
from test_negotiation import MIB, RICH
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


class Device:
    """A `Target` with `max_queues` sockets, whose other ends are `ends`."""

    kind = "nbd"
    stays = False
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
        return asyncio.create_task(self.loop.run())

    async def connected(self, generation: int) -> None:
        await eventually(
            f"generation {generation} or a later one, connected",
            lambda: (
                self.loop.phase is Phase.CONNECTED and self.frontend.generation >= generation
            ),
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
    os.truncate(directory / "disk", 4 * MIB)
    try:
        async with await Host.start(directory, gntalloc_limit=limit) as host:
            await host.create_domain(1)
            await host.attach_disk(1, f"format=raw, vdev=xvdb, target={directory / 'disk'}")
            backend = await BlkBackend.start(host, **asdict(replace(RICH, queues=queues)))
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


async def test_each_queue_has_a_ring_of_its_own_and_all_are_one_disk() -> None:
    async with place(queues=4, target=3) as it:
        details = it.frontend.details()["rings"]
        assert (details["queues"], details["granted"]["got"]) == (3, 3 * 708)
        assert len(it.target.ends) == 3
        keys = await it.keys()
        assert {"queue-0", "queue-1", "queue-2", "multi-queue-num-queues"} <= keys
        assert not keys & {"event-channel", "ring-ref", "ring-ref0", "queue-3"}
        await it.exchange()
        await eventually("3 reads of each counted", lambda: it.requests() == [3, 3, 3])


async def test_there_are_as_many_queues_as_the_least_of_all_can() -> None:
    async with place(queues=2, target=4) as it:
        assert it.frontend.details()["rings"]["queues"] == 2
        await it.exchange()
    async with place(queues=4, target=4, settings=DiskSettings(max_queues=1)) as it:
        assert it.frontend.details()["rings"]["queues"] == 1
        assert "queue-0" not in await it.keys()
        await it.exchange()


async def test_without_room_for_all_queues_there_are_fewer() -> None:
    async with place(queues=4, target=4, limit=4000) as it:
        details = it.frontend.details()["rings"]
        assert (details["queues"], details["granted"]["asked"]) == (2, 4 * 708)
        assert details["granted"]["why"] == "a share of 4000 pages for 1 device"
        await it.exchange()


async def test_a_backend_that_comes_back_with_other_queues_is_served_with_those() -> None:
    async with place(queues=4, target=4) as it:
        await it.exchange()
        pid = it.frontend.details()["worker_pid"]
        for queues in (2, 1, 4):
            generation = it.frontend.generation + 1
            await it.backend.stop()
            it.backend = await BlkBackend.start(
                it.host, **asdict(replace(RICH, queues=queues, ring_order=generation % 2 + 1))
            )
            await it.connected(generation)
            assert it.frontend.details()["rings"]["queues"] == queues
            assert len(it.target.ends) == queues
            keys = await it.keys()
            assert ("queue-1" in keys) is (queues > 1)
            assert "queue-3" not in keys or queues == 4, "a key of before was left"
            await it.exchange()
        assert it.frontend.details()["worker_pid"] == pid


async def test_the_loss_of_one_socket_ends_the_generation_of_all() -> None:
    async with place(queues=2, target=2) as it:
        await it.exchange()
        first, second = it.target.ends
        first.close()
        await it.connected(2)
        assert second.fileno() == -1, "it was replaced with the other"
        assert it.target.attached == 2
        await it.exchange()


async def test_a_worker_that_dies_takes_all_its_queues_along_and_the_next_has_as_many() -> None:
    async with place(queues=2, target=2) as it:
        pid = it.frontend.details()["worker_pid"]
        os.kill(pid, 9)
        await it.connected(2)
        assert it.frontend.details()["rings"]["queues"] == 2
        await it.exchange()


async def test_a_later_supervisor_adopts_all_queues() -> None:
    async with place(queues=3, target=3) as it:
        await it.exchange()
        worker = it.frontend._worker
        assert worker is not None
        worker.close()  # as the end of a supervisor does
        on = Embedded(it.host.directory)
        later = DiskFrontend("vbd-51728", 51728, "xvdb", on, it.target)
        assert await later.adopt(it.loop.device)
        rings = later.details()["rings"]
        assert (rings["queues"], rings["slots"], rings["pool_pages"]) == (3, 128, 704)
        assert later.budget.held == 3 * 708
        await it.exchange()
        assert later._worker is not None
        later._worker.close()
        assert await it.frontend.adopt(it.loop.device)
