# SPDX-License-Identifier: BSD-2-Clause
"""A network's half of the device loop: grants and ports, the worker, and the TAP.

Theory of operation
    `NetFrontend` is what `DeviceLoop` drives. A generation begins with `attach`: for each queue
    an event channel, two pages of rings, TX pages that the backend may only read and RX pages
    that it may write, all of which pass to the worker. `start` sets up the TAP for what the
    backend can and gives the worker its queues.

    The TAP (`link.py`) stays when a generation ends, without carrier: whoever uses the interface
    sees a cable that is pulled. What was in the rings is lost, as packets may be. Carrier and speed
    follow the keys of both ends also while it is connected (`update`).

    The worker's process is `WorkerSide`'s business (workerside.py). To another one in its place the
    TAP's queues pass on.

    How many queues and pages a generation has is decided when the backend is at InitWait
    (`shape.py`): what both ends can, what the budget of granted pages has (`budget.py`). Where
    gntalloc has less than that, because other processes hold pages, or event channels run out,
    smaller shapes are tried, and said. Features are read again at Connected; each generation takes
    what its backend offers then, be it less than the one before had: offloads and MTU of the TAP
    follow, and it is said.

    Questions to the backend go over the control ring (`controlside.py`), which is ours and not the
    worker's: it is opened with the rest, and let go of wherever the rest is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..abi import StatsUnreadable, lib, read_all_net_stats
from ..budget import Budget, Grant
from ..errors import PvfrontError
from ..packettrace import PacketTrace
from ..platform import Platform
from ..states import XenbusState
from ..trace import Kind
from ..worker import Worker, WorkerError
from ..workermessage import Hello, State
from ..workerside import STALL_SECONDS, WorkerSide
from ..xenbus import XenbusDevice
from . import features, report, shape
from .controlside import ControlSide
from .features import Offer
from .generation import opened
from .link import STATE_KEYS, Link, LinkState, link_state
from .multicast import joined
from .settings import NetSettings
from .shape import Shape
from .tap import Tap, TapError

log = logging.getLogger(__name__)

DRAIN_MAPPINGS = 2.0  # for the backend to unmap pages, at the end of a quiesce


class NetFrontend(WorkerSide):
    """One vif. See `frontend.Frontend` for what each method promises."""

    waiting = "packets"

    def __init__(
        self,
        name: str,
        devid: int,
        ifname: str,
        platform: Platform,
        *,
        settings: NetSettings | None = None,
        budget: Budget | None = None,
        stolen: Callable[[], bool] = lambda: False,
    ) -> None:
        """`ifname`: the TAP's name; `settings`: None, the defaults; `budget`: that of all vifs of
        this service.
        """
        super().__init__(name, ifname, platform, budget=budget, stolen=stolen)
        self.devid = devid
        self.link = Link(name, ifname, platform.run_dir)
        settings = settings or NetSettings()
        self.max_queues = min(settings.max_queues or os.cpu_count() or 1, features.MAX_QUEUES)
        self.split = bool(settings.split_event_channels)
        self.multicast_filter = bool(settings.multicast_filter)
        self.offer: Offer | None = None
        self.shape: Shape | None = None  # of the present generation
        self.control = ControlSide(name, hashes=bool(settings.hash))
        self.trusted = True
        self.mac = b""
        self.mtu = 0  # as the toolstack says
        self.queues = 0
        self.connected = False  # the worker has the TAP's queues
        self._news = False  # the kernel says something of the interface: status is to show it
        self._state = LinkState(True)
        self._packets = PacketTrace(name)
        self._said: set[str] = set()
        self._opening: asyncio.Task[Tap] | None = None  # the last thread that made the TAP

    @property
    def ifname(self) -> str:
        return self.link.name

    @property
    def label(self) -> str:
        return self.ifname  # as it is called now

    def link_changed(self, index: int, name: str, mtu: int) -> None:
        """The kernel says what an interface is like now. It may be any."""
        if index == self.link.index and self.link.changed(name, mtu):
            self._news = True
            self._poke()

    # -- what the loop asks ------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return self._news or self._upgrade.ready

    @property
    def publish_state(self) -> XenbusState:
        return XenbusState.CONNECTED  # netback's frontend_changed() ignores Initialised

    def stale_key(self, key: str) -> bool:
        return features.stale_key(key)

    def in_flight(self) -> int:
        if self._worker is not None:
            with contextlib.suppress(OSError, StatsUnreadable):
                stats = read_all_net_stats(self._worker.stats_fd)
                return sum(queue["tx_in_flight"] for queue in stats)
        return 0

    def details(self) -> dict[str, Any]:
        return {
            "label": self.ifname,
            "target": "tap",
            "os_device": self.ifname if self.link.index else "",
            **self._worker_details(),
            "mac": self.mac.hex(":"),
            "mtu": self.link.mtu or self.mtu,
            "queues": self.queues,
            "carrier": self.connected and self.link.state.up,
            "no_carrier_because": self.link.state.why,
            "speed_mbits": self.link.state.speed,
            "trusted": self.trusted,
            "rings": report.rings(self.shape, self.budget.grant(self.name)),
            "control": self.control.details(),
            "offer": report.offered(self.offer),
        }

    # -- the walk ----------------------------------------------------------------------------

    async def _serves(self, hello: Hello) -> bool:
        return hello.state is State.RUNNING and hello.has_target

    async def _adopted(self, device: XenbusDevice, worker: Worker) -> bool:
        assert worker.hello is not None
        offer = await self._read(device)
        if not await asyncio.to_thread(self.link.found):
            log.warning("%s: its TAP has gone; connected anew", self.name)
            return False
        self.queues = worker.hello.attached
        self._adopt_shape(worker)
        self.connected = True
        self.link.most = features.MTU_LARGEST if offer.sg else features.MTU_ONE_PAGE
        await self._show_state()
        return True

    def _adopt_shape(self, worker: Worker) -> None:
        """What an earlier supervisor had negotiated, as far as the worker tells."""
        found = Shape(self.queues)
        with contextlib.suppress(OSError, StatsUnreadable):
            first = read_all_net_stats(worker.stats_fd)[0]
            found = Shape(self.queues, first["tx_pool_pages"], first["rx_pool_pages"])
        self.shape = found
        self.budget.hold(self.name, Grant(found.pages, found.pages, "as it was adopted"))
        self.control.lost()

    async def _read(self, device: XenbusDevice) -> Offer:
        """The keys of both ends. Raises NetError."""
        backend = await device.backend_keys((*features.BACKEND_KEYS, *STATE_KEYS[:1]))
        offer, problems = features.parse_offer(backend)
        ours = {
            key: value
            for key in (*features.FRONTEND_KEYS, *STATE_KEYS[1:])
            if (value := await device.store.read_opt(f"{device.path}/{key}")) is not None
        }
        self.mac = features.parse_mac(ours.get("mac", backend.get("mac")))
        self.mtu, of_mtu = features.parse_mtu(ours, backend, sg=offer.sg)
        self.trusted, of_trust = features.trusted(ours)
        self._state, of_link = link_state(backend, ours)
        for problem in (*problems, *of_mtu, *of_trust, *of_link):
            self._say(str(problem))
        before, self.offer = self.offer, offer
        for what in features.lost(before, offer) if before is not None else ():
            text = f"the backend came back with less: {what}"
            log.warning("%s: %s", self.name, text)
            self._note(Kind.NODES, text)
        return offer

    def _say(self, text: str) -> None:
        """A warning, once: keys are read twice in each connection."""
        if text not in self._said:
            self._said.add(text)
            log.warning("%s: key %s", self.name, text)

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        worker = await self._begin()
        offer = await self._read(device)
        assert worker.hello is not None
        most = min(self.max_queues, worker.hello.queues)
        asked = shape.wanted(offer, most, split=self.split)
        share, why = self.budget.share(self.name)
        first = asked if share is None else shape.fit(asked, share)
        with opened(self.platform, device.backend_id, asked, first) as made:
            self._attached = True  # so it is also if the answer never comes
            for number, queue in enumerate(made.queues):
                try:
                    await worker.attach(
                        self._generation,
                        queue=number,
                        queues=made.shape.queues,
                        device_class=lib.PVF_CLASS_NET,
                        port=queue.port,
                        rx_port=queue.rx_port,
                        ring_pages=shape.RING_PAGES,
                        ring_offset=queue.ring.offset,
                        pool_offset=queue.tx.offset,
                        pool_grefs=queue.pool_refs,
                        tx_pages=made.shape.tx,
                        scrub=not self.trusted,
                        fds=queue.hand_over(),
                    )
                except WorkerError:
                    self._attached = number > 0
                    raise
            # The worker holds all of it now. Ours are closed without unbinding or freeing anything.
        control = self.control.open(self.platform, device.backend_id, offered=offer.ctrl_ring)
        self.control.has_pools([(queue.tx.grefs, queue.rx.grefs) for queue in made.queues])
        self.queues = made.shape.queues
        self.shape = made.shape
        self._hold_pages(asked, made.shape, made.refused, why, more=self.control.pages)
        ports = [port for queue in made.queues for port in queue.ports]
        of_control = "".join(f"; control ring {port}" for port in self.control.ports)
        self._note(
            Kind.ATTACHED,
            f"{made.shape}, event channels {', '.join(map(str, ports))}{of_control}",
            ports=ports,
            refs=[ref for queue in made.queues for ref in queue.first_refs],
            pages=made.shape.pages + self.control.pages,
            pid=worker.pid,
        )
        return features.frontend_keys(
            [queue.keys for queue in made.queues],
            offer=offer,
            control=control,
            multicast_filter=self.multicast_filter,
        )

    async def start(self, device: XenbusDevice) -> None:
        offer = await self._read(device)
        await self.control.set_up()
        tap = await self._open_tap(offer)
        # Without an await in between: what is open is given away or closed.
        groups = joined(self.ifname) if offer.multicast_control else ()
        fds = tap.give()
        try:
            await self._need_worker().start_net(
                self._generation,
                features=report.bits(offer),
                stall_seconds=STALL_SECONDS,
                target_fds=fds,
                groups=groups,
            )
        finally:
            for fd in fds:
                os.close(fd)
        if features.multicast_later(offer, multicast_filter=self.multicast_filter):
            await device.store.write(f"{device.path}/{features.REQUEST_MULTICAST}", "1")
        self.connected = True
        await self._show_state()
        self.link.announce()

    async def _open_tap(self, offer: Offer) -> Tap:
        await self._opened()
        self._opening = asyncio.create_task(asyncio.to_thread(self._set_up, offer))
        try:
            return await asyncio.shield(self._opening)
        except asyncio.CancelledError:
            # The thread goes on to its end; a TAP that nobody reads must not keep its carrier.
            self._opening.add_done_callback(_close_tap)
            raise

    async def _opened(self) -> None:
        """Returns once no thread makes the TAP any more for a start that was cancelled."""
        if self._opening is not None:
            await asyncio.wait({self._opening})

    def _set_up(self, offer: Offer) -> Tap:
        """The TAP with its queues. It has a carrier as soon as somebody has one of them."""
        most = features.MTU_LARGEST if offer.sg else features.MTU_ONE_PAGE
        tap = self.link.open(self.queues, mac=self.mac, mtu=self.mtu, most=most)
        try:
            # What the backend cannot finish of a checksum is finished by the worker.
            tap.set_offloads(csum=True, tso4=offer.gso_tcpv4, tso6=offer.gso_tcpv6)
        except BaseException:
            tap.close()
            raise
        return tap

    async def _show_state(self) -> None:
        try:
            await asyncio.to_thread(self.link.set_state, self._state)
        except TapError as error:
            log.warning("%s: %s", self.name, error)

    async def update(self, device: XenbusDevice) -> None:
        self._news = False
        before = self._state
        with contextlib.suppress(PermissionError, FileNotFoundError):  # the nodes are going
            backend = await device.backend_keys(STATE_KEYS[:1])
            ours = {
                key: value
                for key in STATE_KEYS[1:]
                if (value := await device.store.read_opt(f"{device.path}/{key}")) is not None
            }
            self._state, problems = link_state(backend, ours)
            for problem in problems:
                self._say(str(problem))
        if self._state != before:
            await self._show_state()
        await self._upgrade_if_asked()

    # -- the end of a generation ---------------------------------------------------------------

    async def _drain(self, worker: Worker, timeout: float) -> bool:
        until = asyncio.get_running_loop().time() + timeout
        drained = await super()._drain(worker, timeout)
        if drained:
            left = until - asyncio.get_running_loop().time()
            await self.control.take_back(max(0.1, min(left, DRAIN_MAPPINGS)))
        return drained

    async def detach(self, *, keep_target: bool) -> None:
        """Without carrier its queues are of no use: the TAP gives new ones each time."""
        self.control.close()
        await super().detach(keep_target=False)
        self.connected = False
        self.shape = None
        self.link.silence()

    async def close(self, *, drain: float = 10.0) -> None:
        """The interface goes, and its name is free again; what was configured on it is noted."""
        await self._opened()  # else it would come after us, and keep the name from the kernel's
        try:
            await asyncio.to_thread(self.link.close)
        except PvfrontError as error:
            log.warning("%s: %s", self.name, error)

    async def end(self) -> None:
        self._packets.close()
        self.control.close()
        await super().end()

    async def poisoned(self) -> None:
        self.connected = False
        self.link.silence()
        await self.control.poisoned()
        await super().poisoned()

    # -- its worker --------------------------------------------------------------------------

    @property
    def _most_queues(self) -> int:
        return self.max_queues

    @property
    def _options(self) -> Sequence[str]:
        return ["--net"]

    async def packets(self) -> dict[str, Any]:
        return await self._packets.renew(self._need_worker())


def _close_tap(opening: asyncio.Task[Tap]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
