# SPDX-License-Identifier: BSD-2-Clause
"""A host for one worker: its queues' backends (ringbackend.py), a supervisor and NBD clients."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from ringbackend import SECTOR, Backend, Pages, Port
from waiting import PATIENCE

from pvfront.abi import BlkStats, ffi, lib, read_stats
from pvfront.workermessage import BODIES


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
            lib.PVF_CTL_MAGIC,
            lib.PVF_CTL_VERSION,
            len(data),
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
        self._directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pvf-"))
        self.args = args or []
        self.workers = 0
        self.ends = [0, -signal.SIGKILL]  # statuses that its end may have
        self.path, self.process, self.supervisor = self.start_worker()

    def start_worker(
        self, queues: int | None = None
    ) -> tuple[str, subprocess.Popen[bytes], Supervisor]:
        """A worker that holds nothing yet: where it listens, its process, a connection to it."""
        self.workers += 1
        path = f"{self._directory}/w{self.workers}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen(4)
        script = [
            str(binary()), "--name", self.name, "--queues", str(queues or self.queues), *self.args,
        ]  # fmt: skip

        def third() -> None:
            os.dup2(listener.fileno(), 3)

        process = subprocess.Popen(script, preexec_fn=third, pass_fds=[3], stderr=subprocess.PIPE)
        listener.close()
        return path, process, Supervisor(path)

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
                assert status in self.ends, f"the worker ended by {status}"
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
                lib.PVF_CTL_ATTACH,
                self.attach_body(queue, **override),
                self.generation,
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
            lib.PVF_CTL_DETACH,
            ffi.new("struct pvf_ctl_detach *", {"flags": flags}),
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
