# SPDX-License-Identifier: BSD-2-Clause
"""What to do with event channels that were bound while the domain was suspended: keep them open.

See portparker.py for why. A process that holds such a port is *parked*: its descriptors of
/dev/xen/evtchn are handed to a process of root that does nothing but hold them; then it may end.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import PvfrontError
from .threads import in_daemon_thread

PARKER = Path(__file__).with_name("portparker.py")
NAME = "@pvfront-parker"
NODE = "/dev/xen/evtchn"
HINT = "it must go on running until the guest stops"


_never_closed: list[int] = []
"""Descriptors of ports of ours that slept with the domain and could be given to nobody."""


class CannotPark(PvfrontError):
    """The ports of a process could not be taken over; it must not end before the guest does."""


async def park(
    pid: int, *, node: str = NODE, timeout: float = 10.0, fds: Sequence[int] = ()
) -> tuple[int, int]:
    """Has a new process hold duplicates of `pid`'s descriptors of `node`, for good.

    `fds`: of those only these, for a process that has others and goes on; none: all.

    Returns that process's pid and how many descriptors it holds; (0, 0) if there were none. Needs
    root (pidfd_getfd(2)). Raises CannotPark: then `pid` is still the only holder.
    """

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NAME, "-I", "-S", str(PARKER), str(pid), node, *map(str, fds)],
            executable=sys.executable,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    try:
        async with asyncio.timeout(timeout):
            ended = await in_daemon_thread("pvfront-park", run)
    except TimeoutError:
        raise CannotPark(
            f"process {pid}: its ports were not taken over in {timeout:g} s", hint=HINT
        ) from None
    if ended.returncode != 0:
        reason = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        raise CannotPark(f"process {pid}: its ports cannot be taken over: {reason}", hint=HINT)
    parker, count = map(int, ended.stdout.split())
    if fds and count != len(fds):
        raise CannotPark(f"process {pid}: {count} of {len(fds)} ports were taken over", hint=HINT)
    return parker, count


async def park_own(fd: int) -> int:
    """Has a new process hold the port of `fd`, a descriptor of `NODE` in this process, for good.

    Returns that process's pid; `fd` is closed then. Raises CannotPark: it stays open, and the port
    bound, as long as this process lives.
    """
    try:
        parker, _ = await park(os.getpid(), fds=[fd])
    except CannotPark:
        _never_closed.append(fd)
        raise
    os.close(fd)
    return parker
