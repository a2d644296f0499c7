# SPDX-License-Identifier: BSD-2-Clause
"""The backend's end of one device in the store: its life on the bus, and missteps as they are told.

Theory of operation. What is the same for every class follows drivers/xen/xenbus/xenbus_probe.c:

* Every event of the frontend's state is acted upon; what was written in between is never seen.
* A device goes when its frontend is Closed and `online` is 0, or when its nodes do.
* An error is said in the store, and the device goes Closing.

What a class does at each step is its own: vbd.py, vif.py. A `BusDevice` is one device, from its
probe to its end. process.py makes one for each directory below backend/CLASS and pokes it when
something there changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pvfront.errors import PvfrontError
from pvfront.host.faults import Misstep
from pvfront.xenstore import Permission, Xenstore, XenstoreError

log = logging.getLogger(__name__)

# enum xenbus_state (xen/io/xenbus.h)
UNKNOWN, INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(7)

Keys = Mapping[str, str | None]


class Engine(Protocol):
    """What serves a device's rings; what an engine of a class has beside is its device's."""

    def set_faults(self, faults: Sequence[Any], seed: int) -> None:
        """Replaces what goes wrong on the rings. Raises FaultError."""

    def release(self) -> None:
        """Everything that faults hold back goes on."""

    def stats(self) -> dict[str, int]:
        """All counters; `fired_<kind>` counts faults."""

    def close(self) -> None:
        """Forgets what is in flight. Twice is harmless."""


F = TypeVar("F")
E = TypeVar("E", bound=Engine)


@dataclass
class Plan(Generic[F]):
    """What every device of a backend is told to do; the lists are shared and change at any time."""

    features: F
    overrides: dict[str, str | None] = field(default_factory=dict)
    """Keys that are published with another value, or (None) not at all."""
    faults: list[Any] = field(default_factory=list)
    seed: int = 0


class FrontendError(PvfrontError):
    """The frontend asked for something that cannot be."""


@dataclass
class _Armed:
    misstep: Misstep
    skip: int
    times: int

    def due(self) -> bool:
        if self.skip:
            self.skip -= 1
            return False
        if self.times < 0:
            return False
        if self.misstep.times:
            self.times -= 1
            if not self.times:
                self.times = -1
        return True


class BusDevice(ABC, Generic[E, F]):
    """One device of a backend; what its class does is in `_probe`, `_own_changed`,
    `_frontend_changed` and `linger`.
    """

    KLASS = ""
    PUBLISHED = ""
    """A regular expression: keys that the backend publishes, none of the toolstack's."""

    def __init__(
        self,
        store: Xenstore,
        host: Path,
        own_domid: int,
        domid: int,
        devid: int,
        plan: Plan[F],
        engine: E | None = None,
    ) -> None:
        self.store = store
        self.host = host
        self.own_domid = own_domid
        self.domid = domid
        self.devid = devid
        self.path = f"/local/domain/{own_domid}/backend/{self.KLASS}/{domid}/{devid}"
        self.state = UNKNOWN
        """What was written last; the kernel's `dev->state`."""
        self.frontend = ""
        self.plan = plan
        self.engine = engine
        self.features = plan.features
        self.overrides = plan.overrides
        self.keep_engine = False
        """What it serves outlives this device: it only pretends to vanish."""
        self._armed: list[_Armed] = []
        self._woken = asyncio.Event()
        self._frontend_fired = self._own_fired = False
        self._gone = False
        self._flicker: asyncio.Task[None] | None = None
        self._saved: tuple[dict[str, str], list[Permission]] | None = None

    def __repr__(self) -> str:
        return f"{self.KLASS} {self.domid}/{self.devid}"

    # -- what a class does -----------------------------------------------------------------------

    @abstractmethod
    async def _probe(self) -> None:
        """Publishes what the backend can, and InitWait."""

    async def _own_changed(self) -> None:
        """Something below its directory changed."""

    @abstractmethod
    async def _frontend_changed(self, state: int) -> None:
        """The frontend wrote its state."""

    @abstractmethod
    async def linger(self) -> None:
        """Waits until nothing is in flight, and lets go of everything."""

    async def leave(self) -> None:
        """The process ends in order."""

    def describe(self) -> dict[str, Any]:
        """What a list of the backend's devices shows."""
        return {"domid": self.domid, self.KLASS: self.devid, "state": self.state}

    def set_features(self, features: F) -> None:
        """What is published already stays so until the next connection."""
        self.features = features

    # -- the device on its bus -------------------------------------------------------------------

    async def run(self) -> None:
        """From the probe to the end. What is still in flight then is the caller's (`linger`)."""
        try:
            self.frontend = await self._read("frontend") or ""
            if not self.frontend:
                log.warning("%r: no frontend key; ignored", self)
                return
            await self._step("probe", self._probe)
            async with self.store.watch(f"{self.frontend}/state") as watch:
                follow = asyncio.create_task(self._follow(watch))
                try:
                    self._own_fired = True
                    self._woken.set()
                    while not self._gone:
                        await self._woken.wait()
                        self._woken.clear()
                        if not self._gone:
                            await self._look()
                finally:
                    follow.cancel()
                    with contextlib.suppress(asyncio.CancelledError, XenstoreError):
                        await follow
        finally:
            if self._flicker is not None:
                self._flicker.cancel()

    def poke(self) -> None:
        """Something below its directory changed."""
        self._own_fired = True
        self._woken.set()

    async def _follow(self, watch: object) -> None:
        async for _ in watch:  # type: ignore[attr-defined]
            self._frontend_fired = True
            self._woken.set()

    async def _look(self) -> None:
        if self._own_fired:
            self._own_fired = False
            if await self._read("state") is None:
                self._gone = True
                return
            await self._own_changed()
        if self._frontend_fired:
            self._frontend_fired = False
            state = state_of(await self.store.read_opt(f"{self.frontend}/state"))
            await self._frontend_changed(state)

    async def _unregister(self) -> None:
        # xenbus_dev_remove: what the toolstack has forced to Closing is Closed then.
        if state_of(await self._read("state")) == CLOSING:
            await self._switch(CLOSED)
        self._gone = True

    # -- missteps --------------------------------------------------------------------------------

    def arm(self, missteps: Sequence[Misstep]) -> None:
        """Replaces what goes wrong in the walk."""
        self._armed = [_Armed(m, m.skip, m.times) for m in missteps]

    async def _step(self, name: str, honest: Callable[[], Awaitable[None]]) -> None:
        due = [a.misstep for a in self._armed if a.misstep.at == name and a.due()]
        for misstep in due:
            if misstep.place == "before":
                await self._do(misstep)
        instead = [m for m in due if m.place == "instead"]
        for misstep in instead:
            await self._do(misstep)
        if not instead:
            await honest()
        for misstep in due:
            if misstep.place == "after":
                await self._do(misstep)

    async def _do(self, misstep: Misstep) -> None:
        if misstep.action == "state":
            await self.jump(misstep.number)
        elif misstep.action == "keys":
            await self.write_keys(misstep.keys or {})
        elif misstep.action == "pause":
            await asyncio.sleep(misstep.number / 1000)
        elif misstep.action == "vanish":
            await self.vanish()
            if misstep.number:
                await asyncio.sleep(misstep.number / 1000)
                await self.come_back()
        # Behind it: whoever reads this may lean on what was done.
        log.info("%r: misstep %s at %s", self, misstep.action, misstep.at)

    async def jump(self, state: int) -> None:
        """Writes any number as its state."""
        await self._write_state(state)

    async def write_keys(self, keys: Keys) -> None:
        """Sets, or (None) removes, keys of its directory."""
        for key, value in keys.items():
            if value is None:
                await self.store.remove(f"{self.path}/{key}", missing_ok=True)
            else:
                await self.store.write(f"{self.path}/{key}", value)

    def flicker(self, keys: Mapping[str, Sequence[str]], every: float) -> None:
        """Writes the values of each key in turn, all `every` seconds; {} ends it."""
        if self._flicker is not None:
            self._flicker.cancel()
            self._flicker = None
        if keys:
            self._flicker = asyncio.create_task(self._flickering(keys, every))

    async def _flickering(self, keys: Mapping[str, Sequence[str]], every: float) -> None:
        turn = 0
        with contextlib.suppress(XenstoreError):
            while True:
                await self.write_keys({k: v[turn % len(v)] for k, v in keys.items()})
                turn += 1
                await asyncio.sleep(every)

    async def vanish(self) -> None:
        """Its nodes go, as if the toolstack had removed them; `come_back` finds what it serves."""
        if self._saved is None:
            permissions = await self.store.get_permissions(self.path)
            self._saved = await self._dump(""), permissions
        self.keep_engine = True
        self._gone = True
        self._woken.set()
        await self.store.remove(self.path)

    async def come_back(self) -> None:
        """The nodes return as the toolstack writes them: a new device, which serves the same."""
        if self._saved is None:
            raise PvfrontError(f"{self!r} has not vanished")
        keys, permissions = self._saved
        self._saved = None
        async for txn in self.store.transaction():
            async with txn:
                await txn.mkdir(self.path)
                await txn.set_permissions(self.path, permissions)
                for key, value in keys.items():
                    await txn.write(f"{self.path}/{key}", value)
                await txn.write(f"{self.path}/state", str(INITIALISING))

    async def _dump(self, below: str) -> dict[str, str]:
        """Keys of the toolstack, from "params" to "a/b"; what a backend publishes is left out."""
        keys = {}
        for name in await self.store.directory(self.path + below):
            key = f"{below}/{name}"
            if key != "/state" and not re.match(rf"/({self.PUBLISHED})", key):
                keys[key[1:]] = await self.store.read_opt(self.path + key) or ""
                keys |= await self._dump(key)
        return keys

    # -- the store -------------------------------------------------------------------------------

    async def _read(self, key: str) -> str | None:
        return await self.store.read_opt(f"{self.path}/{key}")

    async def _online(self) -> bool:
        return bool(await self._number(self.path, "online", 0))

    async def _number(self, where: str, key: str, default: int) -> int:
        """As xenbus_read_unsigned: nonsense counts as missing."""
        found = re.match(r"\s*(\d{1,10})", await self.store.read_opt(f"{where}/{key}") or "")
        return default if found is None else int(found[1])

    async def _required(self, where: str, key: str) -> int:
        number = await self._number(where, key, -1)
        if not 0 <= number < 1 << 32:
            raise FrontendError(f"reading {where}/{key}")
        return number

    async def _publish(self, keys: Keys) -> None:
        said = {k: self.overrides.get(k, v) for k, v in keys.items()}
        async for txn in self.store.transaction():
            async with txn:
                for key, value in said.items():
                    if value is None:
                        await txn.remove(f"{self.path}/{key}", missing_ok=True)
                    else:
                        await txn.write(f"{self.path}/{key}", value)

    async def _switch(self, state: int) -> None:
        if state != self.state:
            await self._write_state(state)

    async def _write_state(self, state: int) -> None:
        """As xenbus_switch_state: a directory that has gone is not made again."""
        if await self._write_if_there("state", str(state)):
            self.state = state

    async def _write_if_there(self, key: str, value: str) -> bool:
        async for txn in self.store.transaction():
            async with txn:
                there = await txn.read_opt(f"{self.path}/state") is not None
                if there:
                    await txn.write(f"{self.path}/{key}", value)
        return there

    async def _fatal(self, code: int, text: str) -> None:
        """As xenbus_dev_fatal: says why, and goes Closing."""
        log.warning("%r: %d %s", self, code, text)
        where = f"/local/domain/{self.own_domid}/error/backend/{self.KLASS}"
        path = f"{where}/{self.domid}/{self.devid}/error"
        await self.store.write(path, f"{code} {text}")
        await self._switch(CLOSING)


def flag(on: bool) -> str:
    return "1" if on else "0"


def state_of(text: str | None) -> int:
    """As xenbus_read_driver_state: anything that is no number is Unknown."""
    return int(text) if text is not None and re.fullmatch(r"\d{1,9}", text) else UNKNOWN
