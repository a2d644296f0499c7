# SPDX-License-Identifier: BSD-2-Clause
"""What exports a disk: one small interface, and the kernel's nbd device behind it.

The other implementation is `nbdexport.SocketTarget`, for clients without a kernel driver.

Theory of operation
-------------------
A target outlives the connections to the backend. The kernel's device keeps the requests that a
dead worker or a restarted backend left unfinished, and its users notice nothing but a pause. Each
generation does

    fds = await target.attach(geometry, queues=n)   fresh socket pairs: one end of each is the
    ... START(geometry, fds) to the worker; close ...                 kernel's from now on
    await target.publish(geometry)                  the disk has its size, and its link

- `attach` the first time makes the device with **size 0**: it exists, its queue is set up, and it
  accepts no request. `publish` gives it the size; the partition scan, which reads at once,
  finds a worker that serves. Later, `attach` gives the kernel a new socket for the dead one, and
  nothing else: a size in the same command could wait for requests that wait for the socket.
- The kernel takes a new socket only after it has noticed that the old one is dead, and answers
  success in any case. So `attach` closes its copy of the kernel's end and looks whether the
  worker's end has hung up; if so it tries again with another pair. Only an end that the kernel
  really holds is handed out: the worker never sees a false end of stream.
- The kernel may still give up a socket it has just taken, when the receiver of the old one runs
  late (recv_work marks whatever socket is current as dead). The worker then reports the end of
  its socket, and the caller starts the next generation as for any other loss.
- What was sent on the old socket and not answered is sent again when its request timer expires
  (nbd_xmit_timeout compares socket cookies): within `io_timeout_ms` plus up to two seconds of timer
  rounding. With NBD_ATTR_TIMEOUT=0 the same timer only logs "Possible stuck request" for a slow
  server. Requests that were waiting to be sent go out at once.
- A size of 0 makes the kernel refuse new requests to the whole disk: EIO to file systems, ENOSPC
  and end of file to programs. It does not reach partitions, whose requests are checked against
  their own end: an open partition goes on. `close` therefore waits for requests in flight only
  up to its deadline.
- nbd keeps the flags of its first connect. A feature that the backend loses is taken away
  through sysfs; one that it gains later appears only on a new device. A disk that has become
  read-only stays writable for the kernel, and its writes fail; another sector size is refused
  as long as the disk is connected.
- What nbd cannot carry (physical sectors, discard geometry, removable, a serial) stands in
  /run/pvfront/udev/nbdN for udev's rules, before the size that makes udev look.

Several sockets, one for each queue of the worker
- They are a device's hardware queues, and as many as its CONNECT had for its whole life. A
  generation with fewer queues replaces some of the dead sockets; what belongs to the others goes
  over a living one (find_fallback). One with more gets no more than the device has.
- Such a device needs NBD_FLAG_CAN_MULTI_CONN: a flush on one socket covers what was answered on
  the others. It does with blkback, whose flush and barrier are the disk's (dispatch_rw_block_io:
  REQ_PREFLUSH). So a frontend asks for several queues of such backends only.
- A request timer that expires while its socket is alive makes the kernel declare the socket dead,
  however NBD_ATTR_TIMEOUT is set, and send the request again **on another living socket**, at once
  (nbd_xmit_timeout). Were the first still unread, or in a ring, it could land after a newer write.
  So there `io_timeout` is three times what the worker has patience for: it closes all of its
  sockets before the kernel loses its own (PVF_NBD_PATIENCE_SECONDS). The price is that a replay
  after the death of a worker waits that long.

Nothing here waits for the disk in the event loop's thread: netlink commands and the exclusive
open run in daemon threads with a deadline, because a thread that hangs in the kernel must not hang
the loop, nor the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .. import sysfs, threads
from ..abi import lib
from ..errors import PvfrontError
from . import nbd, nbdrefuse
from .blockdisk import POLL, BlockDisk, Feature, within
from .features import DiskGeometry

log = logging.getLogger(__name__)

T = TypeVar("T")

_COMMAND_DEADLINE = 15.0
_REFUSED = 6.0  # seconds; what the dead one had been sent comes with its timer, in 2 to 4
_LAST_CLOSE = 1.0  # seconds for udev to let go of a device that was just closed
_NO_TIMEOUT = 10 * 365 * 24 * 3600  # seconds; requests wait for us as long as it takes


class TargetError(PvfrontError):
    """The device could not be made, attached, resized or closed."""


class Clients(Protocol):
    """What a target has besides if its clients come and go: a socket's do, the kernel stays.

    `Target.attach` then returns the socket of the client that waits, if one does; the end of a
    socket is its client's business and no trouble.
    """

    @property
    def waiting(self) -> bool:
        """A client waits to be served: `Target.attach` returns its socket."""
        ...

    def on_waiting(self, poke: Callable[[], None]) -> None:
        """`poke` is to be called whenever `waiting` becomes true."""

    def served(self, connected: bool) -> None:
        """The worker holds a client's socket; or it does not, and the next client may come."""
        ...

    def details(self) -> dict[str, Any]:
        """What status shows of the clients."""
        ...


