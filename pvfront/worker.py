# SPDX-License-Identifier: BSD-2-Clause
"""Start, adopt and speak to one C worker: the supervisor's end of the control protocol.

Theory of operation
    A worker is a process of its own: it is started in a session of its own, outlives us, and is
    found again by the path of its listening socket. Its process is followed by a pidfd, which
    works the same for a child and for an adopted stranger and cannot mean another process.

    Commands go one at a time; each has one answer (docs/architecture.md) and a deadline. What
    arrives unasked goes to `on_event`, in order. Everything fails with `WorkerGone` once the
    process or its connection has ended.

    A worker hands everything over to a second one of the same device by `hand_over`
    (docs/upgrade.md). Until that has taken over it listens at ``<name>.next``, so that whoever
    finds both knows which is which: one that is IDLE there has not, and is ended.

    Nothing here ever waits for the worker to take a message: the socket is non-blocking, and a
    worker that lets its queue fill up is treated as gone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from .abi import ffi, lib
from .errors import PvfrontError
from .workermessage import (
    Drained,
    Event,
    Exited,
    Hello,
    State,
    Taken,
    body_of,
    event_of,
    hello_of,
    taken_of,
    text_of,
)
from .workerprogram import kill_and_reap, start

log = logging.getLogger(__name__)

ANSWER_DEADLINE = 10.0
HELLO_DEADLINE = 10.0


class WorkerError(PvfrontError):
    """The worker refused a command; `error` is its errno."""

    def __init__(self, message: str, error: int) -> None:
        super().__init__(message)
        self.error = error


class WorkerGone(PvfrontError):
    """The worker's process or its control connection has ended."""


_ANSWERS = {
    lib.PVF_CTL_ATTACH: lib.PVF_CTL_ATTACHED,
    lib.PVF_CTL_START: lib.PVF_CTL_STARTED,
    lib.PVF_CTL_START_NET: lib.PVF_CTL_STARTED,
    lib.PVF_CTL_QUIESCE: lib.PVF_CTL_DRAINED,
    lib.PVF_CTL_DETACH: lib.PVF_CTL_DETACHED,
    lib.PVF_CTL_HAND_OVER: lib.PVF_CTL_HANDED_OVER,
    lib.PVF_CTL_TAKE_OVER: lib.PVF_CTL_TAKEN_OVER,
    lib.PVF_CTL_TRACE: lib.PVF_CTL_TRACING,
}
_COMMANDS = {
    lib.PVF_CTL_ATTACH: "ATTACH",
    lib.PVF_CTL_START: "START",
    lib.PVF_CTL_START_NET: "START_NET",
    lib.PVF_CTL_QUIESCE: "QUIESCE",
    lib.PVF_CTL_DETACH: "DETACH",
    lib.PVF_CTL_HAND_OVER: "HAND_OVER",
    lib.PVF_CTL_TAKE_OVER: "TAKE_OVER",
    lib.PVF_CTL_TRACE: "TRACE",
}
_SYSLOG = {3: logging.ERROR, 4: logging.WARNING, 6: logging.INFO}


