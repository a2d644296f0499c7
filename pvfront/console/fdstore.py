# SPDX-License-Identifier: BSD-2-Clause
"""Descriptors that systemd keeps while a service is started again (sd_notify(3), FDSTORE=1).

Where there is no systemd nothing is kept, and nobody complains.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Mapping

_FIRST = 3  # SD_LISTEN_FDS_START


def _tell(text: str, fds: tuple[int, ...] = ()) -> None:
    where = os.environ.get("NOTIFY_SOCKET")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.sendmsg([text.encode()], rights, 0, address)


def keep(name: str, fd: int) -> None:
    """Keeps `fd` under `name`, also while its other end is closed. Never raises, never blocks."""
    # FDPOLL=0: a PTY that no program has open hangs up, and would be thrown away.
    _tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", (fd,))


def forget(name: str) -> None:
    """Everything under `name` is kept no more."""
    _tell(f"FDSTOREREMOVE=1\nFDNAME={name}")


def kept() -> dict[str, int]:
    """What was kept for this process, by name; the caller's from here on. Once: a process that this
    one starts finds nothing. Of several under one name the last.
    """
    found = _kept(os.environ)
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    for fd in found.values():
        os.set_inheritable(fd, False)
    return found


def _kept(environ: Mapping[str, str]) -> dict[str, int]:
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit()):
        return {}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    return dict(zip(names, range(_FIRST, _FIRST + int(count)), strict=False))
