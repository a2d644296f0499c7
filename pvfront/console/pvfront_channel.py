#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""pvfront-channel: files and commands of a guest, over a console of it, from dom0.

    pvfront-channel CONSOLE put FILE REMOTE
    pvfront-channel CONSOLE get REMOTE FILE
    pvfront-channel CONSOLE run COMMAND [ARGUMENT]...

CONSOLE is what the toolstack has made of the channel: the Unix socket of `connection=socket`, or
the pty of `connection=pty`. In the guest `pvfront console channel NAME` must run, which says what
may be read, written and run. This file is all that dom0 needs: Python 3.9, nothing else.

Both ends speak in frames: FRAME, then up to MOST bytes. A frame whose checksum is wrong ends the
transfer; a file is there under its name only when all of it has come and its SHA-256 is right.
Dom0 asks, the guest answers, one thing at a time. Hello, with a random number, begins anew whatever
the guest was doing for whoever was there before.

Each frame of a transfer (DATA, STDERR) is acknowledged when it was taken, and no more than WINDOW
is under way: QEMU's console drops what too slow a reader leaves to it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import select
import socket
import stat
import struct
import sys
import tempfile
import termios
import time
import tty
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

VERSION = 2
FRAME = struct.Struct(">4sBBHI")  # MAGIC, kind, 0, length, CRC-32 of kind, length and body
MAGIC = b"\xf5PVC"
MOST = 16384
HELLO, GREETING, PUT, GET, RUN, DATA, END, OK, ERROR, STDERR, ACK = range(1, 12)
TAKEN = struct.Struct(">Q")  # ACK: bytes of frames of this transfer that were taken, from its begin
WINDOW = 256 << 10
"""Bytes of frames that may be under way. QEMU keeps `limit` of them (libxl's: 1 MiB) and drops the
rest; what a reader has taken counts, too, until it has taken all. Hence a window opens again
when all of it is acknowledged, not some.
"""
SECONDS = 60.0
"""For the other end to say or take something."""
GREET_SECONDS = 2.0
FILL = (2, 4, 8, 16)
"""The attempts to greet that fill up a frame that was cut; few, for who may not read at all."""


class ChannelError(Exception):
    """What went wrong, in one line."""


class ChannelGone(ChannelError):
    """There is nobody to speak to any more."""


def framed(kind: int, body: bytes = b"") -> bytes:
    """One frame."""
    check = zlib.crc32(struct.pack(">BH", kind, len(body)) + body)
    return FRAME.pack(MAGIC, kind, 0, len(body), check) + body


class Frames:
    """Bytes in, frames out. What is no frame is skipped, and counted. Pure."""

    def __init__(self) -> None:
        self.skipped = 0
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Kind and body of each frame that is complete now; bytes may be any."""
        self._rest += data
        while True:
            at = self._rest.find(MAGIC)
            if at < 0:
                at = max(0, len(self._rest) - len(MAGIC) + 1)  # its beginning may be the end here
            self.skipped += at
            self._rest = self._rest[at:]
            if len(self._rest) < FRAME.size:
                return
            magic, kind, zero, length, check = FRAME.unpack_from(self._rest)
            if magic == MAGIC and not zero and length <= MOST:
                if len(self._rest) < FRAME.size + length:
                    return
                body = self._rest[FRAME.size : FRAME.size + length]
                if zlib.crc32(struct.pack(">BH", kind, length) + body) == check:
                    self._rest = self._rest[FRAME.size + length :]
                    yield kind, body
                    continue
            self.skipped += 1
            self._rest = self._rest[1:]


def _size(body: bytes) -> int:
    return FRAME.size + len(body)


class Window:
    """The sending end of one transfer: what may be sent now. Pure."""

    def __init__(self) -> None:
        self._sent = self._taken = 0
        self._until = WINDOW

    def fits(self, body: bytes) -> bool:
        """Whether a frame may be sent before more is heard."""
        return self._sent + _size(body) <= self._until

    def sent(self, body: bytes) -> None:
        self._sent += _size(body)

    def heard(self, kind: int, body: bytes) -> None:
        """A frame of the other end's. Raises ChannelError if it acknowledges nothing of ours."""
        if kind != ACK:
            raise ChannelError(f"a frame of kind {kind} within a transfer")
        taken = TAKEN.unpack(body)[0] if len(body) == TAKEN.size else 0
        if not self._taken < taken <= self._sent:
            raise ChannelError("what was acknowledged was not sent")
        self._taken = taken
        if taken == self._sent:
            self._until = taken + WINDOW


class Receipts:
    """The receiving end of one transfer. Pure."""

    def __init__(self) -> None:
        self._taken = 0

    def of(self, body: bytes) -> bytes:
        """What an ACK says now that this frame was taken, too."""
        self._taken += _size(body)
        return TAKEN.pack(self._taken)


