# SPDX-License-Identifier: BSD-2-Clause
"""The device handles of a domain of the embedded host: event channels, grants, mapped grants.

They are the handles of evtchn.py, gntalloc.py and gntdev.py with the hub in the place of a device
node: the same methods, the same errors, the same rules. The descriptor of a handle is its
connection to the hub; whoever holds it holds the ports or the pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import mmap
import os
import select
import socket
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pvfront.errors import ClosedError, DeviceUnavailable
from pvfront.evtchn import EventChannels
from pvfront.gntalloc import GrantAllocator, GrantsExhausted, pages_held, raised_limit
from pvfront.gntdev import GrantMapper, GrantMapping
from pvfront.handle import PAGE_SIZE, DeviceHandle, check_domid
from pvfront.host._host import ffi, lib
from pvfront.platform import HOST_DOMID, HOST_VARIABLE

HUB_SECONDS = 60
"""The hub answers a request in microseconds. If it does not in this time, it never will."""

_ANSWER_MAX = 1 << 19
_PORTS_PER_CALL = 1024


class _HubHandle(DeviceHandle):
    """A handle whose descriptor is a connection to the hub."""

    _handed_over = False

    def _ask(self, do: str, **fields: object) -> tuple[dict[str, Any], list[int]]:
        """One request. Raises OSError as the hub gives it (ENOSPC, EINVAL, …)."""
        fd = self.fileno()
        if self._handed_over:
            raise ClosedError(f"{self.path}: used after it was handed over")
        return _ask(fd, {"do": do, **fields})

    def _offer(self, **fields: object) -> int:
        """Leaves the answer to `hand_over` in the connection, for its next owner."""
        fd = self.fileno()
        if self._handed_over:
            raise ClosedError(f"{self.path}: handed over twice")
        self._handed_over = True
        with _socket(fd) as sock:
            sock.send(_packet({"do": "hand_over", **fields}))
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(HUB_SECONDS * 1000):
            raise OSError(errno.ETIMEDOUT, "the embedded host's hub does not answer")
        return fd


def _open(path: str, device: str, domid: int) -> tuple[int, str, list[int]]:
    """A connection to the hub of the host at `path` ("": $PVFRONT_HOST), where it is, and the
    descriptors that came with it. Raises DeviceUnavailable.
    """
    directory = path or os.environ.get(HOST_VARIABLE, "")
    if not directory:
        raise DeviceUnavailable(
            device, errno.ENOENT, f"no embedded host is named: {HOST_VARIABLE} is not set"
        )
    where = os.fspath(Path(directory) / "hub.sock")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        timeout = struct.pack("@ll", HUB_SECONDS, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, timeout)
        sock.connect(where)
        _, fds = _ask(sock.fileno(), {"do": "open", "device": device, "domid": domid})
    except OSError as exc:
        sock.close()
        code = exc.errno or errno.EIO
        raise DeviceUnavailable(
            where,
            code,
            f"cannot open {device} at {where}: {errno.errorcode.get(code, code)} ({exc.strerror})",
            hint=f"start the embedded host: pvfront-host {directory}",
        ) from exc
    return sock.detach(), f"{where}:{device}", fds


@contextlib.contextmanager
def _socket(fd: int) -> Any:
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def _packet(request: dict[str, object]) -> bytes:
    return json.dumps(request, separators=(",", ":")).encode()


def _ask(fd: int, request: dict[str, object]) -> tuple[dict[str, Any], list[int]]:
    with _socket(fd) as sock:
        try:
            sock.send(_packet(request))
            data, fds, _, _ = socket.recv_fds(sock, _ANSWER_MAX, 3)
        except BlockingIOError:
            # Its answer may come yet, and would be taken for another's.
            sock.shutdown(socket.SHUT_RDWR)
            raise OSError(errno.ETIMEDOUT, "the embedded host's hub does not answer") from None
        except ConnectionError:
            data, fds = b"", []
    if not data:
        raise OSError(errno.ENODEV, "the embedded host's hub is gone")
    for received in fds:
        os.set_inheritable(received, False)
    answer = json.loads(data)
    if not answer["ok"]:
        # The text as everywhere: who knows the device's errors knows these.
        code = getattr(errno, answer["errno"])
        raise OSError(code, f"{os.strerror(code)}: {answer['text']}")
    return answer, fds


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


# -- event channels ----------------------------------------------------------------------------


@dataclass(slots=True)
class _End:
    """Our end of a channel."""

    channel: Any
    side: int
    own: int
    other: int

    def close(self) -> None:
        lib.pvf_channel_unmap(self.channel)
        os.close(self.own)
        os.close(self.other)


class EmbeddedEventChannels(_HubHandle, EventChannels):
    """`EventChannels` of a domain of the embedded host."""

    MODULE = "evtchn"

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self._ends: dict[int, _End] = {}
        self._by_event: dict[int, int] = {}
        self._epoll = select.epoll()
        self._overflow = False

    @classmethod
    def open(cls, path: str = "", *, domid: int = HOST_DOMID) -> Self:
        """Opens it. path: the host's directory, or $PVFRONT_HOST. Raises DeviceUnavailable."""
        fd, where, _ = _open(path, cls.MODULE, check_domid(domid))
        return cls(fd, where)

    def hand_over(self, port: int) -> int:
        """The descriptor that gives `port` to another process (over SCM_RIGHTS); still ours.

        What its next owner needs waits to be read from it (docs/host.md). This handle can only be
        closed from then on. Raises OSError.
        """
        return self._offer(port=self._mine(port))

    def pollable(self) -> int:
        self.fileno()
        return self._epoll.fileno()

    def inject_overflow(self) -> None:
        """As if the kernel's ring of pending ports had overflowed, which nothing here can make it
        do: what is pending is lost, and `read` raises EventOverflow until `reset`.
        """
        self.fileno()
        self._take()
        self._overflow = True

    def _forget(self) -> None:
        super()._forget()
        for end in self._ends.values():
            end.close()
        self._ends.clear()
        self._by_event.clear()
        self._epoll.close()

    def _bind_unbound(self, remote_domid: int) -> int:
        return self._join(*self._ask("bind_unbound", remote=remote_domid))

    def _bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        return self._join(
            *self._ask("bind_interdomain", remote=remote_domid, remote_port=remote_port)
        )

    def _notify(self, port: int) -> None:
        end = self._ends[port]
        _check(lib.pvf_channel_notify(end.channel, end.side, end.other))

    def _unmask(self, ports: Sequence[int]) -> None:
        for port in ports:
            end = self._ends[port]
            _check(lib.pvf_channel_unmask(end.channel, end.side, end.own))

    def _unbind(self, port: int) -> None:
        self._ask("unbind", port=port)
        end = self._ends.pop(port)
        del self._by_event[end.own]
        self._epoll.unregister(end.own)
        end.close()

    def _take(self) -> list[int]:
        if self._overflow:
            raise OSError(errno.EFBIG, "overflow")
        fired = []
        for event, _ in self._epoll.poll(0, _PORTS_PER_CALL):
            port = self._by_event[event]
            end = self._ends[port]
            if _check(lib.pvf_channel_take(end.channel, end.side, end.own)):
                fired.append(port)
        return fired

    def _reset(self) -> None:
        self._overflow = False

    def _join(self, answer: dict[str, Any], fds: list[int]) -> int:
        port: int = answer["port"]
        memory, own, other = fds
        channel = ffi.new("struct pvf_channel **")
        try:
            _check(lib.pvf_channel_map(memory, channel))
        except OSError:
            os.close(own)
            os.close(other)
            raise
        finally:
            os.close(memory)
        self._ends[port] = _End(channel[0], answer["side"], own, other)
        self._by_event[own] = port
        self._epoll.register(own, select.EPOLLIN)
        return port


