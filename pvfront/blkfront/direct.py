# SPDX-License-Identifier: BSD-2-Clause
"""A disk for this process alone: no block device, no other process on the data path.

    async with DirectDisk.open("xvdb") as disk:
        await disk.write(0, b"x" * 4096)
        await disk.flush()
        assert await disk.read(0, 4096) == b"x" * 4096

The library of docs/direct.md in this process, with the supervisor of `pvfront vbd lend` beside it
as tasks of the running event loop: the loop must go on running, because a suspend, an unplug and a
backend that comes back are its business. `disk.handle` with `lib` is for who wants to poll in a
thread of his own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pvfront.blkfront._direct import ffi, lib

from ..config import PerDevice
from ..device import Phase
from ..errors import PvfrontError
from ..platform import Platform, platform
from ..worker import Worker
from ..xenbus import Bus
from .lend import LentDisks, pair, supervisor
from .service import find
from .settings import DiskSettings
from .vdev import vdev_name

__all__ = ["DirectDisk", "Info", "ffi", "lib"]

CONNECT_DEADLINE = 60.0
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Info:
    """struct pvf_disk_info."""

    size: int  # bytes
    sector_size: int  # bytes
    read_only: bool
    flush: bool
    discard: bool
    discard_granularity: int  # bytes
    discard_alignment: int  # bytes
    ready: bool  # a backend is connected; else requests wait for one
    generation: int  # connections to a backend so far
    pending: int  # requests not completed


class _OwnWorker(Worker):
    """This process as a worker: it is not killed, it loses the disk."""

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class _Here:
    """`lend.Borrower`: this process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sock, theirs = pair()
        self.closed = False
        self.handle = _open(theirs)

    async def worker(self, name: str, label: str) -> Worker:
        return await _OwnWorker.over(name, self._sock.dup())

    def left(self, label: str) -> bool:
        return True  # the library has ended, and is not started twice

    def in_use(self, label: str) -> str | None:
        return None if self.closed else f"open in process {os.getpid()}"

    def close(self) -> None:
        self.closed = True
        self._sock.close()


class DirectDisk:
    """An open disk; made by `open`. Every method raises OSError with the request's errno."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._cookies = itertools.count()
        self._waiting: dict[int, tuple[asyncio.Future[int], Any]] = {}
        self._room = asyncio.Semaphore(lib.PVF_DISK_DEPTH)
        self._done = ffi.new("struct pvf_disk_done[]", _BATCH)
        self._loop = asyncio.get_running_loop()
        self._soon = False
        self._loop.add_reader(lib.pvf_disk_fd(handle), self._service)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        name: str,
        on: Platform | None = None,
        *,
        force: bool = False,
        settings: PerDevice[DiskSettings] | None = None,
        deadline: float = CONNECT_DEADLINE,
    ) -> AsyncIterator[DirectDisk]:
        """Takes the disk, gives it back at the end.

        Raises PvfrontError: there is no such disk, it is in use, its backend does not connect.
        """
        on = on or platform()
        on.require()
        store = await on.store()
        try:
            devid = find(name, await Bus(store, "vbd").ids())
            here = _Here(vdev_name(devid))
            disks = LentDisks(on, here, expected=1, settings=settings)
            serving = supervisor(store, disks, [devid], force=force)
            task = asyncio.create_task(serving.run(signals=False), name=f"supervisor of {name}")
            try:
                await _connected(serving, devid, task, deadline)
                disk = cls(here.handle)
                try:
                    yield disk
                finally:
                    disk._close()
            finally:
                here.closed = True
                serving.stop()
                try:
                    await asyncio.shield(task)
                finally:
                    here.close()
                    await disks.hooks.close()
                    await asyncio.to_thread(lib.pvf_disk_close, here.handle)
        finally:
            await store.close()

    @property
    def info(self) -> Info:
        found = ffi.new("struct pvf_disk_info *")
        lib.pvf_disk_get_info(self.handle, found)
        return Info(
            size=found.size,
            sector_size=found.sector_size,
            read_only=bool(found.flags & lib.PVF_DISK_READ_ONLY),
            flush=bool(found.flags & lib.PVF_DISK_FLUSH),
            discard=bool(found.flags & lib.PVF_DISK_DISCARD),
            discard_granularity=found.discard_granularity,
            discard_alignment=found.discard_alignment,
            ready=found.state == lib.PVF_DISK_READY,
            generation=found.generation,
            pending=found.pending,
        )

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes; both are multiples of the sector size."""
        buffer = ffi.new("char[]", max(length, 1))
        await self._do(
            lambda cookie: lib.pvf_disk_read(self.handle, buffer, length, offset, cookie), buffer
        )
        return bytes(ffi.buffer(buffer, length))

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """`fua`: on stable storage when this returns."""
        kept = bytes(data)
        buffer = ffi.from_buffer(kept)
        iov = ffi.new("struct iovec *", {"iov_base": buffer, "iov_len": len(kept)})
        flags = lib.PVF_DISK_FUA if fua else 0
        await self._do(
            lambda cookie: lib.pvf_disk_writev(self.handle, iov, 1, offset, flags, cookie),
            (kept, buffer),
        )

    async def flush(self) -> None:
        """Writes that were done before are on stable storage when this returns."""
        await self._do(lambda cookie: lib.pvf_disk_flush(self.handle, cookie))

    async def discard(self, offset: int, length: int) -> None:
        """Advice; at most 1 GiB."""
        await self._do(lambda cookie: lib.pvf_disk_discard(self.handle, length, offset, cookie))

    # -- requests ----------------------------------------------------------------------------------

    async def _do(self, ask: Any, kept: Any = None) -> None:
        """`kept` lives until the request has completed, also if nobody waits for it any more."""
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("a DirectDisk is used in the event loop that opened it")
        await self._room.acquire()
        cookie = next(self._cookies)
        error = ask(cookie) if self.handle is not None else -errno.EBADF
        if error:
            self._room.release()
            raise OSError(-error, os.strerror(-error))
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting[cookie] = future, kept
        if not self._soon:  # all that are asked in this turn of the loop go together
            self._soon = True
            self._loop.call_soon(self._service)
        result = await future
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _service(self) -> None:
        self._soon = False
        if self.handle is None:
            return
        while True:
            count = lib.pvf_disk_poll(self.handle, self._done, _BATCH)
            for done in self._done[0:count]:
                future, _ = self._waiting.pop(done.cookie)
                self._room.release()
                if not future.done():
                    future.set_result(done.result)
            if count < _BATCH and not lib.pvf_disk_arm(self.handle):
                return

    def _close(self) -> None:
        self._loop.remove_reader(lib.pvf_disk_fd(self.handle))
        self.handle = None
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_result(-errno.ECANCELED)


def _open(theirs: socket.socket) -> Any:
    found = ffi.new("struct pvf_disk **")
    fd = theirs.detach()
    error = lib.pvf_disk_open_fd(fd, found)
    if error:
        raise PvfrontError(f"the disk library cannot start: {os.strerror(-error)}")
    return found[0]


async def _connected(serving: Any, devid: int, task: asyncio.Task[int], deadline: float) -> None:
    """Waits for the first connection. Raises what ended the supervisor, or why it takes so long."""

    async def wait() -> None:
        while devid not in serving.served:  # noqa: ASYNC110 - at most a moment, and nobody tells
            await asyncio.sleep(0.02)
        await serving.served[devid].loop.until_phase(Phase.CONNECTED, timeout=deadline)

    waiting = asyncio.create_task(wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        task.result()
        raise PvfrontError("the disk was taken away before it was connected")
    waiting.result()
