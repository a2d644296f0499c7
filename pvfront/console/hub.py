# SPDX-License-Identifier: BSD-2-Clause
"""Who reads and who writes a console: its PTY, and any number of attached clients.

Theory of operation
    The worker has one end of a stream socket, we have the other. What comes from the backend is
    appended to the history (history.py), and every reader takes it from there at its own pace: the
    program that has the PTY open, and each client. Nothing is read from the stream while the
    slowest of them is a whole history behind: then the stream fills, then the ring, and the backend
    waits. A reader that takes nothing for `PATIENCE` seconds while others wait is none any more:
    clients are sent away, with a reason. The program on the PTY is waited for, for ever.

    While no program has the PTY open, what comes waits for one, a history full of it. If clients
    are attached they are not held up by that: the program then finds the last of it.

    One writes at a time: the program on the PTY, or the client that has taken its place. What the
    program writes meanwhile waits in the PTY.

    No byte is thrown away that was read: a chunk is read only when the one before is gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

from .history import SIZE, History
from .hotkeys import HotKeys
from .pty import Pty

log = logging.getLogger(__name__)

CHUNK = 4096
PATIENCE = 30.0
_BEHIND = SIZE - 1
"""How far the slowest may be behind: an escape byte that hot keys held back may still come."""


class Client:
    """An attached client: how far it has read, and whether it writes."""

    def __init__(self, who: str, position: int) -> None:
        self.who = who
        self.position = position
        self.news = asyncio.Event()
        self.sent_away = ""
        """Why it is to go."""


class Hub:
    """Of one console. `stream`: our end of the worker's; a non-blocking stream socket."""

    def __init__(
        self,
        name: str,
        stream: socket.socket,
        pty: Pty,
        history: History,
        *,
        changed: Callable[[], None] = lambda: None,
        keys: HotKeys | None = None,
        pressed: Callable[[str], None] = lambda key: None,
    ) -> None:
        self.name = name
        self.stream = stream
        self.pty = pty
        self.history = history
        self.changed = changed
        self.keys = keys
        self.pressed = pressed
        self.clients: list[Client] = []
        self.writer: Client | None = None
        self.pty_in_use = False
        self._unread = True
        """Whether the PTY may have something to be read: also of a program that has ended."""
        self._out = b""
        """Read from the writer, not yet taken by the stream."""
        self._room = asyncio.Event()
        """Set while nothing waits in `_out`."""
        self._room.set()
        self._closed = False
        stream.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pty.pollable, self._opened)
        self._look_at_pty()

    def close(self) -> None:
        """Lets go of everything but the descriptors, which are its maker's. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.changed = lambda: None
        for fd in (self.stream.fileno(), self.pty.master, self.pty.pollable):
            if fd >= 0:
                self._loop.remove_reader(fd)
                self._loop.remove_writer(fd)
        self._room.set()
        for client in self.clients:
            self._send_away(client, "the console is served no more")

    # -- from the backend ------------------------------------------------------------------------

    def _slowest(self) -> int:
        """Where the reader is that is waited for most."""
        waited_for = [client.position for client in self.clients]
        if self.pty_in_use or not waited_for:
            waited_for.append(self.history.taken)
        return min(waited_for)

    def _readable(self) -> None:
        room = _BEHIND - (self.history.end - self._slowest())
        try:
            data = self.stream.recv(min(CHUNK, room)) if room > 0 else b""
        except BlockingIOError:
            return
        except OSError as error:
            log.error("%s: the worker's stream: %s", self.name, error.strerror)
            data = b""
        if not data:
            self._loop.remove_reader(self.stream.fileno())
            return
        pressed: list[str] = []
        if self.keys is not None:
            data, pressed = self.keys.feed(data)
        self.history.append(data)
        self.spread()
        for key in pressed:
            self.pressed(key)

    def spread(self) -> None:
        """Gives readers what there is, as far as they take it, and reads on if there is room."""
        if self._closed:
            return
        self._give_pty()
        for client in self.clients:
            if client.position < self.history.end:
                client.news.set()
        if self.history.end - self._slowest() < _BEHIND:
            self._loop.add_reader(self.stream.fileno(), self._readable)
        else:
            self._loop.remove_reader(self.stream.fileno())

    def _give_pty(self) -> None:
        master = self.pty.master
        while self.pty_in_use and self.history.taken < self.history.end:
            if not self.pty.in_use:
                self._left()
                return
            data = self.history.read(self.history.taken, CHUNK)
            try:
                count = os.write(master, data)
            except BlockingIOError:
                count = 0
            if not count:
                self._loop.add_writer(master, self.spread)
                return
            self.history.take(self.history.taken + count)
        self._loop.remove_writer(master)

    # -- the program on the PTY ------------------------------------------------------------------

    def _opened(self) -> None:
        self.pty.drain()
        self._look_at_pty()

    def _look_at_pty(self) -> None:
        # Whoever opened it may have written, and closed it, before we look.
        self._unread = True
        self.pty_in_use = self.pty.in_use
        self._listen()
        self.spread()
        self.changed()

    def _listen(self) -> None:
        """The PTY is read while its program is the one that writes, and the stream takes it."""
        if self._unread and self.writer is None and not self._out and not self._closed:
            self._loop.add_reader(self.pty.master, self._written)
        elif self.pty.master >= 0:
            self._loop.remove_reader(self.pty.master)

    def _written(self) -> None:
        try:
            data = os.read(self.pty.master, CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:
                log.error("%s: %s: %s", self.name, self.pty.path, error.strerror)
            self._unread = self.pty.in_use  # another program has opened it just now
            self._listen()
            self._left()
            return
        self.send(data)

    def _left(self) -> None:
        """The last program has closed it: nothing is given to it any more."""
        if self.pty.in_use or not self.pty_in_use:
            return
        self.pty_in_use = False
        self._loop.remove_writer(self.pty.master)
        self.spread()
        self.changed()

    # -- to the backend --------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Sends, or keeps until the stream takes it: whoever writes waits for `room` then. Nothing
        once it is closed.
        """
        if self._closed:
            return
        self._out += data
        self._flush()

    async def room(self) -> None:
        """Returns when the stream has taken all that was sent, or will take no more."""
        await self._room.wait()

    def _flush(self) -> None:
        while self._out:
            try:
                self._out = self._out[self.stream.send(self._out) :]
            except BlockingIOError:
                break
            except OSError as error:
                log.error("%s: the worker's stream: %s", self.name, error.strerror)
                break
        if self._out:
            self._room.clear()
            self._loop.add_writer(self.stream.fileno(), self._flush)
        else:
            self._loop.remove_writer(self.stream.fileno())
            self._room.set()
        self._listen()

    # -- clients ---------------------------------------------------------------------------------

    @property
    def who_writes(self) -> str:
        """For people; "" if nobody does."""
        if self.writer is not None:
            return self.writer.who
        return "the program on its PTY" if self.pty_in_use else ""

    def join(self, client: Client) -> None:
        self.clients.append(client)
        self.spread()
        self.changed()

    def take_over(self, client: Client) -> None:
        """From now on it is the one that writes."""
        if self.writer is not None and self.writer is not client:
            self._send_away(self.writer, f"{client.who} writes now")
        self.writer = client
        self._listen()
        self.changed()

    def leave(self, client: Client) -> None:
        """Idempotent."""
        if client in self.clients:
            self.clients.remove(client)
        if self.writer is client:
            self.writer = None
        self._listen()
        self.spread()
        self.changed()

    def _send_away(self, client: Client, why: str) -> None:
        client.sent_away = why
        client.news.set()
