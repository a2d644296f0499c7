# SPDX-License-Identifier: BSD-2-Clause
"""A small block frontend for the tests of the backend: the walk, the ring and the pages, by hand.

Nothing of ours speaks on the ring or in the store's walk: layouts are those of xen/io/blkif.h and
io/ring.h for x86_64, the keys those of blkif.h. Only the handles of event channels and grants are
ours: they are what a kernel gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from waiting import PATIENCE

from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.host.handles import EmbeddedEventChannels, EmbeddedGrantAllocator

PAGE = 4096
SECTOR = 512
VBD = 51728
SPEC = "format=raw,vdev=xvdb,access=rw,target=memory:8M"

INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(1, 7)
READ, WRITE, BARRIER, FLUSH, RESERVED, DISCARD, INDIRECT = range(7)
OKAY, ERROR, EOPNOTSUPP = 0, -1, -2

REQUEST = struct.Struct("<BBHxxxxQQ")  # operation, nr_segments, handle, id, sector_number
SEGMENT = struct.Struct("<IBBxx")
DISCARD_REQUEST = struct.Struct("<BBHxxxxQQQ")
INDIRECT_REQUEST = struct.Struct("<BBHxxxxQQHxxI")
RESPONSE = struct.Struct("<QBxhxxxx")
SLOT = 112
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT, SLOTS = 0, 1, 2, 3, 64  # words; bytes
MASK = 0xFFFFFFFF

Segment = tuple[int, int, int]
"""Data page, first and last sector."""


class Ring:
    """One queue: a shared ring, its event channel and what was sent."""

    def __init__(self, frontend: Frontend, order: int) -> None:
        self.frontend = frontend
        pages = 1 << order
        self.pool = frontend.grants.alloc(0, pages)
        self.memory = self.pool.map()
        self.words = memoryview(self.memory).cast("I")
        self.slots = 1 << (((pages * PAGE - SLOTS) // SLOT).bit_length() - 1)
        self.words[REQ_EVENT] = self.words[RSP_EVENT] = 1
        self.req_prod = self.rsp_cons = 0
        self.port = frontend.events.bind_unbound(0)

    def put(self, request: bytes) -> None:
        at = SLOTS + SLOT * (self.req_prod % self.slots)
        self.memory[at : at + len(request)] = request
        self.req_prod = (self.req_prod + 1) & MASK

    def push(self) -> None:
        self.words[REQ_PROD] = self.req_prod
        self.frontend.events.notify(self.port)

    def take(self) -> tuple[int, int, int] | None:
        """The next response (id, operation, status), or None."""
        if self.words[RSP_PROD] == self.rsp_cons:
            self.words[RSP_EVENT] = (self.rsp_cons + 1) & MASK
            if self.words[RSP_PROD] == self.rsp_cons:
                return None
        at = SLOTS + SLOT * (self.rsp_cons % self.slots)
        self.rsp_cons = (self.rsp_cons + 1) & MASK
        ident, op, status = RESPONSE.unpack_from(self.memory, at)
        return ident, op, status

    def close(self) -> None:
        self.words.release()
        with contextlib.suppress(BufferError):
            self.memory.close()


class Frontend:
    """The frontend of one disk of domain 1. `data` holds `pages` granted pages."""

    def __init__(self, host: Host, vdev: int = VBD, pages: int = 300) -> None:
        self.host = host
        self.store = host.store
        self.path = f"/local/domain/1/device/vbd/{vdev}"
        self.back = f"/local/domain/0/backend/vbd/1/{vdev}"
        self.pages = pages
        self.next_id = 0
        self.rings: list[Ring] = []
        self._open()

    def _open(self) -> None:
        directory = str(self.host.directory)
        self.events = EmbeddedEventChannels.open(directory, domid=1)
        self.grants = EmbeddedGrantAllocator.open(directory, domid=1)
        self.pool = self.grants.alloc(0, self.pages)
        self.data: mmap.mmap = self.pool.map()

    def drop(self) -> None:
        """As after a crash: everything goes but the states in the store."""
        for ring in self.rings:
            ring.close()
        self.rings = []
        self.data.close()
        self.grants.close()
        self.events.close()

    # -- the walk --------------------------------------------------------------------------------

    async def read(self, key: str) -> str | None:
        return await self.store.read_opt(f"{self.back}/{key}")

    async def keys(self) -> dict[str, str]:
        """The backend's directory."""
        found = {}
        for name in await self.store.directory(self.back):
            found[name] = await self.store.read_opt(f"{self.back}/{name}") or ""
        return found

    async def say(self, state: int) -> None:
        await self.store.write(f"{self.path}/state", str(state))

    async def backend_is(self, *states: int | None) -> int | None:
        """Waits for one of these states; None: no state at all."""
        wanted = [None if state is None else str(state) for state in states]
        found: str | None = ""
        async with self.store.watch(f"{self.back}/state") as watch:
            try:
                async with asyncio.timeout(PATIENCE):
                    async for _ in watch:
                        found = await self.read("state")
                        if found in wanted:
                            return None if found is None else int(found)
            except TimeoutError:
                pass
        error = await self.store.read_opt(
            f"/local/domain/0/error/backend/vbd/1/{self.back.rpartition('/')[2]}/error"
        )
        raise AssertionError(f"the backend never came to {states}: it is {found}, error {error}")

    async def connect(
        self,
        *,
        order: int | None = None,
        queues: int = 1,
        persistent: bool = False,
        keys: dict[str, str] | None = None,
    ) -> None:
        """From InitWait to Connected. order None: `ring-ref` without an order, as the oldest."""
        await self.backend_is(INIT_WAIT)
        await self.publish(order=order, queues=queues, persistent=persistent, keys=keys)
        await self.backend_is(CONNECTED)
        await self.say(CONNECTED)

    async def publish(
        self,
        *,
        order: int | None = None,
        queues: int = 1,
        persistent: bool = False,
        keys: dict[str, str] | None = None,
    ) -> None:
        self.rings = [Ring(self, order or 0) for _ in range(queues)]
        said = {"protocol": "x86_64-abi", "feature-persistent": str(int(persistent))}
        if order is not None:
            said["ring-page-order"] = str(order)
        if queues > 1:
            said["multi-queue-num-queues"] = str(queues)
        for number, ring in enumerate(self.rings):
            where = f"queue-{number}/" if queues > 1 else ""
            said[f"{where}event-channel"] = str(ring.port)
            for page, gref in enumerate(ring.pool.grefs):
                said[f"{where}ring-ref" + ("" if order is None else str(page))] = str(gref)
        for key, value in (said | (keys or {})).items():
            if value:
                await self.store.write(f"{self.path}/{key}", value)
        await self.say(INITIALISED)

    async def disconnect(self) -> None:
        """Closing, Closed; the rings go. What was published goes too."""
        # A backend that is Closed would answer nothing, and a Closed of ours that it never saw for
        # what came after it would be missed: it waits for one, as the kernel's does.
        if await self.read("state") != str(CLOSED):
            await self.say(CLOSING)
            await self.backend_is(CLOSING, CLOSED)
            await self.say(CLOSED)
            await self.backend_is(CLOSED)
        self.drop()
        for name in await self.store.directory(self.path):
            if name.startswith(("ring-", "event-", "queue-", "multi-", "feature-", "protocol")):
                await self.store.remove(f"{self.path}/{name}")
        self._open()

    async def reconnect(self, **how: Any) -> None:
        await self.disconnect()
        await self.say(INITIALISING)
        await self.connect(**how)

    # -- requests --------------------------------------------------------------------------------

    def put(
        self, op: int, sector: int = 0, segments: list[Segment] | None = None, *, queue: int = 0
    ) -> int:
        """Writes a request into the ring; `push` sends it. Returns its id."""
        self.next_id += 1
        segments = segments or []
        request = REQUEST.pack(op, len(segments), 0, self.next_id, sector)
        for page, first, last in segments:
            request += SEGMENT.pack(self.pool.grefs[page], first, last)
        self.rings[queue].put(request)
        return self.next_id

    def put_discard(self, sector: int, sectors: int) -> int:
        self.next_id += 1
        self.rings[0].put(DISCARD_REQUEST.pack(DISCARD, 0, 0, self.next_id, sector, sectors))
        return self.next_id

    def put_indirect(self, op: int, sector: int, segments: list[Segment], *, table: int) -> int:
        self.next_id += 1
        for number, (page, first, last) in enumerate(segments):
            SEGMENT.pack_into(
                self.data, table * PAGE + 8 * number, self.pool.grefs[page], first, last
            )
        self.rings[0].put(
            INDIRECT_REQUEST.pack(
                INDIRECT, op, len(segments), self.next_id, sector, 0, self.pool.grefs[table]
            )
        )
        return self.next_id

    def push(self, queue: int = 0) -> None:
        self.rings[queue].push()

    async def response(self, *, queue: int = 0, timeout: float = PATIENCE) -> tuple[int, int, int]:
        """The next response: id, operation, status. Raises TimeoutError."""
        ring = self.rings[queue]
        async with asyncio.timeout(timeout):
            while (found := ring.take()) is None:
                self.events.unmask(*await self.events.wait())
        return found

    async def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes."""
        try:
            await self.response(timeout=seconds)
        except TimeoutError:
            return True
        return False

    async def do(self, op: int, sector: int = 0, segments: list[Segment] | None = None) -> int:
        """One request and its status; the response must be its own."""
        ident = self.put(op, sector, segments)
        self.push()
        found, operation, status = await self.response()
        assert (found, operation) == (ident, op)
        return status

    async def write(self, sector: int, payload: bytes, page: int = 0) -> int:
        """Writes whole pages (at most 11) through data pages from `page` on."""
        self.data[page * PAGE : page * PAGE + len(payload)] = payload
        return await self.do(WRITE, sector, whole(page, len(payload) // PAGE))

    async def read_back(self, sector: int, pages: int, page: int = 20) -> bytes:
        """Reads whole pages (at most 11)."""
        self.data[page * PAGE : (page + pages) * PAGE] = b"\xee" * (pages * PAGE)
        assert await self.do(READ, sector, whole(page, pages)) == OKAY
        return self.data[page * PAGE : (page + pages) * PAGE]


def whole(page: int, pages: int) -> list[Segment]:
    return [(page + i, 0, 7) for i in range(pages)]


def pattern(seed: int, pages: int) -> bytes:
    """Pages of which each 8 bytes are different."""
    return b"".join(((seed << 32) + i).to_bytes(8, "little") for i in range(pages * PAGE // 8))


@asynccontextmanager
async def disk(
    spec: str = SPEC, *, start: bool = True, **features: Any
) -> AsyncIterator[tuple[Host, BlkBackend, Frontend]]:
    """A host with one disk, its backend, and a frontend that has not begun its walk."""
    async with await Host.start() as host:
        await host.create_domain()
        await host.attach_disk(1, spec)
        async with await BlkBackend.start(host, **features) as backend:
            frontend = Frontend(host)
            try:
                yield host, backend, frontend
            finally:
                frontend.drop()
