# SPDX-License-Identifier: BSD-2-Clause
"""Connections to the store: who asked what, and the two transports underneath.

A *link* is one connection: it numbers requests, sends each as one message, and hands every reply
to whoever asked, by request id. Requests of many tasks wait in one queue; as many as the transport
allows are in flight at once. When anything is wrong with the connection itself (an error of the
device, end of file, a packet that cannot be), the link fails as a whole: every pending and every
later call raises XenstoreLost with that one reason.

Requests of transactions go before all others: an open transaction is in the way of others, here and
in the store, and the longer it is the more often it conflicts.

A call can be given up at any time (timeout, cancellation). Its request id stays taken until the
late reply comes, so that ids never collide and a late reply is no surprise; a late reply that
created something (a transaction, a watch) is undone. The time of a request begins when it is sent:
that many others go before it is no fault of the store's. One that waits is given up when the store
has answered nobody for as long: on the device a request without a reply holds up all later ones.

/dev/xen/xenbus (drivers/xen/xenbus/xenbus_dev_frontend.c) has rules of its own:

* One message per write(), 4096 bytes with its header. poll never says "writable"; a write does
  not wait, except for WATCH and UNWATCH.
* **One request in flight per descriptor.** The file has one message buffer, and the kernel queues
  a pointer to it (xenbus_dev_request_and_reply in xenbus_xs.c), to be copied into the ring later.
  A second write() before the first reply puts its payload under the first one's header: requests
  act on wrong paths, and xenstored 4.17 dies of a path without its NUL.
* write() of WATCH or UNWATCH returns only when the store has answered, and holds the descriptor's
  lock meanwhile. The kernel's one reader thread takes the same lock to deliver any other reply of
  that descriptor. **A WATCH written while a request is pending on the same descriptor can hang the
  store for the whole guest.** So each watch gets a descriptor of its own, on which nothing else is
  ever asked, and a thread of its own for that one write.
* UNWATCH also waits for the kernel's watch thread, which runs a suspend: it would block here, in
  a state that cannot be frozen, and the suspend would fail. So it is never sent; a watch ends by
  closing its descriptor, which the kernel finishes in the background.
* The kernel queues events without limit until they are read: they are read at once, always, and
  coalesced by the reader (Watch in xenstore.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from pvfront.xswire import (
    DEVICE_PAYLOAD_MAX,
    PAYLOAD_MAX,
    Op,
    Packet,
    Parser,
    WireError,
    XenstoreError,
    decode,
    encode,
    error_from_reply,
    next_request_id,
    printable,
)

_log = logging.getLogger(__name__)

_READ_SIZE = 65536

Undo = Callable[[bytes], tuple[Op, int, bytes]]
"""From the reply of a request, the (op, tx_id, payload) that takes back what it made."""

Sink = Callable[[str | None], None]
"""Takes the paths of a watch's events, in order; None when the link has failed."""


class XenstoreTimeout(XenstoreError, TimeoutError):
    """The store did not answer in time. A write may still happen later.

    `what`: what did not come, if it was nothing of the store's.
    """

    def __init__(self, op: str, path: str, seconds: float, what: str = "no answer") -> None:
        super().__init__(errno.ETIMEDOUT, op, path, f"{what} within {seconds:g} s")


class XenstoreLost(XenstoreError):
    """The connection is closed or broken; nothing more can be done with this store object."""

    def __init__(self, code: int, op: str, path: str, where: str, reason: str) -> None:
        super().__init__(code, op, path, f"connection to {where} lost: {reason}")


@asynccontextmanager
async def deadline(
    op: str, path: str, seconds: float, what: str = "no answer"
) -> AsyncIterator[asyncio.Timeout]:
    """Cancels its block after `seconds` and raises XenstoreTimeout: `what` did not come."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except XenstoreError:
        raise
    except TimeoutError:
        raise XenstoreTimeout(op, path, seconds, what) from None


class Slots:
    """Leave for `count` transactions at a time, in the order in which it was asked for."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = asyncio.Semaphore(count)
        self._waiting: dict[asyncio.Timeout, float] = {}

    async def acquire(self, seconds: float) -> None:
        """Raises XenstoreTimeout if none is released for so long; a queue that moves is fine."""
        # Nothing was asked of the store yet: it is ours who keep this one waiting.
        busy = f"{self._count} transactions of this connection are open, and none ended"
        async with deadline("transaction", "", seconds, busy) as late:
            self._waiting[late] = seconds
            try:
                await self._free.acquire()
            finally:
                del self._waiting[late]

    def release(self) -> None:
        self._free.release()
        now = asyncio.get_running_loop().time()
        for late, seconds in self._waiting.items():
            if not late.expired():
                late.reschedule(now + seconds)


