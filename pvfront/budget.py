# SPDX-License-Identifier: BSD-2-Clause
"""How many granted pages each device of a service may have. Pure but for the limit it is told.

Every page that user space grants counts against one limit, gntalloc's, for all devices of all
processes (gntalloc.py). The kernel has no counter of what is used: known is what this service's
devices hold.

The rule. A device that begins a generation may have

    share = 2/3 * free / (devices + 2)        free = limit - what the other devices hold

where `devices` counts all that the service knows of, whether they hold pages yet or not. So a
device that is alone has two ninths of the limit, of eight each has a fifteenth at the most, and
there is always room for more: of 16384 pages, 64 disks that came one by one leave a tenth, and 128
find their least. What is left belongs to devices that come later, and to other processes.
A device never gets less than its least: with too many devices, the limit says so in the end.

A device that is connected keeps what it has until its next generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def share(limit: int, held: int, devices: int) -> int:
    """Pages for one more device: `held` are the others', `devices` counts it too. Not below 0."""
    return 2 * max(limit - held, 0) // (3 * (max(devices, 1) + 2))


@dataclass(frozen=True, slots=True)
class Grant:
    """What a device asked for and got, in pages, and why it was not more ("" if it is all)."""

    asked: int
    got: int
    why: str = ""


class Budget:
    """The books of one service. `limit` is asked each time: an admin may raise it at any time.

    `limit` returns None if nobody knows it; then nothing is shared out, and the device's own
    ENOSPC decides.
    """

    def __init__(self, limit: Callable[[], int | None], *, expected: int = 0) -> None:
        """`expected`: how many devices there will be, as far as that is known at the start."""
        self._limit = limit
        self._expected = expected
        self._grants: dict[str, Grant | None] = {}

    @property
    def devices(self) -> int:
        return max(len(self._grants), self._expected)

    @property
    def held(self) -> int:
        """Pages of all devices together."""
        return sum(grant.got for grant in self._grants.values() if grant is not None)

    def expect(self, devices: int) -> None:
        """There are so many devices, seen or not."""
        self._expected = devices

    def join(self, name: str) -> None:
        """A device that will want pages. Idempotent."""
        self._grants.setdefault(name, None)

    def leave(self, name: str) -> None:
        """The device is gone for good. Idempotent."""
        self._grants.pop(name, None)

    def share(self, name: str) -> tuple[int | None, str]:
        """What `name` may have now (None: no limit is known), and the reason in a few words."""
        self.join(name)
        limit = self._limit()
        if limit is None:
            return None, ""
        mine = self._grants[name]
        others = self.held - (mine.got if mine is not None else 0)
        count = self.devices
        text = f"a share of {limit} pages for {count} device{'s' * (count != 1)}"
        if others:
            text += f", of which the others hold {others}"
        return share(limit, others, count), text

    def hold(self, name: str, grant: Grant) -> None:
        """`name` has these pages now, instead of any that it had."""
        self._grants[name] = grant

    def release(self, name: str) -> None:
        """`name` holds no page between two generations. Idempotent."""
        if name in self._grants:
            self._grants[name] = None

    def grant(self, name: str) -> Grant | None:
        """What `name` holds, None if nothing."""
        return self._grants.get(name)