class Target(Protocol):
    """What users have of a disk: a block device, or a socket, whose requests a worker serves."""

    @property
    def clients(self) -> Clients | None:
        """None: the one client is the kernel, which stays."""
        ...

    @property
    def kind(self) -> str:
        """What it is: "nbd", "ublk", "socket" or "lent"."""
        ...

    @property
    def stays(self) -> bool:
        """The worker keeps its end, and the unanswered requests, from generation to generation.

        Only a new worker needs `attach`.
        """
        ...

    server_pid: int
    """The worker's; the caller says it before `publish`."""

    @property
    def resize_waits(self) -> bool:
        """Users still see the size of before: `publish` again when they have closed the disk."""
        ...

    @property
    def name(self) -> str:
        """The kernel's name ("nbd0"); "" while there is no device."""
        ...

    @property
    def path(self) -> str:
        """The device node ("/dev/nbd0"), or the URI of a socket; "" while there is nothing."""
        ...

    @property
    def link(self) -> str:
        """The stable path ("/dev/pvfront/xvdb"), a socket's path."""
        ...

    @property
    def max_queues(self) -> int:
        """How many queues the next `attach` can have."""
        ...

    @property
    def usual_queues(self) -> int:
        """How many it has unless somebody sets `max_queues`."""
        ...

    async def adopt(self) -> bool:
        """Finds the device of an earlier supervisor; True if there is one."""
        ...

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        """Makes a new connection for each queue; returns the worker's ends for the caller to close.

        `queues`: at most `max_queues`. The list is empty only with `clients`, while none waits.
        """
        ...

    async def publish(self, geometry: DiskGeometry) -> None:
        """The worker serves: users find the disk, with this size. Also resizes."""
        ...

    async def feature_off(self, feature: Feature) -> None:
        """The backend refused this operation: offer it no more."""
        ...

    async def fail_after(self, seconds: float) -> None:
        """Nobody will come after the present worker: requests that find none fail after so long.

        Where the device knows no such time, they wait. Holds until the next `attach`.
        """
        ...

    def busy(self) -> str | None:
        """Why users would notice if the device went away. May wait for the disk: not in a loop."""
        ...

    def in_flight(self) -> int:
        """Requests that the kernel has sent and that are not answered."""
        ...

    async def close(self, *, drain: float = 10.0) -> None:
        """Refuses new requests, waits up to `drain` seconds for the others, ends the device."""
        ...


@dataclass(frozen=True, slots=True)
class NbdSettings:
    """What is set on the device's queue."""

    io_timeout_ms: int = 2000  # bounds how long a replay waits
    max_sectors_kb: int = 1024  # largest request; the worker's pool streams it
    socket_buffer: int = 1 << 20  # bytes each way


