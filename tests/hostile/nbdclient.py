# SPDX-License-Identifier: BSD-2-Clause
"""An NBD client for the tests: any number of requests at a time, and it never waits for ever.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: newstyle handshake with GO, then
simple replies. It knows when a server is out of step, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

from waiting import PATIENCE

READ, WRITE, DISC, FLUSH, TRIM = range(5)
FUA = 1
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM = 1, 2, 4, 8, 32
EIO, EINVAL, ENOSPC, ENOTSUP = 5, 22, 28, 95

_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_GO, _ACK, _INFO = 7, 1, 3


class NbdError(Exception):
    """The server answered a request with an error number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"NBD error {number}")
        self.number = number


class OutOfStep(AssertionError):
    """What came is no reply to anything that was asked."""


class Refused(ConnectionError):
    """The server does not want to talk now."""


class Client:
    """A connection in transmission. Requests raise NbdError, ConnectionError, AssertionError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.size = 0
        self.flags = 0
        self._reader, self._writer = reader, writer
        self._next = 0
        self._waiting: dict[int, tuple[asyncio.Future[bytes], int]] = {}
        self._ended: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path) -> Client:
        async with asyncio.timeout(PATIENCE):
            client = cls(*await asyncio.open_unix_connection(path))
            try:
                await client._handshake()
            except BaseException as error:
                client._writer.close()
                if isinstance(error, asyncio.IncompleteReadError):
                    raise Refused("the server ended the handshake") from error
                raise
        client._task = asyncio.create_task(client._replies())
        return client

    async def _handshake(self) -> None:
        magic = await self._reader.readexactly(18)
        assert magic[:16] == b"NBDMAGICIHAVEOPT", magic
        self._writer.write(struct.pack(">I", 3) + _OPTION.pack(b"IHAVEOPT", _GO, 6) + bytes(6))
        while True:
            reply = await self._reader.readexactly(_REPLY.size)
            _, option, kind, length = _REPLY.unpack(reply)
            data = await self._reader.readexactly(length)
            assert option == _GO
            if kind == _ACK:
                return
            if kind != _INFO:
                raise Refused(data.decode(errors="replace"))
            if data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack_from(">QH", data, 2)

    # -- requests ----------------------------------------------------------------------------

    def start(
        self, kind: int, at: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> asyncio.Future[bytes]:
        """Sends a request; the future is its reply's payload, or its error."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Somebody may look at it much later, or not at all.
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        if self._ended is not None:
            future.set_exception(ConnectionResetError(str(self._ended)))
            return future
        self._next += 1
        self._waiting[self._next] = future, length if kind == READ else 0
        self._writer.write(_REQUEST.pack(0x25609513, flags, kind, self._next, at, length) + data)
        return future

    async def read(self, at: int, length: int) -> bytes:
        return await finished(self.start(READ, at, length))

    async def write(self, at: int, data: bytes, *, fua: bool = False) -> None:
        await finished(self.start(WRITE, at, len(data), data, FUA if fua else 0))

    async def flush(self) -> None:
        await finished(self.start(FLUSH))

    async def trim(self, at: int, length: int) -> None:
        await finished(self.start(TRIM, at, length))

    @property
    def alive(self) -> bool:
        return self._ended is None

    async def gone(self) -> None:
        """Waits until the server has ended the connection."""
        assert self._task is not None
        await asyncio.wait_for(asyncio.shield(self._task), PATIENCE)

    async def close(self) -> None:
        """Leaves at once, whatever is in flight."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _replies(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(_SIMPLE.size)
                magic, error, handle = _SIMPLE.unpack(header)
                if magic != 0x67446698 or handle not in self._waiting:
                    raise OutOfStep(f"no reply to anything: {header.hex()}")
                future, length = self._waiting[handle]
                # Only a reply without an error has a payload.
                data = await self._reader.readexactly(0 if error else length)
                del self._waiting[handle]
                if future.cancelled():
                    continue
                if error:
                    future.set_exception(NbdError(error))
                else:
                    future.set_result(data)
        except (OSError, asyncio.IncompleteReadError, OutOfStep) as error:
            self._end(error)
        except asyncio.CancelledError:
            self._end(ConnectionAbortedError("closed by the test"))
            raise

    def _end(self, why: BaseException) -> None:
        self._ended = why
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(
                    why if isinstance(why, OutOfStep) else ConnectionResetError(str(why))
                )
        self._waiting.clear()


async def finished(reply: asyncio.Future[bytes], seconds: float = PATIENCE) -> bytes:
    """The reply; fails where a request hangs."""
    done, _ = await asyncio.wait({reply}, timeout=seconds)
    assert done, f"a request had neither reply nor error within {seconds:g} s"
    return reply.result()


async def outcome(reply: asyncio.Future[bytes], seconds: float = PATIENCE) -> bytes | Exception:
    """The reply, or the error that it came to (NbdError or ConnectionError)."""
    try:
        return await finished(reply, seconds)
    except (NbdError, ConnectionError) as error:
        return error
