# SPDX-License-Identifier: BSD-2-Clause
"""`memory/target`: the kernel's balloon follows it; where it does not, it is told to.

The balloon's own target (sysfs, target_kb) is less than `memory/target` by what the toolstack
counts to the domain and the kernel does not (video memory; drivers/xen/xen-balloon.c). That
difference is learnt while both are at rest.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import sysfs
from ..errors import PvfrontError
from ..xswire import printable
from .context import Context
from .helper import Command, command, outside

log = logging.getLogger(__name__)

TARGET = "memory/target"
KERNEL = 3.0  # seconds in which the kernel follows
_SLACK = 1024  # KiB
_MOST = 1 << 40  # KiB
_BALLOON = Path("devices/system/xen_memory/xen_memory0")


@dataclass
class Target:
    """What the balloon should be told. Pure; all in KiB."""

    floor: int
    difference: int | None = None  # of memory/target and the balloon's target

    def learn(self, wanted: int, balloon: int) -> None:
        self.difference = wanted - balloon

    def to_write(self, wanted: int, before: int, now: int) -> int | None:
        """The balloon's target that must be written, None if it is right.

        `before`, `now`: the balloon's target before `memory/target` changed, and when the kernel
        has had its time.
        """
        difference = self.difference or 0
        if wanted < self.floor:
            least = max(self.floor - difference, 0)
            return least if now < least else None
        expected = wanted - difference
        if abs(now - expected) <= _SLACK:
            return None
        if now != before:
            self.learn(wanted, now)  # the kernel has followed, in its own way
            return None
        return expected if expected > 0 else None


class Memory:
    """Follows `memory/target`, and says what became of it."""

    name = "memory"

    def __init__(self, *, run: Command = command, kernel: float = KERNEL) -> None:
        self._run = run
        self._kernel = kernel
        self._wanted = 0
        self._sys = Path("/sys")
        self._told = 0
        self._ignored = ""
        self._floor = 0

    async def run(self, context: Context) -> None:
        self._sys = context.platform.roots.sys
        self._floor = context.settings.memory_floor_mib << 10
        target = Target(self._floor)
        before = self._balloon()
        if before is None:
            return  # this kernel has no balloon
        async with context.store.watch(TARGET) as events:
            async for _ in events:
                text = await context.store.read_opt(TARGET) or ""
                wanted = _number(text)
                if wanted is None:
                    self._complain(text)
                    continue
                self._wanted = wanted
                if target.difference is None:
                    target.learn(wanted, before)
                await asyncio.sleep(self._kernel)
                now = self._balloon()
                if now is None:
                    continue
                least = target.to_write(wanted, before, now)
                before = now
                if least is not None:
                    before = await self._tell(wanted, least)

    async def _tell(self, wanted: int, balloon: int) -> int:
        why = "below the floor" if wanted < self._floor else "not followed by the kernel"
        log.warning("memory/target %d KiB is %s: the balloon is told %d", wanted, why, balloon)
        self._told += 1
        path = self._sys / _BALLOON / "target_kb"
        words = ("/bin/sh", "-c", f"echo {balloon} >{path}")
        if failure := await outside(*words, run=self._run):
            raise PvfrontError(f"the balloon is not told: {failure}")
        return balloon

    def _complain(self, text: str) -> None:
        if text and text != self._ignored:
            log.warning("%s is no number: %r", TARGET, printable(text[:40]))
        self._ignored = text

    def _balloon(self) -> int | None:
        return sysfs.read_int(self._sys / _BALLOON / "target_kb")

    def status(self) -> dict[str, Any]:
        balloon = self._balloon()
        if balloon is None:
            return {"balloon": "none"}
        return {
            "target_kib": self._wanted,
            "balloon_target_kib": balloon,
            "current_kib": sysfs.read_int(self._sys / _BALLOON / "info" / "current_kb"),
            "floor_kib": self._floor,
            "told_here": self._told,
        }


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) < 14):
        return None
    return int(text) if 0 < int(text) < _MOST else None
