# SPDX-License-Identifier: BSD-2-Clause
"""A device's worker is replaced by another one while it serves: docs/upgrade.md.

Theory of operation
    `Upgrade.ask` starts the next worker, in a task beside the device's loop: the program may lie on
    a slow disk, or never begin, and nobody waits for that who has a suspend or a detach to do.
    When it has said HELLO, `ready` is true and the loop is poked. `perform`, between two steps of
    the loop, is the rest: it takes milliseconds, and a few seconds if the next worker hangs.

    What the old worker says until it hands over is as true as ever and is passed on, but not its
    end, which was asked for: nobody has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from .errors import PvfrontError
from .worker import Worker, WorkerError
from .workermessage import Event, Exited
from .workerprogram import binary, build_of

log = logging.getLogger(__name__)

# A worker whose client leaves at that very moment refuses, and soon does not any more.
TRIES = 20
TRY_AGAIN_AFTER = 0.5


def outdated(build: str) -> bool:
    """Whether the installed program is another build than `build`; False if none is told.

    It looks at that program's file: not while a disk is in trouble, which it may lie on.
    """
    with contextlib.suppress(OSError, PvfrontError):
        return bool(build) and build != build_of(binary())
    return False


class Upgrade:
    """Upgrades of one device: one that is asked for, and what became of those before."""

    def __init__(self, name: str, run_dir: Path) -> None:
        self.count = 0
        self.pause: float | None = None  # seconds, of the last
        self._name = name
        self._path = run_dir / f"{name}.next"
        self._asked: asyncio.Future[str] | None = None
        self._refused = 0  # times in a row
        self._begin: Callable[[], Awaitable[Worker]]
        self._poke: Callable[[], None]
        self._preparing: asyncio.Task[None] | None = None
        self._next: Worker | None = None

    @property
    def ready(self) -> bool:
        """Whether there is one to `perform`."""
        return self._next is not None

    def ask(
        self, begin: Callable[[], Awaitable[Worker]], poke: Callable[[], None]
    ) -> asyncio.Future[str]:
        """How it went, once it was performed. Nobody needs to wait for it: the log says it too.

        `begin` starts the next worker, as `following`; `poke` is called when it is `ready`.
        """
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self._asked.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._begin, self._poke = begin, poke
            self._prepare(0.0)
        return self._asked

    def drop(self, why: str) -> None:
        """What is asked for is not to be performed any more."""
        if self._asked is not None:
            self._settle(PvfrontError(f"{self._name}: {why}"))

    def _prepare(self, pause: float) -> None:
        self._preparing = asyncio.create_task(self._prepared(pause), name=f"{self._name} next")

    async def _prepared(self, pause: float) -> None:
        await asyncio.sleep(pause)
        try:
            worker = await self._begin()
        except (PvfrontError, OSError) as error:
            self._settle(error)
            return
        self._next = worker
        self._poke()
        try:
            await worker.ended(None)
        finally:
            mine = self._next is worker  # its turn has not come
            if mine:
                self._next = None
                worker.kill()
                self._path.unlink(missing_ok=True)
        if mine:
            self._settle(PvfrontError(f"{self._name}: the next worker ended before its turn"))

    async def perform(
        self, old: Worker, use: Callable[[Worker], None], on_event: Callable[[Event], None]
    ) -> str | None:
        """Does what is `ready`. The text of how it went; None: `old` goes on, or nobody serves.

        `use` is told that the other worker serves. What either says meanwhile comes to `on_event`
        once it is decided whose word counts. Refused for now, it is tried again later.
        """
        new, self._next = self._next, None
        assert new is not None
        if self._preparing is not None:
            self._preparing.cancel()
            self._preparing = None
        try:
            text = await self._hand_over(old, new, use, on_event)
        except (PvfrontError, OSError) as error:
            busy = isinstance(error, WorkerError) and error.error == errno.EBUSY
            if busy and self._refused < TRIES:
                self._refused += 1
                self._prepare(TRY_AGAIN_AFTER)
            else:
                self._settle(error)
            return None
        self._settle(text)
        return text

    def _settle(self, how: str | Exception) -> None:
        asked, self._asked = self._asked, None
        self._refused = 0
        if self._preparing is not None and self._preparing is not asyncio.current_task():
            self._preparing.cancel()
        self._preparing = None
        if isinstance(how, str):
            log.info("%s: %s", self._name, how)
        else:
            log.warning("%s: the worker is not upgraded: %s", self._name, how)
        if asked is None or asked.done():
            return
        if isinstance(how, str):
            asked.set_result(how)
        else:
            asked.set_exception(how)

    async def _hand_over(
        self,
        old: Worker,
        new: Worker,
        use: Callable[[Worker], None],
        on_event: Callable[[Event], None],
    ) -> str:
        said: list[Event] = []
        news: list[Event] = []
        old.on_event, new.on_event = said.append, news.append
        try:
            taken = await old.hand_over(new)
        except (PvfrontError, OSError):
            # Not if we are cancelled: whichever of the two serves then, `Worker.adopt` finds it.
            self._path.unlink(missing_ok=True)
            new.kill()
            old.on_event = on_event
            for event in said:
                on_event(event)
            raise
        self.count += 1
        self.pause = taken.pause
        old.on_event = lambda event: None
        old.close()
        for event in said:
            if not isinstance(event, Exited):
                on_event(event)
        use(new)
        try:
            self._path.replace(self._path.with_suffix(".sock"))
        except OSError as error:
            log.error("%s: nobody will find worker %d again: %s", self._name, new.pid, error)
        for event in news:
            on_event(event)
        return (
            f"worker {new.pid} took over from {old.pid} with {taken.in_flight} requests in flight; "
            f"a pause of {taken.pause * 1e3:.1f} ms"
        )
