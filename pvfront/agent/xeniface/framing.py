# SPDX-License-Identifier: BSD-2-Clause
"""Large messages of D-Bus lose their bodies before anybody decodes them.

The bus carries messages of 32 MiB, from whoever likes to send one, and the library makes an object
of each value in them: many times that memory, in one go. What XENIFACE is sent fits into MOST
bytes. Of a larger message only the header is passed on, with a flag of ours in it, so that the call
can still be answered (`has_lost_its_body`). One whose header alone is larger is passed over, and
nobody is answered.

Message layout: https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol-messages
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any, cast

from dbus_fast import Message
from dbus_fast.aio import MessageBus

MOST = 1 << 16
"""Bytes of a message: values have 2 KiB, and the bus itself tells of a user's groups."""

_EMPTIED = 0x80
"""Of a header's flags one that means nothing: receivers ignore it, and we take it from senders."""
_FIXED = 16
"""Bytes of a header before its fields: with the lengths of the body and of the fields."""
_READS = 32
"""Of a turn: a large message must not keep the loop from everything else."""


def has_lost_its_body(message: Message) -> bool:
    return bool(message.flags & _EMPTIED)


class Framing:
    """The stream of messages, without the bodies of large ones. Pure: takes and gives bytes."""

    def __init__(self) -> None:
        self._fixed = b""
        self._keep = 0  # bytes to be passed on as they are
        self._drop = 0  # bytes to be left out, after those

    def feed(self, data: bytes) -> bytes:
        """What is to be passed on of the next bytes of the stream."""
        passed = bytearray()
        while data:
            if self._keep:
                passed += data[: self._keep]
                data, self._keep = data[self._keep :], max(0, self._keep - len(data))
            elif self._drop:
                data, self._drop = data[self._drop :], max(0, self._drop - len(data))
            else:
                missing = _FIXED - len(self._fixed)
                self._fixed += data[:missing]
                data = data[missing:]
                if len(self._fixed) == _FIXED:
                    passed += self._begin(self._fixed)
                    self._fixed = b""
        return bytes(passed)

    def _begin(self, fixed: bytes) -> bytes:
        """What to do with a message; its first bytes, as they are to be passed on."""
        order = ">" if fixed[:1] == b"B" else "<"
        flags = fixed[2] & ~_EMPTIED
        body, _, fields = struct.unpack_from(f"{order}III", fixed, 4)
        fields += -fields % 8
        if _FIXED + fields + body <= MOST:
            self._keep = fields + body
            return fixed[:2] + bytes([flags]) + fixed[3:]
        if _FIXED + fields <= MOST:
            self._keep, self._drop = fields, body
            return fixed[:2] + bytes([flags | _EMPTIED]) + fixed[3:4] + bytes(4) + fixed[8:]
        self._drop = fields + body
        return b""


class _FramedSocket:
    """A socket whose reader sees what Framing passes on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._framing = Framing()

    def recv(self, size: int) -> bytes:
        """Raises BlockingIOError: nothing now."""
        for _ in range(_READS):
            data = self._sock.recv(size)
            if not data or (passed := self._framing.feed(data)):
                return passed if data else b""
        raise BlockingIOError(errno.EAGAIN, "the loop's turn")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class FramedBus(MessageBus):
    """A connection to a bus on which no message is larger than MOST."""

    async def _authenticate(self) -> None:
        # What follows it on the socket are messages; the library has no other place to step in.
        await super()._authenticate()
        assert self._sock is not None
        self._sock = cast(socket.socket, _FramedSocket(self._sock))
