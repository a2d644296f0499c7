# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront console channel`: the guest's end of a channel for files and commands.

Dom0's end, and the frames, are pvfront_channel.py. Nothing is offered but what is said: files
below one directory, to be read or also written; programs of one directory, as run-parts(8) takes
them. One thing at a time; Hello ends whatever is under way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import stat
import subprocess
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import PvfrontError
from . import pvfront_channel as wire
from .pvfront_channel import ChannelError, ChannelGone, Link, Received, facts_of

log = logging.getLogger(__name__)

_COMMAND = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ARGUMENTS = 64
ALIVE = 10.0
"""Seconds after which a command that is silent is said to live."""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NUMBER = 64  # characters
_REQUESTS = (wire.PUT, wire.GET, wire.RUN)


class Hello(Exception):
    """A client has come, and wants nothing of what the one before asked for."""

    def __init__(self, said: dict[str, Any]) -> None:
        """Raises ChannelError."""
        super().__init__()
        self.number, self.version = said.get("number"), said.get("version")
        if not isinstance(self.number, str) or len(self.number) > _NUMBER:
            raise ChannelError("the other end said nonsense: number")


class Server:
    """Serves one channel. None: there are no such files, or commands."""

    def __init__(
        self, link: Link, *, files: Path | None, writable: bool, commands: Path | None
    ) -> None:
        self.link = link
        self.files = None if files is None else files.resolve()
        self.writable = writable
        self.commands = commands
        self._version: object = None
        """What the client speaks."""

    def run(self) -> None:
        """Until the terminal has gone: ChannelError says so."""
        hello: Hello | None = None
        while True:
            try:
                if hello is not None:
                    self._version = hello.version
                    self.link.tell(wire.GREETING, number=hello.number, version=wire.VERSION)
                    hello = None
                self._one()
            except Hello as another:
                self.link.whole()
                hello = another

    def _one(self) -> None:
        try:
            kind, body = self._next()
            if kind in _REQUESTS and self._version != wire.VERSION:
                raise _RefusedError(f"only who has said Hello in version {wire.VERSION} is served")
            if kind == wire.PUT:
                self._put(facts_of(body))
            elif kind == wire.GET:
                self._get(facts_of(body))
            elif kind == wire.RUN:
                self._run(facts_of(body))
            # Anything else is the rest of what has ended with an error.
        except ChannelGone:
            raise
        except (_RefusedError, ChannelError, OSError, ValueError, TypeError) as error:
            text = str(error)
            log.warning("refused: %s", ascii(text))
            self.link.tell(wire.ERROR, text=text[:1000])

    def _next(self) -> tuple[int, bytes]:
        kind, body = self.link.receive()
        if kind == wire.HELLO:
            raise Hello(facts_of(body))
        if self.link.damaged:
            self.link.whole()
            raise _RefusedError("bytes were lost or changed on the way")
        return kind, body

    # -- files -----------------------------------------------------------------------------------

    def _path(self, facts: dict[str, Any]) -> Path:
        if self.files is None:
            raise _RefusedError("this guest offers no files here")
        asked = str(facts.get("path"))
        if "\0" in asked:
            raise _RefusedError("a name with a NUL")
        # The last part may be a link only to what lies inside as well.
        try:
            path = (self.files / asked.lstrip("/")).resolve()
        except RuntimeError:
            raise _RefusedError(f"{asked}: a loop of links") from None
        if not path.is_relative_to(self.files) or path == self.files:
            raise _RefusedError(f"{asked} lies outside of what this guest offers")
        return path

    @contextlib.contextmanager
    def _opened(self, facts: dict[str, Any]) -> Iterator[Path]:
        """The file asked for, below its directory, which is open: who may write there makes no link
        out of it meanwhile that root would follow.
        """
        path = self._path(facts)
        assert self.files is not None
        fd = -1
        try:
            fd = os.open(self.files, _DIRECTORY)
            for part in path.relative_to(self.files).parts[:-1]:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield Path(f"/proc/self/fd/{fd}") / path.name
        except OSError as error:
            raise _RefusedError(f"{facts.get('path')}: {error.strerror}") from error
        finally:
            if fd >= 0:
                os.close(fd)

    def _put(self, facts: dict[str, Any]) -> None:
        with self._opened(facts) as path:
            if not self.writable:
                raise _RefusedError("this guest's files are only to be read")
            self._take(path, facts)
        log.info("%s: written", ascii(str(facts.get("path"))))
        self.link.tell(wire.OK)

    def _take(self, path: Path, facts: dict[str, Any]) -> None:
        file = Received(str(path), wire.number_of(facts, "mode", 0o777))
        try:
            self.link.tell(wire.OK)
            receipts = wire.Receipts()
            while True:
                kind, body = self._next()
                if kind == wire.DATA:
                    file.add(body)
                    self.link.send(wire.ACK, receipts.of(body))
                elif kind == wire.END:
                    file.finish(facts_of(body).get("sha256"))
                    break
                else:
                    raise _RefusedError(f"a frame of kind {kind} within a file")
        finally:
            file.close()

    def _get(self, facts: dict[str, Any]) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with self._opened(facts) as path, os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _RefusedError(f"{facts.get('path')} is no file")
            self.link.tell(wire.OK, mode=found.st_mode & 0o777, size=found.st_size)
            wire.send_file(self.link, file, self._next)
        log.info("%s: read", ascii(str(facts.get("path"))))

    # -- commands --------------------------------------------------------------------------------

    def _run(self, facts: dict[str, Any]) -> None:
        if self.commands is None:
            raise _RefusedError("this guest offers no commands here")
        name, arguments = facts.get("command"), facts.get("arguments", [])
        if not isinstance(name, str) or not _COMMAND.fullmatch(name):
            raise _RefusedError("no name of a command: letters, digits, _ and -")
        if (
            not isinstance(arguments, list)
            or len(arguments) > _ARGUMENTS
            or not all(isinstance(one, str) and "\0" not in one for one in arguments)
        ):
            raise _RefusedError(f"arguments are texts, {_ARGUMENTS} at most")
        program = self.commands / name
        if not os.access(program, os.X_OK) or not program.is_file():
            raise _RefusedError(f"this guest offers no command {name}")
        log.info("runs %s %s", program, ascii(arguments))
        with subprocess.Popen(
            [program, *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                self.link.tell(wire.OK)
                window = wire.Window()
                for kind, data in _output(process, self.link.fd):
                    if kind == wire.GREETING:
                        self.link.tell(kind)
                    elif kind:
                        wire.send_within(window, self.link, kind, data, self._next)
                    while self.link.waiting():  # another client, too
                        window.heard(*self._next())
                status = process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.link.tell(wire.END, status=status if status >= 0 else 128 - status)


class _RefusedError(PvfrontError):
    """What the client is told."""


def _output(process: subprocess.Popen[bytes], channel: int) -> Iterator[tuple[int, bytes]]:
    """What it prints, by kind of frame, to its end; (0, b"") when the channel has something, and
    (GREETING, b"") when nothing was to be said for a while.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    kinds = {process.stdout.fileno(): wire.DATA, process.stderr.fileno(): wire.STDERR}
    poll = select.poll()
    for fd in (*kinds, channel):
        poll.register(fd, select.POLLIN)
    while kinds:
        ready = poll.poll(ALIVE * 1000)
        if not ready:
            yield wire.GREETING, b""
        for fd, _ in ready:
            if fd == channel:
                yield 0, b""
            elif data := os.read(fd, wire.MOST):
                yield kinds[fd], data
            else:
                poll.unregister(fd)
                del kinds[fd]


def _end(number: int, frame: object) -> None:
    raise SystemExit(0)  # and what was not whole goes


def serve(terminal: Path, *, files: Path | None, writable: bool, commands: Path | None) -> int:
    """Serves the console's terminal until it goes, or SIGTERM; the exit status."""
    signal.signal(signal.SIGTERM, _end)
    try:
        fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        tty.setraw(fd, termios.TCSANOW)  # what waits is not to be thrown away
    except (OSError, termios.error) as error:
        raise PvfrontError(
            f"{terminal}: {error}", hint="`pvfront console list` shows what is served"
        ) from error
    try:
        Server(Link(fd, seconds=None), files=files, writable=writable, commands=commands).run()
    except ChannelError as error:
        raise PvfrontError(str(error)) from error
    finally:
        os.close(fd)
    return 0
