# SPDX-License-Identifier: BSD-2-Clause
"""The control connection to one worker: its process, commands and their answers, what it says.

What commands there are, and how a worker is found, is worker.py's.

Theory of operation
    Commands go one at a time; each has one answer (docs/architecture.md) and a deadline. What
    arrives unasked goes to `on_event`, in order. Everything fails with `WorkerGone` once the
    process or its connection has ended.

    The process is followed by a pidfd, which works the same for a child and for an adopted stranger
    and cannot mean another process. The end of the process and what it said before come by two
    descriptors, in any order: its words come first. The end of the connection alone is the worker's
    end too; of a process that is on its way out the end is waited for, because what it holds is
    free only then.

    Nothing here ever waits for the worker to take a message: the socket is non-blocking, and a
    worker that lets its queue fill up is treated as gone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from .abi import ffi, lib
from .errors import PvfrontError
from .workermessage import (
    Drained,
    Event,
    Exited,
    Hello,
    Taken,
    body_of,
    event_of,
    hello_of,
    taken_of,
    text_of,
)
from .workerprogram import kill_and_reap

log = logging.getLogger(__name__)

ANSWER_DEADLINE = 10.0
HELLO_DEADLINE = 10.0
_LAST_WORDS = 64  # messages; what others say who hold its socket has no end
_LAST_BREATH = 1.0  # seconds for an adopted worker's end after that of its connection


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
    lib.PVF_CTL_START_CONS: lib.PVF_CTL_STARTED,
    lib.PVF_CTL_QUIESCE: lib.PVF_CTL_DRAINED,
    lib.PVF_CTL_DETACH: lib.PVF_CTL_DETACHED,
    lib.PVF_CTL_HAND_OVER: lib.PVF_CTL_HANDED_OVER,
    lib.PVF_CTL_TAKE_OVER: lib.PVF_CTL_TAKEN_OVER,
    lib.PVF_CTL_TRACE: lib.PVF_CTL_TRACING,
    lib.PVF_CTL_LAST: lib.PVF_CTL_NOTED,
}
_COMMANDS = {
    lib.PVF_CTL_ATTACH: "ATTACH",
    lib.PVF_CTL_START: "START",
    lib.PVF_CTL_START_NET: "START_NET",
    lib.PVF_CTL_START_CONS: "START_CONS",
    lib.PVF_CTL_QUIESCE: "QUIESCE",
    lib.PVF_CTL_DETACH: "DETACH",
    lib.PVF_CTL_HAND_OVER: "HAND_OVER",
    lib.PVF_CTL_TAKE_OVER: "TAKE_OVER",
    lib.PVF_CTL_TRACE: "TRACE",
    lib.PVF_CTL_LAST: "LAST",
}
_SYSLOG = {3: logging.ERROR, 4: logging.WARNING, 6: logging.INFO}


class WorkerLink:
    """One worker at the other end of `sock`, whose process is `pid`."""

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
        self._one_of_several = False  # programs, one after another, at the other end
        self._exit_seen = False
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
        over = self._receive()
        if not over:
            return
        if not self._found:
            self._end(over)
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        loop.call_later(_LAST_BREATH, self._end, over)

    def _receive(self) -> str | None:
        """Takes the next message: None. "": there is none now; a reason: none comes any more."""
        try:
            if self._one_of_several and _sender(self._sock) not in (0, self.pid):
                return "another program has taken its place"  # whose message stays
            data, fds, flags, _ = socket.recv_fds(
                self._sock, lib.PVF_CTL_MAX, lib.PVF_CTL_MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return ""
        except WorkerGone as error:
            return str(error)
        except OSError as error:
            return f"the control connection failed: {error.strerror}"
        try:
            if not data:
                return "the worker closed the control connection"
            if flags & socket.MSG_TRUNC:
                self._end("the worker sent a message that is too long")
            else:
                self._message(data, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return None

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
        self._exit_seen = True
        for _ in range(_LAST_WORDS):
            if self._gone is not None or self._receive() is not None:
                break
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


async def peer_pid(sock: socket.socket, deadline: float | None = HELLO_DEADLINE) -> int:
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
    if (pid := _sender(sock)) == 0:
        raise WorkerGone("the worker closed its control connection")
    return pid


def _sender(sock: socket.socket) -> int:
    """Whose message waits, by peeking; 0: none, the other end is closed. Raises WorkerGone."""
    size = struct.calcsize("3i")  # struct ucred of unix(7): pid, uid, gid
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(size), socket.MSG_PEEK)
    if not data:
        return 0
    for level, kind, found in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(found) >= size:
            return int(struct.unpack("3i", found[:size])[0])
    raise WorkerGone("the worker cannot be told by its credentials")


def drop(sock: socket.socket) -> None:
    """Throws the next message away."""
    for fd in socket.recv_fds(sock, 1, lib.PVF_CTL_MAX_FDS, socket.MSG_CMSG_CLOEXEC)[1]:
        os.close(fd)
