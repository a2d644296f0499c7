# SPDX-License-Identifier: BSD-2-Clause
"""A host for one worker: event channel, granted pages, a backend and a supervisor.

The event channel and the pages are handed over as the embedded host's hub does (docs/host.md). The
backend is written against Xen's headers (io/ring.h, io/blkif.h) and shares no code with the
frontend's ring. It is honest and serves a disk in memory; tests make it hostile by overriding
`answer` or `respond`, or by writing into the shared page directly.

Layout of the arena: one guard page, the ring, the pool. Grant references are deliberately not page
numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waiting import PATIENCE

from pvfront.abi import BlkStats, ffi, lib, read_stats
from pvfront.host import _host

PAGE = 4096
SECTOR = 512

# io/blkif.h
READ, WRITE, FLUSH, DISCARD = 0, 1, 3, 5
OKAY, ERROR, EOPNOTSUPP = 0, -1, -2
# x86_64: operation, nr_segments, handle, id, sector_number, then 11 of gref, first, last
REQUEST = struct.Struct("<BBHxxxxQQ")
SEGMENT = struct.Struct("<IBBxx")
NR_SECTORS = struct.Struct("<Q")
RESPONSE = struct.Struct("<QBxhxxxx")
SLOT = 112
# io/ring.h: req_prod, req_event, rsp_prod, rsp_event, then 48 bytes
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT, SLOTS = 0, 4, 8, 12, 64
MASK = 0xFFFFFFFF


def sealed(name: str, size: int, *, seal: bool = True) -> int:
    """A memfd as the hub makes them: nobody can shrink it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def hand_over(kind: int, fds: list[int], **fields: int) -> tuple[socket.socket, socket.socket]:
    """A connection to the hub in which a `struct pvf_host_packet` waits: both its ends."""
    hub, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packet = _host.ffi.new(
        "struct pvf_host_packet *", {"magic": _host.lib.PVF_HOST_MAGIC, "kind": kind, **fields}
    )
    socket.send_fds(hub, [bytes(_host.ffi.buffer(packet))], fds)
    return hub, theirs


class Port:
    """One event channel. End 0 is the worker's, end 1 the backend's."""

    PENDING, MASKED = _host.lib.PVF_CHANNEL_PENDING, _host.lib.PVF_CHANNEL_MASKED

    def __init__(self, number: int = 5) -> None:
        self.fd = sealed("channel", PAGE)
        self._map = mmap.mmap(self.fd, PAGE)
        self._channel = _host.ffi.from_buffer("struct pvf_channel *", self._map)
        _host.lib.pvf_channel_init(self._channel)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.worker_fd, self.backend_fd = os.eventfd(0, flags), os.eventfd(0, flags)
        # Readable at its end: nobody holds the worker's side any more.
        self.hub, self.theirs = hand_over(
            _host.lib.PVF_HOST_EVENT, [self.fd, self.worker_fd, self.backend_fd], port=number
        )

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_flags(self) -> int:
        """PENDING and MASKED of the worker's end."""
        return int(self._channel.end[0].flags)

    @worker_flags.setter
    def worker_flags(self, value: int) -> None:
        self._channel.end[0].flags = value

    def notify(self) -> None:
        assert _host.lib.pvf_channel_notify(self._channel, 1, self.worker_fd) == 0

    def take(self) -> bool:
        return bool(_host.lib.pvf_channel_take(self._channel, 1, self.backend_fd))

    def unmask(self) -> None:
        assert _host.lib.pvf_channel_unmask(self._channel, 1, self.backend_fd) == 0

    def close(self) -> None:
        if self.fd < 0:
            return
        _host.ffi.release(self._channel)
        self._map.close()
        for fd in (self.fd, self.worker_fd, self.backend_fd):
            os.close(fd)
        self.fd = -1
        self.hub.close()
        self.theirs.close()


