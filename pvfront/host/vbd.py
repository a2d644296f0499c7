# SPDX-License-Identifier: BSD-2-Clause
"""One disk's backend in the store: the walk of Linux's blkback, and missteps as they are told.

Theory of operation. The honest half follows drivers/block/xen-blkback/xenbus.c step by step, its
oddities included, because frontends are written against them:

* What the transport needs is published with InitWait, what the disk is only just before Connected.
* Every event of the frontend's state is acted upon; what was written in between is never seen.
* Closed is published even while requests are in flight. A frontend that comes back meanwhile is
  refused with "pending I/O": Closing, and no way out but another round.
* `protocol` missing means 32-bit x86, which is not served here.
* A device goes when its frontend is Closed and `online` is 0, or when its nodes do.

A `Vbd` is one device on the bus, from its probe to its end. blkback.py makes one for each directory
below backend/vbd and pokes it when something there changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pvfront.errors import PvfrontError
from pvfront.host.blkengine import Busy, Engine, EngineError, Features, Queue
from pvfront.host.faults import Fault, Misstep
from pvfront.host.params import SECTOR, parse_params
from pvfront.xenstore import Permission, Xenstore, XenstoreError

log = logging.getLogger(__name__)

# enum xenbus_state (xen/io/xenbus.h)
UNKNOWN, INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(7)

# xen/io/blkif.h
VDISK_CDROM, VDISK_REMOVABLE, VDISK_READONLY = 1, 2, 4

PROTOCOLS = ("x86_64-abi",)  # XEN_IO_PROTO_ABI_X86_64: the layout of this machine
LINGER_SECONDS = 0.05
MARK = "rings-in-order"
"""Key of the rings that a backend left in order: "GREF:RSP_PROD ..."."""

Keys = Mapping[str, str | None]


class FrontendError(PvfrontError):
    """The frontend asked for something that cannot be."""


@dataclass
class Plan:
    """What every device of a backend is told to do; the lists are shared and change at any time."""

    features: Features = field(default_factory=Features)
    overrides: dict[str, str | None] = field(default_factory=dict)
    """Keys that are published with another value, or (None) not at all."""
    faults: list[Fault] = field(default_factory=list)
    seed: int = 0


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


class Vbd:
    """The backend's end of one virtual disk."""

    def __init__(
        self,
        store: Xenstore,
        host: Path,
        own_domid: int,
        domid: int,
        devid: int,
        plan: Plan,
        engine: Engine | None = None,
    ) -> None:
        self.store = store
        self.host = host
        self.own_domid = own_domid
        self.domid = domid
        self.devid = devid
        self.plan = plan
        self.path = f"/local/domain/{own_domid}/backend/vbd/{domid}/{devid}"
        self.engine = engine
        self.state = UNKNOWN
        """What was written last; the kernel's `dev->state`."""
        self.frontend = ""
        self.features = plan.features
        self.overrides = plan.overrides
        self.keep_engine = False
        """The disk outlives this device: it only pretends to vanish."""
        self._armed: list[_Armed] = []
        self._woken = asyncio.Event()
        self._frontend_fired = self._own_fired = False
        self._refused: str | None = None
        """The `params` that could not be opened last."""
        self._gone = False
        self._flicker: asyncio.Task[None] | None = None
        self._saved: tuple[dict[str, str], list[Permission]] | None = None

    def __repr__(self) -> str:
        return f"vbd {self.domid}/{self.devid}"

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

    async def linger(self) -> None:
        """Waits until nothing is in flight, lets go of the frontend and closes the disk."""
        while self.engine is not None:
            try:
                self.engine.disconnect()
            except Busy:
                await asyncio.sleep(LINGER_SECONDS)
                continue
            if not self.keep_engine:
                self.engine.close()
                self.engine = None
            return

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
            if self.engine is None:
                await self._open_disk()
                self._frontend_fired |= self.engine is not None
        if self._frontend_fired:
            self._frontend_fired = False
            state = _state(await self.store.read_opt(f"{self.frontend}/state"))
            await self._frontend_changed(state)

    async def _frontend_changed(self, state: int) -> None:
        log.debug("%r: frontend %d, own state %d", self, state, self.state)
        if state == INITIALISING:
            if self.state == CLOSED:
                await self._step("reconnect", lambda: self._switch(INIT_WAIT))
        elif state in (INITIALISED, CONNECTED):
            if self.engine is None:  # what was missing may be there now
                await self._open_disk(again=True)
            if self.state != CONNECTED and self.engine is not None:
                await self._step("connect", self._connect)
        elif state == CLOSING:
            await self._step("closing", lambda: self._switch(CLOSING))
        elif state == CLOSED:
            await self._step("closed", self._close)
        elif state == UNKNOWN:
            await self._unregister()
        else:
            await self._fatal(errno.EINVAL, f"saw state {state} at frontend")

    # -- honest steps ----------------------------------------------------------------------------

    async def _probe(self) -> None:
        f = self.features
        keys = {
            "multi-queue-max-queues": str(f.queues),
            "max-ring-page-order": str(f.ring_order),
            # What a backend before this one offered is not ours to keep.
            "feature-max-indirect-segments": str(f.indirect) if f.indirect else None,
        }
        await self._publish(keys)
        await self._switch(INIT_WAIT)

    async def _open_disk(self, *, again: bool = False) -> None:
        """As `backend_changed`: the toolstack has said where the disk is. again: if it is refused
        already, too.
        """
        params = await self._read("params")
        if not params or (params == self._refused and not again):
            return
        mode = await self._read("mode") or "w"
        try:
            self.engine = Engine(parse_params(params), self.features, read_only="w" not in mode)
            self.engine.set_faults(self.plan.faults, self.plan.seed)
        except PvfrontError as exc:
            # Saying so is an event of this very directory: without the note it would not end.
            self._refused = params
            await self._fatal(errno.ENOENT, f"creating vbd structure: {exc}")
            return
        self._refused = None

    async def _connect(self) -> None:
        assert self.engine is not None
        try:
            self.engine.disconnect()
            queues, persistent = await self._read_frontend()
            if left := await self._take_mark():
                self.engine.take_up(left)
            self.engine.connect(
                self.host, self.own_domid, self.domid, queues, persistent=persistent
            )
        except Busy:
            await self._fatal(errno.EBUSY, "pending I/O")
            return
        except FrontendError as exc:
            await self._fatal(errno.EINVAL, str(exc))
            return
        except EngineError as exc:
            await self._fatal(exc.errno, str(exc))
            return
        await self._publish(await self._properties())
        await self._switch(CONNECTED)
        self.engine.start()
        log.info(
            "%r: connected, %d queues of %d pages%s",
            self, len(queues), len(queues[0].grefs), ", persistent grants" * persistent,
        )  # fmt: skip

    async def _close(self) -> None:
        if self.engine is not None:
            with contextlib.suppress(Busy):  # says Closed all the same
                self.engine.disconnect()
        await self._switch(CLOSED)
        if not await self._online():
            await self._unregister()

    async def _unregister(self) -> None:
        # xenbus_dev_remove: what the toolstack has forced to Closing is Closed then.
        if _state(await self._read("state")) == CLOSING:
            await self._switch(CLOSED)
        self._gone = True

    # The kernel's blkback drains before it lets go of a ring and then may be bound to it again. A
    # process can be killed with requests answered out of order, of which nothing in the ring tells;
    # so a used ring is taken up only by its mark, which is written last and removed before anything
    # is served: who is killed has left none.

    async def leave(self) -> None:
        """The process ends in order: rings with nothing under way are left to the next one."""
        if self.engine is None or self._saved is not None:
            return
        with contextlib.suppress(Busy):
            self.engine.disconnect()
            if left := self.engine.left():
                said = " ".join(f"{ref}:{rsp_prod}" for ref, rsp_prod in left.items())
                await self._write_if_there(MARK, said)

    async def _take_mark(self) -> dict[int, int]:
        said = await self._read(MARK)
        if said is None:
            return {}
        await self.store.remove(f"{self.path}/{MARK}", missing_ok=True)
        pairs = re.findall(r"\b(\d{1,9}):(\d{1,10})\b", said)
        return {int(ref): int(at) & 0xFFFFFFFF for ref, at in pairs[:16]}

    async def _properties(self) -> dict[str, str]:
        assert self.engine is not None
        f = self.features
        keys = {"feature-flush-cache": _flag(f.flush)}
        if (await self._read("discard-enable") or "1") != "0":
            if f.discard:
                keys["discard-granularity"] = str(f.discard_granularity)
                keys["discard-alignment"] = str(f.discard_alignment)
                keys["discard-secure"] = _flag(f.discard_secure)
            keys["feature-discard"] = _flag(f.discard)
        device_type = await self.store.read_opt(f"{self.frontend}/device-type")
        info = VDISK_CDROM * (f.cdrom or device_type == "cdrom")
        info |= VDISK_REMOVABLE * f.removable | VDISK_READONLY * self.engine.read_only
        keys["feature-barrier"] = _flag(f.barrier)
        keys["feature-persistent"] = _flag(f.persistent)
        keys["sectors"] = str(self.engine.size // SECTOR)
        keys["info"] = str(info)
        keys["sector-size"] = str(f.sector_size)
        keys["physical-sector-size"] = str(max(f.sector_size, f.physical_sector_size))
        return keys

    async def _read_frontend(self) -> tuple[list[Queue], bool]:
        """As `connect_ring`. Raises FrontendError."""
        protocol = await self.store.read_opt(f"{self.frontend}/protocol")
        if protocol not in PROTOCOLS:
            raise FrontendError(
                f"unknown fe protocol {protocol}"
                if protocol is not None
                else "no protocol, which means x86_32-abi: not served here"
            )
        count = await self._number(self.frontend, "multi-queue-num-queues", 1)
        if not 1 <= count <= self.features.queues:
            raise FrontendError(
                f"guest requested {count} queues, exceeding the maximum of {self.features.queues}."
            )
        order = await self._number(self.frontend, "ring-page-order", -1)
        if order > self.features.ring_order:
            raise FrontendError(
                f"requested ring page order {order} exceed max:{self.features.ring_order}"
            )
        names = ["ring-ref"] if order < 0 else [f"ring-ref{i}" for i in range(1 << order)]
        queues = []
        for index in range(count):
            where = self.frontend if count == 1 else f"{self.frontend}/queue-{index}"
            port = await self._required(where, "event-channel")
            queues.append(Queue(port, [await self._required(where, name) for name in names]))
        persistent = await self._number(self.frontend, "feature-persistent", 0)
        return queues, bool(persistent)

    async def resize(self, size: int) -> None:
        """As xen_vbd_resize: a connected frontend is told by `sectors` and its state once more."""
        if self.engine is None:
            raise PvfrontError(f"{self!r} has no disk yet")
        self.engine.resize(size)
        if self.state == CONNECTED:
            await self._publish({"sectors": str(self.engine.size // SECTOR)})
            await self._write_state(self.state)

    def set_features(self, features: Features) -> None:
        """What is published already stays so until the next connection."""
        self.features = features
        if self.engine is not None:
            self.engine.set_features(features)

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
        log.info("%r: misstep %s at %s", self, misstep.action, misstep.at)
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
        """Its nodes go, as if the toolstack had removed them; the disk stays for `come_back`."""
        if self._saved is None:
            permissions = await self.store.get_permissions(self.path)
            self._saved = await self._dump(""), permissions
        self.keep_engine = True
        self._gone = True
        self._woken.set()
        await self.store.remove(self.path)

    async def come_back(self) -> None:
        """The nodes return as the toolstack writes them: a new device, with the same disk."""
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
            if re.match(r"/(feature-|discard-[ags]|sector|physical-sector|info$|m.*max-)", key):
                continue
            if not key.startswith("/max-ring") and key not in ("/state", f"/{MARK}"):
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
        where = f"/local/domain/{self.own_domid}/error/backend/vbd/{self.domid}/{self.devid}"
        await self.store.write(f"{where}/error", f"{code} {text}")
        await self._switch(CLOSING)


def _flag(on: bool) -> str:
    return "1" if on else "0"


def _state(text: str | None) -> int:
    """As xenbus_read_driver_state: anything that is no number is Unknown."""
    return int(text) if text is not None and re.fullmatch(r"\d{1,9}", text) else UNKNOWN
