# SPDX-License-Identifier: BSD-2-Clause
"""A console's pseudo-terminal under a stable name, and whether somebody has it open.

Nobody holds the slave open for its own sake: the master then says by POLLHUP that no program has
it, and inotify(7) when one opens it. So bytes for a program that is not there are not thrown into
a line discipline that would echo them, or drop what is too long for a line. For the same reason a
new terminal is raw: what waited is written as soon as a program has opened it, which may be before
that program has set the modes that it wants.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import termios
import tty
from pathlib import Path
from typing import Self

from ..errors import PvfrontError

ROWS, COLUMNS = 24, 80
"""A ring has no word for the size of a terminal. `resize` of xterm asks the terminal itself."""

_TIOCGPTN = 0x80045430
_IN_OPEN = 0x20
_libc = ctypes.CDLL(None, use_errno=True)


class Pty:
    """Made by `open`, or `of` a master that an earlier supervisor had."""

    def __init__(self, master: int, link: Path) -> None:
        self.master = master
        self.link = link
        number = struct.unpack("=I", fcntl.ioctl(master, _TIOCGPTN, b"\0" * 4))[0]
        self.path = Path(f"/dev/pts/{number}")
        os.set_blocking(master, False)
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._inotify < 0 or (
            _libc.inotify_add_watch(self._inotify, os.fsencode(self.path), _IN_OPEN) < 0
        ):
            code = ctypes.get_errno()
            self.close_descriptors()
            raise PvfrontError(f"{self.path} cannot be watched: {os.strerror(code)}")
        _point(link, self.path)

    @classmethod
    def open(cls, link: Path) -> Self:
        """A new one, at `link`. Raises PvfrontError."""
        try:
            master, slave = os.openpty()
        except OSError as error:
            raise PvfrontError(
                f"no pseudo-terminal: {error.strerror}", hint="is /dev/pts mounted?"
            ) from error
        try:
            termios.tcsetwinsize(slave, (ROWS, COLUMNS))
            tty.setraw(slave, termios.TCSANOW)
        finally:
            os.close(slave)
        return cls(master, link)

    @property
    def in_use(self) -> bool:
        """Whether a program has it open now."""
        poll = select.poll()
        poll.register(self.master, 0)
        return not poll.poll(0)

    @property
    def pollable(self) -> int:
        """Readable when it was opened; `drain` then."""
        return int(self._inotify)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._inotify, 4096):
                pass

    def close_descriptors(self) -> None:
        """Ends it here; whoever else has the master keeps it. Idempotent."""
        for fd in (self.master, self._inotify):
            if fd >= 0:
                os.close(fd)
        self.master = self._inotify = -1

    def close(self) -> None:
        """The name goes, and with the last master the terminal. Idempotent."""
        self.close_descriptors()
        with contextlib.suppress(OSError):
            if self.link.readlink() == self.path:
                self.link.unlink()


def _point(link: Path, target: Path) -> None:
    """`link` is a symbolic link to `target`; at no moment it is missing. Raises PvfrontError."""
    try:
        link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if link.exists() and not link.is_symlink():
            raise PvfrontError(f"{link} is there, and is none of ours")
        new = link.with_name(f".{link.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)
    except OSError as error:
        raise PvfrontError(f"{link} cannot be made: {error.strerror}") from error
