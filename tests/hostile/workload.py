# SPDX-License-Identifier: BSD-2-Clause
"""Sixteen requests at a time, and a model of what the disk may hold by what was acknowledged."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any

from hostileworld import MIB, Attach, Disk, World
from nbdclient import FLUSH, READ, SEND_FLUSH, TRIM, WRITE, Client, NbdError, finished

BLOCK = 4096
SIZE = 8 * MIB
LANES = 16
LANE_BLOCKS = SIZE // BLOCK // LANES
DEADLINE = 60.0
"""Seconds for a request, over every reconnection that it meets."""


class Model:
    """For each block the contents that it may have: one, or several while a write is in doubt.

    A write that failed, or whose connection ended before its answer, may have happened or not, in
    part too: each of its blocks is new or old. A read decides; then only that is right.
    """

    def __init__(self) -> None:
        self.may: list[set[bytes]] = [{bytes(BLOCK)} for _ in range(SIZE // BLOCK)]
        self.past: list[deque[str]] = [deque(maxlen=8) for _ in self.may]
        """What became of the last requests to each block, for a miscompare's report."""
        self.compared = 0
        self.acknowledged = 0

    def _note(self, first: int, count: int, what: str) -> None:
        for i in range(first, first + count):
            self.past[i].append(f"{time.monotonic():.3f} {what}")

    def wrote(self, first: int, data: bytes, *, sure: bool) -> None:
        self._note(
            first, len(data) // BLOCK, f"write {data[:4].hex()} {'ok' if sure else 'in doubt'}"
        )
        for i in range(len(data) // BLOCK):
            new = data[i * BLOCK : (i + 1) * BLOCK]
            if sure:
                self.may[first + i] = {new}
            else:
                self.may[first + i].add(new)
        self.acknowledged += sure

    def trimmed(self, first: int, count: int) -> None:
        """Zeroes or what was there: advice."""
        self._note(first, count, "trim")
        for i in range(first, first + count):
            self.may[i].add(bytes(BLOCK))

    def read(self, first: int, data: bytes) -> None:
        self._note(first, len(data) // BLOCK, "read")
        for i in range(len(data) // BLOCK):
            got = data[i * BLOCK : (i + 1) * BLOCK]
            may = self.may[first + i]
            assert got in may, (
                f"miscompare in block {first + i}: {got[:24].hex()}… is none of "
                f"{[content[:24].hex() for content in may]}: {'; '.join(self.past[first + i])}"
            )
            self.may[first + i] = {got}
            self.compared += 1


class Workload:
    """LANES requests at a time, each on a part of the disk of its own, until `stop` is set."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.seed = seed
        self.model = Model()
        self.random = random.Random(seed)
        self.stop = asyncio.Event()
        self.cuts = self.errors = self.requests = 0
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    @classmethod
    async def on_a_new_disk(cls, attach: Attach, world: World) -> Workload:
        """Drawn from $PVFRONT_FAULT_SEED; without it from a seed that is printed."""
        # asyncio says so of each request that is sent to a client that was cut off.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        seed = int(os.environ.get("PVFRONT_FAULT_SEED") or random.SystemRandom().getrandbits(31))
        print(f"PVFRONT_FAULT_SEED={seed}")
        image = world.host.directory / "workload.img"
        image.write_bytes(bytes(SIZE))  # it outlives the backend's process
        return cls(await attach(target=str(image)), seed)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for lane in range(LANES):
                group.create_task(self._lane(lane))

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None or not self._client.alive:
                if self._client is not None:
                    self.cuts += 1
                await self.disk.leave()
                self._client = await asyncio.wait_for(self.disk.client(), DEADLINE)
            return self._client

    async def _lane(self, lane: int) -> None:
        while not self.stop.is_set():
            await self._one(lane)

    async def _one(self, lane: int) -> None:
        rng, model = self.random, self.model
        count = rng.choice([1, 1, 1, 2, 8, 24, 64])
        first = lane * LANE_BLOCKS + rng.randrange(LANE_BLOCKS - count + 1)
        kind = rng.choice([READ, READ, WRITE, WRITE, WRITE, FLUSH, TRIM])
        client = await self._connected()
        data = rng.randbytes(8) * (count * BLOCK // 8) if kind == WRITE else b""
        at, length = (0, 0) if kind == FLUSH else (first * BLOCK, count * BLOCK)
        fua = int(kind == WRITE and bool(client.flags & SEND_FLUSH) and rng.random() < 0.1)
        if kind in (FLUSH, TRIM) and not client.flags & SEND_FLUSH:
            return
        self.requests += 1
        try:
            got = await finished(client.start(kind, at, length, data, fua), DEADLINE)
        except (NbdError, ConnectionError) as error:
            self.errors += isinstance(error, NbdError)
            if kind == WRITE:
                model.wrote(first, data, sure=False)
            elif kind == TRIM:
                model.trimmed(first, count)
            return
        if kind == READ:
            model.read(first, got)
        elif kind == WRITE:
            model.wrote(first, data, sure=True)
        elif kind == TRIM:
            model.trimmed(first, count)

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.requests} requests, {self.errors} errors, "
            f"{self.cuts} reconnections of the client, "
            f"{self.model.acknowledged} writes acknowledged, {self.model.compared} blocks compared"
        )

    async def beside(self, trouble: Coroutine[Any, Any, None], told: object) -> None:
        """Works while `trouble` lasts, and then compares everything.

        Raises what either of them raises; then `told` is printed too, as it is by that time.
        """
        working, making = asyncio.create_task(self.run()), asyncio.create_task(trouble)
        try:
            await asyncio.wait({working, making}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():  # a lane that ends before `stop` has failed
                await working
            await making
            self.stop.set()
            await asyncio.wait_for(working, 2 * DEADLINE)
        except BaseException:
            print(f"until then: {self}; {told}")
            raise
        finally:
            for task in (working, making):
                task.cancel()
            await asyncio.gather(working, making, return_exceptions=True)
        await self.verify()

    async def verify(self) -> None:
        """Reads everything once more, with a backend that is honest."""
        client = await self._connected()
        for first in range(0, SIZE // BLOCK, 64):
            self.model.read(first, await client.read(first * BLOCK, 64 * BLOCK))