@dataclass(slots=True)
class Failure:
    """Why a link is dead. Each caller gets an exception of its own made from it."""

    code: int
    where: str
    reason: str

    def error(self, op: str, path: str) -> XenstoreLost:
        return XenstoreLost(self.code, op, path, self.where, self.reason)


@dataclass(slots=True, eq=False)
class Request:
    op: Op
    path: str
    tx_id: int
    payload: bytes
    reply: asyncio.Future[bytes] | None
    """None: nobody waits, the reply is only counted."""
    undo: Undo | None = None
    """What to send if the reply comes and nobody waits for it any more."""
    since: float = 0.0
    """When it was sent or, until then, queued, by the event loop's clock."""
    sent: bool = False

    @property
    def name(self) -> str:
        return self.op.name.lower()


class Transport(Protocol):
    payload_max: int
    in_flight: int
    """Requests that may be sent before the first is answered."""
    refused: frozenset[Op]
    """Operations that must not be sent this way."""

    def send(self, frame: bytes, req_id: int) -> None:
        """Sends one message, now or soon. OSError: not sent, and the stream is still in step."""

    async def close(self) -> None: ...


class Link:
    """One connection: request ids, replies, the events of its watches."""

    def __init__(self, where: str, reply_max: int = PAYLOAD_MAX) -> None:
        self.where = where
        self.transport: Transport | None = None
        self.watches: dict[bytes, Sink] = {}
        """By token, who takes the events."""
        self.failure: Failure | None = None
        self._parser = Parser(reply_max)
        self._first: deque[Request] = deque()
        """Those of transactions, which go before the queue."""
        self._queue: deque[Request] = deque()
        self._heard = 0.0
        """When the store last answered anybody, by the event loop's clock."""
        self._requests: dict[int, Request] = {}
        """Those in flight, given up or not, by request id."""
        self._last_id = -1

    async def request(
        self,
        op: Op,
        path: str,
        payload: bytes,
        tx_id: int = 0,
        undo: Undo | None = None,
        *,
        seconds: float,
    ) -> bytes:
        """Sends a request and returns the reply's payload.

        Raises XenstoreTimeout if `seconds` pass without a reply after it was sent, or without any
        while it waits to be. With 0 it is sent, and no reply is waited for, however quick it is.
        """
        self._check(op, path, payload)
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[bytes] = loop.create_future()
        request = Request(op, path, tx_id, payload, reply, undo, loop.time())
        queue = self._first if tx_id or op is Op.TRANSACTION_START else self._queue
        queue.append(request)
        self._pump()
        timer = loop.call_later(max(seconds, 0.0), self._late, request, seconds)
        if seconds <= 0:
            self._late(request, seconds)
        try:
            return await reply
        except asyncio.CancelledError:
            if undo is not None and not reply.cancelled() and reply.exception() is None:
                # Cancelled in the instant between the reply and this task's turn.
                self._undo(undo, reply.result())
            raise
        finally:
            timer.cancel()
            if not request.sent and request in queue:
                queue.remove(request)

    def _late(self, request: Request, seconds: float) -> None:
        """The timer of a request: gives it up, or looks again later."""
        assert request.reply is not None
        if request.reply.done():
            return
        loop = asyncio.get_running_loop()
        since = request.since if request.sent else max(request.since, self._heard)
        left = since + seconds - loop.time()
        if left > 0:
            loop.call_later(left, self._late, request, seconds)
        else:
            request.reply.set_exception(XenstoreTimeout(request.name, request.path, seconds))

    def post(self, op: Op, tx_id: int, payload: bytes) -> None:
        """Sends a request whose outcome nobody needs, as the next. Never fails, never waits."""
        try:
            self._check(op, "", payload)
        except XenstoreError as exc:
            _log.debug("not sent: %s", exc)
        else:
            self._first.appendleft(Request(op, "", tx_id, payload, None))
            self._pump()

    def feed(self, data: bytes) -> None:
        """Takes what was read from the connection."""
        try:
            for packet in self._parser.feed(data):
                if packet.op is Op.WATCH_EVENT:
                    self._event(packet.payload)
                else:
                    self._reply(packet)
            self._pump()
        except WireError as exc:
            self.fail(errno.EPROTO, f"protocol error: {exc}")

    def end_of_file(self) -> None:
        partial = self._parser.partial
        self.fail(
            errno.ECONNRESET,
            "the store closed it"
            + (f" in the middle of a packet ({partial} bytes)" * bool(partial)),
        )

    def fail(self, code: int, reason: str) -> None:
        """Ends the link for everybody. Only the first reason counts."""
        if self.failure is not None:
            return
        failure = self.failure = Failure(code, self.where, reason)
        requests = [*self._requests.values(), *self._first, *self._queue]
        for held in (self._requests, self._first, self._queue):
            held.clear()
        for request in requests:
            self._settle(request, failure.error(request.name, request.path))
        for sink in self.watches.values():
            sink(None)

    def fail_request(self, req_id: int, exc: OSError) -> None:
        """The transport could not send request `req_id` after all."""
        request = self._requests.pop(req_id, None)
        if request is not None:
            code = exc.errno or errno.EIO
            self._settle(request, XenstoreError(code, request.name, request.path))
            self._pump()

    async def close(self, reason: str = "closed by this process") -> None:
        self.fail(errno.EBADF, reason)
        if self.transport is not None:
            await self.transport.close()

    def _check(self, op: Op, path: str, payload: bytes) -> None:
        if self.failure is not None:
            raise self.failure.error(op.name.lower(), path)
        assert self.transport is not None
        if op in self.transport.refused:
            raise ValueError(f"{op.name} must not be sent on this descriptor of {self.where}")
        limit = self.transport.payload_max
        if len(payload) > limit:
            raise XenstoreError(
                errno.E2BIG,
                op.name.lower(),
                path,
                f"E2BIG (a message of {len(payload)} bytes, {self.where} takes {limit})",
            )

    def _pump(self) -> None:
        """Sends what is queued, as far as the transport allows."""
        assert self.transport is not None
        while (
            (queue := self._first or self._queue)
            and self.failure is None
            and len(self._requests) < self.transport.in_flight
        ):
            request = queue.popleft()
            request.sent, request.since = True, asyncio.get_running_loop().time()
            req_id = self._last_id = next_request_id(self._last_id, self._requests)
            frame = encode(request.op, req_id, request.tx_id, request.payload)
            self._requests[req_id] = request
            try:
                self.transport.send(frame, req_id)
            except OSError as exc:
                self.fail_request(req_id, exc)  # nobody is left to be told if the link failed

    def _settle(self, request: Request, outcome: bytes | XenstoreError) -> None:
        if request.reply is not None and not request.reply.done():
            if isinstance(outcome, bytes):
                request.reply.set_result(outcome)
            else:
                request.reply.set_exception(outcome)
        elif request.undo is not None and isinstance(outcome, bytes):
            self._undo(request.undo, outcome)

    def _undo(self, undo: Undo, reply: bytes) -> None:
        try:
            self.post(*undo(reply))
        except XenstoreError as exc:  # a reply that makes no sense made nothing to be taken back
            _log.debug("%s", exc)

    def _reply(self, packet: Packet) -> None:
        request = self._requests.get(packet.req_id)
        if request is None:
            raise WireError(f"a reply to request {packet.req_id}, which is not pending")
        if packet.op not in (request.op, Op.ERROR):
            raise WireError(f"{packet.op.name} as the reply to {request.op.name}")
        del self._requests[packet.req_id]
        self._heard = asyncio.get_running_loop().time()
        if packet.op is Op.ERROR:
            self._settle(request, error_from_reply(request.name, request.path, packet.payload))
        else:
            self._settle(request, packet.payload)

    def _event(self, payload: bytes) -> None:
        # Only the payload counts: the kernel leaves req_id and tx_id of events uninitialised.
        path, nul, rest = payload.partition(b"\0")
        token, end, _ = rest.partition(b"\0")
        if not (nul and end):
            raise WireError("a watch event without path and token")
        sink = self.watches.get(token)
        if sink is not None:
            sink(decode(path))
        elif not token.isdigit():
            raise WireError(f"an event for a watch that was never set: {printable(decode(token))}")
        # else: an event that was on its way when its watch ended


