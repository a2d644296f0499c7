#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause
"""pvfront-channel: files and commands of a guest, over a console of it, from dom0.

    pvfront-channel CONSOLE put FILE REMOTE
    pvfront-channel CONSOLE get REMOTE FILE
    pvfront-channel CONSOLE run COMMAND [ARGUMENT]...

CONSOLE is what the toolstack has made of the channel: the Unix socket of `connection=socket`, or
the pty of `connection=pty`. In the guest `pvfront console channel NAME` must run, which says what
may be read, written and run. This file is all that dom0 needs: Python 3.9, nothing else.

The exit status is 1 if it failed, 2 if it was called wrongly, that of the guest's command for
`run`, 255 if that has none to tell, and 128 + N after signal N. On a terminal it shows how far it
is; --quiet says not to.

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
import errno
import hashlib
import json
import os
import select
import signal
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
"""For the other end to say or take something. A guest whose command is silent says that it lives by
a GREETING that greets nobody.
"""
GREET_SECONDS = 2.0
LEAVE_SECONDS = 10.0
FILL = (2, 4, 8, 16)
"""The attempts to greet that fill up a frame that was cut; few, for who may not read at all."""


class ChannelError(Exception):
    """What went wrong, in one line."""


class ChannelGone(ChannelError):
    """There is nobody to speak to any more."""


class ChannelRefused(ChannelError):
    """The guest has said that it has ended what was asked for, and why."""


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
        if len(body) > MOST:
            raise ChannelError(f"too long: {len(body)} bytes of a request, {MOST} at most")
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


def number_of(facts: dict[str, Any], key: str, most: int) -> int:
    """A number of such an object, 0 to `most`. Raises ChannelError."""
    found = facts.get(key)
    if type(found) is not int or not 0 <= found <= most:
        raise ChannelError(f"the other end said nonsense: {key}")
    return found


class Received:
    """A file that comes: beside its place until it is whole."""

    def __init__(self, path: str, mode: int) -> None:
        """Raises OSError: before anything is sent, for a directory, too."""
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
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
            raise ChannelError("what came is not what was sent (SHA-256 differs)")
        self._file.flush()
        os.fchmod(self._file.fileno(), self._mode & 0o777)
        os.fsync(self._file.fileno())
        self._file.close()
        self._name.replace(self.path)

    def close(self) -> None:
        """What did not take its place goes. Idempotent."""
        with contextlib.suppress(OSError):  # of a full disk, which has no room for the rest either
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


def send_file(
    link: Link,
    file: IO[bytes],
    hear: Callable[[], tuple[int, bytes]],
    moved: Callable[[int], None] = lambda count: None,
) -> None:
    """Sends what `file` has, and END. `moved` is told of bytes that went."""
    window, total = Window(), hashlib.sha256()
    while data := file.read(MOST):
        total.update(data)
        send_within(window, link, DATA, data, hear)
        moved(len(data))
    link.tell(END, sha256=total.hexdigest())


# -- dom0 ----------------------------------------------------------------------------------------


class Progress:
    """A line on a terminal that says how far it is."""

    EVERY = 0.5  # seconds

    def __init__(self, what: str = "", out: IO[str] | None = None) -> None:
        """`out`: nothing is shown on what is no terminal."""
        self.total = 0
        self._what, self._out = printable(what), out if out is not None and out.isatty() else None
        self._moved, self._begin, self._shown = 0, time.monotonic(), 0.0

    def moved(self, count: int) -> None:
        """So many bytes more."""
        self._moved += count
        now = time.monotonic()
        if self._out is not None and now - self._shown >= self.EVERY:
            self._shown = now
            rate = self._moved / max(now - self._begin, 0.1)
            text = f"{self._what}: {self._moved >> 10} KiB"
            if self.total:
                text += f" of {self.total >> 10} ({min(100, 100 * self._moved // self.total)} %)"
            self._out.write(f"\r{text}, {rate / 1024:.0f} KiB/s\x1b[K")
            self._out.flush()

    def end(self) -> None:
        """The line goes."""
        if self._out is not None and self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()


def printable(text: str) -> str:
    """What a terminal may get."""
    return "".join(c if c.isprintable() else "?" for c in text)


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
            f"the guest did not greet within {seconds:g} s: does `pvfront console channel` run, "
            "and is nobody else at this console?"
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

    def leave(self) -> None:
        """What the guest still does for us ends, if it hears that within some seconds."""
        self.link.seconds = LEAVE_SECONDS
        with contextlib.suppress(ChannelError):
            self.link.fill()
            self.link.tell(HELLO, number="", version=VERSION)

    def put(self, path: str, remote: str, progress: Progress | None = None) -> None:
        """Copies a file into the guest."""
        progress = progress or Progress()
        with Path(path).open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ChannelError(f"{path} is no file")
            self.link.tell(PUT, path=remote, mode=found.st_mode & 0o777)
            self._answer(OK)
            progress.total = found.st_size
            send_file(self.link, file, self._next, progress.moved)
            self._answer(OK)

    def get(self, remote: str, path: str, progress: Progress | None = None) -> None:
        """Copies a file out of the guest. Who may use it our umask says, too."""
        progress = progress or Progress()
        self.link.tell(GET, path=remote)
        said = facts_of(self._answer(OK))
        os.umask(mask := os.umask(0o077))
        if "size" in said:
            progress.total = number_of(said, "size", 1 << 63)
        file, receipts = Received(path, number_of(said, "mode", 0o777) & ~mask), Receipts()
        try:
            while True:
                kind, body = self._next()
                if kind == DATA:
                    file.add(body)
                    self.link.send(ACK, receipts.of(body))
                    progress.moved(len(body))
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
                return number_of(facts_of(body), "status", 255)
            to = {DATA: out, STDERR: errors}.get(kind)
            if to is None:
                raise ChannelError(f"a frame of kind {kind} from a command")
            to.write(body)
            to.flush()
            self.link.send(ACK, receipts.of(body))

    def _next(self) -> tuple[int, bytes]:
        kind, body = self.link.receive()
        while kind == GREETING:  # of a Hello that was sent again meanwhile, or of nobody's
            kind, body = self.link.receive()
        if self.link.damaged:
            raise ChannelError("bytes were lost or changed on the way")
        if kind == ERROR:
            text = str(facts_of(body).get("text"))
            raise ChannelRefused(f"the guest: {printable(text)}")
        return kind, body

    def _answer(self, wanted: int) -> bytes:
        kind, body = self._next()
        while kind == ACK:  # of what was sent last
            kind, body = self._next()
        if kind != wanted:
            raise ChannelError(f"a frame of kind {kind} instead of {wanted}")
        return body


def connect(where: str) -> int:
    """A descriptor of the console: a Unix socket, or a terminal. Raises ChannelError, OSError."""
    mode = Path(where).stat().st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(where)
        except OSError as error:
            sock.close()
            raise ChannelError(f"{where}: {error.strerror}: does the domain run?") from error
        return sock.detach()
    if not stat.S_ISCHR(mode):
        raise ChannelError(f"{where} is no console: neither a Unix socket nor a terminal")
    fd = os.open(where, os.O_RDWR | os.O_NOCTTY)
    with contextlib.suppress(termios.error):
        tty.setraw(fd)
    return fd


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 1e6:
        raise ValueError(text)
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pvfront-channel",
        description="Files and commands of a guest, over a console of it.",
        epilog="The exit status is 1 if it failed, 2 if it was called wrongly; of run, the guest's "
        "command's, or 255 if there is none. A command may be silent for as long as it likes.",
    )
    parser.add_argument("console", help="the channel's Unix socket, or its pty")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=SECONDS,
        metavar="SECONDS",
        help="that the guest may say and take nothing (default %(default)g)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show how far it is")
    parser.add_argument("--version", action="version", version=f"version {VERSION} of the channel")
    verbs = parser.add_subparsers(dest="verb", required=True)
    put = verbs.add_parser("put", help="copy a file into the guest")
    put.add_argument("file")
    put.add_argument("remote", help="its name below the directory that the guest offers")
    get = verbs.add_parser("get", help="copy a file out of the guest")
    get.add_argument("remote", help="its name below the directory that the guest offers")
    get.add_argument("file")
    run = verbs.add_parser("run", help="run a command that the guest offers")
    run.add_argument("command")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _do(options: argparse.Namespace) -> int:
    """What was asked for; the exit status."""
    channel = Channel(connect(options.console), seconds=options.timeout)
    copies = options.verb != "run"
    progress = Progress(
        options.file if copies else "", sys.stderr if copies and not options.quiet else None
    )
    try:
        if options.verb == "put":
            channel.put(options.file, options.remote, progress)
        elif options.verb == "get":
            channel.get(options.remote, options.file, progress)
        else:
            out, errors = sys.stdout.buffer, sys.stderr.buffer
            return channel.run(options.command, options.arguments, out, errors)
    except (ChannelGone, ChannelRefused):
        raise
    except BaseException:
        channel.leave()
        raise
    finally:
        progress.end()
    return 0


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """The command; its exit status, or that of the guest's command."""
    options = _parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup(1)
            signal.signal(number, _end)  # what is not whole goes, here and in the guest
    try:
        return _do(options)
    except OSError as error:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    except (ChannelError, ValueError) as error:
        text = str(error)
    print(f"pvfront-channel: {text}", file=sys.stderr)
    return 255 if options.verb == "run" else 1


if __name__ == "__main__":
    sys.exit(main())
