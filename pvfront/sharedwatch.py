# SPDX-License-Identifier: BSD-2-Clause
"""One watch on a directory of the store, shared by all who follow something in it.

Theory of operation
    A guest may have 128 watches (xenstored's quota; oxenstored's is 100), those of its kernel
    included, and each costs a descriptor and a thread while it is set (xslink.py). A watch for each
    key of each device would be all of them at some thirty devices. So there is one for a directory
    that holds many devices, and its events are told to those whom they concern.

    Who follows a path is told of events at it, below it, and above it: a directory that is removed
    with all that it holds is one event. Events that nobody has taken yet are coalesced, as those of
    `Watch`; they say "look again", and nothing else.

    Whoever begins to follow and then reads misses nothing: what changes before the watch is set is
    told by its first event, which names the directory. Who joins a watch that is `live` gets no
    such event.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Self

from .xenstore import Watch, Xenstore, XenstoreError, XenstoreLost

log = logging.getLogger(__name__)

AGAIN = 5.0  # seconds after a watch that could not be set


class Following:
    """What one follower is told, within `async with`.

    `directory` is where the watch is: `path` itself, or above it.
    """

    def __init__(self, store: Xenstore, directory: str, path: str) -> None:
        self.path = path
        self._store = store
        self._directory = directory
        self._shared: _SharedWatch | None = None
        self._fired: set[str] = set()
        self._told = asyncio.Event()
        self._failure: XenstoreLost | None = None

    async def __aenter__(self) -> Self:
        shared = _shared.setdefault(self._store, {})
        if self._directory not in shared:
            shared[self._directory] = _SharedWatch(self._store, self._directory)
        self._shared = shared[self._directory]
        self._shared.add(self)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._shared is not None
        shared, self._shared = self._shared, None
        await shared.drop(self)

    @property
    def live(self) -> bool:
        """Whether the watch's first event has come, in answer to others."""
        return self._shared is not None and self._shared.live

    async def news(self) -> frozenset[str]:
        """Waits for events; the paths that fired since the last call.

        Raises XenstoreLost if the connection is. A watch that the store refuses is asked for again.
        """
        await self._told.wait()
        self._told.clear()
        if self._failure is not None:
            raise self._failure
        fired, self._fired = frozenset(self._fired), set()
        return fired

    def tell(self, fired: str) -> None:
        if len(self._fired) >= Watch.MAX_PENDING:
            self._fired = {self.path}
        self._fired.add(fired)
        self._told.set()

    def fail(self, failure: XenstoreLost) -> None:
        self._failure = failure
        self._told.set()


class _SharedWatch:
    """The watch of one directory, as long as anybody follows something there."""

    def __init__(self, store: Xenstore, directory: str) -> None:
        self._store = store
        self._directory = directory
        self.live = False
        self._followers: dict[str, list[Following]] = {}
        self._above: Counter[str] = Counter()  # of the followed paths, how many are below
        self._task = asyncio.create_task(self._run(), name=f"watch {directory}")

    def add(self, follower: Following) -> None:
        self._followers.setdefault(follower.path, []).append(follower)
        self._above.update(_above(follower.path))

    async def drop(self, follower: Following) -> None:
        """The watch ends with its last follower."""
        rest = self._followers[follower.path]
        rest.remove(follower)
        if not rest:
            del self._followers[follower.path]
        self._above.subtract(_above(follower.path))
        self._above += Counter()  # without what is 0
        if not self._followers:
            self._forget()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _forget(self) -> None:
        """Who comes later gets another watch."""
        shared = _shared.get(self._store, {})
        if shared.get(self._directory) is self:
            del shared[self._directory]

    async def _run(self) -> None:
        while True:
            try:
                async with self._store.watch(self._directory) as watch:
                    async for fired in watch:
                        self.live = True
                        self._tell(fired)
            except XenstoreLost as error:
                self._forget()
                for follower in self._all():
                    follower.fail(error)
                return
            except XenstoreError as error:
                log.warning("%s; tried again in %g s", error, AGAIN)
            await asyncio.sleep(AGAIN)

    def _all(self) -> Iterator[Following]:
        return (one for followers in self._followers.values() for one in followers)

    def _tell(self, fired: str) -> None:
        for path in (fired, *_above(fired)):
            for follower in self._followers.get(path, ()):
                follower.tell(fired)
        if fired in self._above:
            for path, followers in self._followers.items():
                if path.startswith(f"{fired}/"):
                    for follower in followers:
                        follower.tell(fired)


_shared: weakref.WeakKeyDictionary[Xenstore, dict[str, _SharedWatch]] = weakref.WeakKeyDictionary()


def _above(path: str) -> Iterator[str]:
    """The directories that a path is in, the nearest first."""
    while "/" in path.lstrip("/"):
        path = path.rpartition("/")[0]
        yield path