class SocketTransport(asyncio.Protocol):
    """A Unix socket: asyncio does the buffering."""

    payload_max = PAYLOAD_MAX
    in_flight = 64
    refused: frozenset[Op] = frozenset()

    def __init__(self, link: Link) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        link.transport = self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._link.feed(data)
        if self._link.failure is not None and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, OSError) and exc.errno:
            self._link.fail(exc.errno, os.strerror(exc.errno))
        else:
            self._link.end_of_file()
        if not self._lost.done():
            self._lost.set_result(None)

    def send(self, frame: bytes, req_id: int) -> None:
        assert self._transport is not None
        self._transport.write(frame)

    async def close(self) -> None:
        if self._transport is not None:
            # abort, not close: whatever is not sent yet has no one waiting for it any more.
            self._transport.abort()
            await asyncio.shield(self._lost)


class Device:
    """The system calls on /dev/xen/xenbus."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def write(self, frame: bytes) -> int:
        return os.write(self._fd, frame)

    def close(self) -> None:
        os.close(self._fd)


_FATAL = {errno.EIO, errno.ENODEV, errno.ENXIO, errno.EBADF, errno.EPIPE, errno.EAGAIN}
"""Errors of write() on the device after which nothing can be expected from it.

All others concern the one message, which the kernel has then dropped as a whole. EAGAIN never
comes from this device, and must not be taken for the conflict of a transaction.
"""


class DeviceTransport:
    """A descriptor of /dev/xen/xenbus for everything but watches."""

    payload_max = DEVICE_PAYLOAD_MAX
    in_flight = 1
    refused = frozenset({Op.WATCH, Op.UNWATCH})

    def __init__(self, link: Link, device: Device) -> None:
        self._link = link
        self._device: Device | None = device
        self._loop = asyncio.get_running_loop()
        link.transport = self
        self._loop.add_reader(device.fileno(), self._readable)

    def send(self, frame: bytes, req_id: int) -> None:
        if self._device is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            self._check_written(self._device.write(frame), frame)
        except OSError as exc:
            self._fatal(exc)
            raise

    async def close(self) -> None:
        device = self._detach()
        if device is not None:
            device.close()

    def _readable(self) -> None:
        assert self._device is not None
        try:
            data = self._device.read(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._link.fail(exc.errno or errno.EIO, f"read: {_describe(exc)}")
        else:
            if data:
                self._link.feed(data)
            else:
                self._link.end_of_file()
        if self._link.failure is not None:
            # A dead device stays readable for ever.
            self._loop.remove_reader(self._device.fileno())

    def _check_written(self, written: int, frame: bytes) -> None:
        if written != len(frame):
            self._link.fail(errno.EIO, f"short write ({written} of {len(frame)} bytes)")
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _fatal(self, exc: OSError) -> None:
        if exc.errno in _FATAL:
            self._link.fail(exc.errno or errno.EIO, f"write: {_describe(exc)}")

    def _detach(self) -> Device | None:
        device, self._device = self._device, None
        if device is not None:
            self._loop.remove_reader(device.fileno())
        return device


class DeviceWatchTransport(DeviceTransport):
    """The descriptor of one watch: its WATCH is written by a thread, because that write waits.

    While the thread is inside write(), the descriptor is its own: closing it here would let the
    number be reused under the thread. Whoever comes last closes it.
    """

    refused = frozenset(Op) - {Op.WATCH}

    def __init__(self, link: Link, device: Device) -> None:
        super().__init__(link, device)
        self._lock = threading.Lock()
        self._writing = False
        self._abandoned = False

    def send(self, frame: bytes, req_id: int) -> None:
        device = self._device
        if device is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._writing = True
        # A daemon: a store that never answers must not keep the process from ending.
        threading.Thread(
            target=self._write, args=(device, frame, req_id), name="xenstore-watch", daemon=True
        ).start()

    async def close(self) -> None:
        device = self._detach()
        if device is None:
            return
        with self._lock:
            self._abandoned = self._writing
        if not self._abandoned:
            device.close()

    def _write(self, device: Device, frame: bytes, req_id: int) -> None:
        """The thread. Of the loop's state it touches only what the lock protects."""
        error: OSError | None = None
        try:
            written = device.write(frame)
            if written != len(frame):
                error = OSError(errno.EIO, f"short write ({written} bytes)")
        except OSError as exc:
            error = exc
        with self._lock:
            self._writing = False
            abandoned = self._abandoned
        if abandoned:
            device.close()
        elif error is not None:
            try:
                self._loop.call_soon_threadsafe(self._link.fail_request, req_id, error)
            except RuntimeError:
                pass  # the loop is closed: nobody waits for the watch any more


def _describe(exc: OSError) -> str:
    code = exc.errno or errno.EIO
    return f"{errno.errorcode.get(code, str(code))} ({os.strerror(code)})"
