# SPDX-License-Identifier: BSD-2-Clause
"""A network's half of the device loop: grants and ports, the worker, and the TAP.

Theory of operation
    `NetFrontend` is what `DeviceLoop` drives. A generation begins with `attach`: for each queue
    an event channel, two pages of rings, TX pages that the backend may only read and RX pages
    that it may write, all of which pass to the worker. `start` sets up the TAP for what the
    backend can, gives the worker its queues and switches the carrier on.

    The TAP stays when a generation ends, without carrier: whoever uses the interface sees a cable
    that is pulled. What was in the rings is lost, as packets may be.

    After each connect the neighbours are told where the address is now, by whoever has addresses
    on the interface: the kernel does so when a carrier comes, where arp_notify and ndisc_notify
    are set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..abi import StatsUnreadable, lib, read_all_net_stats
from ..errors import PvfrontError
from ..parking import CannotPark, park
from ..platform import Platform
from ..startlimit import Limits
from ..states import XenbusState
from ..trace import Kind, Note, nothing
from ..worker import Worker, WorkerError, WorkerGone
from ..workermessage import Broken, Event, Exited, Stalled, State
from ..xenbus import XenbusDevice
from . import features
from .features import Offer, QueueKeys
from .tap import Tap, TapError, announce, delete

log = logging.getLogger(__name__)

STALL_SECONDS = 10
SETTLE = 2.0
TX_PAGES = 288  # a ring of 256 slots, and the packet that is read while all are out
RX_PAGES = 256
RING_PAGES = 2


class NetFrontend:
    """One vif. See `frontend.Frontend` for what each method promises."""

    def __init__(
        self,
        name: str,
        devid: int,
        ifname: str,
        platform: Platform,
        *,
        max_queues: int = 0,
        stolen: Callable[[], bool] = lambda: False,
    ) -> None:
        """`ifname`: the TAP's name; `max_queues`: 0, one for each processor."""
        self.name = name
        self.devid = devid
        self.ifname = ifname
        self.platform = platform
        self.run_dir = platform.run_dir
        self.max_queues = min(max_queues or os.cpu_count() or 1, features.MAX_QUEUES)
        self.offer: Offer | None = None
        self.mac = b""
        self.mtu = 0
        self.queues = 0
        self.carrier = False
        self.stalled = 0
        self._worker: Worker | None = None
        self._generation = 0
        self._attached = False
        self._broken = False
        self._trouble: str | None = None
        self._poke: Callable[[], None] = lambda: None
        self._note: Note = nothing
        self._stolen = stolen

    # -- what the loop asks ------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        return self._trouble

    @property
    def pending(self) -> bool:
        return False

    @property
    def publish_state(self) -> XenbusState:
        return XenbusState.CONNECTED  # netback's frontend_changed() ignores Initialised

    @property
    def start_limits(self) -> Limits:
        return Limits()

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def os_path(self) -> str:
        return ""  # nothing of a suspend's concern: no file system is here

    def on_poke(self, poke: Callable[[], None]) -> None:
        self._poke = poke

    def on_note(self, note: Note) -> None:
        self._note = note

    def stale_key(self, key: str) -> bool:
        return features.stale_key(key)

    def stolen(self) -> bool:
        return self._stolen()

    def in_flight(self) -> int:
        if self._worker is not None:
            with contextlib.suppress(OSError, StatsUnreadable):
                stats = read_all_net_stats(self._worker.stats_fd)
                return sum(queue["tx_in_flight"] for queue in stats)
        return 0

    def busy(self) -> str | None:
        return None  # an interface may always be unplugged

    def details(self) -> dict[str, Any]:
        worker = self._worker
        offer = self.offer
        return {
            "label": self.ifname,
            "target": "tap",
            "os_device": self.ifname if self.queues else "",
            "worker_pid": worker.pid if worker is not None else None,
            "stalled_seconds": self.stalled,
            "statistics_file": (
                f"/proc/{os.getpid()}/fd/{worker.stats_fd}"
                if worker is not None and worker.stats_fd >= 0
                else None
            ),
            "mac": self.mac.hex(":"),
            "mtu": self.mtu,
            "queues": self.queues,
            "carrier": self.carrier,
            "offer": None
            if offer is None
            else {name: getattr(offer, name) for name in offer.__dataclass_fields__},
        }

    # -- the walk ----------------------------------------------------------------------------

    async def adopt(self, device: XenbusDevice) -> bool:
        worker = await Worker.adopt(self.name, self.run_dir)
        if worker is None:
            return False
        self._use(worker)
        hello = worker.hello
        assert hello is not None
        self._note(Kind.WORKER, f"found, {hello.state.name}: pid {worker.pid}", pid=worker.pid)
        self._generation = hello.generation
        view = device.view
        serves = hello.state is State.RUNNING and hello.has_target
        if not (serves and view.frontend is view.backend is XenbusState.CONNECTED):
            log.warning(
                "%s: found a worker (pid %d, %s) that cannot be adopted as it is (%s)",
                self.name, worker.pid, hello.state.name, view,
            )  # fmt: skip
            if hello.state is not State.IDLE:
                if view.moved or view.frontend is XenbusState.INITIALISING:
                    await self.poisoned()
                else:
                    await self.detach(keep_target=False)
            return False
        await self._read(device)
        self.queues = hello.attached
        self.carrier = True
        log.info("%s: adopted worker %d, generation %d", self.name, worker.pid, hello.generation)
        return True

    async def _read(self, device: XenbusDevice) -> Offer:
        """The keys of both ends. Raises NetError."""
        backend = await device.backend_keys()
        offer, problems = features.parse_offer(backend)
        ours = {
            key: value
            for key in ("mac", "mtu", "trusted", "disconnect")
            if (value := await device.store.read_opt(f"{device.path}/{key}")) is not None
        }
        self.mac = features.parse_mac(ours.get("mac", backend.get("mac")))
        self.mtu, more = features.parse_mtu(ours, sg=offer.sg)
        for problem in (*problems, *more):
            log.warning("%s: %s", self.name, problem)
        self.offer = offer
        return offer

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        self._trouble = None
        self._broken = False
        self._generation += 1
        worker = await self._living_worker()
        offer = await self._read(device)
        queues = max(1, min(self.max_queues, offer.max_queues))
        scrub = (await device.store.read_opt(f"{device.path}/trusted") or "1").strip() != "1"
        keys = []
        with contextlib.ExitStack() as stack:
            self._attached = True  # so it is also if the answer never comes
            for number in range(queues):
                channels = stack.enter_context(self.platform.event_channels())
                port = channels.bind_unbound(device.backend_id)
                grants = stack.enter_context(self.platform.grant_allocator())
                ring = grants.alloc(device.backend_id, RING_PAGES)
                tx = grants.alloc(device.backend_id, TX_PAGES, writable=False)
                rx = grants.alloc(device.backend_id, RX_PAGES)
                try:
                    await worker.attach(
                        self._generation,
                        queue=number,
                        queues=queues,
                        device_class=lib.PVF_CLASS_NET,
                        port=port,
                        ring_pages=RING_PAGES,
                        ring_offset=ring.offset,
                        pool_offset=tx.offset,
                        pool_grefs=(*tx.grefs, *rx.grefs),
                        tx_pages=TX_PAGES,
                        scrub=scrub,
                        fds=(channels.hand_over(port), grants.hand_over()),
                    )
                except WorkerError:
                    self._attached = number > 0
                    raise
                keys.append(QueueKeys(ring.grefs[0], ring.grefs[1], port))
        self.queues = queues
        ports = [queue.port for queue in keys]
        self._note(
            Kind.ATTACHED,
            f"{queues} queue{'s' * (queues > 1)}, event channels {', '.join(map(str, ports))}",
            ports=ports,
            pages=queues * (RING_PAGES + TX_PAGES + RX_PAGES),
            pid=worker.pid,
        )
        return features.frontend_keys(keys, offer=offer)

    async def start(self, device: XenbusDevice) -> None:
        offer = await self._read(device)
        tap = await asyncio.to_thread(self._set_up, offer)
        fds = tap.give()
        try:
            await self._need_worker().start_net(
                self._generation,
                features=_bits(offer),
                stall_seconds=STALL_SECONDS,
                target_fds=fds,
            )
        finally:
            for fd in fds:
                os.close(fd)
        self.carrier = True
        await asyncio.to_thread(self._announce)

    def _set_up(self, offer: Offer) -> Tap:
        """The TAP with its queues. It has a carrier as soon as somebody has one of them."""
        tap = Tap.open(self.ifname, self.queues)
        try:
            tap.configure(mac=self.mac, mtu=self.mtu)
            # What the backend cannot finish of a checksum is finished by the worker.
            tap.set_offloads(csum=True, tso4=offer.gso_tcpv4, tso6=offer.gso_tcpv6)
        except BaseException:
            tap.close()
            raise
        return tap

    def _announce(self) -> None:
        try:
            announce(self.ifname)
        except TapError as error:
            log.warning("%s: its neighbours are not told: %s", self.name, error)

    async def update(self, device: XenbusDevice) -> None:
        return

    def outdated(self) -> bool:
        return False

    async def upgrade(self) -> str:
        raise PvfrontError(f"{self.ifname}: a network's worker cannot be handed over")

    async def quiesce(self, timeout: float) -> bool:
        worker = self._worker
        if worker is None or self._broken:
            return False
        if not self._attached:
            return True
        try:
            return await worker.quiesce(self._generation, timeout)
        except PvfrontError as error:
            log.warning("%s", error)
            return False

    async def detach(self, *, keep_target: bool) -> None:
        worker = self._worker
        if worker is not None and not self._attached:
            return
        if worker is not None:
            try:
                await worker.detach(self._generation, keep_target=False)
            except (WorkerGone, WorkerError) as error:
                log.warning("%s; ending the worker", error)
                self._note(Kind.WORKER, f"killed: {error}", pid=worker.pid)
                worker.kill()
                await worker.ended(SETTLE)
                self._forget()
        if self._attached:
            self._note(Kind.DETACHED, "event channels and granted pages are let go of")
        self._attached = False
        self.carrier = False

    async def fail_after(self, seconds: float) -> None:
        return  # packets wait for nobody

    async def close(self, *, drain: float = 10.0) -> None:
        """The interface goes, and its name is free again."""
        try:
            await asyncio.to_thread(delete, self.ifname)
        except TapError as error:
            log.warning("%s: %s", self.name, error)

    async def end(self) -> None:
        if self._worker is not None:
            self._worker.on_event = lambda event: None
            await self._worker.exit()
            self._note(Kind.WORKER, f"ended: pid {self._worker.pid}", pid=self._worker.pid)
            self._forget()
        (self.run_dir / f"{self.name}.sock").unlink(missing_ok=True)

    async def poisoned(self) -> None:
        worker = self._worker
        self.carrier = False
        self._trouble = "the domain was suspended while connected"
        if worker is None:
            return
        worker.on_event = lambda event: None
        try:
            parker, ports = await park(worker.pid)
        except CannotPark as error:
            log.error("%s: %s", self.name, error)
            with contextlib.suppress(PvfrontError):
                await worker.detach(self._generation, keep_target=False, park=True)
            (self.run_dir / f"{self.name}.sock").unlink(missing_ok=True)
        else:
            what = f"killed: pid {worker.pid}; its {ports} ports are kept by process {parker}"
            self._note(Kind.WORKER, what, pid=worker.pid, parker=parker, ports=ports)
            worker.kill()
            await worker.ended(SETTLE)
        self._forget()

    # -- the worker --------------------------------------------------------------------------

    async def _living_worker(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            try:
                self._use(
                    await Worker.spawn(
                        self.name,
                        self.run_dir,
                        queues=self.max_queues,
                        change_user=self.platform.name == "xen",
                        net=True,
                    )
                )
            except WorkerGone as error:
                self._note(Kind.DIED, str(error).removeprefix(f"{self.name}: "))
                raise
            pid = self._need_worker().pid
            self._note(Kind.WORKER, f"started: pid {pid}", pid=pid)
        return self._need_worker()

    def _need_worker(self) -> Worker:
        if self._worker is None:
            raise WorkerGone(f"{self.name}: there is no worker")
        return self._worker

    def _use(self, worker: Worker) -> None:
        self._worker = worker
        state = worker.hello.state if worker.hello is not None else State.IDLE
        self._attached = state is not State.IDLE
        worker.on_event = self._on_event

    def _forget(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._attached = False

    def _on_event(self, event: Event) -> None:
        match event:
            case Broken():
                self._broken = True
                self._trouble = str(event)
                self._note(
                    Kind.BROKEN, str(event), rule=event.rule, field=event.field, value=event.value
                )
            case Exited():
                self._note(Kind.DIED, event.text)
                self._trouble = event.text
                self._forget()
            case Stalled():
                self.stalled = event.seconds
        self._poke()


def _bits(offer: Offer) -> int:
    bits = {
        lib.PVF_NET_SG: offer.sg,
        lib.PVF_NET_CSUM4: offer.csum_ipv4,
        lib.PVF_NET_CSUM6: offer.csum_ipv6,
        lib.PVF_NET_GSO4: offer.gso_tcpv4,
        lib.PVF_NET_GSO6: offer.gso_tcpv6,
    }
    return sum(bit for bit, has in bits.items() if has)
