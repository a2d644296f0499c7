# SPDX-License-Identifier: BSD-2-Clause
"""An NBD server that has no disk: every request fails, at once.

For requests that the kernel's nbd keeps for a worker that will not come. While it waits for a
connection (wait_for_reconnect, drivers/block/nbd.c) neither a shorter time-out nor a disconnect
reaches it: all sockets being dead already, nothing marks the device as disconnected, and the
disconnect waits for a dispatch that waits for ten years. Nor does a resize end, which freezes the
queue (seen with 6.12). A connection does reach it.

Layout: the simple requests and replies of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct

_REQUEST = struct.Struct(">IHH8sQI")  # magic, flags, type, cookie, offset, length
_REPLY = struct.Struct(">II8s")  # magic, error, cookie
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_WRITE, _DISCONNECT = 1, 2
_CHUNK = 1 << 18


async def refuse(end: socket.socket) -> int:
    """Answers EIO to each request that comes through `end`, until it is closed at the other end.

    Returns how many there were. `end` stays the caller's.
    """
    end.setblocking(False)
    loop = asyncio.get_running_loop()
    waiting = bytearray()
    skip = refused = 0
    while data := await _receive(loop, end):
        waiting += data
        while True:
            gone = min(skip, len(waiting))
            skip -= gone
            del waiting[:gone]
            if skip or len(waiting) < _REQUEST.size:
                break
            magic, _, kind, cookie, _, length = _REQUEST.unpack_from(waiting)
            if magic != _REQUEST_MAGIC or kind == _DISCONNECT:
                return refused
            del waiting[: _REQUEST.size]
            skip = length if kind == _WRITE else 0
            refused += 1
            try:
                await loop.sock_sendall(end, _REPLY.pack(_REPLY_MAGIC, errno.EIO, cookie))
            except OSError:
                return refused
    return refused


async def _receive(loop: asyncio.AbstractEventLoop, end: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(end, _CHUNK)
    except OSError:
        return b""