class NbdTarget(BlockDisk):
    """A kernel nbd device.

    `identifier` ("pvfront:vbd-51728") is what a later supervisor finds the device by; `label`
    ("xvdb") names the link.
    """

    clients: Clients | None = None
    kind = prefix = "nbd"
    stays = False
    server_pid = 0

    def __init__(
        self,
        identifier: str,
        label: str,
        *,
        settings: NbdSettings | None = None,
        roots: sysfs.Roots = sysfs.SYSTEM,
    ) -> None:
        super().__init__(identifier, label, roots)
        self.settings = settings or NbdSettings()

    # -- names -----------------------------------------------------------------------------

    @property
    def max_queues(self) -> int:
        """What there is has as many as it had at first; a new device any number."""
        ours = [d.name for d in nbd.devices(self._roots) if d.backend == self.identifier]
        name = self.name or (ours[-1] if ours else "")
        return self._sockets(name) if name else int(lib.PVF_MAX_QUEUES)

    @property
    def usual_queues(self) -> int:
        """One: what several cost after the death of a worker stands at the top."""
        return 1

    def _sockets(self, name: str) -> int:
        """Connections of a device, dead ones too: each is a hardware queue."""
        return max(1, len(sysfs.listdir(self._roots.sys / "block" / name / "mq")))

    # -- life ------------------------------------------------------------------------------

    async def adopt(self) -> bool:
        """Also ends what is left of our devices that were never published, or are closed already.

        A closed device that a program still has open keeps its identifier. It has no size.
        """
        ours = [d for d in nbd.devices(self._roots) if d.backend == self.identifier]
        found = [d for d in ours if sysfs.read_int(self._roots.block(d.name) / "size")]
        for remains in ours:
            if remains not in found:
                with contextlib.suppress(PvfrontError):
                    await self._disconnect(remains.index)
        if not found:
            return False
        # More than one: someone disconnected ours under its users, and a new one was made. The
        # link names the living one.
        with contextlib.suppress(OSError):
            linked = self._link.readlink().name
            found = [d for d in found if d.name == linked] or found
        self._index = found[-1].index
        self._find_off()
        return True

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        """Raises NbdUnavailable, NbdError, or TargetError if the kernel keeps the old sockets.

        A device whose connection somebody else ended (`nbd-client -d`) is given up for a new one.
        """
        if self._index is not None or await self.adopt():
            try:
                return await self._reattach(queues, deadline)
            except nbd.NbdError as error:
                if sysfs.errno_name(error.errno) != "EINVAL":
                    raise
                log.warning(
                    "%s: its connection was ended by somebody else; making a new device", self.name
                )
                self._properties.unlink(missing_ok=True)
                self._index = None
        return await self._attach_new(geometry, queues)

    async def _attach_new(self, geometry: DiskGeometry, queues: int = 1) -> list[int]:
        flags = (
            (nbd.FLAG_READ_ONLY if geometry.read_only else 0)
            | (nbd.FLAG_SEND_FLUSH if geometry.flush else 0)
            | (nbd.FLAG_SEND_TRIM if geometry.discard else 0)
            | (nbd.FLAG_CAN_MULTI_CONN if queues > 1 else 0)
        )
        with contextlib.ExitStack() as ours:
            pairs = [self._pair() for _ in range(queues)]
            ends = [ours.enter_context(mine) for mine, _ in pairs]
            kernels = [theirs for _, theirs in pairs]

            def connect() -> int:
                # The thread owns the kernel's ends: it may outlive a caller that was cancelled.
                with contextlib.ExitStack() as held, nbd.NbdControl(self._roots) as control:
                    for end in kernels:
                        held.enter_context(end)
                    return control.connect(
                        [end.fileno() for end in kernels],
                        size=0,
                        block_size=geometry.sector_size,
                        server_flags=flags,
                        identifier=self.identifier,
                        dead_conn_timeout=_NO_TIMEOUT,
                    )

            self._index = await _command(connect, "nbd connect")
            self._off.clear()
            self._tune()
            return [end.detach() for end in ends]

    async def _reattach(self, queues: int, deadline: float) -> list[int]:
        """Gives the kernel sockets until it has taken one for each queue."""
        index = self._need_device()
        until = time.monotonic() + deadline
        with contextlib.ExitStack() as ours:
            taken: list[socket.socket] = []
            while True:
                pairs = [self._pair() for _ in range(queues - len(taken))]
                ends = [ours.enter_context(mine) for mine, _ in pairs]
                kernels = [theirs for _, theirs in pairs]

                def reconfigure(kernels: list[socket.socket] = kernels) -> None:
                    with contextlib.ExitStack() as held, nbd.NbdControl(self._roots) as control:
                        for end in kernels:
                            held.enter_context(end)
                        control.reconfigure(
                            index,
                            identifier=self.identifier,
                            sock_fds=[end.fileno() for end in kernels],
                            dead_conn_timeout=_NO_TIMEOUT,
                        )

                await _command(reconfigure, "nbd reconfigure")
                taken = [end for end in (*taken, *ends) if not hung_up(end)]
                if len(taken) == queues:
                    self._tune()
                    return [end.detach() for end in taken]
                if time.monotonic() > until:
                    raise TargetError(
                        f"{self.name}: the kernel did not let go of its former "
                        f"{'sockets' if queues > 1 else 'socket'} within {deadline:.0f} s",
                        hint="the worker that held the other end must have ended",
                    )
                await asyncio.sleep(POLL)

    async def publish(self, geometry: DiskGeometry) -> None:
        """Raises TargetError if the sector size of a disk in use would change."""
        index = self._need_device()
        sectors = sysfs.read_int(self._sys / "size")
        block = sysfs.read_int(self._sys / "queue" / "logical_block_size")
        if sectors != geometry.sectors or block != geometry.sector_size:
            if sectors and block != geometry.sector_size:
                raise TargetError(
                    f"{self.name}: the sector size changed from {block} to "
                    f"{geometry.sector_size} bytes while connected",
                    hint=f"release {self.label} and serve it again",
                )
            if sectors:
                log.info("%s: resized from %d to %d sectors", self.name, sectors, geometry.sectors)
            self._describe(geometry)

            def resize() -> None:
                with nbd.NbdControl(self._roots) as control:
                    control.reconfigure(
                        index,
                        identifier=self.identifier,
                        size=geometry.size,
                        block_size=geometry.sector_size,
                    )

            await _command(resize, "nbd resize")
        elif self._describe(geometry):
            sysfs.write(self._sys / "uevent", "change")
        if not geometry.flush:
            self._off.add("flush")
        if not geometry.discard:
            self._off.add("discard")
        self._apply_off()
        self._make_link()

    async def fail_after(self, seconds: float) -> None:
        """Requests that wait already when the socket dies wait by what holds then."""
        index = self._need_device()

        def set_timeout() -> None:
            with nbd.NbdControl(self._roots) as control:
                control.reconfigure(
                    index, identifier=self.identifier, dead_conn_timeout=max(1, int(seconds))
                )

        await _command(set_timeout, "nbd dead_conn_timeout")

    async def close(self, *, drain: float = 10.0) -> None:
        """Raises TargetError if the kernel's end cannot be closed: end the worker, then again.

        Idempotent. Requests that are still in flight after `drain` seconds fail with EIO.
        """
        if self._index is None and not await self.adopt():
            self._remove_link()
            return
        index = self._need_device()

        def refuse_requests() -> None:
            with nbd.NbdControl(self._roots) as control:
                control.reconfigure(index, identifier=self.identifier, size=0)

        async with self._refusing(index) as alone:
            with contextlib.suppress(nbd.NbdError):  # not connected any more: nothing to drain
                await _command(refuse_requests, "nbd resize")
            drain = max(drain, _REFUSED) if alone else drain
            if not await within(drain, lambda: self.in_flight() == 0):
                log.warning(
                    "%s: %d requests did not end within %.0f s and fail now",
                    self.name,
                    self.in_flight(),
                    drain,
                )
            try:
                await self._disconnect(index)
            except nbd.NbdError as error:
                log.warning("%s", error)
        # The device goes once its last opener has gone; nobody needs to wait for that one.
        if not await within(_LAST_CLOSE, lambda: not self._sys.exists()):
            log.info("%s: stays until the last program that has it open ends", self.name)
        self._remove_link()
        self._properties.unlink(missing_ok=True)
        self._index = None
        self._off.clear()

    # -- steps -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _refusing(self, index: int) -> AsyncIterator[bool]:
        """Meanwhile what waits for a worker that will not come fails.

        A server that refuses everything takes the dead one's place (nbdrefuse.py); where the worker
        lives, the kernel takes no other, and False is given. Whether anything waits, nobody says:
        what was not sent yet is not in flight for the kernel, but keeps its queue from freezing,
        and so the next resize from ending.
        """
        ours, kernels = self._pair()
        with ours:

            def reconnect() -> None:
                with kernels, nbd.NbdControl(self._roots) as control:
                    control.reconfigure(
                        index,
                        identifier=self.identifier,
                        sock_fds=[kernels.fileno()],
                        dead_conn_timeout=1,
                    )

            with contextlib.suppress(nbd.NbdError):  # not connected any more: nothing waits
                await _command(reconnect, "nbd reconfigure")
            refusing = asyncio.create_task(nbdrefuse.refuse(ours))
            try:
                yield not hung_up(ours)
            finally:
                refusing.cancel()
                await asyncio.gather(refusing, return_exceptions=True)

    async def _disconnect(self, index: int) -> None:
        def disconnect() -> None:
            with nbd.NbdControl(self._roots) as control:
                control.disconnect(index)

        await _command(disconnect, "nbd disconnect")

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, kernels):
            set_buffers(end, self.settings.socket_buffer)
        return ours, kernels

    def _need_device(self) -> int:
        if self._index is None:
            raise TargetError(f"{self.label}: there is no device yet", hint="attach it first")
        return self._index

    def _tune(self) -> None:
        queue = self._sys / "queue"
        alone = self._sockets(self.name) == 1
        timeout = self.settings.io_timeout_ms if alone else 3000 * lib.PVF_NBD_PATIENCE_SECONDS
        sysfs.write(queue / "io_timeout", timeout)
        most = sysfs.read_int(queue / "max_hw_sectors_kb") or self.settings.max_sectors_kb
        sysfs.write(queue / "max_sectors_kb", min(most, self.settings.max_sectors_kb))
        self._no_elevator()

    def _no_elevator(self) -> None:
        """Requests go to the worker from who submits them, unsorted: the backend knows the medium.

        The usual elevator of a device with one queue has a kernel thread that preempts who submits
        send each request, and the worker is woken for each. Without, a burst is received and
        notified at once (docs/performance.md). A rule of udev's may set another.
        """
        try:
            sysfs.write(self._sys / "queue" / "scheduler", "none")
        except PvfrontError as error:
            log.warning("%s: slower than it might be: %s", self.name, error)


def set_buffers(end: socket.socket, size: int) -> None:
    """Both buffers of a socket in bytes; without CAP_NET_ADMIN as far as the system allows."""
    for option, force in (
        (socket.SO_SNDBUF, getattr(socket, "SO_SNDBUFFORCE", 32)),
        (socket.SO_RCVBUF, getattr(socket, "SO_RCVBUFFORCE", 33)),
    ):
        try:
            end.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, option, size)


def hung_up(end: socket.socket) -> bool:
    """Whether nobody holds the other end any more."""
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    return any(events & (select.POLLHUP | select.POLLRDHUP) for _, events in poll.poll(0))


async def command(work: Callable[[], T], what: str, seconds: float, hint: str) -> T:
    """A command to the kernel in a thread of its own. Raises TargetError if it hangs."""
    try:
        return await threads.to_its_end(what, work, seconds)
    except threads.Late as error:
        raise TargetError(str(error), hint=hint) from error


async def _command(work: Callable[[], T], what: str) -> T:
    hint = "the kernel waits for a worker that does not read its socket"
    return await command(work, what, _COMMAND_DEADLINE, hint)
