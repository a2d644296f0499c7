# SPDX-License-Identifier: BSD-2-Clause
"""Writes what the board holds into the store: what has changed, together, and no more.

One transaction for what belongs together, with `data/updated` in it, which toolstacks watch. What
the store refuses: a key that is not ours to write (EACCES; libxl makes some read-only) is left
alone, and is no error. A quota that is used up (ENOSPC, EDQUOT; E2BIG: one value) costs the new
keys that no longer fit; what stands in the store already is still kept up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections import deque
from typing import Any

from ..storetool import tree
from ..xenstore import Xenstore, XenstoreError
from . import QUOTA
from .board import OWNED, Board, Plan, plan
from .context import Context, Resumed
from .keys import Keys, VifKeys, VolumeKeys
from .suspendable import CANNOT, OURS

log = logging.getLogger(__name__)

SETTLE = 0.5  # seconds that a change waits for those that come with it
HOUR = 3600.0
UPDATED = "data/updated"
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.EINVAL, errno.ENOMEM)
_MOST_TRIES = 32
_MOST_REFUSED = 20  # shown


class Publisher:
    """Keeps the store what the board is."""

    name = "publish"

    def __init__(
        self, board: Board, vifs: VifKeys, volumes: VolumeKeys, *, settle: float = SETTLE
    ) -> None:
        self._board = board
        self._vifs = vifs
        self._volumes = volumes
        self._settle = settle
        self.published: Keys = {}
        self.refused: dict[str, str] = {}
        """Keys that the store does not take, and why."""
        self.begun = False
        """Whether it knows what an earlier agent has left."""
        self._writes = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._since = time.monotonic()

    async def run(self, context: Context) -> None:
        with context.events.subscription() as told:
            resumed = asyncio.create_task(_resumed(told))
            try:
                while True:
                    await self._adopt(context.store)
                    self.begun = True
                    self._board.changed.set()
                    while not resumed.done():
                        await self._next(context.store, resumed)
                    # Another store, which knows nothing of us.
                    resumed = asyncio.create_task(_resumed(told))
            finally:
                resumed.cancel()

    async def _next(self, store: Xenstore, resumed: asyncio.Task[None]) -> None:
        changed = asyncio.create_task(self._board.changed.wait())
        try:
            await asyncio.wait({changed, resumed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if resumed.done():
            return
        await asyncio.sleep(self._settle)
        self._board.changed.clear()
        await self._write(store)

    async def _adopt(self, store: Xenstore) -> None:
        """What an earlier agent has left is compared with, and its indices go on."""
        self.published, self.refused = {}, {}
        for directory in OWNED:
            try:
                nodes = await tree(store, directory)
            except XenstoreError as error:
                if error.errno not in (errno.ENOENT, *_NOT_OURS):
                    raise
                continue
            self.published |= {
                f"{directory}/{below}": node.value
                for node in nodes
                if node.value and (below := _below(node.path, directory))
            }
        with contextlib.suppress(PermissionError):
            reason = await store.read_opt(CANNOT) or ""
            if reason.startswith(OURS):  # another's is not ours to remove
                self.published[CANNOT] = reason
        self._vifs.remember(self.published)
        self._volumes.remember(self.published)

    async def _write(self, store: Xenstore) -> None:
        for _ in range(_MOST_TRIES):
            wanted = {p: v for p, v in self._board.wanted().items() if p not in self.refused}
            todo = plan(self.published, wanted, self._board.unknown())
            if not todo:
                return
            error = await self._together(store, todo)
            if error is None:
                break
            if error.errno not in _NOT_OURS or error.path not in todo.writes:
                await self._one_by_one(store, todo)
                break
            self._refuse(error.path, error)
        if todo.removals and any(why in QUOTA for why in self.refused.values()):
            # There is room again.
            self.refused = {p: why for p, why in self.refused.items() if why not in QUOTA}
            self._board.changed.set()
        log.debug("published: %d writes, %d removals", len(todo.writes), len(todo.removals))

    async def _together(self, store: Xenstore, todo: Plan) -> XenstoreError | None:
        """What the store refused, if it did; then nothing has changed."""
        try:
            async for transaction in store.transaction():
                async with transaction:
                    for path in todo.removals:
                        await transaction.remove(path, missing_ok=True)
                    for path, value in todo.writes.items():
                        await transaction.write(path, value)
                    await transaction.write(UPDATED, _now())
        except XenstoreError as error:
            if error.errno not in (*_NOT_OURS, *_FULL, errno.EAGAIN):
                raise
            return error
        for path in todo.removals:
            self._forget(path)
        self.published |= todo.writes
        self._count(len(todo.writes) + len(todo.removals) + 1)
        return None

    async def _one_by_one(self, store: Xenstore, todo: Plan) -> None:
        full = ""
        for path in todo.removals:
            try:
                await store.remove(path, missing_ok=True)
            except XenstoreError as error:
                if error.errno not in (*_NOT_OURS, *_FULL):
                    raise
                self._refuse(path, error)
            self._forget(path)
            self._count(1)
        for path, value in {**todo.writes, UPDATED: _now()}.items():
            if full and path not in self.published and path != UPDATED:
                self.refused[path] = full
                continue
            try:
                await store.write(path, value)
            except XenstoreError as error:
                if _why(error) in QUOTA:
                    full = _why(error)
                    log.warning("the store takes no more of this guest's keys: %s", full)
                elif error.errno not in (*_NOT_OURS, *_FULL):
                    raise
                self._refuse(path, error)
            else:
                self._count(1)
                if path != UPDATED:
                    self.published[path] = value

    def _refuse(self, path: str, error: XenstoreError) -> None:
        self.refused[path] = _why(error)
        log.debug("%s is not published: %s", path, error)

    def _forget(self, path: str) -> None:
        for known in [p for p in self.published if p == path or p.startswith(f"{path}/")]:
            del self.published[known]

    # -- figures -----------------------------------------------------------------------------

    def _count(self, writes: int) -> None:
        self._writes += writes
        self._recent.append((time.monotonic(), writes))
        self._forget_old()

    def _forget_old(self) -> None:
        """Here as well: nobody may ever ask for the status."""
        while self._recent and time.monotonic() - self._recent[0][0] > HOUR:
            self._recent.popleft()

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        self._forget_old()
        found: dict[str, Any] = {
            "keys": len(self.published),
            "store_writes": self._writes,
            "store_writes_last_hour": sum(count for _, count in self._recent),
            "seconds": round(now - self._since),
            "left_out": self._board.left_out + self._vifs.left_out,
        }
        if self.refused:
            shown = sorted(self.refused.items())
            found["refused"] = dict(shown[:_MOST_REFUSED])
            if len(shown) > _MOST_REFUSED:
                found["refused_more"] = len(shown) - _MOST_REFUSED
        return found


async def _resumed(told: asyncio.Queue[Any]) -> None:
    while not isinstance(await told.get(), Resumed):
        pass


def _below(path: str, directory: str) -> str:
    """The part of a path that is below a directory, however that one was spelt."""
    return path.partition(f"{directory}/")[2]


def _why(error: XenstoreError) -> str:
    return errno.errorcode.get(error.errno or 0, "?")


def _now() -> str:
    """As xe-guest-utilities writes it: what is watched is that it changes."""
    return time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime())
