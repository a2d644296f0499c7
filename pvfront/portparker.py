# SPDX-License-Identifier: BSD-2-Clause
"""Holds another process's event-channel descriptors until the machine is switched off.

Run as a program of its own, as root: ``portparker.py PID NODE [FD...]``. It takes a duplicate of
every descriptor of NODE (/dev/xen/evtchn) that process PID has, or of those named, leaves them to a
child that sleeps for ever, and prints the child's pid and their number (``0 0``: there were none).
From then on PID may end: the last reference is the child's.

A port that was bound while the domain was suspended must never be unbound: the kernel has forgotten
its interrupt, and its close is a BUG (drivers/xen/evtchn.c, `evtchn_unbind_from_user`) in whoever
closes, which then can neither go on nor be ended, and power-off waits for it for minutes. So the
holder must not end before the kernel does: it is started with a name that begins with ``@``,
by which systemd's last kill knows processes of root that it must spare (systemd's
ROOT_STORAGE_DAEMONS.md), and it leaves the cgroup of the service that started it.

Imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import sys

SYS_PIDFD_GETFD = 438  # the same on every architecture


def take(pid: int, node: str, only: frozenset[str] = frozenset()) -> list[int]:
    """Duplicates of every descriptor of the device `node` in process `pid`; `only`: of these
    numbers. Raises OSError."""
    device = os.stat(node).st_rdev  # noqa: PTH116 - fewer modules
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    taken = []
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        if only and name not in only:
            continue
        try:
            status = os.stat(f"/proc/{pid}/fd/{name}")  # noqa: PTH116
        except FileNotFoundError:
            continue  # closed just now
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == device:
            fd = libc.syscall(SYS_PIDFD_GETFD, process, int(name), 0)
            if fd < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            taken.append(fd)
    os.close(process)
    return taken


def leave_cgroup() -> None:
    """Moves to the root cgroup, out of reach of whatever ends the service's processes."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:  # noqa: PTH123
        for line in mounts:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                path = left.split(" ")[4] + "/cgroup.procs"
                with open(path, "w", encoding="ascii") as procs:  # noqa: PTH123
                    procs.write(str(os.getpid()))
                return


def main() -> None:
    pid, node = int(sys.argv[1]), sys.argv[2]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    taken = take(pid, node, frozenset(sys.argv[3:]))
    child = os.fork() if taken else 0
    if child or not taken:
        print(child, len(taken), flush=True)
        return
    os.setsid()
    try:
        leave_cgroup()
    except OSError:
        pass  # then only the service manager's mercy keeps us
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
