# SPDX-License-Identifier: BSD-2-Clause
"""Devices of this guest as the store shows them: enumeration, hot plug, views of both ends.

Theory of operation
    A toolstack defines a device by two directories: ``device/<class>/<id>`` in the guest's part of
    the store (the frontend) and the directory that its ``backend`` key names (the backend). Each
    end owns a ``state`` key (XenbusState); a handshake is nothing but both ends reading the
    other's.

    `Bus` follows ``device/<class>`` and says which ids came and went. `XenbusDevice` follows one
    device's keys and condenses them into a `View`: both states, ``online``, and whether the nodes
    are there at all. Watches say only "look again": a key that fired is read afresh, so a coalesced
    event costs nothing and an early one never a wrong view. `XenbusDevice.until` is the only wait
    there is: it has a deadline and its error names the end that is stuck and the state it is
    stuck in.

    All devices share two watches (sharedwatch.py): one of ``device``, one of the directory that
    holds their backends. To read is what costs, a turn through another domain for each key: of
    what nobody has written nothing is read again, but for what one transaction may have written
    together.

    Everything read here was written by another domain. States parse to UNKNOWN when they are
    nonsense; a ``backend`` path or id that changes under us counts as a vanished device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass

from .errors import PvfrontError
from .negotiate import parse_uint
from .sharedwatch import Following
from .states import XenbusState, parse_state
from .xenstore import Xenstore, XenstoreError, XenstoreLost

log = logging.getLogger(__name__)

# The largest domain id that can be a backend: DOMID_FIRST_RESERVED - 1 (xen.h).
MAX_DOMID = 0x7FEF

_LOOK_AGAIN = 1.0  # seconds after a read that failed


class HandshakeTimeout(PvfrontError, TimeoutError):
    """A wait for the other end ran out; the message names who is stuck in which state."""


class DeviceGone(PvfrontError):
    """The frontend's or the backend's node vanished, or now names another backend."""


@dataclass(frozen=True, slots=True)
class View:
    """Both ends of a device at one moment.

    `present`: the frontend node is there, and so is the backend that it names. `moved`: it names
    another backend than the one that was opened, as after a restore under a new domain id.
    `serial` grows with each look, `told` with each write of the backend's state, so that one that
    writes the same state again is seen (blkback: state 4 again is a resize), and of what a class
    of devices wants to be told of (`XenbusDevice.tells`).
    """

    frontend: XenbusState
    backend: XenbusState
    online: bool
    present: bool
    moved: bool = False
    serial: int = 0
    told: int = 0

    def __str__(self) -> str:
        if self.moved:
            return "moved to another backend"
        if not self.present:
            return "nodes vanished"
        text = f"frontend {self.frontend.label}, backend {self.backend.label}"
        return text if self.online else text + ", offline"


class XenbusDevice:
    """One frontend node, its backend, and the views of both.

    `name` is the kernel's bus name (``vbd-51728``), `path` the frontend directory. Use `open`,
    and `close` at the end: the watches belong to the object.
    """

    def __init__(
        self, store: Xenstore, klass: str, devid: int, path: str, backend: str, backend_id: int
    ) -> None:
        self.store = store
        self.klass = klass
        self.devid = devid
        self.name = f"{klass}-{devid}"
        self.path = path
        self.backend = backend
        self.backend_id = backend_id
        self.view = View(XenbusState.UNKNOWN, XenbusState.UNKNOWN, False, False)
        self.on_view: Callable[[View, View], None] = lambda before, now: None
        self.tells: Collection[str] = ()  # keys of either end whose writes count as `View.told`
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = contextlib.AsyncExitStack()
        self._home = path.removesuffix(f"/{klass}/{devid}")
        self._read: dict[str, tuple[int, str | None]] = {}  # by path: the look, and its value
        self._looks = 0
        self._told = 0

    @classmethod
    async def open(cls, store: Xenstore, klass: str, devid: int, *, home: str = "") -> XenbusDevice:
        """Reads where the backend is and starts to watch both ends.

        Raises DeviceGone if there is no such node, PvfrontError if its keys make no sense.
        """
        path = f"{home}device/{klass}/{devid}"
        device = cls(store, klass, devid, path, *await _locate(store, path))
        try:
            await device._begin()
        except BaseException:
            await device.close()
            raise
        return device

    async def reopen(self) -> None:
        """Follows the backend that the frontend names now. After a restore it is another one.

        Raises as `open` does; the backend is then the same as before, and still watched.
        """
        backend, backend_id = await _locate(self.store, self.path)
        await self.close()
        self.backend, self.backend_id = backend, backend_id
        await self._begin()

    async def _begin(self) -> None:
        self._read.clear()
        ends = (
            (self._home, self.path, ("state", "backend")),
            (self.backend.rpartition("/")[0] or self.backend, self.backend, ("state", "online")),
        )
        for directory, path, keys in ends:
            following = await self._stack.enter_async_context(
                Following(self.store, directory, path)
            )
            work = self._follow(following, keys)
            self._tasks.append(asyncio.create_task(work, name=f"follow {path}"))
        await self.refresh()

    async def close(self) -> None:
        """Follows the keys no more; they are left as they are. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _follow(self, following: Following, keys: Collection[str]) -> None:
        """Reads again which of one end's keys have fired."""
        end, seen = following.path, list[str]()  # what is to be read
        while True:
            try:
                if not seen:
                    fired = await following.news()
                    # What is above a key fired for it too.
                    seen = [f"{end}/{k}" for k in keys if _holds(fired, f"{end}/{k}")]
                    if (state := f"{self.backend}/state") in seen:
                        self._told += 1
                        # A detach writes both in one transaction, whose events come one by one:
                        # read after the state, `online` is never older than it.
                        seen = [state, f"{self.backend}/online"]
                    if any(path.removeprefix(f"{end}/") in self.tells for path in fired):
                        self._told += 1
                        if not seen:
                            self._looks += 1
                            await self._seen(self._looks, {})
                if seen:
                    await self._look(*seen)
                    seen = []
            except XenstoreLost:
                return  # whoever asks the store for anything is told
            except XenstoreError as error:
                # gather() drops a cancellation that meets the failure of what it waits for.
                if (task := asyncio.current_task()) is None or task.cancelling():
                    return
                log.warning("%s: %s", self.name, error)
                await asyncio.sleep(_LOOK_AGAIN)

    async def refresh(self) -> View:
        """Reads both ends afresh and wakes whoever waits for a change."""
        front, back = self.path, self.backend
        return await self._look(
            f"{front}/state", f"{back}/state", f"{back}/online", f"{front}/backend"
        )

    async def _look(self, *paths: str) -> View:
        """Reads these keys; what is known of the others holds."""
        look = self._begin_look()
        values = await asyncio.gather(*map(self._value, paths))
        return await self._seen(look, dict(zip(paths, values, strict=True)))

    def _begin_look(self) -> int:
        self._looks += 1
        return self._looks

    async def _value(self, path: str) -> str | None:
        """None for a key that is not there: of what is missing in a directory that is not ours to
        read, as a backend's is once the toolstack has removed it, xenstored says EACCES.
        """
        try:
            return await self.store.read_opt(path)
        except PermissionError:
            return None

    async def _seen(self, look: int, values: Mapping[str, str | None]) -> View:
        """Makes the view of what a look has found, but for what a later one knows better."""
        for path, value in values.items():
            if self._read.get(path, (0, None))[0] < look:
                self._read[path] = look, value

        def known(path: str) -> str | None:
            return self._read.get(path, (0, None))[1]

        frontend, backend = known(f"{self.path}/state"), known(f"{self.backend}/state")
        where = known(f"{self.path}/backend")
        moved = where is not None and where.rstrip("/") != self.backend
        present = frontend is not None and backend is not None and where is not None and not moved
        async with self._changed:
            before = self.view
            self.view = View(
                frontend=parse_state(frontend),
                backend=parse_state(backend),
                online=known(f"{self.backend}/online") == "1",
                present=present,
                moved=moved,
                serial=before.serial + 1,
                told=self._told,
            )
            self.on_view(before, self.view)
            self._changed.notify_all()
        return self.view

    async def changed(self, since: View) -> View:
        """Waits until something was written after `since`, without a deadline."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.view.serial > since.serial)
            return self.view

    async def until(self, wanted: Callable[[View], bool], *, what: str, timeout: float) -> View:
        """Waits for a view that `wanted` accepts.

        Raises HandshakeTimeout after `timeout` seconds, naming `what` never came and both
        states, and DeviceGone as soon as the nodes vanish.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout), self._changed:
                while not wanted(self.view):
                    if not self.view.present:
                        raise DeviceGone(f"{self.name}: vanished while waiting for {what}")
                    await self._changed.wait()
                return self.view
        except TimeoutError as error:
            if isinstance(error, HandshakeTimeout):
                raise
            spent = time.monotonic() - started
            raise HandshakeTimeout(
                f"{self.name}: {what} never came within {spent:.0f} s ({self.view})",
                hint=f"look at {self.backend} with xenstore-ls in the backend domain "
                f"{self.backend_id} and at its kernel log",
            ) from None

    async def write_state(self, state: XenbusState, *, again: bool = False) -> None:
        """Writes the frontend's state if it differs, or in any case with `again`.

        A state is never created where the toolstack has removed the node: writing into a
        vanished directory would leave a ghost that no toolstack cleans up.
        """
        path = f"{self.path}/state"
        async for attempt in self.store.transaction():
            async with attempt as t:
                now = await t.read_opt(path)
                if now is None:
                    raise DeviceGone(f"{self.name}: {path} vanished")
                if again or now != str(int(state)):
                    await t.write(path, str(int(state)))
                look = self._begin_look()
        await self._wrote(state, look)

    async def publish(self, keys: dict[str, str], state: XenbusState) -> None:
        """Writes the frontend's keys and its state in one transaction."""
        async for attempt in self.store.transaction():
            async with attempt as t:
                if await t.read_opt(f"{self.path}/state") is None:
                    raise DeviceGone(f"{self.name}: {self.path}/state vanished")
                for key, value in keys.items():
                    await t.write(f"{self.path}/{key}", value)
                await t.write(f"{self.path}/state", str(int(state)))
                look = self._begin_look()
        await self._wrote(state, look)

    async def _wrote(self, state: XenbusState, look: int) -> None:
        """Our own state is known.

        `look` began with the commit: looks before it may have found the state before, and those
        after it what another has written since.
        """
        await self._seen(look, {f"{self.path}/state": str(int(state))})

    async def remove_keys(self, keys: Callable[[str], bool]) -> list[str]:
        """Removes the frontend keys that `keys` accepts; returns their names."""
        removed: list[str] = []
        async for attempt in self.store.transaction():
            async with attempt as t:
                removed = [k for k in await t.directory(self.path) if keys(k)]
                for key in removed:
                    await t.remove(f"{self.path}/{key}")
        return removed

    async def backend_keys(self, wanted: Collection[str] | None = None) -> dict[str, str]:
        """The keys of the backend's directory, `wanted` or all, one level deep.

        Hostile text, unparsed.
        """
        names = await self.store.directory(self.backend)
        if wanted is not None:
            names = [name for name in names if name in wanted]
        values = await asyncio.gather(
            *(self.store.read_opt(f"{self.backend}/{name}") for name in names)
        )
        return {n: v for n, v in zip(names, values, strict=True) if v is not None}


