# SPDX-License-Identifier: BSD-2-Clause
"""The backend's end of a vif's control ring, and what Xen would give to open one.

Written against Xen's io/netif.h and io/ring.h, sharing no code with the frontend. `Peer` answers as
Linux's netback does (drivers/net/xen-netback/hash.c), and, as netif.h has it and Linux has not,
keeps pages mapped. Tests make it lie through `lie`.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pvfront.gntalloc import GrantsExhausted

PAGE = 4096
SLOT, SLOTS = 16, 128
REQUEST = struct.Struct("<HH3I")
RESPONSE = struct.Struct("<HHII")
GREF = struct.Struct("<IHH")

OK, NOT_SUPPORTED, INVALID, OVERFLOW = range(4)
(GET_FLAGS, SET_FLAGS, SET_KEY, GET_TABLE_SIZE, SET_TABLE_SIZE, SET_TABLE, SET_ALGORITHM,
 GET_GREF_SIZE, ADD_GREF, DEL_GREF) = range(1, 11)  # fmt: skip
READ_ONLY = 1


@dataclass
class Asked:
    """A request, as the backend copied it."""

    id: int
    kind: int
    data: tuple[int, int, int]


@dataclass
class Peer:
    """`refuses`: types that are not supported. `greferences`: how many it keeps of each queue."""

    queues: int = 2
    greferences: int = 0
    refuses: set[int] = field(default_factory=set)
    lie: Callable[[Asked, tuple[int, int, int, int]], list[tuple[int, int, int, int]]] | None = None
    mute: bool = False
    asked: list[Asked] = field(default_factory=list)
    algorithm: int = 0
    flags: int = 0
    key: bytes = b""
    table: list[int] = field(default_factory=list)
    kinds: int = 15
    most_entries: int = 128
    mapped: dict[int, dict[int, int]] = field(default_factory=dict)
    keeps: set[int] = field(default_factory=set)
    """References that it does not unmap when asked."""
    pages: dict[int, Any] = field(default_factory=dict)
    """What was granted to it, by reference."""
    _ring: Any = None
    _requests: int = 0
    _responses: int = 0

    def names(self) -> list[int]:
        return [one.kind for one in self.asked]

    def serve(self, ring: Any) -> bool:
        """Answers what is in the ring. True: the frontend wants an event."""
        if ring is not self._ring:  # another connection
            self._ring, self._requests, self._responses = ring, 0, 0
            self.algorithm = self.flags = 0
            self.key, self.table = b"", []
            self.mapped.clear()
        before = self._responses
        (produced,) = struct.unpack_from("<I", ring, 0)
        while self._requests != produced:
            at = 64 + self._requests % SLOTS * SLOT
            number, kind, *data = REQUEST.unpack_from(ring, at)
            request = Asked(number, kind, (data[0], data[1], data[2]))
            self.asked.append(request)
            self._requests += 1
            struct.pack_into("<I", ring, 4, self._requests + 1)
            if self.mute:
                continue
            status, value = self._answer(request)
            honest = (number, kind, status, value)
            for response in [honest] if self.lie is None else self.lie(request, honest):
                RESPONSE.pack_into(ring, 64 + self._responses % SLOTS * SLOT, *response)
                self._responses += 1
        self.publish(ring)
        (event,) = struct.unpack_from("<I", ring, 12)
        return (self._responses - event) & 0xFFFFFFFF < (self._responses - before) & 0xFFFFFFFF

    def publish(self, ring: Any, off: int = 0) -> None:
        struct.pack_into("<I", ring, 8, (self._responses + off) & 0xFFFFFFFF)

    def _answer(self, request: Asked) -> tuple[int, int]:
        first, second, third = request.data
        if request.kind in self.refuses:
            return NOT_SUPPORTED, 0
        match request.kind:
            case 7:
                self.algorithm = first
                return OK if first in (0, 1) else INVALID, 0
            case 1:
                return (OK, self.kinds) if self.algorithm else (NOT_SUPPORTED, 0)
            case 2:
                if first & ~self.kinds or not self.algorithm:
                    return INVALID, 0
                self.flags = first
                return OK, 0
            case 3:
                if second > 40:
                    return INVALID, 0
                self.key = bytes(self.pages[first][:second])
                return OK, 0
            case 4:
                return OK, self.most_entries
            case 5:
                if first > self.most_entries:
                    return INVALID, 0
                self.table = [0] * first
                return OK, 0
            case 6:
                if third + second > len(self.table):
                    return INVALID, 0
                part = struct.unpack_from(f"<{second}I", self.pages[first])
                if any(queue >= self.queues for queue in part):
                    return INVALID, 0
                self.table[third : third + second] = part
                return OK, 0
            case 8 if self.greferences and first < self.queues:
                return OK, self.greferences
            case 9 | 10 if self.greferences and third * GREF.size <= PAGE:
                return self._map(request.kind == 9, first, self.pages[second], third)
        return NOT_SUPPORTED, 0

    def _map(self, add: bool, queue: int, page: Any, count: int) -> tuple[int, int]:
        mine = self.mapped.setdefault(queue, {})
        entries = [GREF.unpack_from(page, GREF.size * index) for index in range(count)]
        if add:
            if len(mine) + count > self.greferences or any(ref in mine for ref, _, _ in entries):
                return INVALID, 0
            mine.update((ref, flags) for ref, flags, _ in entries)
            return OK, 0
        gone = 0
        for index, (ref, flags, _) in enumerate(entries):
            fits = ref in mine and ref not in self.keeps
            if fits:
                del mine[ref]
                gone += 1
            GREF.pack_into(page, GREF.size * index, ref, flags, OK if fits else INVALID)
        return OK, gone


class Guest:
    """What Xen gives to a guest: ports and pages, counted, so that a leak is seen.

    `pages_left`, `ports_left`: None, no end. `peer` has the other side of a control ring.
    """

    def __init__(self, peer: Peer | None = None) -> None:
        self.peer = peer
        self.pages_left: int | None = None
        self.ports_left: int | None = None
        self.handles: list[Channels | Allocator] = []
        self.pages: dict[int, Any] = {}
        self.step: Callable[[str], None] = lambda what: None
        """Told of each step before it is done; may raise."""
        self._numbers = 0

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def event_channels(self) -> Any:
        self.step("open evtchn")
        return Channels(self)

    def grant_allocator(self) -> Any:
        self.step("open gntalloc")
        return Allocator(self)

    @property
    def open(self) -> list[str]:
        """What is neither closed nor given away."""
        return [str(handle) for handle in self.handles if not handle.closed]

    @property
    def granted(self) -> int:
        return sum(handle.held for handle in self.handles if isinstance(handle, Allocator))

    @property
    def bound(self) -> list[int]:
        return sorted(
            port
            for handle in self.handles
            if isinstance(handle, Channels) and not handle.closed
            for port in handle.ports
        )


class _Handle:
    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.closed = False
        self.given = False
        guest.handles.append(self)  # type: ignore[arg-type]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return type(self).__name__

    def close(self) -> None:
        self.closed = True


class Channels(_Handle):
    """`EventChannels` with a control ring's backend behind its port, if there is one."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.ports: list[int] = []
        self.masked = False
        self.pending = False
        self.storm = self.deaf = False
        self.unmasked = 0
        self._fired = asyncio.Event()

    def bind_unbound(self, domid: int) -> int:
        self.guest.step("bind")
        if self.guest.ports_left == len(self.guest.bound):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.ports.append(100 + self.guest.number())
        return self.ports[-1]

    def hand_over(self, port: int) -> int:
        assert port in self.ports
        self.given = True
        return 1000 + port

    def notify(self, port: int) -> None:
        self.guest.step("notify")
        assert port in self.ports
        assert not self.closed
        peer, allocator = self.guest.peer, self.guest.handles[-1]
        assert isinstance(allocator, Allocator)
        if peer is not None:
            peer.pages = self.guest.pages
            if peer.serve(allocator.first):
                self.fire()

    def fire(self) -> None:
        self.pending = not self.deaf
        if self.pending and not self.masked:
            self._fired.set()

    def unmask(self, port: int) -> None:
        assert port in self.ports
        self.unmasked += 1
        self.masked = False
        if self.storm:
            self.pending = True
        if self.pending:
            self._fired.set()

    async def wait(self) -> list[int]:
        await self._fired.wait()
        self._fired.clear()
        self.pending, self.masked = False, True
        return self.ports

    def give(self) -> int:
        self.closed = self.given = True
        return 1000 + self.ports[0]


