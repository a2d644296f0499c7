# SPDX-License-Identifier: BSD-2-Clause
"""The store as callers have it: single requests, and sessions with watches and a transaction.

No bus here: a caller is a name and a user, and a watch that fires calls a function. Every request
goes through the policy first.

A session belongs to one connection to the bus and ends with it. Its requests are done one after
the other, in the order in which they came. Its transaction is ended when it has been open for too
long: xenstored has few for a whole domain, and each makes others conflict.

All watches share one watch of the store, on the guest's own directory: their number is no matter
between us and xenstored. After a resume the directory is another one (the domain has another id),
and each watch fires once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable

from ...sharedwatch import Following
from ...storetool import home
from ...xenstore import Permission, Transaction, Xenstore, XenstoreError
from .policy import ROOT, Caller, Policy, Refused, Usage, Usages, is_below

log = logging.getLogger(__name__)

MANY_PATHS = 16
"""So many paths of one watch are told of at once; of more, only that there was something."""
ALL_SESSIONS = 256
"""Of all users together, root excepted: a user may have the ids of many."""
PACE = 0.1
"""Seconds between what a watch tells: events that come faster are one."""

Tell = Callable[["Session", int, str], None]
"""Takes what fired: the session, its watch's number, a path."""


class Requests:
    """Single requests of any caller, in a transaction or not. Paths as the policy has them.

    Every method raises Refused or XenstoreError.
    """

    def __init__(self, store: Xenstore, policy: Policy) -> None:
        self._store = store
        self._policy = policy

    async def read(self, caller: Caller, path: str, within: Transaction | None) -> bytes:
        path = self._policy.readable(caller, path)
        return await (within or self._store).read_bytes(path or await home(self._store))

    async def write(
        self, caller: Caller, path: str, value: bytes, within: Transaction | None
    ) -> None:
        path = self._policy.writable(caller, path)
        await (within or self._store).write(path, self._policy.value(value))

    async def make_directory(self, caller: Caller, path: str, within: Transaction | None) -> None:
        await (within or self._store).mkdir(self._policy.writable(caller, path))

    async def remove(self, caller: Caller, path: str, within: Transaction | None) -> None:
        """A path that does not exist is an error, unlike in the store's protocol."""
        path = self._policy.writable(caller, path)
        await (within or self._store).read_bytes(path)
        await (within or self._store).remove(path)

    async def directory(self, caller: Caller, path: str, within: Transaction | None) -> list[str]:
        path = self._policy.readable(caller, path)
        return sorted(await (within or self._store).directory(path or await home(self._store)))

    async def get_permissions(
        self, caller: Caller, path: str, within: Transaction | None
    ) -> list[str]:
        path = self._policy.readable(caller, path)
        found = await (within or self._store).get_permissions(path or await home(self._store))
        return [str(each) for each in found]

    async def set_permissions(
        self, caller: Caller, path: str, permissions: Iterable[str], within: Transaction | None
    ) -> None:
        self._policy.owner(caller)
        path = self._policy.writable(caller, path)
        try:
            wanted = [Permission.parse(each) for each in permissions]
            await (within or self._store).set_permissions(path, wanted)
        except ValueError as error:
            raise Refused("InvalidArgs", str(error)) from None


