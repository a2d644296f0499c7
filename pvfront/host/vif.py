# SPDX-License-Identifier: BSD-2-Clause
"""One network interface's backend in the store: the walk of Linux's netback, on busdevice.py.

Theory of operation. It follows drivers/net/xen-netback/xenbus.c (`set_backend_state`), its oddities
included, because frontends are written against them:

* Everything that it can is published with InitWait. The frontend's Initialised is passed over; its
  keys are read when it is Connected.
* Connected is written once `hotplug-status` says `connected`, and so is every state before that.
* From a state to another it goes through all those between: from Connected to InitWait by Closing
  and Closed.
* Which multicast packets are passed on is looked at with Connected, and again whenever
  `request-multicast-control` is written, if the backend offers that. `xdp-headroom` is looked at
  with Connected; nobody here goes through Reconfiguring.
* A frontend that breaks the rings' protocol ends its vif: nothing is carried any more, and the
  states stay as they are.

The interface's other end is a TAP, named `vifname` or vifDOMID.DEVID, in the network namespace
that this process runs in. It is there from the probe to the end, as netback's; its carrier is on
while a frontend is connected. What a hotplug script does is done here: address (`ip`), MTU, bridge,
`hotplug-status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import Any

from pvfront.errors import PvfrontError
from pvfront.host import hotplug
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
from pvfront.host.netengine import Control, Engine, Features, Queue, Wishes
from pvfront.netfront.tap import Tap
from pvfront.xenstore import XenstoreError

log = logging.getLogger(__name__)

HOTPLUGGED = "connected"
MOST_HEADROOM = 0x7FFF  # XEN_NETIF_MAX_XDP_HEADROOM


class Vif(BusDevice[Engine, Features]):
    """The backend's end of one network interface."""

    KLASS = "vif"
    PUBLISHED = r"feature-|multi-queue-max-queues$|hotplug-status$|carrier$"

    tap = ""
    """Its name, once it is there."""
    _is = UNKNOWN
    """Where the walk is; `state` is what was written, which waits for the hotplug script."""
    _deferred = False
    _filtering: asyncio.Task[None] | None = None

    # -- the device on its bus -------------------------------------------------------------------

    async def linger(self) -> None:
        """Lets go of the frontend; the TAP goes."""
        self._disconnect()
        if not self.keep_engine:
            await self.leave()

    async def leave(self) -> None:
        """The TAP goes with its backend."""
        self._disconnect()
        if self.tap:
            name, self.tap = self.tap, ""
            await asyncio.to_thread(hotplug.offline, name)

    def _disconnect(self) -> None:
        if self._filtering is not None:
            self._filtering.cancel()
            self._filtering = None
        if self.engine is not None:
            self.engine.disconnect()

    async def _own_changed(self) -> None:
        if self._deferred and await self._read("hotplug-status") == HOTPLUGGED:
            self._deferred = False
            await self._switch(self._is)

    async def _frontend_changed(self, state: int) -> None:
        log.debug("%r: frontend %d, own state %d", self, state, self._is)
        if state == INITIALISING:
            if self._is != INIT_WAIT:
                await self._step("reconnect", lambda: self._towards(INIT_WAIT))
        elif state == INITIALISED:
            pass
        elif state == CONNECTED:
            if self._is != CONNECTED:
                await self._step("connect", lambda: self._towards(CONNECTED))
        elif state == CLOSING:
            await self._step("closing", lambda: self._towards(CLOSING))
        elif state == CLOSED:
            await self._step("closed", self._close)
        elif state == UNKNOWN:
            await self._towards(CLOSED)
            await self._unregister()
        else:
            await self._fatal(errno.EINVAL, f"saw state {state} at frontend")

    async def jump(self, state: int) -> None:
        """Writes any number as its state."""
        await super().jump(state)
        self._is = state

    # -- honest steps ----------------------------------------------------------------------------

    async def _probe(self) -> None:
        if self.engine is None:
            self.engine = Engine()
            self.engine.set_faults(self.plan.faults, self.plan.seed)
        f = self.features
        await self._publish(
            {
                "feature-sg": flag(f.sg),
                "feature-gso-tcpv4": flag(f.gso_tcpv4),
                "feature-gso-tcpv6": flag(f.gso_tcpv6),
                "feature-no-csum-offload": None if f.csum else "1",
                "feature-ipv6-csum-offload": flag(f.ipv6_csum),
                "feature-rx-copy": flag(f.rx_copy),
                "feature-rx-flip": "0",
                "feature-multicast-control": flag(f.multicast_control),
                "feature-dynamic-multicast-control": flag(f.dynamic_multicast_control),
                "feature-split-event-channels": flag(f.split_event_channels),
                "feature-ctrl-ring": flag(f.ctrl_ring),
                "feature-xdp-headroom": flag(f.xdp_headroom),
                "multi-queue-max-queues": str(f.queues),
            }
        )
        await self._hotplug()
        self._is = INIT_WAIT
        await self._switch(INIT_WAIT)

    async def _hotplug(self) -> None:
        """As the kernel's vif and its script: the interface, and what is configured of it."""
        keys = {key: await self._read(key) or "" for key in ("vifname", "mtu", "ip", "bridge")}
        name = keys["vifname"] or f"vif{self.domid}.{self.devid}"
        mtu = int(keys["mtu"]) if keys["mtu"].isdecimal() else hotplug.MTU
        try:
            await asyncio.to_thread(
                hotplug.online, name, mtu, keys["ip"].split(), keys["bridge"], self.features.queues
            )
        except PvfrontError as exc:
            await self._publish({"hotplug-status": "error", "hotplug-error": str(exc)})
            log.error("%r: %s", self, exc)
            return
        self.tap = name
        await self._publish({"hotplug-status": HOTPLUGGED})

    async def _towards(self, wanted: int) -> None:
        """As set_backend_state."""
        while self._is != wanted:
            if self._is == CLOSED:
                step = CLOSING if wanted == CLOSING else INIT_WAIT
            elif self._is == INIT_WAIT:
                step = CONNECTED if wanted == CONNECTED else CLOSING
            elif self._is == CONNECTED:
                step = CLOSING
            else:
                step = CLOSED
            if step == CONNECTED and not await self._connect():
                return
            if self._is == CONNECTED:
                self._disconnect()
            await self._enter(step)

    async def _enter(self, state: int) -> None:
        self._is = state
        self._deferred = state == CONNECTED and await self._read("hotplug-status") != HOTPLUGGED
        if not self._deferred:
            await self._switch(state)

    async def _connect(self) -> bool:
        assert self.engine is not None
        try:
            queues, wishes, csum = await self._read_frontend()
            control = await self._read_control()
            taps = await asyncio.to_thread(self._open_tap, len(queues), wishes, csum)
            self.engine.connect(
                self.host, self.own_domid, self.domid, queues, taps, wishes, control=control,
                gref_mapping=self.features.gref_mapping if self.features.ctrl_ring else 0,
            )  # fmt: skip
            if self.features.xdp_headroom:
                room = await self._number(self.frontend, "xdp-headroom", 0)
                self.engine.set_headroom(min(room, MOST_HEADROOM))
            if self.features.multicast_control:
                await self._sample_filter()
                if self.features.dynamic_multicast_control:
                    self._filtering = asyncio.create_task(self._follow_filter())
            self.engine.start()
        except FrontendError as exc:
            await self._failed(errno.EINVAL, str(exc))
        except EngineError as exc:
            await self._failed(exc.errno, str(exc))
        except PvfrontError as exc:
            await self._failed(errno.EIO, str(exc))
        else:
            split = any(queue.rx_port is not None for queue in queues)
            log.info(
                "%r: connected, %d queues%s%s, %s, %s",
                self, len(queues), ", split event channels" * split,
                ", control ring" * (control is not None), wishes, self.tap,
            )  # fmt: skip
            return True
        return False

    async def _sample_filter(self) -> None:
        assert self.engine is not None
        wanted = await self._number(self.frontend, "request-multicast-control", 0)
        self.engine.set_filter(bool(wanted))

    async def _follow_filter(self) -> None:
        with contextlib.suppress(XenstoreError):  # the store has gone, and all with it
            async with self.store.watch(f"{self.frontend}/request-multicast-control") as watch:
                async for _ in watch:
                    await self._sample_filter()

    async def _failed(self, code: int, text: str) -> None:
        await self._fatal(code, text)
        self._is = self.state

    def _open_tap(self, queues: int, wishes: Wishes, csum: bool) -> list[int]:
        if not self.tap:
            raise PvfrontError("it has no interface")
        tap = Tap.open(self.tap, queues)
        try:
            tap.set_offloads(csum=csum, tso4=wishes.gso_tcpv4, tso6=wishes.gso_tcpv6)
        except BaseException:
            tap.close()
            raise
        return tap.give()

    async def _close(self) -> None:
        await self._towards(CLOSED)
        if not await self._online():
            await self._unregister()

    async def _read_frontend(self) -> tuple[list[Queue], Wishes, bool]:
        """As `connect` and `read_xenbus_vif_flags`; whether it takes packets without a checksum.
        Raises FrontendError.
        """
        front = self.frontend
        count = await self._number(front, "multi-queue-num-queues", 1)
        if not 1 <= count <= self.features.queues:
            raise FrontendError(
                f"guest requested {count} queues, exceeding the maximum of {self.features.queues}."
            )
        queues = [
            await self._read_queue(front if count == 1 else f"{front}/queue-{index}")
            for index in range(count)
        ]
        if not await self._number(front, "request-rx-copy", 0):
            raise FrontendError("request-rx-copy is not 1: there is no other way")
        sg = bool(await self._number(front, "feature-sg", 0))
        wishes = Wishes(
            sg=sg,
            gso_tcpv4=sg and bool(await self._number(front, "feature-gso-tcpv4", 0)),
            gso_tcpv6=sg and bool(await self._number(front, "feature-gso-tcpv6", 0)),
        )
        # A TAP has one word for both families.
        csum = not await self._number(front, "feature-no-csum-offload", 0) and bool(
            await self._number(front, "feature-ipv6-csum-offload", 0)
        )
        return queues, wishes, csum

    async def _read_queue(self, where: str) -> Queue:
        tx, rx = [await self._required(where, f"{way}-ring-ref") for way in ("tx", "rx")]
        if await self.store.read_opt(f"{where}/event-channel-tx") is None:
            return Queue(tx, rx, await self._required(where, "event-channel"))
        ports = [await self._required(where, f"event-channel-{way}") for way in ("tx", "rx")]
        return Queue(tx, rx, *ports)

    async def _read_control(self) -> Control | None:
        """As connect_ctrl_ring: a frontend may do without."""
        if await self.store.read_opt(f"{self.frontend}/ctrl-ring-ref") is None:
            return None
        return Control(
            await self._required(self.frontend, "ctrl-ring-ref"),
            await self._required(self.frontend, "event-channel-ctrl"),
        )

    def describe(self) -> dict[str, Any]:
        mistake = self.engine.mistake() if self.engine is not None else ""
        return {**super().describe(), "tap": self.tap, "mistake": mistake}

    # -- missteps --------------------------------------------------------------------------------

    async def carrier(self, up: bool) -> None:
        """Tells the frontend whether the link is up (netif.h)."""
        await self._publish({"carrier": flag(up)})