class Allocator(_Handle):
    """`GrantAllocator`."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.pools: list[Pool] = []

    @property
    def held(self) -> int:
        return 0 if self.closed else sum(pool.pages for pool in self.pools if not pool.freed)

    @property
    def first(self) -> Any:
        return self.pools[0].mapping

    def hand_over(self) -> int:
        self.given = True
        return 2000

    def alloc(self, domid: int, pages: int, *, writable: bool = True) -> Any:
        self.guest.step("alloc")
        left = self.guest.pages_left
        if left is not None and self.guest.granted + pages > left:
            raise GrantsExhausted(wanted=pages, held=self.guest.granted, limit=left)
        offset = sum(pool.pages for pool in self.pools) * PAGE
        self.pools.append(Pool(self, pages, offset, writable))
        return self.pools[-1]


class Pool:
    """`GrantPool`."""

    def __init__(self, owner: Allocator, pages: int, offset: int, writable: bool) -> None:
        self.owner, self.pages, self.offset, self.writable = owner, pages, offset, writable
        self.grefs = tuple(5000 + owner.guest.number() for _ in range(pages))
        self.freed = False
        self.mapping: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        self.owner.guest.step("map")
        self.mapping = mmap.mmap(-1, self.pages * PAGE)
        self.owner.guest.pages[self.grefs[0]] = self.mapping
        return self.mapping

    def free(self) -> None:
        if self.mapping is not None:
            self.mapping.close()  # BufferError: somebody still looks at it
            self.mapping = None
        self.freed = True
