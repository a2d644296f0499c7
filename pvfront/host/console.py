# SPDX-License-Identifier: BSD-2-Clause
"""One secondary console's backend in the store: the walk of QEMU's xen_console, on busdevice.py.

Theory of operation. It follows hw/xen/xen-legacy-backend.c and hw/char/xen_console.c, oddities
included, because frontends are written against them:

* It connects as soon as `ring-ref` and `port` can be read, whatever state the frontend is in: with
  keys left over from a connection it is Connected while the frontend is Initialising. Its state is
  no word about the ring.
* The frontend's Closing and Closed are mirrored.
* From Closed it begins anew only with Initialising.
"""

from __future__ import annotations

import logging
from typing import Any

from pvfront.errors import PvfrontError
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
)
from pvfront.host.consengine import Engine
from pvfront.host.consparams import ConsFeatures

log = logging.getLogger(__name__)


class Console(BusDevice[Engine, ConsFeatures]):
    """The backend's end of one console."""

    KLASS = "console"
    PUBLISHED = r"hotplug-status$"

    async def linger(self) -> None:
        if self.engine is not None:
            self.engine.disconnect()

    async def _frontend_changed(self, state: int) -> None:
        if state == INITIALISING:
            if self.state == CLOSED:
                await self._step("reconnect", lambda: self._switch(INIT_WAIT))
            if self.state == INIT_WAIT:
                await self._step("connect", self._connect)
        elif state in (INITIALISED, CONNECTED):
            if self.state == INIT_WAIT:
                await self._step("connect", self._connect)
        elif state == CLOSING:
            await self._step("closing", lambda: self._mirror(CLOSING))
        elif state in (CLOSED, UNKNOWN):
            await self._step("closed", lambda: self._mirror(CLOSED))
            if state == UNKNOWN or not await self._online():
                await self._unregister()

    async def _probe(self) -> None:
        if self.engine is None:
            self.engine = Engine(
                self.host / f"console-{self.domid}-{self.devid}.chardev", hold=self.features.hold
            )
            self.engine.set_faults(self.plan.faults, self.plan.seed)
        await self._switch(INIT_WAIT)

    async def _connect(self) -> None:
        assert self.engine is not None
        try:
            ring_ref = await self._required(self.frontend, "ring-ref")
            port = await self._required(self.frontend, "port")
        except FrontendError:
            return  # not yet
        try:
            self.engine.connect(self.host, self.own_domid, self.domid, ring_ref, port)
        except (PvfrontError, OSError) as exc:
            log.warning("%r: ring-ref %d, port %d: %s", self, ring_ref, port, exc)
            return
        await self._switch(CONNECTED)

    async def _mirror(self, state: int) -> None:
        if self.engine is not None:
            self.engine.disconnect()
        await self._switch(state)

    def describe(self) -> dict[str, Any]:
        path = str(self.engine.path) if self.engine is not None else ""
        return {**super().describe(), "socket": path}
