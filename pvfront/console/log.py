# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront console log`: lines of the journal, or of standard input, to a console that nobody else
writes to.

Who writes lines never waits for who reads the console. Up to `BACKLOG` bytes wait; while there is
no more room lines are dropped, and a line in their place says how many. What is kept keeps its
order, and is whole.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import termios
import tty
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ..cli.output import printable
from ..errors import PvfrontError

BACKLOG = 1 << 20
LINE = 4096
"""Bytes of a line; more are cut off."""
_CHUNK = 1 << 16


class Backlog:
    """Lines that wait. Pure."""

    def __init__(self, most: int = BACKLOG) -> None:
        self.most = most
        self.dropped = 0
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._missing = 0  # dropped since the last line that is kept

    def put(self, line: bytes) -> None:
        """One line without its end, of any bytes; a terminal is not harmed by what it gets."""
        text = printable(line[:LINE].decode(errors="replace").expandtabs()).encode() + b"\r\n"
        if self._bytes + len(text) > self.most:
            self._missing += 1
            self.dropped += 1
            return
        self._note_missing()
        self._add(text)

    def take(self, most: int) -> bytes:
        """Up to `most` bytes from the beginning: they wait until `taken`."""
        if not self._lines:
            self._note_missing()
        found = b""
        for line in self._lines:
            found += line
            if len(found) >= most:
                break
        return found[:most]

    def taken(self, count: int) -> None:
        """So many of them have gone."""
        self._bytes -= count
        while count:
            line = self._lines.popleft()
            if len(line) > count:
                self._lines.appendleft(line[count:])
                return
            count -= len(line)

    def _note_missing(self) -> None:
        if self._missing:
            self._add(b"--- %d lines dropped: nobody read them in time\r\n" % self._missing)
            self._missing = 0

    def _add(self, text: bytes) -> None:
        self._lines.append(text)
        self._bytes += len(text)


def journal(priority: str | None, units: Sequence[str], lines: int) -> list[str]:
    """The command whose lines are the journal's."""
    command = ["journalctl", "--follow", "--quiet", "--no-pager", "--output=short-iso"]
    command += [f"--lines={lines}"]
    if priority:
        command += [f"--priority={priority}"]
    return command + [f"--unit={unit}" for unit in units]


def run(terminal: Path, command: Sequence[str] | None) -> int:
    """Passes lines of `command`, or (None) of standard input, on to `terminal` until their end, and
    then all that waits; the exit status: 1 if the terminal went, or the command failed, which has
    said why.
    """
    try:
        to = os.open(terminal, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PvfrontError(
            f"{terminal}: {error.strerror}", hint="`pvfront console list` shows what is served"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, to)
        with contextlib.suppress(termios.error):
            tty.setraw(to)
        if command is None:
            return _pass_on(0, to)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, close_fds=True
            )
        except OSError as error:
            raise PvfrontError(f"{command[0]}: {error.strerror}") from error
        stack.callback(process.wait)
        stack.callback(process.terminate)
        assert process.stdout is not None
        stack.callback(process.stdout.close)
        return _pass_on(process.stdout.fileno(), to) or int(process.wait() != 0)


def _pass_on(source: int, to: int) -> int:
    backlog = Backlog()
    rest = b""
    ended = False
    poll = select.poll()
    while True:
        waits = backlog.take(_CHUNK)
        if ended and not waits:
            return 0
        if waits:
            poll.register(to, select.POLLOUT)
        if not ended:
            poll.register(source, select.POLLIN)
        ready = dict(poll.poll())
        for fd in ready:
            poll.unregister(fd)
        if source in ready:
            data = os.read(source, _CHUNK)
            ended = not data
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[: LINE + 1]  # of a line without end no more is ever shown
            for line in (*lines, *([rest] if ended and rest else ())):
                backlog.put(line)
        if to in ready and waits:
            if ready[to] & (select.POLLERR | select.POLLHUP):
                return 1
            with contextlib.suppress(BlockingIOError):
                backlog.taken(os.write(to, waits))
