# SPDX-License-Identifier: BSD-2-Clause
"""A disk's half of the device loop: grants and ports, the worker, and what exports the disk.

Theory of operation
    `DiskFrontend` is what `DeviceLoop` drives. A generation begins with `attach`: an event channel
    towards the backend's domain and one grant pool (ring pages first, data pages after) are
    opened here and handed to the worker, which from then on is their only holder. `start`
    reads the backend's keys, gives the worker its geometry and its end of a socket of the
    target (`target.py`), and publishes the disk.

    A target has one client that stays (the kernel's device) or clients that come and go. Then a
    generation may start without a socket; `update` starts each client's when it waits and the
    ring holds no request of the one before (DRAINED after TARGET_GONE: the fence).

    How large a generation's rings are is decided when the backend is at InitWait (`rings.py`):
    what both ends can, what the settings want, what the budget of granted pages has (`budget.py`).
    Where gntalloc has less than the budget thought, because other processes hold pages, smaller
    shapes are tried, and said. Features are read again at Connected, where most backends write
    them; each generation takes what its backend offers then, be it less than the one before had.
    What users were told cannot always be taken back: see target.py.

    The worker's process is `WorkerSide`'s business (workerside.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..abi import StatsUnreadable, lib, read_all_stats
from ..budget import Budget, Grant
from ..errors import PvfrontError
from ..platform import Platform
from ..startlimit import Limits
from ..states import XenbusState
from ..trace import Kind
from ..worker import Worker, WorkerError
from ..workermessage import Drained, Event, Exited, FeatureOff, Hello, State, TargetGone
from ..workerside import STALL_SECONDS, WorkerSide
from ..xenbus import XenbusDevice
from . import features, report, rings
from .features import MAX_INDIRECT_SEGMENTS, DiskGeometry, RingLimits
from .generation import opened
from .rings import Shape
from .settings import DiskSettings
from .target import Target

log = logging.getLogger(__name__)

RESIZE_POLL = 2.0  # seconds between two looks whether a disk that is to be resized is in use


class DiskFrontend(WorkerSide):
    """One vbd. See `frontend.Frontend` for what each method promises."""

    def __init__(
        self,
        name: str,
        vdev: int,
        label: str,
        platform: Platform,
        target: Target,
        *,
        settings: DiskSettings | None = None,
        budget: Budget | None = None,
        on_event: Callable[[str, Mapping[str, object]], None] = lambda event, facts: None,
        stolen: Callable[[], bool] = lambda: False,
    ) -> None:
        """`settings`: None, the defaults; `budget`: that of all disks of this service.

        `on_event` is told "resize", "eject" and "insert" (hooks.py), with the facts.
        """
        super().__init__(name, label, platform, budget=budget, stolen=stolen)
        self.vdev = vdev
        self.target = target
        self.settings = settings or DiskSettings()
        self.geometry: DiskGeometry | None = None
        self.limits = RingLimits()
        self.shape: Shape | None = None  # of the present generation
        self.off: set[str] = set()
        self._wanted_off: list[str] = []
        self._has_socket = False
        self._draining = False  # a client has left requests in the ring
        self._news = False  # a client came or went: status is to show it
        self._held = (0, 0)  # the generation, and the number of queues, that the worker has
        self._look_again: asyncio.TimerHandle | None = None
        self._used = 0  # the latest generation that was given requests
        self._drained: bool | None = None  # that one's ring; None: it ended unasked, or goes on
        self._tell_event = on_event
        if target.clients is not None:
            target.clients.on_waiting(lambda: self._poke())

    # -- what the loop asks ------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        asked = bool(self._wanted_off) or self._upgrade.ready
        return asked or self._news or self._next_client or self.target.resize_waits

    @property
    def publish_state(self) -> XenbusState:
        return XenbusState.INITIALISED

    @property
    def start_limits(self) -> Limits:
        return self.settings.start_limits

    def stale_key(self, key: str) -> bool:
        # Without virtual-device the kernel's blkfront refuses the device (blkfront_probe). Were it
        # to bind a disk that we serve, it would read from a ring that nobody maps, inside the
        # kernel's only watch thread: no watch of this guest would ever fire again.
        return key == features.VIRTUAL_DEVICE or features.stale_key(key)

    @property
    def os_path(self) -> str:
        return self.target.path if self.target.clients is None else ""

    def in_flight(self) -> int:
        # A socket's client asks the worker, and nobody else knows.
        taken = 0
        if self._worker is not None:
            with contextlib.suppress(OSError, StatsUnreadable):
                taken = sum(queue.nbd_pending for queue in read_all_stats(self._worker.stats_fd))
        return max(self.target.in_flight(), taken)

    def unfenced(self) -> str | None:
        # A ring that ended unasked: all that is known is what the kernel's device still waits for.
        if self._drained or (self._drained is None and not self.target.in_flight()):
            return None
        return f"{self.label}: its backend has not answered all requests, and may do them late"

    def busy(self) -> str | None:
        return self.target.busy()

    def details(self) -> dict[str, Any]:
        geometry = self.geometry
        found: dict[str, Any] = {
            "label": self.label,
            "serial": self.name,
            "target": self.target.kind,
            "os_device": self.target.path,
            "link": self.target.link,
            **self._worker_details(),
        }
        if self.shape is not None:
            found["rings"] = report.rings(
                self.shape, self.budget.grant(self.name), persistent=self._persistent
            )
        if self.target.clients is not None:
            found["client"] = self.target.clients.details()
        if self.target.resize_waits:
            found["resize_waits_for_last_close"] = True
        if geometry is not None:
            found["geometry"] = report.geometry(
                geometry, self._offered, by_barrier=self._by_barrier
            )
        return found

    @property
    def _persistent(self) -> bool:
        offered = self.geometry is not None and self.geometry.persistent
        return offered and self.settings.feature_persistent

    @property
    def _by_barrier(self) -> bool:
        """Whether flushes go out as barriers, for want of a flush."""
        geometry = self.geometry
        if geometry is None or "flush" in self.off:
            return False
        return geometry.barrier and not geometry.flush

    # -- its worker --------------------------------------------------------------------------

    @property
    def _most_queues(self) -> int:
        wanted = self.settings.max_queues or self.target.usual_queues
        return max(1, min(wanted, self.target.max_queues))

    @property
    def _options(self) -> Sequence[str]:
        return ["--ublk"] if self.target.stays else []

    @property
    def _replaceable(self) -> bool:
        return not self.target.stays

    async def upgrade(self) -> str:
        if self._worker is not None and not self._replaceable:
            raise PvfrontError(
                f"{self.label}: a ublk device cannot be handed over; its worker stays",
                hint="end the worker, and a new one takes its place after a pause: "
                f"kill -9 {self._worker.pid}",
            )
        return await super().upgrade()

    async def _living_worker(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            self._hold(False)
        return await super()._living_worker()

    def _use(self, worker: Worker) -> None:
        super()._use(worker)
        self.target.server_pid = worker.pid
        state = worker.hello.state if worker.hello is not None else State.IDLE
        self._draining = state is State.TARGET_LOST

    def _forget(self) -> None:
        super()._forget()
        self._draining = False

    def _hold(self, socket: bool) -> None:
        """Whether the worker has a socket of the target."""
        self._has_socket = socket
        if self.target.clients is not None:
            self.target.clients.served(socket)
            self._news = True

    def _on_event(self, event: Event) -> None:
        match event:
            case TargetGone() if self.target.clients is not None:
                level = logging.WARNING if event.error else logging.INFO
                log.log(level, "%s: %s", self.name, event)
                self._note(Kind.TARGET, str(event))
                self._draining = True
                self._hold(False)
            case TargetGone():
                self._note(Kind.TARGET, str(event))
                self._hold(False)
                self._trouble = str(event)
            case Drained():
                self._draining = False
            case Exited():
                self._hold(False)
            case FeatureOff():
                if event.feature not in self.off:  # a worker tells it again after HELLO
                    self._wanted_off.append(event.feature)
        super()._on_event(event)

    # -- the walk ----------------------------------------------------------------------------

    async def _serves(self, hello: Hello) -> bool:
        self._held = hello.generation, hello.attached
        has_device = await self.target.adopt()
        serves = hello.state is State.RUNNING and hello.has_target
        if self.target.stays:
            self._hold(hello.has_target)
        if self.target.clients is not None:
            self._hold(hello.has_target)
            # Between two clients it serves as well.
            serves = hello.state is State.RUNNING or (
                hello.state in (State.TARGET_LOST, State.DRAINED) and not hello.has_target
            )
        return has_device and serves

    async def _adopted(self, device: XenbusDevice, worker: Worker) -> bool:
        assert worker.hello is not None
        await self._read(device)
        self._used = self._generation
        self._adopt_shape(worker)
        self._hold(worker.hello.has_target)
        await self._publish()
        return True

    def _adopt_shape(self, worker: Worker) -> None:
        """What an earlier supervisor had negotiated, as far as the worker tells."""
        assert worker.hello is not None
        shape = Shape()
        with contextlib.suppress(OSError, StatsUnreadable):
            first = read_all_stats(worker.stats_fd)[0]
            shape = Shape(
                max(1, worker.hello.attached),
                max(0, (first.ring_slots // rings.SLOTS).bit_length() - 1),
                first.pool_pages,
                MAX_INDIRECT_SEGMENTS,
            )
        self.shape = shape = rings.started(shape, self.limits, self.settings)
        self.budget.hold(self.name, Grant(shape.pages, shape.pages, "as it was adopted"))

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        worker = await self._begin()
        self.limits = self._parse_limits(await device.backend_keys(features.LIMIT_KEYS))
        assert worker.hello is not None
        most = min(self._most_queues, worker.hello.queues) if _is_blkback(device) else 1
        asked = rings.wanted(self.limits, self.settings, most)
        share, why = self.budget.share(self.name)
        trusted = await device.store.read_opt(f"{device.path}/trusted")
        scrub = not features.trusted({} if trusted is None else {"trusted": trusted})
        with opened(self.platform, device.backend_id, rings.smaller(asked, share)) as made:
            if self._has_socket and len(made.queues) != self._held[1]:
                # As many sockets as queues: nobody would read from one too many.
                await worker.detach(self._held[0], keep_target=False)
                self._hold(False)
                self._trouble = None
            self._attached = True  # so it is also if the answer never comes
            try:
                for number, queue in enumerate(made.queues):
                    await worker.attach(
                        self._generation,
                        queue=number,
                        queues=len(made.queues),
                        device_class=lib.PVF_CLASS_BLK,
                        port=queue.port,
                        ring_pages=queue.ring_pages,
                        ring_offset=queue.ring_offset,
                        pool_offset=queue.pool_offset,
                        pool_grefs=queue.pool_refs,
                        scrub=scrub,
                        fds=queue.hand_over(),
                    )
            except WorkerError:
                self._attached = number > 0
                raise
            self._held = self._generation, len(made.queues)
            # The worker holds all of it now. Ours are closed without unbinding or freeing anything.
        self.shape = made.shape
        self._hold_pages(asked, made.shape, made.refused, why)
        ports = [queue.port for queue in made.queues]
        self._note(
            Kind.ATTACHED,
            f"{made.shape}, event channels {', '.join(map(str, ports))}",
            ports=ports,
            pages=made.shape.pages,
            pid=worker.pid,
        )
        return features.queue_keys(
            [(queue.port, queue.ring_refs) for queue in made.queues],
            persistent=self.settings.feature_persistent,
        )

    async def _read(self, device: XenbusDevice) -> None:
        """Reads the backend's keys, and what follows from them."""
        keys = await device.backend_keys(features.BACKEND_KEYS)
        self.geometry = await self._parse_geometry(device, keys)
        self.limits = self._parse_limits(keys)

    def _parse_limits(self, keys: Mapping[str, str]) -> RingLimits:
        limits, problems = features.parse_limits(keys)
        for problem in problems:
            log.warning("%s: backend key %s", self.name, problem)
        return limits

    async def start(self, device: XenbusDevice) -> None:
        before = self.geometry
        await self._read(device)
        assert self.shape is not None
        assert self.geometry is not None
        self.shape = rings.started(self.shape, self.limits, self.settings)
        self.off.clear()
        self._used, self._drained = self._generation, None
        if before is not None:
            for what in report.lost(before, self.geometry):
                log.warning("%s: the backend came back with less: %s", self.name, what)
        if self._has_socket:
            await self._start_worker()
        else:
            await self._start_socket()
        await self._publish()
        if before is not None and before.sectors != self.geometry.sectors:
            self._tell_size(before.size, self.geometry.size)

    async def _publish(self) -> None:
        await self.target.publish(self._offered)
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        if self.target.resize_waits:  # nobody tells when a disk's last user has closed it
            loop = asyncio.get_running_loop()
            self._look_again = loop.call_later(RESIZE_POLL, lambda: self._poke())

    async def _start_socket(self) -> None:
        """START with new sockets of the target, or with none if no client waits."""
        assert self.shape is not None
        fds = await self.target.attach(self._offered, queues=self.shape.queues)
        self._hold(bool(fds))  # first: its end may be told as soon as it is started
        try:
            await self._start_worker(fds)
        except BaseException:
            self._hold(False)
            raise
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def _offered(self) -> DiskGeometry:
        """The disk as users have it: without what its backend turned out not to have.

        A barrier does for them what a flush does: what was answered before it is on the disk.
        """
        geometry = self.geometry
        assert geometry is not None
        return replace(
            geometry,
            flush=(geometry.flush or geometry.barrier) and "flush" not in self.off,
            discard=geometry.discard and "discard" not in self.off,
        )

    async def _start_worker(self, fds: Sequence[int] = ()) -> None:
        geometry = self._offered
        assert self.shape is not None
        flags = 0
        if geometry.read_only:
            flags |= lib.PVF_BLK_READ_ONLY
        if self._by_barrier:
            flags |= lib.PVF_BLK_BARRIER
        elif geometry.flush:
            flags |= lib.PVF_BLK_FLUSH
        if geometry.discard:
            flags |= lib.PVF_BLK_DISCARD
        await self._need_worker().start(
            self._generation,
            sectors=geometry.sectors,
            sector_size=geometry.sector_size,
            flags=flags,
            max_segments=self.shape.segments,
            discard_granularity=geometry.discard_granularity,
            discard_alignment=geometry.discard_alignment,
            vdev=self.vdev,
            stall_seconds=STALL_SECONDS,
            poll_us=self.settings.poll_us,
            clients=self.target.clients is not None,
            target_fds=list(fds),
        )

    def _tell_size(self, old: int, new: int) -> None:
        """The event of another size: for the log and for hooks."""
        event = report.size_event(old, new)
        log.info(
            "%s: %s: from %d to %d sectors",
            self.name,
            event,
            old // features.SECTOR,
            new // features.SECTOR,
        )
        facts = {
            "NAME": self.label,
            "DEVICE": self.target.link,
            "OS_DEVICE": self.target.path,
            "SIZE": new,
            "OLD_SIZE": old,
        }
        self._tell_event(event, facts)

    async def _parse_geometry(
        self, device: XenbusDevice, keys: Mapping[str, str], *, may_be_empty: bool = False
    ) -> DiskGeometry:
        geometry, problems = features.parse_geometry(
            keys,
            device_type=await device.store.read_opt(f"{device.path}/device-type"),
            blkback=_is_blkback(device),
            may_be_empty=may_be_empty,
        )
        for problem in problems:
            log.warning("%s: backend key %s", self.name, problem)
        if geometry.device_type != "disk":
            raise PvfrontError(
                f"{self.label}: it is a {geometry.device_type}, not a disk; pvfront serves disks",
                hint="leave it to the kernel: name the disks to serve instead of --all",
            )
        return geometry

    async def update(self, device: XenbusDevice) -> None:
        for feature in self._wanted_off:
            log.warning(
                "%s: the backend does not support %s after all; offered no more",
                self.name,
                feature,
            )
            self.off.add(feature)
            await self.target.feature_off("flush" if feature == "flush" else "discard")
        self._wanted_off.clear()
        before = self.geometry
        keys = await device.backend_keys(features.BACKEND_KEYS)
        geometry = await self._parse_geometry(device, keys, may_be_empty=before is not None)
        if before is not None and geometry.sectors != before.sectors:
            self.geometry = geometry
            if geometry.sectors:
                await self._start_worker()
            await self._publish()
            self._tell_size(before.size, geometry.size)
        elif self.target.resize_waits:
            await self._publish()
        if self._next_client:
            await self._start_socket()
        self._news = False
        await self._upgrade_if_asked()

    @property
    def _next_client(self) -> bool:
        """Whether a client waits, and can be served."""
        clients = self.target.clients
        return (
            clients is not None
            and clients.waiting
            and not self._empty
            and not self._has_socket
            and not self._draining
        )

    @property
    def _empty(self) -> bool:
        """Without a medium: nothing is started before there is one."""
        return self.geometry is not None and not self.geometry.sectors

    async def _drain(self, worker: Worker, timeout: float) -> bool:
        drained = await super()._drain(worker, timeout)
        if self._used == self._generation:
            self._drained = drained
        return drained

    async def _let_go(self, *, keep_target: bool) -> bool:
        # Nobody would bring the requests of a client again, but of one that has none under way the
        # worker can keep the socket, and does only then.
        keep = keep_target or (self.target.clients is not None and self._has_socket)
        keep = keep and self._trouble is None
        # A ublk device stays with its worker whatever became of the ring.
        keep = keep or (self.target.stays and self._has_socket)
        kept = await super()._let_go(keep_target=keep)
        self._draining = False
        self._hold(kept and self._has_socket)
        return kept

    async def fail_after(self, seconds: float) -> None:
        try:
            await self.target.fail_after(seconds)
        except PvfrontError as error:
            log.warning("%s", error)
        if self._worker is None:
            return
        try:
            await self._worker.last(self._generation)
        except PvfrontError as error:
            log.warning("%s; the power-off may wait for it", error)

    async def close(self, *, drain: float = 10.0) -> None:
        try:
            # Without a worker nobody is there to answer.
            await self.target.close(drain=drain if self._worker is not None else 0.0)
        except PvfrontError as error:
            # The device waits for a worker that does not read: without it the kernel gives up.
            log.warning("%s; ending the worker", error)
            if self._worker is not None:
                self._worker.kill()
                with contextlib.suppress(PvfrontError):
                    await self.target.close(drain=0.0)
        self._hold(False)

    async def poisoned(self) -> None:
        self._hold(False)
        await super().poisoned()


def _is_blkback(device: XenbusDevice) -> bool:
    """Linux's, whose sector-size can be believed, and whose flush on one ring covers them all."""
    return "/backend/vbd/" in device.backend