class Worker:
    """A running worker. Make one by `spawn` or `adopt`; `close` forgets it without ending it."""

    def __init__(
        self, name: str, sock: socket.socket, pid: int, *, child: bool, found: bool = False
    ) -> None:
        self.name = name
        self.pid = pid
        self._found = found  # left by an earlier supervisor: ours to end
        self._taken: Taken | None = None
        self.hello: Hello | None = None
        self.stats_fd = -1
        self.on_event: Callable[[Event], None] = lambda event: None
        self._sock = sock
        self._child = child
        self._pidfd = os.pidfd_open(pid)
        self._lock = asyncio.Lock()
        self._answer: asyncio.Future[Any] | None = None
        self._expected = 0
        self._generation = 0
        self._greeted: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._gone: str | None = None
        self._ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock, self._readable)
        loop.add_reader(self._pidfd, self._exited)

    # -- beginning and end -------------------------------------------------------------------

    @classmethod
    async def spawn(
        cls,
        name: str,
        run_dir: Path,
        *,
        queues: int = 1,
        change_user: bool = True,
        ublk: bool = False,
        net: bool = False,
        following: bool = False,
    ) -> Worker:
        """Starts a worker listening at ``run_dir/<name>.sock`` and waits for its HELLO.

        `following`: at ``<name>.next``; it is to take over from the one at ``.sock``.
        `queues`: the most that a connection can have, PVF_MAX_QUEUES at most; each is a thread.
        `change_user`: as root, it becomes the user pvfront's and gets an empty root directory.
        `net`: it serves a network instead of a disk.
        `ublk`: it can serve a ublk device; it then may use an io_uring.
        """
        path = run_dir / f"{name}.{'next' if following else 'sock'}"
        pid = start(name, path, queues=queues, change_user=change_user, ublk=ublk, net=net)
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
            # For _peer_pid. From the start: the kernel notes a sender's credentials only for who
            # wants them at that time.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            # The backlog is never full: connecting to a unix socket does not wait.
            sock.connect(str(path))
            child = pid is not None
            pid = pid or await _peer_pid(sock)
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

        `sock` is ours from here on, and has SO_PASSCRED set before anybody could speak. Raises
        WorkerGone if the other end is closed.
        """
        sock.setblocking(False)
        try:
            worker = cls(name, sock, await _peer_pid(sock, None), child=False)
        except BaseException:
            sock.close()
            raise
        try:
            await worker._greeted
        except BaseException:
            worker.close()
            raise
        return worker

    def close(self) -> None:
        """Forgets the worker, which goes on. Idempotent."""
        self._end("the supervisor closed the connection", tell=False)

    def kill(self) -> None:
        """SIGKILL. Everything it held is released by the kernel. Idempotent."""
        if self._gone is None:  # else the number of its pidfd may be another's
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @property
    def alive(self) -> bool:
        return self._gone is None

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

    async def ended(self, timeout: float | None) -> bool:
        """Waits for the end of the process or its connection; False if it did not come.

        `timeout`: seconds; None: for ever.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout)
        return self._ended.is_set()

    async def _command(
        self,
        kind: int,
        generation: int,
        message: Any,
        size: int | None = None,
        fds: Sequence[int] = (),
        timeout: float = ANSWER_DEADLINE,
        *,
        sent: Callable[[], None] = lambda: None,
    ) -> None:
        async with self._lock:
            self._answer = asyncio.get_running_loop().create_future()
            self._expected = _ANSWERS[kind]
            before, self._generation = self._generation, generation
            try:
                self._send(kind, generation, message, size, fds)
                sent()
                async with asyncio.timeout(timeout):
                    await self._answer
            except WorkerError:
                self._generation = before  # a refused ATTACH begins none
                raise
            except TimeoutError:
                if kind == lib.PVF_CTL_QUIESCE:
                    raise
                raise WorkerGone(
                    f"{self.name}: the worker (pid {self.pid}) did not answer "
                    f"{_COMMANDS[kind]} within {timeout:.0f} s"
                ) from None
            finally:
                self._answer = None

    def _send(
        self, kind: int, generation: int, message: Any, size: int | None, fds: Sequence[int]
    ) -> None:
        if self._gone is not None:
            raise WorkerGone(f"{self.name}: {self._gone}")
        size = size or ffi.sizeof(message[0])
        message.hdr.magic = lib.PVF_CTL_MAGIC
        message.hdr.version = lib.PVF_CTL_VERSION
        message.hdr.type = kind
        message.hdr.generation = generation
        message.hdr.length = size
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([ffi.buffer(message, size)], rights)
        except OSError as error:
            self._end(f"the control connection failed: {error.strerror}")
            raise WorkerGone(f"{self.name}: {self._gone}") from None

    # -- what arrives -------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._sock, lib.PVF_CTL_MAX, lib.PVF_CTL_MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"the control connection failed: {error.strerror}")
            return
        try:
            if not data:
                self._end("the worker closed the control connection")
            elif flags & socket.MSG_TRUNC:
                self._end("the worker sent a message that is too long")
            else:
                self._message(data, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _message(self, data: bytes, fds: list[int]) -> None:
        if len(data) < ffi.sizeof("struct pvf_ctl_hdr"):
            self._end("the worker sent a truncated message")
            return
        hdr = ffi.from_buffer("struct pvf_ctl_hdr *", data)
        if (hdr.magic, hdr.version) != (lib.PVF_CTL_MAGIC, lib.PVF_CTL_VERSION):
            if self._found and hdr.magic == lib.PVF_CTL_MAGIC and not self._greeted.done():
                # Of another version of ours: it cannot be served on, nor asked to end.
                self.kill()
            self._end("the worker speaks another version of the control protocol")
            return
        body = body_of(int(hdr.type), data)
        if body is None:
            self._end(f"the worker sent a message of unknown shape (type {hdr.type})")
            return
        kind, generation = int(hdr.type), int(hdr.generation)
        if kind == lib.PVF_CTL_HELLO:
            self._hello(body, generation, fds)
        elif kind == lib.PVF_CTL_LOG:
            level = _SYSLOG.get(int(body.level), logging.INFO)
            log.log(level, "%s: worker: %s", self.name, text_of(body.text))
        elif kind == lib.PVF_CTL_ERROR:
            self._refused(body)
        elif kind in _ANSWERS.values():
            if kind == lib.PVF_CTL_TAKEN_OVER:
                self._taken = taken_of(body)
            # A DRAINED that comes after its QUIESCE has timed out finds nobody waiting.
            answer = self._answer
            if (
                answer is not None
                and kind == self._expected
                and generation == self._generation
                and not answer.done()
            ):
                answer.set_result(None)
            if kind == lib.PVF_CTL_DRAINED and generation == self._generation:
                self.on_event(Drained())
        else:
            self.on_event(event_of(kind, body))

    def _hello(self, body: Any, generation: int, fds: list[int]) -> None:
        hello = hello_of(body, generation)
        if hello is None:
            self._end(f"the worker sent a message of unknown shape (state {body.state})")
            return
        if fds and self.stats_fd < 0:
            self.stats_fd = os.dup(fds[0])
        self._generation = generation
        self.hello = hello
        if not self._greeted.done():
            self._greeted.set_result(hello)

    def _refused(self, body: Any) -> None:
        command = _COMMANDS.get(int(body.in_reply_to), str(body.in_reply_to))
        code = int(body.error)
        error = WorkerError(
            f"{self.name}: the worker refused {command}: {text_of(body.text)} "
            f"({errno.errorcode.get(code, code)})",
            code,
        )
        # A refusal that comes after its command has timed out is not for the next command.
        ours = _ANSWERS.get(int(body.in_reply_to)) == self._expected
        if ours and self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        else:
            log.warning("%s", error)

    def _exited(self) -> None:
        self._end(f"the worker (pid {self.pid}) has ended")

    def _end(self, why: str, *, tell: bool = True) -> None:
        if self._gone is not None:
            return
        if self._child and tell:
            # A worker whose connection broke serves nobody we could reach: it ends, and is
            # never left a zombie. One that is ending already, and whose connection therefore
            # closed first, still ends its own way: that is the reason to tell.
            why += f"; pid {self.pid} {kill_and_reap(self.pid)}"
        self._gone = why
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        loop.remove_reader(self._pidfd)
        self._sock.close()
        os.close(self._pidfd)
        self._ended.set()
        if self.stats_fd >= 0:
            os.close(self.stats_fd)
            self.stats_fd = -1
        error = WorkerGone(f"{self.name}: {why}")
        if not self._greeted.done():
            self._greeted.set_exception(error)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        if tell:
            self.on_event(Exited(why))


async def _peer_pid(sock: socket.socket, deadline: float | None = HELLO_DEADLINE) -> int:
    """Who sent the waiting HELLO, by peeking: an adopted worker is no child of ours.

    The kernel's word for it, not the worker's, which may lie: what has this pid may be killed
    later. SO_PEERCRED would name whoever called listen(), a supervisor that may be long dead.
    """
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def arrived() -> None:
        loop.remove_reader(sock)
        if not readable.done():  # cancelled in the same turn
            readable.set_result(None)

    loop.add_reader(sock, arrived)
    try:
        async with asyncio.timeout(deadline):
            await readable
    except TimeoutError:
        raise WorkerGone("the worker does not answer on its control socket") from None
    finally:
        loop.remove_reader(sock)
    size = struct.calcsize("3i")  # struct ucred of unix(7): pid, uid, gid
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(size), socket.MSG_PEEK)
    if not data:
        raise WorkerGone("the worker closed its control connection")
    for level, kind, found in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(found) >= size:
            return int(struct.unpack("3i", found[:size])[0])
    raise WorkerGone("the worker cannot be told by its credentials")
