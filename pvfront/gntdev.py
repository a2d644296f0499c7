# SPDX-License-Identifier: BSD-2-Clause
"""Mapping pages that another domain granted, through /dev/xen/gntdev.

The frontends never need it (they grant, backends map); tests and our own peers do.

**Only a PV domain may map its own grants.** In a translated one (HVM, PVH) a frame of the domain's
own has one guest address only: mapping it elsewhere makes Xen remove the original one
(guest_physmap_add_entry in xen/arch/x86/mm/p2m.c), and nothing puts it back. The page under the
grant is then a hole, the kernel hands the hole out again, as a page table for instance, and
crashes. So the mapper knows which domain it is in, and refuses.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pvfront.errors import ClosedError, PvfrontError
from pvfront.handle import PAGE_SIZE, DeviceHandle, check_domid

# _IOC(_IOC_NONE, 'G', nr, size) of xen/gntdev.h
_MAP_GRANT_REF = 0x00184700
_UNMAP_GRANT_REF = 0x00104701

_MAP = struct.Struct("=I4xQ")  # count, index; then (domid, ref) per page
_GRANT = struct.Struct("=II")
_UNMAP = struct.Struct("=QI4x")


GUEST_TYPE_PATH = "/sys/hypervisor/guest_type"


class GrantMapError(PvfrontError):
    """Grants could not be mapped: not granted to this domain, read-only, or taken back."""


class GrantMapper(DeviceHandle):
    """One open /dev/xen/gntdev. Grants stay mapped until their mapping is unmapped."""

    MODULE = "xen-gntdev"

    def __init__(self, fd: int, path: str = "/dev/xen/gntdev", *, refused: int | None) -> None:
        super().__init__(fd, path)
        self._refused = refused
        """The domain whose grants must not be mapped here: this one, unless it is PV."""

    @classmethod
    def open(cls, path: str = "/dev/xen/gntdev", *, own_domid: int) -> Self:
        """Opens the device. Raises DeviceUnavailable (module not loaded, not root).

        own_domid: this domain's id (`domid` in the store), to refuse what would crash its kernel.
        """
        return cls(cls._open_fd(path), path, refused=None if _is_pv() else check_domid(own_domid))

    def map(self, domid: int, grefs: Sequence[int], *, writable: bool = True) -> GrantMapping:
        """Maps the pages that `domid` granted as `grefs`, one after the other.

        Raises GrantMapError if one of them cannot be mapped (then none is), or if they are this
        domain's own and it is not PV; ValueError.
        """
        check_domid(domid)
        if domid == self._refused:
            raise GrantMapError(
                f"domain {domid} is this one and not PV: mapping its own grants would take the "
                "pages away from its kernel"
            )
        if not grefs:
            raise ValueError("no grant references to map")
        self.fileno()
        try:
            offset, memory = self._map(domid, grefs, writable)
        except OSError as exc:
            what = f"{len(grefs)} grants of domain {domid} (first reference {grefs[0]})"
            raise _map_error(what, exc) from exc
        memory.madvise(mmap.MADV_DONTFORK)
        return GrantMapping(self, offset, domid, tuple(grefs), memory)

    # What the device does; arguments have been checked.

    def _map(self, domid: int, grefs: Sequence[int], writable: bool) -> tuple[int, mmap.mmap]:
        """Where the device has the pages, and the pages. Raises OSError, with nothing mapped."""
        argument = bytearray(_MAP.pack(len(grefs), 0))
        for gref in grefs:
            argument += _GRANT.pack(domid, gref)
        self._ioctl(_MAP_GRANT_REF, argument)
        offset = _MAP.unpack_from(argument)[1]
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        size = len(grefs) * PAGE_SIZE
        try:
            if sys.version_info >= (3, 13):
                memory = mmap.mmap(
                    self.fileno(), size, prot=protection, offset=offset, trackfd=False
                )
            else:
                memory = mmap.mmap(self.fileno(), size, prot=protection, offset=offset)
        except OSError:
            self._ioctl(_UNMAP_GRANT_REF, _UNMAP.pack(offset, len(grefs)))
            raise
        return offset, memory

    def _unmap(self, mapping: GrantMapping) -> None:
        """The memory of `mapping` is gone."""
        if not self.closed:
            self._ioctl(_UNMAP_GRANT_REF, _UNMAP.pack(mapping.offset, len(mapping.grefs)))


class GrantMapping:
    """Grants of domain `domid` mapped here; `memory` holds their pages in the order of `grefs`."""

    def __init__(
        self,
        mapper: GrantMapper,
        offset: int,
        domid: int,
        grefs: tuple[int, ...],
        memory: mmap.mmap,
    ) -> None:
        self.offset = offset
        self.domid = domid
        self.grefs = grefs
        self._mapper = mapper
        self._memory: mmap.mmap | None = memory

    @property
    def memory(self) -> mmap.mmap:
        """The mapped pages. Raises ClosedError after `unmap`."""
        if self._memory is None:
            raise ClosedError(f"{self._mapper.path}: grant mapping used after it was unmapped")
        return self._memory

    def unmap(self) -> None:
        """Lets go of the pages. Twice is harmless, and it works after the mapper's close too.

        Raises BufferError, with nothing unmapped, if a memoryview of `memory` is still in use.
        """
        if self._memory is None:
            return
        self._memory.close()
        self._memory = None
        self._mapper._unmap(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unmap()


def _is_pv() -> bool:
    # Anything unclear counts as translated: the mistake on that side costs a refusal, no crash.
    try:
        return Path(GUEST_TYPE_PATH).read_text().strip() == "PV"
    except OSError:
        return False


def _map_error(what: str, exc: OSError) -> GrantMapError:
    code = exc.errno or errno.EIO
    name = errno.errorcode.get(code, str(code))
    return GrantMapError(f"cannot map {what}: {name} ({os.strerror(code)})")
