# SPDX-License-Identifier: BSD-2-Clause
"""Thaws the cgroups that a supervisor froze, if it dies or hangs before it does so itself.

Run as a program of its own: ``python3 -I -S thawguard.py LIST SECONDS``, standard input a pipe
from the supervisor. ``F`` on it: from now on something is frozen; ``T``: nothing is. The end of
the pipe, or SECONDS after an ``F`` without ``T``: everything that the file LIST names, one cgroup
directory or mount point a line, is thawed and LIST removed.

Imports nothing of the package, and is locked in memory: while it is needed the disk that its code
came from may be unable to answer.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys
import time

MCL_CURRENT, MCL_FUTURE = 1, 2  # <sys/mman.h>
FITHAW = 0xC0045878  # <linux/fs.h>


def let_go(where: str) -> None:
    """In a process of its own: it writes to a disk, which may not answer for long."""
    if os.fork():
        return
    try:
        fcntl.ioctl(os.open(where, os.O_RDONLY | os.O_DIRECTORY), FITHAW, 0)
    finally:
        os._exit(0)


def thaw(path: str) -> None:
    try:
        with open(path, encoding="utf-8") as listed:  # noqa: PTH123 - fewer modules to lock
            groups = listed.read().splitlines()
    except FileNotFoundError:
        return
    mounts = []
    for group in groups:
        switch = group + "/cgroup.freeze"
        # To open for writing waits where a file system is frozen, whether the file is there or not.
        if not os.access(switch, os.F_OK):
            mounts.append(group)  # or a cgroup that is gone
            continue
        try:
            fd = os.open(switch, os.O_WRONLY)
        except OSError:
            continue  # gone just now
        try:
            os.write(fd, b"0")
        except OSError:
            pass  # gone just now
        finally:
            os.close(fd)
    for where in mounts:
        let_go(where)
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        pass


def watch(pipe: int, path: str, limit: float) -> None:
    """Returns when the pipe has ended and everything is thawed."""
    deadline: float | None = None
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(wait):
            thaw(path)
            deadline = None
            continue
        said = os.read(pipe, 64)
        if not said:
            thaw(path)
            return
        deadline = time.monotonic() + limit if said.endswith(b"F") else None


def main() -> None:
    path, limit = sys.argv[1], float(sys.argv[2])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_FUTURE)
    watch(0, path, limit)


if __name__ == "__main__":
    main()