async def _locate(store: Xenstore, path: str) -> tuple[str, int]:
    """The backend's directory and domain that a frontend's directory names."""
    backend = await store.read_opt(f"{path}/backend")
    if not backend:
        raise DeviceGone(f"{path}/backend is missing from the store")
    if not backend.startswith("/"):
        raise PvfrontError(f"{path}/backend={backend[:80]!r} is no absolute path")
    text = await store.read_opt(f"{path}/backend-id")
    return backend.rstrip("/"), parse_uint(text or "", lo=0, hi=MAX_DOMID)


class Bus:
    """Enumeration and hot plug of one class of devices (``vbd``, ``vif``, ``console``)."""

    def __init__(self, store: Xenstore, klass: str, *, home: str = "") -> None:
        self.store = store
        self.klass = klass
        self.path = f"{home}device/{klass}"

    async def ids(self) -> list[int]:
        """The ids present now, ascending. A name that is no number is not a device."""
        try:
            names = await self.store.directory(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(n) for n in names if n.isascii() and n.isdigit() and len(n) <= 10)

    async def changes(self) -> AsyncIterator[tuple[list[int], set[int]]]:
        """Yields the ids now, and again whenever the list changes or one of its nodes does.

        The second of each pair are ids whose node itself was made, removed or made anew: one that
        was detached and attached again before we looked is in the list before and after.
        """
        last: list[int] | None = None
        async with Following(self.store, self.path.rpartition("/")[0], self.path) as following:
            fired = frozenset((self.path,)) if following.live else await following.news()
            while True:
                # Keys below a device change all the time; only the devices count here.
                paths = {path for path in fired if not path.startswith(f"{self.path}/")}
                names = {path.removeprefix(f"{self.path}/") for path in fired - paths}
                if last is None or paths or not all("/" in name for name in names):
                    now = await self.ids()
                    touched = {devid for devid in now if paths or str(devid) in names}
                    if now != last or touched:
                        last = now
                        yield now, touched
                fired = await following.news()


def _holds(fired: Collection[str], path: str) -> bool:
    """Whether `path`, or what it is in, is among what has fired."""
    return any(path == above or path.startswith(f"{above}/") for above in fired)


@contextlib.asynccontextmanager
async def opened(
    store: Xenstore, klass: str, devid: int, *, home: str = ""
) -> AsyncIterator[XenbusDevice]:
    """`XenbusDevice.open` as a context manager."""
    device = await XenbusDevice.open(store, klass, devid, home=home)
    try:
        yield device
    finally:
        await device.close()