# -- grants ------------------------------------------------------------------------------------


class EmbeddedGrantAllocator(_HubHandle, GrantAllocator):
    """`GrantAllocator` of a domain of the embedded host."""

    MODULE = "gntalloc"

    def __init__(self, fd: int, path: str, arena: int) -> None:
        super().__init__(fd, path)
        self._arena = arena

    @classmethod
    def open(cls, path: str = "", *, domid: int = HOST_DOMID) -> Self:
        """Opens it. path: the host's directory, or $PVFRONT_HOST. Raises DeviceUnavailable."""
        fd, where, fds = _open(path, cls.MODULE, check_domid(domid))
        return cls(fd, where, fds[0])

    def hand_over(self) -> int:
        """The descriptor that gives all pools to another process (over SCM_RIGHTS); still ours.

        What its next owner needs waits to be read from it (docs/host.md). This handle can only be
        closed from then on. Raises OSError.
        """
        return self._offer()

    def _forget(self) -> None:
        super()._forget()
        os.close(self._arena)

    def _alloc(self, domid: int, pages: int, writable: bool) -> tuple[int, tuple[int, ...]]:
        if pages > lib.PVF_GRANTS:
            raise OSError(errno.ENOSPC, "more pages than a domain has references")
        answer, _ = self._ask("alloc", domid=domid, pages=pages, writable=writable)
        return answer["offset"], tuple(answer["grefs"])

    def _dealloc(self, offset: int, pages: int) -> None:
        self._ask("free", offset=offset, pages=pages)

    def _set_unmap_notify(self, offset: int, clear_byte: bool, port: int | None) -> None:
        self._ask("unmap_notify", offset=offset, clear_byte=clear_byte, port=port)

    def _memory(self) -> int:
        self.fileno()
        return self._arena

    def _exhausted(self, wanted: int) -> GrantsExhausted:
        where = Path(self.path).with_name("limits.json")
        held = pages_held()
        limit = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            limit = int(json.loads(where.read_bytes())["gntalloc"])
        raised = raised_limit(wanted + held)
        if limit is None or limit < raised:
            hint = f"""raise the limit now: echo '{{"gntalloc": {raised}}}' > {where}"""
        else:
            hint = f"other processes hold the rest, or all references are in use (see {where})"
        return GrantsExhausted(
            wanted=wanted, held=held, limit=limit, where=os.fspath(where), hint=hint
        )


