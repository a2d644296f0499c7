# SPDX-License-Identifier: BSD-2-Clause
"""A backend for one worker's queue: event channel, granted pages, and a disk in memory.

The event channel and the pages are handed over as the embedded host's hub does (docs/host.md). The
backend is written against Xen's headers (io/ring.h, io/blkif.h) and shares no code with the
frontend's ring. It is honest and serves a disk in memory; tests make it hostile by overriding
`answer` or `respond`, or by writing into the shared page directly.

Layout of the arena: one guard page, the ring, the pool. Grant references are deliberately not page
numbers.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from waiting import PATIENCE

from pvfront.host import _host

PAGE = 4096
SECTOR = 512

# io/blkif.h
READ, WRITE, FLUSH, DISCARD = 0, 1, 3, 5
OKAY, ERROR, EOPNOTSUPP = 0, -1, -2
# x86_64: operation, nr_segments, handle, id, sector_number, then 11 of gref, first, last
REQUEST = struct.Struct("<BBHxxxxQQ")
SEGMENT = struct.Struct("<IBBxx")
NR_SECTORS = struct.Struct("<Q")
RESPONSE = struct.Struct("<QBxhxxxx")
SLOT = 112
# io/ring.h: req_prod, req_event, rsp_prod, rsp_event, then 48 bytes
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT, SLOTS = 0, 4, 8, 12, 64
MASK = 0xFFFFFFFF


def sealed(name: str, size: int, *, seal: bool = True) -> int:
    """A memfd as the hub makes them: nobody can shrink it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def hand_over(kind: int, fds: list[int], **fields: int) -> tuple[socket.socket, socket.socket]:
    """A connection to the hub in which a `struct pvf_host_packet` waits: both its ends."""
    hub, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packet = _host.ffi.new(
        "struct pvf_host_packet *", {"magic": _host.lib.PVF_HOST_MAGIC, "kind": kind, **fields}
    )
    socket.send_fds(hub, [bytes(_host.ffi.buffer(packet))], fds)
    return hub, theirs


class Port:
    """One event channel. End 0 is the worker's, end 1 the backend's."""

    PENDING, MASKED = _host.lib.PVF_CHANNEL_PENDING, _host.lib.PVF_CHANNEL_MASKED

    def __init__(self, number: int = 5) -> None:
        self.fd = sealed("channel", PAGE)
        self._map = mmap.mmap(self.fd, PAGE)
        self._channel = _host.ffi.from_buffer("struct pvf_channel *", self._map)
        _host.lib.pvf_channel_init(self._channel)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.worker_fd, self.backend_fd = os.eventfd(0, flags), os.eventfd(0, flags)
        # Readable at its end: nobody holds the worker's side any more.
        self.hub, self.theirs = hand_over(
            _host.lib.PVF_HOST_EVENT, [self.fd, self.worker_fd, self.backend_fd], port=number
        )

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_flags(self) -> int:
        """PENDING and MASKED of the worker's end."""
        return int(self._channel.end[0].flags)

    @worker_flags.setter
    def worker_flags(self, value: int) -> None:
        self._channel.end[0].flags = value

    def notify(self) -> None:
        assert _host.lib.pvf_channel_notify(self._channel, 1, self.worker_fd) == 0

    def take(self) -> bool:
        return bool(_host.lib.pvf_channel_take(self._channel, 1, self.backend_fd))

    def unmask(self) -> None:
        assert _host.lib.pvf_channel_unmask(self._channel, 1, self.backend_fd) == 0

    def close(self) -> None:
        if self.fd < 0:
            return
        _host.ffi.release(self._channel)
        self._map.close()
        for fd in (self.fd, self.worker_fd, self.backend_fd):
            os.close(fd)
        self.fd = -1
        self.hub.close()
        self.theirs.close()


@dataclass
class Request:
    """One blkif request as the backend copied it. `segments`: (gref, first, last) sectors."""

    op: int
    id: int
    sector: int
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    sectors: int = 0