class Link:
    """Frames over a descriptor that does not block."""

    def __init__(self, fd: int, *, seconds: float | None = SECONDS) -> None:
        """`seconds`: that the other end may say or take nothing; None: as long as it likes."""
        self.fd = fd
        self.seconds = seconds
        self._frames = Frames()
        self._come: list[tuple[int, bytes]] = []
        os.set_blocking(fd, False)

    def send(self, kind: int, body: bytes = b"") -> None:
        """Returns when all of it was taken. Raises ChannelError."""
        self._write(framed(kind, body))

    def fill(self) -> None:
        """Sends what ends any frame that was cut, and is none."""
        self._write(bytes(FRAME.size + MOST))

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, "takes nothing")
            except OSError as error:
                raise ChannelGone(f"the console has gone: {error.strerror}") from error

    def tell(self, kind: int, **facts: Any) -> None:
        self.send(kind, json.dumps(facts).encode())

    def receive(self) -> tuple[int, bytes]:
        """The next frame. Raises ChannelError."""
        while not self._come:
            self._wait(select.POLLIN, "says nothing")
            self._read()
        return self._come.pop(0)

    def waiting(self) -> bool:
        """Whether a frame has come."""
        if not self._come:
            self._read()
        return bool(self._come)

    def readable(self, seconds: float) -> bool:
        """Waits so long for something to come."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    @property
    def damaged(self) -> bool:
        """Whether something came that is no frame, since the last `whole`."""
        return self._frames.skipped > 0

    def whole(self) -> None:
        self._frames.skipped = 0

    def _read(self) -> None:
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelGone(f"the console has gone: {error.strerror}") from error
        if not data:
            raise ChannelGone("the console was closed at the other end")
        self._come += self._frames.feed(data)

    def _wait(self, event: int, what: str) -> None:
        poll = select.poll()
        poll.register(self.fd, event)
        if not poll.poll(None if self.seconds is None else self.seconds * 1000):
            raise ChannelError(f"the other end {what} for {self.seconds:g} s")


def facts_of(body: bytes) -> dict[str, Any]:
    """The JSON object of a frame. Raises ChannelError."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        if isinstance(found, dict):
            return found
    raise ChannelError("the other end said nonsense")


