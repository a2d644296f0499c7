# SPDX-License-Identifier: BSD-2-Clause
"""Granted pages through /dev/xen/gntalloc: memory of ours that another domain may map.

Rules of the device (drivers/xen/gntalloc.c), which callers build on:

* It hands out zeroed pages of its own; existing memory cannot be granted.
* It never tells whether the other domain still maps a page. So a pool is granted for the whole
  life of a connection and freed when the other end has let go; pages are never freed and granted
  again in between.
* A page is freed by DEALLOC (or close) *and* munmap, whichever comes last. Pages that the other
  domain still maps then linger in the kernel, but no longer count against the module's limit.
"""

from __future__ import annotations

import errno
import mmap
import struct
import sys
from pathlib import Path
from typing import Self
from weakref import WeakSet

from pvfront.errors import ClosedError, PvfrontError
from pvfront.handle import PAGE_SIZE, DeviceHandle, check_domid

# _IOC(_IOC_NONE, 'G', nr, size) of xen/gntalloc.h
_ALLOC_GREF = 0x00184705
_DEALLOC_GREF = 0x00104706
_SET_UNMAP_NOTIFY = 0x00104707

_ALLOC = struct.Struct("=HHIQ")  # domid, flags, count, index; then one u32 per page
_ALLOC_SIZE = 24  # sizeof(struct ioctl_gntalloc_alloc_gref): the kernel copies all of it
_DEALLOC = struct.Struct("=QI4x")
_NOTIFY = struct.Struct("=QII")

_FLAG_WRITABLE = 1
_CLEAR_BYTE = 1
_SEND_EVENT = 2

LIMIT_PATH = "/sys/module/xen_gntalloc/parameters/limit"
"""The module's limit: pages that all processes together may have granted through it."""


