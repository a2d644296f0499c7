# SPDX-License-Identifier: BSD-2-Clause
"""Start, adopt and speak to one C worker: the supervisor's end of the control protocol.

Theory of operation
    A worker is a process of its own: it is started in a session of its own, outlives us, and is
    found again by the path of its listening socket. How it is spoken to: workerlink.py.

    A worker hands everything over to a second one of the same device by `hand_over`
    (docs/upgrade.md). Until that has taken over it listens at ``<name>.next``, so that whoever
    finds both knows which is which: one that is IDLE there has not, and is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .abi import ffi, lib
from .errors import PvfrontError
from .workerlink import (
    ANSWER_DEADLINE,
    HELLO_DEADLINE,
    WorkerError,
    WorkerGone,
    WorkerLink,
    drop,
    peer_pid,
)
from .workermessage import State, Taken
from .workerprogram import kill_and_reap, start

__all__ = ["Worker", "WorkerError", "WorkerGone"]

log = logging.getLogger(__name__)


class Worker(WorkerLink):
    """A running worker. Make one by `spawn` or `adopt`; `close` forgets it without ending it."""

    # -- beginning and end -------------------------------------------------------------------

    @classmethod
    async def spawn(
        cls,
        name: str,
        run_dir: Path,
        *,
        queues: int = 1,
        change_user: bool = True,
        options: Sequence[str] = (),
        following: bool = False,
    ) -> Worker:
        """Starts a worker listening at ``run_dir/<name>.sock`` and waits for its HELLO.

        `following`: at ``<name>.next``; it is to take over from the one at ``.sock``.
        `queues`: the most that a connection can have, PVF_MAX_QUEUES at most; each is a thread.
        `change_user`: as root, it becomes the user pvfront's and gets an empty root directory.
        `options`: "--net", "--console": it serves one instead of a disk; "--ublk": it can serve a
        ublk device, and then may use an io_uring.
        """
        path = run_dir / f"{name}.{'next' if following else 'sock'}"
        pid = start(name, path, queues=queues, change_user=change_user, options=options)
        try:
            return await cls._greet(name, path, pid)
        except ConnectionError:
            end = kill_and_reap(pid)
            path.unlink(missing_ok=True)
            raise WorkerGone(f"{name}: the worker does not listen; pid {pid} {end}") from None
        except BaseException:
            kill_and_reap(pid)
            path.unlink(missing_ok=True)
            raise

    @classmethod
    async def adopt(cls, name: str, run_dir: Path) -> Worker | None:
        """Connects to a worker left by another supervisor; None if there is none alive.

        One that speaks another version of the protocol is ended: nobody else could.
        """
        path, follower = run_dir / f"{name}.sock", run_dir / f"{name}.next"
        second = await cls._adopt(name, follower) if follower.exists() else None
        if second is not None:
            assert second.hello is not None
            if second.hello.state is not State.IDLE:
                follower.replace(path)
                return second
            # Not taken over when its supervisor died. Once it has ended the first one goes on.
            second.kill()
            await second.ended(ANSWER_DEADLINE)
            second.close()
            follower.unlink(missing_ok=True)
        return await cls._adopt(name, path) if path.exists() else None

    @classmethod
    async def _adopt(cls, name: str, path: Path) -> Worker | None:
        try:
            return await cls._greet(name, path, None)
        except (ConnectionError, FileNotFoundError, ProcessLookupError, WorkerGone):
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - no disk
            return None

    @classmethod
    async def _greet(cls, name: str, path: Path, pid: int | None) -> Worker:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            # For peer_pid. From the start: the kernel notes a sender's credentials only for who
            # wants them at that time.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            # The backlog is never full: connecting to a unix socket does not wait.
            sock.connect(str(path))
            child = pid is not None
            pid = pid or await peer_pid(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            worker = cls(name, sock, pid, child=child, found=not child)
        except BaseException:
            sock.close()
            raise
        try:
            async with asyncio.timeout(HELLO_DEADLINE):
                await worker._greeted
        except TimeoutError:
            worker.close()
            raise WorkerGone(f"{name}: the worker did not say HELLO in time") from None
        except BaseException:
            worker.close()
            raise
        return worker

    @classmethod
    async def over(cls, name: str, sock: socket.socket) -> Self:
        """Whoever says HELLO at the other end of `sock`, whenever: a program that has a disk lent.

        Several programs may have the other end, one after another: what one says is not taken for
        another's, whichever of its end and the next one's beginning is noticed first.

        `sock` is ours from here on, and has SO_PASSCRED set before anybody could speak. Raises
        WorkerGone if the other end is closed.
        """
        with sock:
            sock.setblocking(False)
            while True:
                pid = await peer_pid(sock, None)
                end = sock.dup()
                try:
                    worker = cls(name, end, pid, child=False)
                except ProcessLookupError:
                    end.close()
                    drop(sock)  # of one that has ended since
                    continue
                except BaseException:
                    end.close()
                    raise
                worker._one_of_several = True
                try:
                    await worker._greeted
                except BaseException as error:
                    worker.close()
                    if isinstance(error, WorkerGone) and worker._exit_seen:
                        continue  # the next may still come
                    raise
                return worker

    # -- commands ------------------------------------------------------------------------------

    async def attach(
        self,
        generation: int,
        *,
        queue: int = 0,
        queues: int = 1,
        device_class: int,
        port: int,
        ring_pages: int,
        ring_offset: int,
        pool_offset: int,
        pool_grefs: Sequence[int],
        scrub: bool,
        fds: Sequence[int],
        tx_pages: int = 0,
        rx_port: int = 0,
    ) -> None:
        """ATTACH of one queue with the descriptors of its event channel and of gntalloc; the caller
        closes its own. Each of a generation's queues is attached by one, in order.

        `rx_port`: a network's event channel for RX, whose descriptor is the third; 0: one for both.
        """
        message = ffi.new("struct pvf_ctl_attach *", {"pool_grefs": list(pool_grefs)})
        message.device_class = device_class
        message.port = port
        message.ring_pages = ring_pages
        message.pool_pages = len(pool_grefs)
        message.ring_offset = ring_offset
        message.pool_offset = pool_offset
        message.name = self.name.encode()
        message.flags = lib.PVF_ATTACH_SCRUB if scrub else 0
        message.queue, message.queues = queue, queues
        message.tx_pages, message.rx_port = tx_pages, rx_port
        size = ffi.sizeof("struct pvf_ctl_attach") + 4 * len(pool_grefs)
        await self._command(lib.PVF_CTL_ATTACH, generation, message, size, fds)

    async def start(
        self,
        generation: int,
        *,
        sectors: int,
        sector_size: int,
        flags: int,
        max_segments: int,
        discard_granularity: int,
        discard_alignment: int,
        vdev: int,
        stall_seconds: int,
        target_fds: Sequence[int],
        first_queue: int = 0,
        poll_us: int = 0,
        clients: bool = False,
    ) -> None:
        """START; `target_fds` are the NBD sockets of the queues from `first_queue` on, the others
        keep the one they have.

        `clients`: they come and go, a queue may have no socket now.
        """
        message = ffi.new("struct pvf_ctl_start *")
        message.sectors = sectors
        message.sector_size = sector_size
        message.flags = flags
        message.max_segments = max_segments
        message.discard_granularity = discard_granularity
        message.discard_alignment = discard_alignment
        message.stall_seconds = stall_seconds
        message.vdev = vdev
        message.options = lib.PVF_START_CLIENTS if clients else 0
        message.first_queue = first_queue
        message.poll_us = poll_us
        await self._command(lib.PVF_CTL_START, generation, message, None, target_fds)

    async def start_net(
        self,
        generation: int,
        *,
        features: int,
        stall_seconds: int,
        target_fds: Sequence[int],
        groups: Sequence[bytes] = (),
    ) -> None:
        """START_NET: `features` are the backend's (PVF_NET_*), `target_fds` a TAP's queues.

        `groups`: the multicast addresses (6 bytes each) that the interface listens to, as far as
        there is room for them; with none the worker keeps what it has learnt.
        """
        message = ffi.new("struct pvf_ctl_start_net *")
        message.features = features
        message.stall_seconds = stall_seconds
        groups = groups[: lib.PVF_NET_GROUPS]
        message.groups = len(groups)
        for index, group in enumerate(groups):
            message.group[index] = list(group)
        await self._command(lib.PVF_CTL_START_NET, generation, message, None, target_fds)

    async def start_cons(self, generation: int, *, stall_seconds: int, stream: int) -> None:
        """START_CONS: `stream` is the worker's end of a stream socket, a copy of which it gets."""
        message = ffi.new("struct pvf_ctl_start_cons *")
        message.stall_seconds = stall_seconds
        await self._command(lib.PVF_CTL_START_CONS, generation, message, None, (stream,))

    async def trace_packets(self, memfd: int | None) -> None:
        """TRACE: packets are noted in `memfd` from now on, a ``struct pvf_trace`` for each of the
        worker's queues, or (None) nowhere any more. Its size is sealed; it stays the caller's.
        """
        message = ffi.new("struct pvf_ctl_simple *")
        fds = () if memfd is None else (memfd,)
        await self._command(lib.PVF_CTL_TRACE, self._generation, message, fds=fds)

    async def quiesce(self, generation: int, timeout: float) -> bool:
        """QUIESCE; False if the ring was not empty within `timeout` seconds."""
        message = ffi.new("struct pvf_ctl_simple *")
        try:
            await self._command(lib.PVF_CTL_QUIESCE, generation, message, timeout=timeout)
        except TimeoutError:
            return False
        return True

    async def detach(self, generation: int, *, keep_target: bool, park: bool = False) -> None:
        """DETACH: everything of the generation is closed when this returns.

        `park` keeps the event channel's descriptor open for ever (suspend.py: a port that was
        bound while the domain slept must never be unbound).
        """
        message = ffi.new("struct pvf_ctl_detach *")
        message.flags = (lib.PVF_DETACH_KEEP_TARGET if keep_target else 0) | (
            lib.PVF_DETACH_PARK if park else 0
        )
        await self._command(lib.PVF_CTL_DETACH, generation, message)

    async def hand_over(self, other: Worker) -> Taken:
        """Has `other`, a new worker, take over everything from this one, which then ends.

        Raises WorkerError if that failed and this one goes on as if nothing had happened,
        WorkerGone if it has ended in the midst of it: then nobody serves. In both cases `other`
        is ended.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        table = os.memfd_create("pvfront-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        taking: asyncio.Task[None] | None = None
        refusal: PvfrontError | None = None
        simple = "struct pvf_ctl_simple *"
        try:
            os.ftruncate(table, lib.PVF_HAND_OVER_BYTES)
            fcntl.fcntl(table, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            # Each end is only theirs once it was sent: its closing says that a worker has died.
            taking = asyncio.create_task(
                other._command(
                    lib.PVF_CTL_TAKE_OVER, 0, ffi.new(simple), fds=(theirs.fileno(), table),
                    timeout=lib.PVF_TAKE_OVER_SECONDS, sent=theirs.close,
                )
            )  # fmt: skip
            await asyncio.sleep(0)  # it is sent: nothing is frozen before somebody waits for it
            try:
                if taking.done():
                    await taking  # it could not be sent
                await self._command(
                    lib.PVF_CTL_HAND_OVER, self._generation, ffi.new(simple),
                    fds=(ours.fileno(), table), sent=ours.close,
                    timeout=lib.PVF_HAND_OVER_SECONDS + ANSWER_DEADLINE,
                )  # fmt: skip
            except WorkerError as error:
                refusal = error
                other.kill()  # it may hang
            except WorkerGone as error:
                refusal = error  # which says nothing of the other
                ours.close()
            with contextlib.suppress(TimeoutError, PvfrontError):
                await asyncio.wait_for(taking, ANSWER_DEADLINE)
        finally:
            if taking is not None:
                taking.cancel()
            ours.close()
            theirs.close()
            os.close(table)
        if not isinstance(refusal, WorkerError) and other._taken is not None:
            if not await self.ended(ANSWER_DEADLINE):
                self.kill()
                await self.ended(ANSWER_DEADLINE)
            return other._taken
        other.kill()
        await other.ended(ANSWER_DEADLINE)
        other.close()
        raise refusal or WorkerGone(f"{self.name}: the worker that took over ended at once")

    async def last(self, generation: int) -> None:
        """LAST: the machine stops, and from now on SIGTERM ends the worker, a little later."""
        await self._command(lib.PVF_CTL_LAST, generation, ffi.new("struct pvf_ctl_simple *"))

    async def exit(self) -> None:
        """EXIT, and wait for the end; SIGKILL if it does not come."""
        if self._gone is None:
            message = ffi.new("struct pvf_ctl_simple *")
            with contextlib.suppress(OSError, PvfrontError):
                self._send(lib.PVF_CTL_EXIT, self._generation, message, None, ())
        if not await self.ended(ANSWER_DEADLINE):
            log.warning("%s: the worker did not exit when asked; killing it", self.name)
            self.kill()
            await self.ended(ANSWER_DEADLINE)