_PROT_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)


class EmbeddedGrantMapper(_HubHandle, GrantMapper):
    """`GrantMapper` of a domain of the embedded host. It may map its own grants, as a PV domain.

    As with the kernel's, pages that are mapped stay mapped over `close`, until they are unmapped.
    """

    MODULE = "gntdev"

    def __init__(self, fd: int, path: str, *, own_domid: int) -> None:
        super().__init__(fd, path, refused=None)
        self._own_domid = own_domid
        self._tables: dict[int, Any] = {}
        self._mappings: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._kept = -1

    @classmethod
    def open(cls, path: str = "", *, own_domid: int = HOST_DOMID) -> Self:
        """Opens it. path: the host's directory, or $PVFRONT_HOST. Raises DeviceUnavailable."""
        fd, where, _ = _open(path, cls.MODULE, check_domid(own_domid))
        return cls(fd, where, own_domid=own_domid)

    def close(self) -> None:
        if self._mappings and not self.closed:
            # The connection's end would take the maps back.
            self._kept, self._fd = self._fd, -1
        else:
            super().close()

    def _forget(self) -> None:
        super()._forget()
        self._drop_tables()

    def _drop_tables(self) -> None:
        for table in self._tables.values():
            lib.pvf_mapper_close(table)
        self._tables.clear()

    def _table(self, domid: int) -> Any:
        found = self._tables.get(domid)
        if found is None:
            _, (table, track) = self._ask("domain", domid=domid)
            found = ffi.new("struct pvf_mapper *")
            try:
                _check(lib.pvf_mapper_open(found, table, track, self._own_domid, ffi.NULL, 0))
            finally:
                os.close(table)
                os.close(track)
            self._tables[domid] = found
        return found

    def _map(self, domid: int, grefs: Sequence[int], writable: bool) -> tuple[int, mmap.mmap]:
        table = self._table(domid)
        pinned: list[int] = []
        try:
            for gref in grefs:
                _check(
                    lib.pvf_grant_map(table.table, table.maptrack, self._own_domid, gref, writable)
                )
                pinned.append(gref)
            memory = self._pages(domid, table, grefs, writable)
        except BaseException:
            self._unpin(table, pinned)
            raise
        number = next(self._numbers)
        # A mapping that is forgotten ends with its memory, as with the kernel's.
        release = weakref.finalize(memory, self._release, number, table, pinned)
        release.atexit = False
        self._mappings[number] = release
        return number, memory

    def _unmap(self, mapping: GrantMapping) -> None:
        release = self._mappings.get(mapping.offset)
        if release is not None:  # else the memory is gone, and took it along
            release()

    def _release(self, number: int, table: Any, grefs: Sequence[int]) -> None:
        self._unpin(table, grefs)
        del self._mappings[number]
        if self._kept >= 0 and not self._mappings:
            self._drop_tables()
            kept, self._kept = self._kept, -1
            os.close(kept)

    @staticmethod
    def _unpin(table: Any, grefs: Sequence[int]) -> None:
        for gref in grefs:
            lib.pvf_grant_unmap(table.table, table.maptrack, gref)

    def _pages(self, domid: int, table: Any, grefs: Sequence[int], writable: bool) -> mmap.mmap:
        """One range of all pages. The grants are pinned: their entries stand still."""
        protection = _PROT_WRITABLE if writable else mmap.PROT_READ
        memory = mmap.mmap(-1, len(grefs) * PAGE_SIZE, prot=protection)
        arenas: dict[int, int] = {}
        try:
            base = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
            for index, gref in enumerate(grefs):
                number, page = table.table[gref].arena, table.table[gref].page
                if number not in arenas:
                    _, (arenas[number],) = self._ask("arena", domid=domid, arena=number)
                _map_page(base + index * PAGE_SIZE, arenas[number], page, protection)
        except BaseException:
            memory.close()
            raise
        finally:
            for fd in arenas.values():
                os.close(fd)
        return memory


def _map_page(where: int, arena: int, page: int, protection: int) -> None:
    # The arena may be somebody else's lie; past its end an access would be a SIGBUS.
    _check(lib.pvf_memfd_check(arena, (page + 1) * PAGE_SIZE))
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(where, PAGE_SIZE, protection, flags, arena, page * PAGE_SIZE) != where:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
