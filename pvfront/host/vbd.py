# SPDX-License-Identifier: BSD-2-Clause
"""One disk's backend in the store: the walk of Linux's blkback, on busdevice.py.

Theory of operation. It follows drivers/block/xen-blkback/xenbus.c step by step, its oddities
included, because frontends are written against them:

* What the transport needs is published with InitWait, what the disk is only just before Connected.
* Closed is published even while requests are in flight. A frontend that comes back meanwhile is
  refused with "pending I/O": Closing, and no way out but another round.
* `protocol` missing means 32-bit x86, which is not served here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
from typing import Any

from pvfront.errors import PvfrontError
from pvfront.host.blkengine import Busy, Engine, Features, Queue
from pvfront.host.busdevice import (
    CLOSED,
    CLOSING,
    CONNECTED,
    INIT_WAIT,
    INITIALISED,
    INITIALISING,
    UNKNOWN,
    BusDevice,
    FrontendError,
    flag,
)
from pvfront.host.hubdevice import EngineError
from pvfront.host.params import SECTOR, parse_params

log = logging.getLogger(__name__)

# xen/io/blkif.h
VDISK_CDROM, VDISK_REMOVABLE, VDISK_READONLY = 1, 2, 4

PROTOCOLS = ("x86_64-abi",)  # XEN_IO_PROTO_ABI_X86_64: the layout of this machine
LINGER_SECONDS = 0.05
MARK = "rings-in-order"
"""Key of the rings that a backend left in order: "GREF:RSP_PROD ..."."""


class Vbd(BusDevice[Engine, Features]):
    """The backend's end of one virtual disk."""

    KLASS = "vbd"
    PUBLISHED = rf"feature-|discard-[ags]|sector|physical-sector|info$|m.*max-|max-ring|{MARK}$"

    _refused: str | None = None
    """The `params` that could not be opened last."""

    # -- the device on its bus -------------------------------------------------------------------

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

    async def _own_changed(self) -> None:
        if self.engine is None:
            await self._open_disk()
            self._frontend_fired |= self.engine is not None

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
        keys = {"feature-flush-cache": flag(f.flush)}
        if (await self._read("discard-enable") or "1") != "0":
            if f.discard:
                keys["discard-granularity"] = str(f.discard_granularity)
                keys["discard-alignment"] = str(f.discard_alignment)
                keys["discard-secure"] = flag(f.discard_secure)
            keys["feature-discard"] = flag(f.discard)
        device_type = await self.store.read_opt(f"{self.frontend}/device-type")
        info = VDISK_CDROM * (f.cdrom or device_type == "cdrom")
        info |= VDISK_REMOVABLE * f.removable | VDISK_READONLY * self.engine.read_only
        keys["feature-barrier"] = flag(f.barrier)
        keys["feature-persistent"] = flag(f.persistent)
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

    def describe(self) -> dict[str, Any]:
        size = self.engine.size if self.engine is not None else None
        return {**super().describe(), "size": size}

    async def resize(self, size: int) -> None:
        """As xen_vbd_resize: a connected frontend is told by `sectors` and its state once more."""
        if self.engine is None:
            raise PvfrontError(f"{self!r} has no disk yet")
        self.engine.resize(size)
        if self.state == CONNECTED:
            await self._publish({"sectors": str(self.engine.size // SECTOR)})
            await self._write_state(self.state)

    def set_features(self, features: Features) -> None:
        """For requests at once; what is published already stays until the next connection."""
        super().set_features(features)
        if self.engine is not None:
            self.engine.set_features(features)