class Session:
    """What one caller has. Made by `Sessions.open`."""

    def __init__(self, sessions: Sessions, number: int, caller: Caller) -> None:
        self.number = number
        self.caller = caller
        self._sessions = sessions
        self._turn = asyncio.Lock()
        self._transaction: Transaction | None = None
        self._expired = False
        self._deadline: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        self._watches: dict[int, tuple[str, asyncio.Task[None]]] = {}
        self._ended = False

    @property
    def watches(self) -> int:
        return len(self._watches)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Transaction | None]:
        """One request: its transaction, if one is open. Raises Refused for one that was ended."""
        async with self._turn:
            if self._ended:
                raise Refused("UnknownObject", "the session has ended")
            if self._expired:
                self._expired = False
                raise Refused("TransactionExpired", self._too_long())
            yield self._transaction

    async def begin(self) -> None:
        """Opens the transaction: until its end, all requests of this session are part of it."""
        sessions = self._sessions
        sessions.policy.writer(self.caller)
        async with self.turn() as open_one:
            if open_one is not None:
                raise Refused("TransactionOpen", "this session has a transaction already")
            transaction = Transaction(sessions.store)
            await transaction.__aenter__()
            self._transaction = transaction
            self._deadline = asyncio.get_running_loop().call_later(
                sessions.policy.limits.transaction_seconds, self._expire
            )

    async def commit(self) -> None:
        """Raises Refused Conflict: somebody else was faster, and nothing of it has happened."""
        async with self.turn() as transaction:
            if transaction is None:
                raise Refused("NoTransaction", "this session has no transaction")
            self._forget_transaction()
            await transaction.__aexit__(None, None, None)
            if transaction.conflicted:
                raise Refused(
                    "Conflict", "somebody else has changed what was read or written: begin again"
                )

    async def abort(self) -> None:
        async with self.turn() as transaction:
            if transaction is None:
                raise Refused("NoTransaction", "this session has no transaction")
            await self._abandon()

    def watch(self, path: str) -> int:
        """Watches a path and all below it; its number. It fires at once, and for each change."""
        sessions = self._sessions
        path = sessions.policy.readable(self.caller, path)
        if path.startswith("/"):
            raise Refused("InvalidArgs", "a watch is on a path below the guest's own directory")
        if self._ended:
            raise Refused("UnknownObject", "the session has ended")
        sessions.usage(self.caller).watch()
        number = next(sessions.numbers)
        self._watches[number] = path, self._following(number, path)
        return number

    async def unwatch(self, number: int) -> None:
        found = self._watches.pop(number, None)
        if found is None:
            raise Refused("NoSuchWatch", f"this session has no watch {number}")
        await self._stop(found[1])

    async def end(self) -> None:
        """The end of all that it has. Twice is harmless."""
        self._ended = True
        watches, self._watches = self._watches, {}
        for _, task in watches.values():
            await self._stop(task)
        async with self._turn:
            await self._abandon()
        if self._ending is not None:
            await self._ending

    async def _stop(self, task: asyncio.Task[None]) -> None:
        self._sessions.usage(self.caller).watches -= 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # -- its transaction

    def _too_long(self) -> str:
        seconds = self._sessions.policy.limits.transaction_seconds
        return f"the transaction was open for more than {seconds:g} s, and nothing of it happened"

    def _expire(self) -> None:
        async def expire() -> None:
            async with self._turn:
                if self._transaction is not None:
                    await self._abandon()
                    self._expired = True

        self._ending = asyncio.create_task(expire())

    async def _abandon(self) -> None:
        transaction = self._transaction
        if transaction is not None:
            self._forget_transaction()
            # As if its block had raised: nothing of it happens, and nobody waits for that.
            await transaction.__aexit__(asyncio.CancelledError, None, None)

    def _forget_transaction(self) -> None:
        self._transaction = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # -- its watches

    def follow_anew(self) -> None:
        """Every watch begins again: the guest's own directory is another one."""
        for number, (path, task) in self._watches.items():
            task.cancel()
            self._watches[number] = path, self._following(number, path)

    def _following(self, number: int, path: str) -> asyncio.Task[None]:
        work = self._follow(number, path)
        return asyncio.create_task(work, name=f"watch {number} of {self.caller.name}")

    async def _follow(self, number: int, path: str) -> None:
        sessions = self._sessions
        # Told at once: the reply with the number is on its way before this task first runs.
        sessions.tell(self, number, path)
        try:
            where = await home(sessions.store)
            root = f"{where}/{path}" if path else where
            async with Following(sessions.store, where, root) as following:
                while True:
                    for each in self._shown(await following.news(), where, path):
                        sessions.tell(self, number, each)
                    await asyncio.sleep(PACE)
        except XenstoreError as error:  # lost: then all is at its end
            log.debug("watch %d of %s: %s", number, self.caller.name, error)

    def _shown(self, fired: Collection[str], where: str, path: str) -> list[str]:
        """The paths to tell of: those that fired, and that the caller may read."""
        found = set()
        for each in fired:
            name = each.removeprefix(f"{where}/")
            if name == each or not (path == "" or is_below(name, path)):
                name = path  # the watched path itself, or something above it
            with contextlib.suppress(Refused):
                found.add(self._sessions.policy.readable(self.caller, name))
        return sorted(found) if len(found) <= MANY_PATHS else [path]


class Sessions:
    """All sessions. `tell` is called for each watch that fires."""

    def __init__(
        self,
        store: Xenstore,
        policy: Policy,
        tell: Tell,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.policy = policy
        self.tell = tell
        self.usages = Usages(policy.limits)
        self.numbers = itertools.count(1)
        self._clock = clock
        self._sessions: dict[int, Session] = {}

    def usage(self, caller: Caller) -> Usage:
        return self.usages.of(caller.uid, self._clock())

    def request(self, caller: Caller, cost: int = 1) -> None:
        """Counts a request, as `cost` of them. Raises Refused for one too many."""
        self.usages.request(caller, self._clock(), cost)

    def open(self, caller: Caller) -> Session:
        """Raises Refused: the user has too many, or all users together."""
        if caller.uid != ROOT and len(self._sessions) >= ALL_SESSIONS:
            raise Refused("LimitsExceeded", f"there are {ALL_SESSIONS} sessions already")
        self.usage(caller).session()
        session = Session(self, next(self.numbers), caller)
        self._sessions[session.number] = session
        return session

    def of(self, caller: Caller, number: int) -> Session:
        """A session of the caller's own. Raises Refused."""
        session = self._sessions.get(number)
        if session is None:
            raise Refused("UnknownObject", f"there is no session {number}")
        if session.caller.name != caller.name:
            raise Refused("AccessDenied", f"session {number} is another connection's")
        return session

    def numbers_of(self, caller: Caller) -> list[int]:
        return [each.number for each in self._sessions.values() if each.caller.name == caller.name]

    async def close(self, session: Session) -> None:
        """Ends a session. Twice is harmless."""
        if self._sessions.pop(session.number, None) is not None:
            self.usage(session.caller).sessions -= 1
            await session.end()

    async def close_all(self, name: str | None = None) -> None:
        """Ends those of a connection, or all."""
        for session in list(self._sessions.values()):
            if name in (None, session.caller.name):
                await self.close(session)

    def has(self, name: str) -> bool:
        return any(each.caller.name == name for each in self._sessions.values())

    def status(self) -> dict[str, int]:
        """How many there are, of all callers."""
        watches = sum(session.watches for session in self._sessions.values())
        return {"sessions": len(self._sessions), "watches": watches}

    def resumed(self) -> None:
        """The domain was resumed: its directory is another, and each watch fires."""
        for session in self._sessions.values():
            session.follow_anew()