class Received:
    """A file that comes: beside its place until it is whole."""

    def __init__(self, path: str, mode: int) -> None:
        """Raises OSError."""
        self.path = path
        self._mode = mode
        self._sum = hashlib.sha256()
        where = Path(path).absolute().parent
        fd, name = tempfile.mkstemp(prefix=".pvfront-channel-", dir=where)
        self._name = Path(name)
        self._file: IO[bytes] = os.fdopen(fd, "wb")

    def add(self, data: bytes) -> None:
        self._sum.update(data)
        self._file.write(data)

    def finish(self, sha256: object) -> None:
        """It takes its place. Raises ChannelError, OSError."""
        if sha256 != self._sum.hexdigest():
            raise ChannelError(f"{self.path}: what came is not what was sent (SHA-256 differs)")
        self._file.flush()
        os.fchmod(self._file.fileno(), self._mode & 0o777)
        os.fsync(self._file.fileno())
        self._file.close()
        self._name.replace(self.path)

    def close(self) -> None:
        """What did not take its place goes. Idempotent."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._name.unlink()


def send_within(
    window: Window, link: Link, kind: int, body: bytes, hear: Callable[[], tuple[int, bytes]]
) -> None:
    """Sends a frame of a transfer, when it may be. `hear`: the next of what the other end says."""
    while link.waiting() or not window.fits(body):
        window.heard(*hear())
    link.send(kind, body)
    window.sent(body)


def send_file(link: Link, file: IO[bytes], hear: Callable[[], tuple[int, bytes]]) -> None:
    """Sends what `file` has, and END."""
    window, total = Window(), hashlib.sha256()
    while data := file.read(MOST):
        total.update(data)
        send_within(window, link, DATA, data, hear)
    link.tell(END, sha256=total.hexdigest())


# -- dom0 ----------------------------------------------------------------------------------------


class Channel:
    """Dom0's end. Raises ChannelError, OSError."""

    def __init__(self, fd: int, *, seconds: float = SECONDS) -> None:
        """Waits until the guest answers."""
        self.link = Link(fd, seconds=seconds)
        number = os.urandom(8).hex()
        end = time.monotonic() + seconds
        # Again and again: a terminal that is not raw yet spoils the first, and half a frame, of who
        # was killed here before, takes what follows for its own.
        attempt = 0
        while time.monotonic() < end:
            attempt += 1
            if attempt in FILL:
                self.link.fill()
            self.link.tell(HELLO, number=number, version=VERSION)
            again = time.monotonic() + GREET_SECONDS
            while time.monotonic() < again and self.link.readable(GREET_SECONDS):
                while self.link.waiting():
                    kind, body = self.link.receive()
                    if kind == GREETING and self._greets(facts_of(body), number):
                        self.link.whole()
                        return
        raise ChannelError(
            f"the guest did not greet within {seconds:g} s: does `pvfront console channel` run?"
        )

    @staticmethod
    def _greets(said: dict[str, Any], number: str) -> bool:
        if said.get("number") != number:
            return False
        if said.get("version") != VERSION:
            raise ChannelError(
                f"the guest speaks version {said.get('version')!a:.20} of the channel, this helper "
                f"{VERSION}: install the one of the guest's package"
            )
        return True

    def put(self, path: str, remote: str) -> None:
        """Copies a file into the guest."""
        with Path(path).open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ChannelError(f"{path} is no file")
            self.link.tell(PUT, path=remote, mode=found.st_mode & 0o777)
            self._answer(OK)
            send_file(self.link, file, self._next)
            self._answer(OK)

    def get(self, remote: str, path: str) -> None:
        """Copies a file out of the guest."""
        self.link.tell(GET, path=remote)
        said = facts_of(self._answer(OK))
        file, receipts = Received(path, int(said.get("mode", 0o600))), Receipts()
        try:
            while True:
                kind, body = self._next()
                if kind == DATA:
                    file.add(body)
                    self.link.send(ACK, receipts.of(body))
                elif kind == END:
                    file.finish(facts_of(body).get("sha256"))
                    return
                else:
                    raise ChannelError(f"a frame of kind {kind} within a file")
        finally:
            file.close()

    def run(self, command: str, arguments: list[str], out: IO[bytes], errors: IO[bytes]) -> int:
        """Runs a command of the guest's; its exit status."""
        self.link.tell(RUN, command=command, arguments=arguments)
        self._answer(OK)
        receipts = Receipts()
        while True:
            kind, body = self._next()
            if kind == END:
                return int(facts_of(body)["status"])
            to = {DATA: out, STDERR: errors}.get(kind)
            if to is None:
                raise ChannelError(f"a frame of kind {kind} from a command")
            to.write(body)
            to.flush()
            self.link.send(ACK, receipts.of(body))

    def _next(self) -> tuple[int, bytes]:
        kind, body = self.link.receive()
        while kind == GREETING:  # of a Hello that was sent again meanwhile
            kind, body = self.link.receive()
        if self.link.damaged:
            raise ChannelError("bytes were lost or changed on the way")
        if kind == ERROR:
            text = str(facts_of(body).get("text"))
            raise ChannelError(f"the guest: {''.join(c if c.isprintable() else '?' for c in text)}")
        return kind, body

    def _answer(self, wanted: int) -> bytes:
        kind, body = self._next()
        while kind == ACK:  # of what was sent last
            kind, body = self._next()
        if kind != wanted:
            raise ChannelError(f"a frame of kind {kind} instead of {wanted}")
        return body


def connect(where: str) -> int:
    """A descriptor of the console: a Unix socket, or a terminal. Raises OSError."""
    if Path(where).is_socket():
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(where)
        return sock.detach()
    fd = os.open(where, os.O_RDWR | os.O_NOCTTY)
    with contextlib.suppress(termios.error):
        tty.setraw(fd)
    return fd


def main() -> int:
    """The command; its exit status, or that of the guest's command."""
    parser = argparse.ArgumentParser(
        prog="pvfront-channel", description="Files and commands of a guest, over a console of it."
    )
    parser.add_argument("console", help="the channel's Unix socket, or its pty")
    parser.add_argument("--timeout", type=float, default=SECONDS, metavar="SECONDS")
    verbs = parser.add_subparsers(dest="verb", required=True)
    put = verbs.add_parser("put", help="copy a file into the guest")
    put.add_argument("file")
    put.add_argument("remote")
    get = verbs.add_parser("get", help="copy a file out of the guest")
    get.add_argument("remote")
    get.add_argument("file")
    run = verbs.add_parser("run", help="run a command that the guest offers")
    run.add_argument("command")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        channel = Channel(connect(options.console), seconds=options.timeout)
        if options.verb == "put":
            channel.put(options.file, options.remote)
        elif options.verb == "get":
            channel.get(options.remote, options.file)
        else:
            out, errors = sys.stdout.buffer, sys.stderr.buffer
            return channel.run(options.command, options.arguments, out, errors)
    except (ChannelError, OSError, ValueError, TypeError, KeyError) as error:
        print(f"pvfront-channel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
