# SPDX-License-Identifier: BSD-2-Clause
"""A disk's worker is replaced by another one while it serves: docs/upgrade.md."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from ..errors import PvfrontError
from ..worker import Event, Worker, WorkerError, binary, build_of

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
    """Upgrades of one disk: one that is asked for, and what became of those before."""

    def __init__(self, name: str, run_dir: Path) -> None:
        self.count = 0
        self.pause: float | None = None  # seconds, of the last
        self._name = name
        self._path = run_dir / f"{name}.next"
        self._asked: asyncio.Future[str] | None = None
        self._refused = 0  # times in a row

    @property
    def asked(self) -> bool:
        """Whether there is one to `perform`."""
        return self._asked is not None

    def ask(self) -> asyncio.Future[str]:
        """How it went, once it was performed. Nobody needs to wait for it: the log says it too."""
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self._asked.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._asked

    async def perform(
        self,
        old: Worker,
        begin: Callable[[], Awaitable[Worker]],
        use: Callable[[Worker], None],
        on_event: Callable[[Event], None],
    ) -> str | None:
        """Does what is asked for. The text of how it went; None: `old` goes on, or nobody serves.
        It stays `asked` if it is to be tried again, after TRY_AGAIN_AFTER seconds.

        `begin` starts the other worker, as `following`; `use` is told that it serves. What either
        says meanwhile comes to `on_event` once it is decided whose word counts.
        """
        asked = self._asked
        assert asked is not None
        try:
            text = await self._hand_over(old, begin, use, on_event)
        except (PvfrontError, OSError) as error:
            if (
                isinstance(error, WorkerError)
                and error.error == errno.EBUSY
                and self._refused < TRIES
            ):
                self._refused += 1
                return None
            self._settle()
            log.warning("%s: the worker is not upgraded: %s", self._name, error)
            if not asked.done():
                asked.set_exception(error)
            return None
        self._settle()
        log.info("%s: %s", self._name, text)
        if not asked.done():
            asked.set_result(text)
        return text

    def _settle(self) -> None:
        self._asked = None
        self._refused = 0

    async def _hand_over(
        self,
        old: Worker,
        begin: Callable[[], Awaitable[Worker]],
        use: Callable[[Worker], None],
        on_event: Callable[[Event], None],
    ) -> str:
        new = await begin()
        said: list[Event] = []
        news: list[Event] = []
        old.on_event, new.on_event = said.append, news.append
        try:
            taken = await old.hand_over(new)
        except (PvfrontError, OSError):
            # Not if we are cancelled: whichever of the two serves then, `Worker.adopt` finds it.
            self._path.unlink(missing_ok=True)
            old.on_event = on_event
            for event in said:
                on_event(event)
            raise
        self.count += 1
        self.pause = taken.pause
        old.on_event = lambda event: None
        old.close()
        self._path.replace(self._path.with_suffix(".sock"))
        use(new)
        for event in news:
            on_event(event)
        return (
            f"worker {new.pid} took over from {old.pid} with {taken.in_flight} requests in flight; "
            f"a pause of {taken.pause * 1e3:.1f} ms"
        )
