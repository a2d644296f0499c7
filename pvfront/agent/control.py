# SPDX-License-Identifier: BSD-2-Clause
"""`control/shutdown`: what the toolstack asks for, done together with the kernel.

Theory of operation
    Linux has a handler of its own (drivers/xen/manage.c) for poweroff, halt, reboot and suspend: it
    acknowledges (writes "") and acts. What it does is not done again here. Its watch is mostly
    served before ours, so we often see the acknowledgement only; then systemd says what was begun.

      the value            what is done here
      poweroff halt reboot if the kernel has not acknowledged within `KERNEL` seconds: acknowledge,
                           and ask systemd for it. If it has, but nothing began within `BEGUN`
                           seconds (it runs /sbin/poweroff, which may be missing): ask systemd.
      suspend              nothing: the kernel's, and of whoever owns suspend (suspend.py)
      s3 s4 crash          acknowledge, and ask systemd: the kernel ignores them
      anything else        one line in the log; it stays, as the kernel leaves it

    Of an acknowledgement alone the kind is asked of systemd: now and then for `BEGUN` seconds, for
    the kernel's helper program may be slow, and once more when systemd stops the agent, for then
    it may have begun and stopped us at once.

    An acknowledgement of ours is a transaction that finds the request unchanged: what somebody else
    has acknowledged is never acted upon twice, what was written meanwhile is not lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from .. import sysfs
from ..service import shutdown_kind
from ..xenstore import Xenstore
from ..xswire import printable
from .board import Board
from .context import Context, ShutdownAsked
from .helper import Command, command, outside
from .keys import clean

log = logging.getLogger(__name__)

SHUTDOWN = "control/shutdown"
REASON = "data/pvfront/sleep-refused"
KERNEL = 5.0  # seconds in which the kernel acknowledges
BEGUN = 30.0  # and in which systemd has begun what it acknowledged
LOOK = 0.5  # the first look at what was begun; the pauses double
SENT = 0.1  # seconds in which D-Bus takes what is told last
_SHOWN = 40  # characters of what nobody knows
_KERNELS = {"poweroff": "poweroff", "halt": "poweroff", "reboot": "reboot"}
_SLEEPS = {"s3": ("mem", "suspend"), "s4": ("disk", "hibernate")}


class Control:
    """Follows `control/shutdown`."""

    name = "control"

    def __init__(
        self,
        board: Board,
        *,
        run: Command = command,
        kind: Callable[[], Awaitable[str]] = shutdown_kind,
        kernel: float = KERNEL,
        begun: float = BEGUN,
        look: float = LOOK,
    ) -> None:
        """`run` begins programs; `kind` says what the machine is on its way down for, or ""."""
        self._board = board
        self._run = run
        self._kind = kind
        self._seconds = (kernel, begun, look)
        self._doing: dict[str, asyncio.Task[None]] = {}
        self._last = ""
        self._ignored = ""
        self._unexplained: float | None = None  # when we saw an acknowledgement of what, unknown
        self._done: list[str] = []

    async def run(self, context: Context) -> None:
        try:
            async with context.store.watch(SHUTDOWN) as events:
                async for _ in events:
                    await self._look(context)
        finally:
            for task in self._doing.values():
                task.cancel()
            await asyncio.gather(*self._doing.values(), return_exceptions=True)
            self._doing.clear()

    async def _look(self, context: Context) -> None:
        value = await context.store.read_opt(SHUTDOWN) or ""
        if not value:
            self._ignored = ""
            if not any(name for name, task in self._doing.items() if name and not task.done()):
                self._unexplained = asyncio.get_running_loop().time()
                self._begin("", self._acknowledged(context))
        elif value in _KERNELS:
            self._begin(value, self._with_kernel(context, value))
        elif value in _SLEEPS:
            self._begin(value, self._sleep(context, value))
        elif value == "crash":
            self._begin(value, self._crash(context))
        elif value == "suspend":
            self._asked(context, value)
        elif value != self._ignored:
            self._ignored = value
            log.warning("%s: %s is unknown here: left alone", SHUTDOWN, _shown(value))

    def _begin(self, what: str, work: Any) -> None:
        """One at a time of each: an event may come twice for one request."""
        if (before := self._doing.get(what)) is not None and not before.done():
            work.close()
            return
        self._doing[what] = asyncio.create_task(work, name=f"control {what}")
        self._doing[what].add_done_callback(_report)

    def _asked(self, context: Context, kind: str) -> None:
        self._last = kind
        self._unexplained = None
        log.info("the toolstack asks for %s", kind)
        context.events.publish(ShutdownAsked(kind))

    # -- of the kernel -----------------------------------------------------------------------

    async def _acknowledged(self, context: Context) -> None:
        """Somebody was asked for something, and begins it or suspends."""
        loop = asyncio.get_running_loop()
        _, begun, look = self._seconds
        while (since := self._unexplained) is not None and loop.time() < since + begun:
            # As long again as it has been: soon at first, and seldom later.
            await asyncio.sleep(max(look, loop.time() - since))
            await self._explain(context)
        self._unexplained = None

    async def _explain(self, context: Context) -> None:
        """Tells of the shutdown that an acknowledgement announced, once it has begun."""
        kind = await self._kind()
        if kind and self._unexplained is not None:
            self._asked(context, kind)

    async def stopping(self, context: Context) -> None:
        """systemd stops the agent: the last moment to tell why."""
        if self._unexplained is not None:
            await self._explain(context)
            await asyncio.sleep(SENT)

    async def _with_kernel(self, context: Context, value: str) -> None:
        self._asked(context, value)
        kernel, begun, look = self._seconds
        await asyncio.sleep(kernel)
        verb = _KERNELS[value]
        if await _take(context.store, value):
            await self._do(f"the kernel did not take {value}", "systemctl", verb)
            return
        end = asyncio.get_running_loop().time() + begun
        while not await self._kind():
            if asyncio.get_running_loop().time() > end:
                await self._do(f"the kernel took {value}, but nothing began", "systemctl", verb)
                return
            await asyncio.sleep(look)

    # -- ours --------------------------------------------------------------------------------

    async def _sleep(self, context: Context, value: str) -> None:
        if not await _take(context.store, value):
            return
        self._asked(context, value)
        state, verb = _SLEEPS[value]
        states = (sysfs.read(context.platform.roots.sys / "power" / "state") or "").split()
        if state in states:
            reason = await self._do(value, "systemctl", verb)
        else:
            reason = f"{value}: this kernel cannot ({state} is not in /sys/power/state)"
            log.warning("%s", reason)
        self._board.put("control", {REASON: clean(reason)})

    async def _crash(self, context: Context) -> None:
        if not await _take(context.store, "crash"):
            return
        self._asked(context, "crash")
        # kdump's, if there is one; else the domain crashes as its on_crash says.
        words = ("/bin/sh", "-c", "echo c >/proc/sysrq-trigger")
        if failure := await outside(*words, run=self._run):
            log.error("crash: %s", failure)

    async def _do(self, why: str, *words: str) -> str:
        log.warning("%s: %s", why, " ".join(words))
        self._done = [*self._done[-9:], " ".join(words)]
        if failure := await self._run(*words):
            log.error("%s", failure)
        return failure

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = {"last_request": self._last, "done_here": self._done}
        if self._ignored:
            found["ignored"] = self._ignored[:_SHOWN]
        return found


async def _take(store: Xenstore, value: str) -> bool:
    """Acknowledges the request if it still stands; whether it did."""
    taken = False
    async for transaction in store.transaction():
        async with transaction:
            taken = await transaction.read_opt(SHUTDOWN) == value
            if taken:
                await transaction.write(SHUTDOWN, "")
    return taken


def _shown(value: str) -> str:
    return repr(printable(value[:_SHOWN])) + ("…" if len(value) > _SHOWN else "")


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s: %s", task.get_name(), error)