class GrantsExhausted(PvfrontError):
    """No room for a pool. `limit` (pages; None: unknown), `wanted` and `held` say how far off.

    `held` counts the pages of this process only: the limit is shared by all processes, and the
    kernel has no counter to read. `where`: the file that holds the limit.
    """

    def __init__(
        self,
        *,
        wanted: int,
        held: int,
        limit: int | None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.wanted, self.held, self.limit = wanted, held, limit
        where = where or LIMIT_PATH
        super().__init__(
            f"no room for {wanted} granted pages: this process holds {held}, the limit for all "
            f"processes together ({where}) is {'unknown' if limit is None else limit}",
            hint=hint or _xen_hint(wanted + held, limit),
        )


class GrantAllocator(DeviceHandle):
    """One open /dev/xen/gntalloc. Closing it frees every pool of it that is not mapped.

    After `close` or `give`, its pools still tell their numbers, but every operation on them raises
    ClosedError.
    """

    MODULE = "xen-gntalloc"

    def __init__(self, fd: int, path: str = "/dev/xen/gntalloc") -> None:
        super().__init__(fd, path)
        self._held = 0
        _allocators.add(self)

    @classmethod
    def open(cls, path: str = "/dev/xen/gntalloc") -> Self:
        """Opens the device. Raises DeviceUnavailable (module not loaded, not root)."""
        return cls._open(path)

    @property
    def held(self) -> int:
        """Pages that are allocated through this handle and not freed."""
        return self._held

    def alloc(self, domid: int, pages: int, *, writable: bool = True) -> GrantPool:
        """Grants `pages` zeroed pages to domain `domid`, read-only for it unless `writable`.

        Raises GrantsExhausted (the module's limit, or Xen's own), OSError (ENOMEM), ValueError.
        """
        check_domid(domid)
        if not 0 < pages < 1 << 20:
            raise ValueError(f"a pool of {pages} pages is not possible")
        self.fileno()
        try:
            offset, grefs = self._alloc(domid, pages, writable)
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                raise self._exhausted(pages) from exc
            raise
        self._held += pages
        return GrantPool(self, offset, grefs)

    def hand_over(self) -> int:
        """The descriptor that gives all pools to another process (over SCM_RIGHTS); still ours.

        The new owner has the pages from then on: close this handle when it has the descriptor.
        """
        return self.fileno()

    def _forget(self) -> None:
        self._held = 0

    # What the device does; arguments have been checked.

    def _alloc(self, domid: int, pages: int, writable: bool) -> tuple[int, tuple[int, ...]]:
        """Offset and references. Raises OSError ENOSPC for any limit."""
        argument = bytearray(max(_ALLOC_SIZE, _ALLOC.size + 4 * pages))
        _ALLOC.pack_into(argument, 0, domid, _FLAG_WRITABLE if writable else 0, pages, 0)
        self._ioctl(_ALLOC_GREF, argument)
        grefs = struct.unpack_from(f"={pages}I", argument, _ALLOC.size)
        return _ALLOC.unpack_from(argument)[3], grefs

    def _dealloc(self, offset: int, pages: int) -> None:
        self._ioctl(_DEALLOC_GREF, _DEALLOC.pack(offset, pages))

    def _set_unmap_notify(self, offset: int, clear_byte: bool, port: int | None) -> None:
        action = (_CLEAR_BYTE if clear_byte else 0) | (0 if port is None else _SEND_EVENT)
        self._ioctl(_SET_UNMAP_NOTIFY, _NOTIFY.pack(offset, action, port or 0))

    def _memory(self) -> int:
        """The descriptor that the pools are mapped from."""
        return self.fileno()

    def _exhausted(self, wanted: int) -> GrantsExhausted:
        return GrantsExhausted(wanted=wanted, held=pages_held(), limit=grant_limit())


class GrantPool:
    """Pages granted to one domain: `grefs[i]` names page i.

    `offset` is where the pool begins in the allocator's descriptor, for mmap, in bytes.
    """

    def __init__(self, allocator: GrantAllocator, offset: int, grefs: tuple[int, ...]) -> None:
        self.offset = offset
        self.grefs = grefs
        self._allocator = allocator
        self._maps: list[mmap.mmap] = []
        self._freed = False

    @property
    def pages(self) -> int:
        return len(self.grefs)

    @property
    def size(self) -> int:
        """Bytes in the pool."""
        return len(self.grefs) * PAGE_SIZE

    def map(self) -> mmap.mmap:
        """Maps the whole pool, shared and writable; children made by fork do not inherit it.

        Before Python 3.13 a mapping keeps a duplicate of the descriptor open until it is closed:
        whoever gives the allocator away must not keep one, or the new owner is not the only holder.
        """
        self._check()
        fd = self._allocator._memory()
        if sys.version_info >= (3, 13):
            mapping = mmap.mmap(fd, self.size, offset=self.offset, trackfd=False)
        else:
            mapping = mmap.mmap(fd, self.size, offset=self.offset)
        self._maps.append(mapping)
        mapping.madvise(mmap.MADV_DONTFORK)
        return mapping

    def set_unmap_notify(self, page_offset: int, *, clear_byte: bool, port: int | None) -> None:
        """Says what the kernel does when a page is freed, a crash of this process included.

        page_offset: a byte of the pool, counted from its start; it names the page and, for
        `clear_byte`, the byte of it that becomes 0. port: a bound event channel that gets an
        event, or None. A later call for the same page replaces the former; neither takes it back.

        The kernel keeps `port` referenced, thus bound even after its unbind, until the page goes:
        free such pages before the domain suspends. Raises OSError EINVAL if `port` is not bound.
        """
        if not 0 <= page_offset < self.size:
            raise ValueError(f"byte {page_offset} is outside of a pool of {self.size} bytes")
        self._check()
        self._allocator._set_unmap_notify(self.offset + page_offset, clear_byte, port)

    def free(self) -> None:
        """Unmaps the pool and gives it back. Freeing twice is harmless.

        Only for when the other domain has let go of it (or will never map it again): its grants
        stay valid until it unmaps them. Raises BufferError, with nothing freed, if a memoryview of
        a mapping is still in use.
        """
        if self._freed:
            return
        self._check()
        while self._maps:
            self._maps[-1].close()
            self._maps.pop()
        self._allocator._dealloc(self.offset, self.pages)
        self._freed = True
        self._allocator._held -= self.pages

    def _check(self) -> None:
        self._allocator.fileno()
        if self._freed:
            raise ClosedError(f"{self._allocator.path}: grant pool used after it was freed")

    def __repr__(self) -> str:
        return f"<GrantPool {self.pages} pages at {self.offset:#x}{' freed' * self._freed}>"


_allocators: WeakSet[GrantAllocator] = WeakSet()


def pages_held() -> int:
    """Pages that this process has allocated and neither freed nor given away."""
    return sum(allocator.held for allocator in _allocators)


def _xen_hint(pages: int, limit: int | None) -> str:
    raised = raised_limit(pages)
    if limit is None or limit < raised:
        return f"raise the limit now: {how_to_raise(raised)}"
    return (
        f"other processes hold the rest (raise {LIMIT_PATH} further), or Xen's own limit "
        "is reached: max_grant_frames in the domain's xl configuration"
    )


def raised_limit(pages: int) -> int:
    """The limit to propose where `pages` do not fit."""
    return max(16384, 1 << pages.bit_length())


def how_to_raise(limit: int) -> str:
    """Commands. The file has a name of its own: pvfront.conf would replace the package's."""
    return (
        f"echo {limit} > {LIMIT_PATH}; and for every boot: "
        f"echo options xen-gntalloc limit={limit} > /etc/modprobe.d/xen-gntalloc.conf"
    )


def grant_limit() -> int | None:
    """The module's limit now; None if it is not loaded, or says something else."""
    try:
        return int(Path(LIMIT_PATH).read_text())
    except (OSError, ValueError):
        return None
