# SPDX-License-Identifier: BSD-2-Clause
"""What the domains of the embedded host hold: event channels, grants, arenas.

The hub's books, without its sockets: who may bind to a port, what a freed page sets off, when a
reference can be given out again. The shared memory itself is described in pvf_host.h; what it says
is never trusted here beyond the number of maps of a grant, because every mapper can write it.

A refusal is an OSError with the errno that the kernel's device gives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pvfront.handle import PAGE_SIZE
from pvfront.host._host import ffi, lib

GRANTS: int = lib.PVF_GRANTS
TABLE_BYTES = GRANTS * int(ffi.sizeof("struct pvf_grant"))
TRACK_BYTES = GRANTS * int(ffi.sizeof("uint32_t"))
CHANNEL_BYTES = 4096

FIRST_PORT = 3
"""Ports 1 and 2 are a domain's store and console."""

MAX_PORT = 1022
"""xl's default, max_event_channels = 1023, for a guest."""

MAX_PORT_DOM0 = 4095

MAX_ARENAS = 1 << 16


def shared_memory(name: str, size: int) -> int:
    """A memfd of `size` zero bytes that nobody can shrink, and that can take no further seal."""
    fd = os.memfd_create(f"pvfront-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # SEAL too: a seal against writing or growing would be somebody else's to add.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, size: int) -> Any:
    where = ffi.new("void **")
    error = lib.pvf_memfd_map(fd, size, True, where)
    if error:
        raise OSError(-error, os.strerror(-error))
    return where[0]


# -- event channels ----------------------------------------------------------------------------


class Channel:
    """One channel: its page, an eventfd for either side, and the port at either side."""

    def __init__(self) -> None:
        self.ends: list[Port | None] = [None, None]
        self.memory = shared_memory("channel", CHANNEL_BYTES)
        self.events: list[int] = []
        try:
            for _ in range(2):
                self.events.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self._page = ffi.cast("struct pvf_channel *", _map(self.memory, CHANNEL_BYTES))
        except BaseException:
            for fd in (self.memory, *self.events):
                os.close(fd)
            raise
        lib.pvf_channel_init(self._page)

    def fds(self, side: int) -> tuple[int, int, int]:
        """For the end at `side`: the page, its own eventfd, the other end's."""
        return self.memory, self.events[side], self.events[1 - side]

    def fire(self, side: int) -> None:
        """Sends an event to the end at `side`."""
        lib.pvf_channel_notify(self._page, 1 - side, self.events[side])

    def renew(self, side: int) -> None:
        """Nothing pending, nothing masked: a new port is here."""
        self._page.end[side].flags = 0

    def close(self) -> None:
        lib.pvf_channel_unmap(self._page)
        for fd in (self.memory, *self.events):
            os.close(fd)


@dataclass(eq=False)
class Port:
    """A bound port. `remote`: the domain at the other end, or that may bind to it."""

    domain: Domain
    number: int
    remote: int
    channel: Channel
    side: int
    pins: int = 0
    """Granted pages that will fire it: it stays bound until they are gone."""
    closing: bool = False

    @property
    def peer(self) -> Port | None:
        return self.channel.ends[1 - self.side]

    @property
    def fds(self) -> tuple[int, int, int]:
        return self.channel.fds(self.side)

    def notify(self) -> None:
        if self.peer is not None:
            self.channel.fire(1 - self.side)

    def unpin(self) -> None:
        self.pins -= 1
        if self.closing and not self.pins:
            self.close()

    def close(self) -> None:
        """Closes the port, now or when no granted page fires it any more."""
        self.closing = True
        if self.pins:
            return
        # As Xen does: an end that is left can be bound once more, by the same domain.
        self.channel.ends[self.side] = None
        del self.domain.ports[self.number]
        if self.peer is None:
            self.channel.close()


# -- grants ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Grant:
    """One page that a domain may map. `notify`: what its end sets off."""

    ref: int
    page: int
    arena: Arena
    notify: tuple[int, bool, Port | None] | None = None
    """Byte in the arena, whether it is cleared, port that fires."""


@dataclass(eq=False)
class Arena:
    """The pages of one open gntalloc. A page number is used once, so a page begins zeroed."""

    domain: Domain
    number: int
    fd: int
    owned: bool = True
    """Its gntalloc is open."""
    granted: dict[int, Grant] = field(default_factory=dict)
    """By page, what has not been freed."""
    alive: int = 0
    """Grants that have not ended: `granted` and those still mapped."""
    readers: set[object] = field(default_factory=set)
    """Connections that know the arena by its number: it is not given out again while they live."""
    pages: int = 0

    def drop_if_unused(self) -> None:
        if not self.owned and not self.alive and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.fd < 0 and not self.readers:
            self.domain.arenas.pop(self.number, None)

    def forget(self, pages: Sequence[int]) -> None:
        """Gives the memory of `pages` back to the machine."""
        if not pages or self.fd < 0 or (not self.owned and not self.alive):
            return  # all of it goes with the descriptor
        with (
            contextlib.suppress(OSError),  # no descriptor left for it: it goes with the arena
            mmap.mmap(self.fd, self.pages * PAGE_SIZE) as memory,
        ):
            for first, count in _runs(pages):
                memory.madvise(mmap.MADV_REMOVE, first * PAGE_SIZE, count * PAGE_SIZE)


def _runs(pages: Iterable[int]) -> Iterable[tuple[int, int]]:
    first = count = 0
    for page in sorted(pages):
        if count and page == first + count:
            count += 1
        else:
            if count:
                yield first, count
            first, count = page, 1
    if count:
        yield first, count


class Maptrack:
    """Where one mapper notes what it maps of one domain; mapped here from the start, so that taking
    the maps back needs nothing that could be used up.
    """

    def __init__(self, domid: int) -> None:
        self.fd = shared_memory(f"maptrack-{domid}", TRACK_BYTES)
        try:
            self.memory = mmap.mmap(self.fd, TRACK_BYTES)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


class Domain:
    """What one domain holds."""

    def __init__(self, domid: int) -> None:
        self.domid = domid
        self.ports: dict[int, Port] = {}
        self.arenas: dict[int, Arena] = {}
        self.pages = 0
        """Pages that count against gntalloc's limit."""
        self.deferred: list[Grant] = []
        """Freed, but still mapped."""
        self.table = shared_memory(f"grants-{domid}", TABLE_BYTES)
        self._table = ffi.cast("struct pvf_grant *", _map(self.table, TABLE_BYTES))
        # Oldest first, and in no order that a frontend could come to rely on.
        free = list(range(lib.PVF_GRANTS_RESERVED, GRANTS))
        random.shuffle(free)
        self._free = deque(free)
        self._next_arena = 0

    # ports

    def bind_unbound(self, remote: int) -> Port:
        number = self._free_port()
        port = Port(self, number, remote, Channel(), 0)
        port.channel.ends[0] = self.ports[number] = port
        return port

    def bind_interdomain(self, remote: Domain, remote_port: int) -> Port:
        other = remote.ports.get(remote_port)
        if other is None or other.closing or other.peer is not None or other.remote != self.domid:
            raise OSError(
                errno.EINVAL,
                f"domain {remote.domid} has no unbound port {remote_port} for domain {self.domid}",
            )
        number = self._free_port()
        side = 1 - other.side
        port = Port(self, number, remote.domid, other.channel, side)
        other.channel.renew(side)
        other.channel.ends[side] = self.ports[number] = port
        # As Xen does: what was sent while nobody was there may be lost.
        other.channel.fire(side)
        return port

    def port(self, number: int) -> Port:
        """A port that is bound. Raises OSError EINVAL."""
        port = self.ports.get(number)
        if port is None or port.closing:
            raise OSError(errno.EINVAL, f"port {number} is not bound")
        return port

    def _free_port(self) -> int:
        last = MAX_PORT if self.domid else MAX_PORT_DOM0
        for number in range(FIRST_PORT, last + 1):
            if number not in self.ports:
                return number
        raise OSError(errno.ENOSPC, f"domain {self.domid} has no event channel left")

    # grants

    def open_arena(self) -> Arena:
        for _ in range(MAX_ARENAS):
            number, self._next_arena = self._next_arena, (self._next_arena + 1) % MAX_ARENAS
            if number not in self.arenas:
                arena = Arena(self, number, shared_memory(f"arena-{self.domid}-{number}", 0))
                self.arenas[number] = arena
                return arena
        raise OSError(errno.ENOSPC, f"domain {self.domid} has no arena number left")

    def grant(
        self, arena: Arena, domid: int, pages: int, *, writable: bool, limit: int
    ) -> tuple[int, list[int]]:
        """Grants new pages; returns where they begin in the arena (bytes), and their references."""
        if self.pages + pages > limit:
            raise OSError(
                errno.ENOSPC,
                f"{pages} pages more than the {self.pages} there are go past the limit of {limit}",
            )
        if pages > len(self._free):
            raise OSError(errno.ENOSPC, f"domain {self.domid} has no grant reference left")
        first = arena.pages
        os.ftruncate(arena.fd, (first + pages) * PAGE_SIZE)
        arena.pages += pages
        refs = [self._free.popleft() for _ in range(pages)]
        for page, ref in enumerate(refs, first):
            arena.granted[page] = Grant(ref, page, arena)
            lib.pvf_grant_begin(self._table + ref, domid, arena.number, page, writable)
        arena.alive += pages
        self.pages += pages
        return first * PAGE_SIZE, refs

    def free(self, arena: Arena, pages: Sequence[int]) -> None:
        """Ends grants. Raises OSError EINVAL, with nothing freed, if one of them is not there."""
        if any(page not in arena.granted for page in pages):
            raise OSError(errno.EINVAL, "not all of these pages are granted")
        ended = []
        for page in pages:
            grant = arena.granted.pop(page)
            self.pages -= 1
            self._announce(grant)
            if self._end(grant):
                ended.append(page)
            else:
                self.deferred.append(grant)
        arena.forget(ended)
        arena.drop_if_unused()

    def close_arena(self, arena: Arena) -> None:
        """The gntalloc is closed: everything of it is freed."""
        arena.owned = False
        self.free(arena, list(arena.granted))

    def set_notify(self, arena: Arena, offset: int, *, clear: bool, port: int | None) -> None:
        """What happens when the page of byte `offset` is freed; instead of what was set before."""
        grant = arena.granted.get(offset // PAGE_SIZE)
        if grant is None:
            raise OSError(errno.EINVAL, f"no granted page at {offset}")
        pinned = None if port is None else self.port(port)
        if pinned is not None:
            pinned.pins += 1
        before, grant.notify = grant.notify, (offset, clear, pinned)
        if before is not None and before[2] is not None:
            before[2].unpin()

    def retry_deferred(self) -> None:
        """Ends the grants that have been unmapped since."""
        waiting, self.deferred = self.deferred, []
        ended: dict[Arena, list[int]] = {}
        for grant in waiting:
            if self._end(grant):
                ended.setdefault(grant.arena, []).append(grant.page)
            else:
                self.deferred.append(grant)
        for arena, pages in ended.items():
            arena.forget(pages)
            arena.drop_if_unused()

    def reclaim(self, track: Maptrack) -> int:
        """Takes the maps back that a mapper has noted in its maptrack; how many there were."""
        with ffi.from_buffer("uint32_t[]", track.memory) as noted:
            return int(lib.pvf_grant_reclaim(self._table, noted))

    def mapped(self, grant: Grant) -> int:
        """How many maps a grant has."""
        return int(lib.pvf_grant_maps(self._table + grant.ref))

    def _announce(self, grant: Grant) -> None:
        if grant.notify is None:
            return
        offset, clear, port = grant.notify
        if clear:
            with contextlib.suppress(OSError):  # out of memory
                os.pwrite(grant.arena.fd, b"\0", offset)
        if port is not None:
            port.notify()
            port.unpin()

    def _end(self, grant: Grant) -> bool:
        if lib.pvf_grant_end(self._table + grant.ref):
            return False
        grant.arena.alive -= 1
        self._free.append(grant.ref)
        return True