@dataclass
class Request:
    """One blkif request as the backend copied it. `segments`: (gref, first, last) sectors."""

    op: int
    id: int
    sector: int
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    sectors: int = 0


class Pages:
    """What the frontend has granted."""

    def __init__(self, ring_pages: int, pool_pages: int) -> None:
        self.ring_offset = PAGE
        self.ring_pages = ring_pages
        self.pool_offset = PAGE * (1 + ring_pages)
        self.pool_pages = pool_pages
        size = self.pool_offset + PAGE * pool_pages
        self.fd = sealed("grants", size)
        self.hub: socket.socket | None = None
        self.map = mmap.mmap(self.fd, size)
        # Indices are read and written as whole words: struct.pack_into clears its target first,
        # and a frontend would see an index of 0.
        self._words = memoryview(self.map).cast("I")
        self.grefs = [7000 + 3 * i for i in range(pool_pages)]
        self._page = {gref: i for i, gref in enumerate(self.grefs)}

    def hand_over(self) -> socket.socket:
        """A new connection to the hub, with the arena waiting in it."""
        if self.hub is not None:
            self.hub.close()
        self.hub, theirs = hand_over(_host.lib.PVF_HOST_PAGES, [self.fd])
        return theirs

    def of(self, gref: int) -> int:
        """Offset of a granted page; KeyError: the frontend named a gref it never granted."""
        return self.pool_offset + PAGE * self._page[gref]

    def get(self, field_: int) -> int:
        return self._words[(self.ring_offset + field_) // 4]

    def set(self, field_: int, value: int) -> None:
        self._words[(self.ring_offset + field_) // 4] = value & MASK

    def pool(self) -> bytes:
        return self.map[self.pool_offset :]

    def close(self) -> None:
        self._words.release()
        self.map.close()
        os.close(self.fd)
        if self.hub is not None:
            self.hub.close()


class Backend(threading.Thread):
    """An honest disk in memory behind an event channel. Ends when nobody holds the other end."""

    def __init__(self, pages: Pages, port: Port, disk: bytearray) -> None:
        super().__init__(daemon=True)
        self.pages = pages
        self.port = port
        self.disk = disk
        slots = (pages.ring_pages * PAGE - SLOTS) // SLOT
        self.slots = 1 << (slots.bit_length() - 1)
        self.req_cons = 0
        self.rsp_prod = 0
        self.hold = False  # take requests, answer none until released
        self.held: list[Request] = []
        self.log: list[Request] = []  # every request taken
        self.overrun = False
        self.notified = 0  # events that were delivered to us
        self.mute = False  # answer without an event
        self.problem: BaseException | None = None
        self._ending = threading.Event()
        self.lock = threading.RLock()

    # -- events ----------------------------------------------------------------------------------

    def event(self) -> None:
        """One event for the frontend."""
        with self.lock:
            self.port.notify()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                readable, _, _ = select.select([self.port.backend_fd, self.port.hub], [], [])
                if self.port.take():
                    with self.lock:
                        self.notified += 1
                        self.work()
                    self.port.unmask()
                elif self.port.hub in readable:
                    return
        except BaseException as error:
            self.problem = error

    def stop(self) -> None:
        """Ends the thread and closes the port; raises what went wrong in it."""
        self._ending.set()
        if self.is_alive():
            os.eventfd_write(self.port.backend_fd, 1)
            self.join(PATIENCE)
            assert not self.is_alive()
        self.port.close()
        if self.problem is not None:
            raise self.problem

    # -- the ring --------------------------------------------------------------------------------

    def work(self) -> None:
        while True:
            producer = self.pages.get(REQ_PROD)
            while self.req_cons != producer:
                assert (producer - self.rsp_prod) & MASK <= self.slots, "ring overrun"
                request = self.take()
                self.log.append(request)
                if self.hold:
                    self.held.append(request)
                else:
                    self.answer(request)
            self.pages.set(REQ_EVENT, self.req_cons + 1)
            if self.pages.get(REQ_PROD) == self.req_cons:
                return

    def take(self) -> Request:
        at = self.pages.ring_offset + SLOTS + SLOT * (self.req_cons % self.slots)
        raw = bytes(self.pages.map[at : at + SLOT])
        self.req_cons = (self.req_cons + 1) & MASK
        op, count, _handle, ident, sector = REQUEST.unpack_from(raw)
        if op == DISCARD:
            (sectors,) = NR_SECTORS.unpack_from(raw, REQUEST.size)
            return Request(op, ident, sector, [], sectors)
        assert count <= 11
        segments = [
            SEGMENT.unpack_from(raw, REQUEST.size + SEGMENT.size * i) for i in range(count)
        ]
        return Request(op, ident, sector, segments)

    def answer(self, request: Request) -> None:
        self.respond(request.id, request.op, self.execute(request))

    def execute(self, request: Request) -> int:
        """What an honest disk does; returns BLKIF_RSP_*."""
        if request.op == FLUSH:
            return OKAY
        at = request.sector * SECTOR
        if request.op == DISCARD:
            length = request.sectors * SECTOR
            assert at + length <= len(self.disk)
            self.disk[at : at + length] = bytes(length)
            return OKAY
        assert 1 <= len(request.segments) <= 11
        assert len({gref for gref, _, _ in request.segments}) == len(request.segments)
        for gref, first, last in request.segments:
            assert first <= last < PAGE // SECTOR
            page = self.pages.of(gref) + first * SECTOR
            length = (last - first + 1) * SECTOR
            assert at + length <= len(self.disk), "beyond the disk"
            if request.op == WRITE:
                self.disk[at : at + length] = self.pages.map[page : page + length]
            else:
                self.pages.map[page : page + length] = bytes(self.disk[at : at + length])
            at += length
        return OKAY

    def respond(self, ident: int, op: int, status: int) -> None:
        at = self.pages.ring_offset + SLOTS + SLOT * (self.rsp_prod % self.slots)
        RESPONSE.pack_into(self.pages.map, at, ident, op, status)
        old, self.rsp_prod = self.rsp_prod, (self.rsp_prod + 1) & MASK
        self.pages.set(RSP_PROD, self.rsp_prod)
        wanted = self.pages.get(RSP_EVENT)
        if (self.rsp_prod - wanted) & MASK < (self.rsp_prod - old) & MASK and not self.mute:
            self.event()

    def release(self, order: Callable[[list[Request]], list[Request]] = list) -> None:
        """Answers what was held, in the order that `order` gives."""
        with self.lock:
            self.hold = False
            held, self.held = self.held, []
            for request in order(held):
                self.answer(request)


class Supervisor:
    """The other end of the control protocol, without asyncio."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)
        self.stats_fd = -1
        self.seen: list[tuple[int, Any, bytes]] = []
        self.hello = self.wait(lib.PVF_CTL_HELLO)

    def close(self) -> None:
        self.sock.close()
        if self.stats_fd >= 0:
            os.close(self.stats_fd)
            self.stats_fd = -1

    def raw(self, data: bytes, fds: list[int] | None = None) -> None:
        socket.send_fds(self.sock, [data], fds or [])

    def send(self, kind: int, body: Any, generation: int, fds: list[int] | None = None) -> None:
        size = ffi.sizeof(body[0])
        if kind == lib.PVF_CTL_ATTACH:
            size = ffi.sizeof("struct pvf_ctl_attach") + 4 * body.pool_pages
        body.hdr.magic = lib.PVF_CTL_MAGIC
        body.hdr.version = lib.PVF_CTL_VERSION
        body.hdr.type = kind
        body.hdr.generation = generation
        body.hdr.length = size
        self.raw(bytes(ffi.buffer(body, size)), fds)

    def receive(self) -> tuple[int, Any]:
        """The next message: type, body."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 8192, 4)
        except TimeoutError:
            raise AssertionError("the worker said nothing") from None
        if not data:
            raise ConnectionError("the worker closed the control connection")
        for fd in fds:
            if self.stats_fd < 0:
                self.stats_fd = fd
            else:
                os.close(fd)
        hdr = ffi.from_buffer("struct pvf_ctl_hdr *", data)
        assert (hdr.magic, hdr.version, hdr.length) == (
            lib.PVF_CTL_MAGIC, lib.PVF_CTL_VERSION, len(data),
        )
        body = ffi.new(f"struct {BODIES[hdr.type]} *")
        assert ffi.sizeof(body[0]) == len(data)
        ffi.memmove(body, data, len(data))
        self.seen.append((hdr.type, body, data))
        return hdr.type, body

    def wait(self, kind: int) -> Any:
        """Receives until a message of this type comes; an ERROR that nobody waits for fails."""
        while True:
            got, body = self.receive()
            if got == kind:
                return body
            if got == lib.PVF_CTL_ERROR:
                raise AssertionError(f"ERROR {body.error}: {text(body.text)}")

    def error(self) -> tuple[int, int, str]:
        """Waits for ERROR: (in reply to, errno, text)."""
        body = self.wait(lib.PVF_CTL_ERROR)
        return body.in_reply_to, body.error, text(body.text)


BODIES = {
    lib.PVF_CTL_ATTACHED: "pvf_ctl_simple",
    lib.PVF_CTL_STARTED: "pvf_ctl_simple",
    lib.PVF_CTL_DRAINED: "pvf_ctl_simple",
    lib.PVF_CTL_DETACHED: "pvf_ctl_simple",
    lib.PVF_CTL_ERROR: "pvf_ctl_error",
    lib.PVF_CTL_HELLO: "pvf_ctl_hello",
    lib.PVF_CTL_BROKEN: "pvf_ctl_broken",
    lib.PVF_CTL_TARGET_GONE: "pvf_ctl_target_gone",
    lib.PVF_CTL_FEATURE_OFF: "pvf_ctl_feature_off",
    lib.PVF_CTL_STALLED: "pvf_ctl_stalled",
    lib.PVF_CTL_LOG: "pvf_ctl_log",
}


def text(field_: Any) -> str:
    return ffi.string(field_).decode()


def binary() -> Path:
    """The worker under test: PVFRONT_WORKER (a sanitizer's build), else the installed one."""
    named = os.environ.get("PVFRONT_WORKER")
    if named:
        return Path(named)
    found = [
        Path(__import__("importlib.util").util.find_spec("pvfront._abi").origin).parent
        / "pvfront-worker",
        Path(__import__("pvfront").__file__).parent / "pvfront-worker",
    ]
    for path in found:
        if path.exists():
            return path
    raise AssertionError(
        "no pvfront-worker to test: install the package, or set PVFRONT_WORKER to one"
    )


class Host:
    """A worker process with everything around it. Use as a context manager."""

    def __init__(
        self,
        *,
        disk_size: int = 8 << 20,
        ring_pages: int = 1,
        pool_pages: int = 352,
        sector_size: int = 512,
        flags: int = lib.PVF_BLK_FLUSH | lib.PVF_BLK_DISCARD,
        backend: type[Backend] = Backend,
        args: list[str] | None = None,
        name: str = "vbd-51728",
        queues: int = 1,
    ) -> None:
        self.disk = bytearray(disk_size)
        self.ring_pages, self.pool_pages = ring_pages, pool_pages
        self.sector_size, self.flags = sector_size, flags
        self.max_segments = 11
        self.granularity = self.alignment = 0
        self.stall = 0
        self.scrub = False
        self.name = name
        self.generation = 0
        self.backend_class = backend
        self.queues = queues
        # One for each queue; `backend`, `pages` and `client` are queue 0's.
        self.backends: list[Backend] = []
        self.all_pages: list[Pages] = []
        self.clients: list[socket.socket] = []
        self._stack = contextlib.ExitStack()
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pvf-"))
        self.path = f"{directory}/w.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.path)
        listener.listen(4)
        script = [str(binary()), "--name", name, "--queues", str(queues), *(args or [])]

        def third() -> None:
            os.dup2(listener.fileno(), 3)

        self.process = subprocess.Popen(
            script, preexec_fn=third, pass_fds=[3], stderr=subprocess.PIPE
        )
        listener.close()
        self.supervisor = Supervisor(self.path)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self._drop_clients()
            self.supervisor.close()
            self.process.send_signal(signal.SIGKILL)
            status = self.process.wait(PATIENCE)
            assert self.process.stderr is not None
            errors = self.process.stderr.read().decode(errors="replace")
            self.process.stderr.close()
            self._drop_backend()
            if kind is None:
                assert not errors, f"the worker wrote to stderr:\n{errors}"
                assert status in (0, -signal.SIGKILL), f"the worker ended by {status}"
            elif errors:
                print(errors)
        finally:
            self._stack.close()

    def _drop_backend(self) -> None:
        backends, self.backends = self.backends, []
        for backend in backends:
            backend.stop()
        pages, self.all_pages = self.all_pages, []
        for page in pages:
            page.close()

    def _drop_clients(self) -> None:
        clients, self.clients = self.clients, []
        for client in clients:
            client.close()

    @property
    def backend(self) -> Backend | None:
        return self.backends[0] if self.backends else None

    @property
    def pages(self) -> Pages | None:
        return self.all_pages[0] if self.all_pages else None

    @pages.setter
    def pages(self, value: Pages) -> None:
        self.all_pages = [value]

    @property
    def client(self) -> socket.socket | None:
        return self.clients[0] if self.clients else None

    @client.setter
    def client(self, value: None) -> None:
        self.clients = []

    # -- walks -----------------------------------------------------------------------------------

    def attach(self, **override: Any) -> None:
        """A new backend and generation, up to ATTACHED."""
        self._drop_backend()
        self.generation += 1
        for queue in range(self.queues):
            self.attach_queue(queue, **override)

    def attach_queue(self, queue: int, **override: Any) -> None:
        """One queue's ATTACH of the present generation."""
        made = Pages(self.ring_pages, self.pool_pages)
        port = Port(5 + queue)
        self.all_pages.append(made)
        self.backends.append(self.backend_class(made, port, self.disk))
        with made.hand_over() as pages:
            self.supervisor.send(
                lib.PVF_CTL_ATTACH, self.attach_body(queue, **override), self.generation,
                [port.theirs.fileno(), pages.fileno()],
            )
        port.theirs.close()
        self.supervisor.wait(lib.PVF_CTL_ATTACHED)
        self.backends[-1].start()

    def attach_body(self, queue: int = 0, /, **override: Any) -> Any:
        pages = self.all_pages[queue]
        body = ffi.new("struct pvf_ctl_attach *", {"pool_grefs": pages.grefs})
        values = {
            "device_class": lib.PVF_CLASS_BLK,
            "port": 5 + queue,
            "ring_pages": self.ring_pages,
            "pool_pages": self.pool_pages,
            "ring_offset": pages.ring_offset,
            "pool_offset": pages.pool_offset,
            "name": self.name.encode(),
            "queue": queue,
            "queues": self.queues,
            "flags": lib.PVF_ATTACH_SCRUB if self.scrub else 0,
            **override,
        }
        for name, value in values.items():
            setattr(body, name, value)
        return body

    def start_body(self, **override: Any) -> Any:
        body = ffi.new("struct pvf_ctl_start *")
        values = {
            "sectors": len(self.disk) // SECTOR,
            "sector_size": self.sector_size,
            "flags": self.flags,
            "max_segments": self.max_segments,
            "discard_granularity": self.granularity,
            "discard_alignment": self.alignment,
            "stall_seconds": self.stall,
            "vdev": 51728,
            **override,
        }
        for name, value in values.items():
            setattr(body, name, value)
        return body

    def start(self, *, keep: bool = False, **override: Any) -> None:
        with contextlib.ExitStack() as stack:
            fds = []
            if not keep:
                self._drop_clients()
                for _ in range(self.queues):
                    client, theirs = socket.socketpair()
                    client.settimeout(PATIENCE)
                    self.clients.append(client)
                    fds.append(stack.enter_context(theirs).fileno())
            self.supervisor.send(
                lib.PVF_CTL_START, self.start_body(**override), self.generation, fds
            )
        self.supervisor.wait(lib.PVF_CTL_STARTED)

    def simple(self, kind: int) -> None:
        self.supervisor.send(kind, ffi.new("struct pvf_ctl_simple *"), self.generation)

    def quiesce(self) -> None:
        self.simple(lib.PVF_CTL_QUIESCE)
        self.supervisor.wait(lib.PVF_CTL_DRAINED)

    def detach(self, flags: int = 0) -> None:
        self.supervisor.send(
            lib.PVF_CTL_DETACH, ffi.new("struct pvf_ctl_detach *", {"flags": flags}),
            self.generation,
        )
        self.supervisor.wait(lib.PVF_CTL_DETACHED)

    def stats(self, queue: int = 0) -> BlkStats:
        return read_stats(self.supervisor.stats_fd, queue)

    def nbd(self, queue: int = 0) -> Nbd:
        return Nbd(self.clients[queue])


def serving(**options: Any) -> Host:
    """A host whose worker is RUNNING."""
    host = Host(**options)
    try:
        host.attach()
        host.start()
    except BaseException:
        host.__exit__(RuntimeError)
        raise
    return host


class NbdError(Exception):
    """The server answered with this error number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"NBD error {number}")
        self.number = number


class Nbd:
    """An NBD client in transmission phase, as plain as can be."""

    READ, WRITE, DISC, FLUSH, TRIM = 0, 1, 2, 3, 4
    FUA = 1
    HEADER = struct.Struct(">IHH8sQI")
    REPLY = struct.Struct(">II8s")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._next = 0

    def handle(self) -> bytes:
        self._next += 1
        return self._next.to_bytes(8, "little")

    def request(
        self, kind: int, at: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> bytes:
        """Sends one request, returns its handle."""
        handle = self.handle()
        self.sock.sendall(self.HEADER.pack(0x25609513, flags, kind, handle, at, length) + payload)
        return handle

    def exactly(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                got = self.sock.recv_into(view)
            except TimeoutError:
                raise AssertionError(
                    f"no reply: {len(view)} of {length} bytes are missing"
                ) from None
            if not got:
                raise ConnectionError("the worker closed the NBD socket")
            view = view[got:]
        return bytes(data)

    def reply(self) -> tuple[bytes, int]:
        """The next reply's header: handle, error."""
        magic, error, handle = self.REPLY.unpack(self.exactly(16))
        assert magic == 0x67446698, hex(magic)
        return handle, error

    def check(self, handle: bytes) -> None:
        got, error = self.reply()
        assert got == handle
        if error:
            raise NbdError(error)

    def read(self, at: int, length: int) -> bytes:
        self.check(self.request(self.READ, at, length))
        return self.exactly(length)

    def write(self, at: int, data: bytes, flags: int = 0) -> None:
        writer = threading.Thread(
            target=lambda: setattr(
                self, "_sent", self.request(self.WRITE, at, len(data), data, flags)
            )
        )
        writer.start()
        try:
            got, error = self.reply()
        finally:
            writer.join(PATIENCE)
        assert got == self._next.to_bytes(8, "little")
        if error:
            raise NbdError(error)

    def flush(self) -> None:
        self.check(self.request(self.FLUSH))

    def trim(self, at: int, length: int, flags: int = 0) -> None:
        self.check(self.request(self.TRIM, at, length, flags=flags))