class Pages:
    """What the frontend has granted."""

    def __init__(self, ring_pages: int, pool_pages: int) -> None:
        self.ring_offset = PAGE
        self.ring_pages = ring_pages
        self.pool_offset = PAGE * (1 + ring_pages)
        self.pool_pages = pool_pages
        size = self.pool_offset + PAGE * pool_pages
        self.fd = sealed("grants", size)
        self.hub: socket.socket | None = None
        self.map = mmap.mmap(self.fd, size)
        # Indices are read and written as whole words: struct.pack_into clears its target first,
        # and a frontend would see an index of 0.
        self._words = memoryview(self.map).cast("I")
        self.grefs = [7000 + 3 * i for i in range(pool_pages)]
        self._page = {gref: i for i, gref in enumerate(self.grefs)}

    def hand_over(self) -> socket.socket:
        """A new connection to the hub, with the arena waiting in it."""
        if self.hub is not None:
            self.hub.close()
        self.hub, theirs = hand_over(_host.lib.PVF_HOST_PAGES, [self.fd])
        return theirs

    def of(self, gref: int) -> int:
        """Offset of a granted page; KeyError: the frontend named a gref it never granted."""
        return self.pool_offset + PAGE * self._page[gref]

    def get(self, field_: int) -> int:
        return self._words[(self.ring_offset + field_) // 4]

    def set(self, field_: int, value: int) -> None:
        self._words[(self.ring_offset + field_) // 4] = value & MASK

    def pool(self) -> bytes:
        return self.map[self.pool_offset :]

    def close(self) -> None:
        self._words.release()
        self.map.close()
        os.close(self.fd)
        if self.hub is not None:
            self.hub.close()


class Backend(threading.Thread):
    """An honest disk in memory behind an event channel. Ends when nobody holds the other end."""

    def __init__(self, pages: Pages, port: Port, disk: bytearray) -> None:
        super().__init__(daemon=True)
        self.pages = pages
        self.port = port
        self.disk = disk
        slots = (pages.ring_pages * PAGE - SLOTS) // SLOT
        self.slots = 1 << (slots.bit_length() - 1)
        self.req_cons = 0
        self.rsp_prod = 0
        self.hold = False  # take requests, answer none until released
        self.held: list[Request] = []
        self.log: list[Request] = []  # every request taken
        self.overrun = False
        self.notified = 0  # events that were delivered to us
        self.mute = False  # answer without an event
        self.problem: BaseException | None = None
        self._ending = threading.Event()
        self.lock = threading.RLock()

    # -- events ----------------------------------------------------------------------------------

    def event(self) -> None:
        """One event for the frontend."""
        with self.lock:
            self.port.notify()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                readable, _, _ = select.select([self.port.backend_fd, self.port.hub], [], [])
                if self.port.take():
                    with self.lock:
                        self.notified += 1
                        self.work()
                    self.port.unmask()
                elif self.port.hub in readable:
                    return
        except BaseException as error:
            self.problem = error

    def stop(self) -> None:
        """Ends the thread and closes the port; raises what went wrong in it."""
        self._ending.set()
        if self.is_alive():
            os.eventfd_write(self.port.backend_fd, 1)
            self.join(PATIENCE)
            assert not self.is_alive()
        self.port.close()
        if self.problem is not None:
            raise self.problem

    # -- the ring --------------------------------------------------------------------------------

    def work(self) -> None:
        while True:
            producer = self.pages.get(REQ_PROD)
            while self.req_cons != producer:
                assert (producer - self.rsp_prod) & MASK <= self.slots, "ring overrun"
                request = self.take()
                self.log.append(request)
                if self.hold:
                    self.held.append(request)
                else:
                    self.answer(request)
            self.pages.set(REQ_EVENT, self.req_cons + 1)
            if self.pages.get(REQ_PROD) == self.req_cons:
                return

    def take(self) -> Request:
        at = self.pages.ring_offset + SLOTS + SLOT * (self.req_cons % self.slots)
        raw = bytes(self.pages.map[at : at + SLOT])
        self.req_cons = (self.req_cons + 1) & MASK
        op, count, _handle, ident, sector = REQUEST.unpack_from(raw)
        if op == DISCARD:
            (sectors,) = NR_SECTORS.unpack_from(raw, REQUEST.size)
            return Request(op, ident, sector, [], sectors)
        assert count <= 11
        segments = [SEGMENT.unpack_from(raw, REQUEST.size + SEGMENT.size * i) for i in range(count)]
        return Request(op, ident, sector, segments)

    def answer(self, request: Request) -> None:
        self.respond(request.id, request.op, self.execute(request))

    def execute(self, request: Request) -> int:
        """What an honest disk does; returns BLKIF_RSP_*."""
        if request.op == FLUSH:
            return OKAY
        at = request.sector * SECTOR
        if request.op == DISCARD:
            length = request.sectors * SECTOR
            assert at + length <= len(self.disk)
            self.disk[at : at + length] = bytes(length)
            return OKAY
        assert 1 <= len(request.segments) <= 11
        assert len({gref for gref, _, _ in request.segments}) == len(request.segments)
        for gref, first, last in request.segments:
            assert first <= last < PAGE // SECTOR
            page = self.pages.of(gref) + first * SECTOR
            length = (last - first + 1) * SECTOR
            assert at + length <= len(self.disk), "beyond the disk"
            if request.op == WRITE:
                self.disk[at : at + length] = self.pages.map[page : page + length]
            else:
                self.pages.map[page : page + length] = bytes(self.disk[at : at + length])
            at += length
        return OKAY

    def respond(self, ident: int, op: int, status: int) -> None:
        at = self.pages.ring_offset + SLOTS + SLOT * (self.rsp_prod % self.slots)
        RESPONSE.pack_into(self.pages.map, at, ident, op, status)
        old, self.rsp_prod = self.rsp_prod, (self.rsp_prod + 1) & MASK
        self.pages.set(RSP_PROD, self.rsp_prod)
        wanted = self.pages.get(RSP_EVENT)
        if (self.rsp_prod - wanted) & MASK < (self.rsp_prod - old) & MASK and not self.mute:
            self.event()

    def release(self, order: Callable[[list[Request]], list[Request]] = list) -> None:
        """Answers what was held, in the order that `order` gives."""
        with self.lock:
            self.hold = False
            held, self.held = self.held, []
            for request in order(held):
                self.answer(request)
