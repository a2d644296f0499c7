# SPDX-License-Identifier: BSD-2-Clause
"""A disk as a plain NBD server on a Unix socket: for clients without a kernel driver, or a guest.

Theory of operation
    ``/run/pvfront/xvdb.nbd`` speaks the newstyle fixed handshake of the NBD protocol
    (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md). `Handshake` is the
    protocol, pure: it says how many bytes it wants next, takes exactly those, and says what to
    answer. `SocketTarget` is the socket around it. What follows the handshake, the
    transmission, is the worker's: it gets the connected descriptor. Therefore not one byte
    beyond what the handshake asked for is ever read here, whatever a client sends ahead.

    One client at a time is in transmission; others may list and ask (LIST, INFO) meanwhile. Who
    wants transmission (GO, EXPORT_NAME) while another has it waits up to `TURN` seconds, so
    that one tool can follow on another's heels, and is then refused with NBD_REP_ERR_POLICY and a
    text (EXPORT_NAME, which has no errors: by the end of the connection). CAN_MULTI_CONN is not
    offered, so that no client opens several connections by itself.

    The socket appears when the worker first serves (`publish`) and stays over reconnections. A
    client that comes while the backend is away gets its handshake, and its requests wait as they
    would for a slow disk.

Limits
    Nothing tells a client in transmission that the disk has changed: a resize, or a feature that
    is gone, is seen by the next client; status shows what the present one was told. Requests
    beyond the present end are refused. Nobody keeps the requests of a client: if the connection
    to the backend breaks with requests in flight, the client's socket is closed, and whether it
    connects again is its own business (qemu: reconnect-delay). A client with none stays.

    Hostile clients: every length is bounded before it is read, a handshake has `HANDSHAKE`
    seconds and `OPTIONS` options in all, and `CLIENTS` handshakes go on at a time; more wait in
    the listen queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..abi import lib
from .blockdisk import Feature
from .features import DiskGeometry
from .target import TargetError, hung_up, set_buffers

log = logging.getLogger(__name__)

# Seconds.
HANDSHAKE = 30.0
TURN = 5.0

CLIENTS = 16  # handshakes at a time
OPTIONS = 64  # of one handshake; a client that wants all that we have sends ten
STRING_MAX = 4096  # bytes of a name, doc/proto.md "Values"
OPTION_MAX = 2 * STRING_MAX  # bytes of one option's data
SOCKET_BUFFER = 1 << 20  # bytes, as far as the system allows
PREFERRED_LEAST = 4096

INIT = struct.Struct(">8s8sH")  # NBDMAGIC, IHAVEOPT, handshake flags
OPTION = struct.Struct(">8sII")  # IHAVEOPT, option, length
REPLY = struct.Struct(">QIII")  # magic, option, type, length
U16, U32 = struct.Struct(">H"), struct.Struct(">I")
NBDMAGIC, IHAVEOPT = b"NBDMAGIC", b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # handshake flags, the server's and the client's


class Opt(enum.IntEnum):
    """Options that are answered with more than ERR_UNSUP (which STARTTLS and the rest get)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class Rep(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_TOO_BIG = 1 << 31 | 9


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# Transmission flags.
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5


@dataclass(frozen=True, slots=True)
class Export:
    """What a client is told. `minimum`, `preferred`, `maximum`: bytes of a request."""

    name: str
    description: str
    size: int  # bytes
    flags: int
    minimum: int
    preferred: int
    maximum: int

    @classmethod
    def of(cls, name: str, geometry: DiskGeometry) -> Export:
        flags = HAS_FLAGS
        if geometry.read_only:
            flags |= READ_ONLY
        if geometry.flush:
            # FUA is a write and a flush of ours: without flush there is none.
            flags |= SEND_FLUSH | SEND_FUA
        if geometry.discard:
            flags |= SEND_TRIM
        maximum: int = lib.PVF_NBD_MAX_PAYLOAD
        preferred = max(PREFERRED_LEAST, geometry.physical_sector_size)
        return cls(
            name=name,
            description=_description(name, geometry),
            size=geometry.size,
            flags=flags,
            minimum=geometry.sector_size,
            preferred=min(preferred, maximum),
            maximum=maximum,
        )


def _description(name: str, geometry: DiskGeometry) -> str:
    """What a person sees, and what the protocol has no field for."""
    text = f"Xen disk {name}, served by pvfront"
    text += f"; physical sectors of {geometry.physical_sector_size} bytes"
    if geometry.discard:
        text += f"; discards in {geometry.discard_granularity} bytes"
        if geometry.discard_alignment:
            text += f" from {geometry.discard_alignment} on"
    return text + "; removable" * geometry.removable


class Then(enum.Enum):
    """What comes after a reply."""

    MORE = "more"  # feed `need` bytes
    GO = "go"  # the client wants transmission: `admit` or `refuse`
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Step:
    reply: bytes = b""
    then: Then = Then.MORE


class Handshake:
    """The server's side of one client's handshake; no socket, no time.

    Send `greeting`; then, while `Then.MORE`, feed exactly `need` bytes.
    """

    def __init__(self, export: Callable[[], Export]) -> None:
        """`export` is asked at each reply: a disk may change while a client haggles."""
        self.greeting = INIT.pack(NBDMAGIC, IHAVEOPT, FIXED_NEWSTYLE | NO_ZEROES)
        self.need = U32.size
        self.told: Export | None = None
        self._export = export
        self._next: Callable[[bytes], Step] = self._flags
        self._zeroes = True
        self._options = 0
        self._option = 0
        self._wanted: frozenset[int] = frozenset()

    def feed(self, data: bytes) -> Step:
        """Takes the next `need` bytes, not one more or less."""
        if len(data) != self.need:
            raise ValueError(f"{self.need} bytes are wanted, not {len(data)}")
        return self._next(data)

    def admit(self) -> bytes:
        """The reply that begins transmission."""
        export = self.told = self._export()
        if self._option == Opt.EXPORT_NAME:
            head = struct.pack(">QH", export.size, export.flags)
            return head + (bytes(124) if self._zeroes else b"")
        return self._info(export, self._wanted)

    def refuse(self, why: str) -> Step:
        """Instead of `admit`: the client may try again, or something else."""
        if self._option == Opt.EXPORT_NAME:
            return Step(then=Then.CLOSE)
        return Step(self._reply(Rep.ERR_POLICY, why.encode()))

    # -- what arrives ------------------------------------------------------------------------

    def _flags(self, data: bytes) -> Step:
        (flags,) = U32.unpack(data)
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            return Step(then=Then.CLOSE)  # it relies on something that we do not know
        self._zeroes = not flags & NO_ZEROES
        return self._want_option()

    def _want_option(self, reply: bytes = b"") -> Step:
        self.need, self._next = OPTION.size, self._header
        return Step(reply)

    def _header(self, data: bytes) -> Step:
        magic, self._option, length = OPTION.unpack(data)
        self._options += 1
        if magic != IHAVEOPT or self._options > OPTIONS:
            return Step(then=Then.CLOSE)
        if length > OPTION_MAX:
            if self._option == Opt.EXPORT_NAME:
                return Step(then=Then.CLOSE)
            # Its data is not read, so this is the last reply that has a place in the stream.
            return Step(self._reply(Rep.ERR_TOO_BIG), Then.CLOSE)
        self.need, self._next = length, self._data
        return Step() if length else self._data(b"")

    def _data(self, data: bytes) -> Step:
        match self._option:
            case Opt.EXPORT_NAME:
                return Step(then=Then.GO if self._is_ours(data) else Then.CLOSE)
            case Opt.ABORT:
                return Step(self._reply(Rep.ACK), Then.CLOSE)
            case Opt.LIST:
                return self._want_option(self._list(data))
            case Opt.INFO | Opt.GO:
                return self._asked(data)
            case _:
                return self._want_option(self._reply(Rep.ERR_UNSUP, b"not supported"))

    def _list(self, data: bytes) -> bytes:
        if data:
            return self._reply(Rep.ERR_INVALID, b"LIST has no data")
        name = self._export().name.encode()
        return self._reply(Rep.SERVER, U32.pack(len(name)) + name) + self._reply(Rep.ACK)

    def _asked(self, data: bytes) -> Step:
        """INFO and GO: length and name, number and kinds of the information that is wanted."""
        try:
            (length,) = U32.unpack_from(data)
            name = data[4 : 4 + length]
            (count,) = U16.unpack_from(data, 4 + length)
            wanted = data[6 + length :]
            if len(wanted) != 2 * count or length > STRING_MAX:
                raise ValueError
        except (struct.error, ValueError):
            return self._want_option(self._reply(Rep.ERR_INVALID, b"the lengths do not agree"))
        if not self._is_ours(name):
            ours = self._export().name.encode()
            text = b"there is no such export; this socket has one: " + ours
            return self._want_option(self._reply(Rep.ERR_UNKNOWN, text))
        self._wanted = frozenset(kind for (kind,) in U16.iter_unpack(wanted))
        self._want_option()
        if self._option == Opt.GO:
            return Step(then=Then.GO)
        return Step(self._info(self._export(), self._wanted))

    def _is_ours(self, name: bytes) -> bool:
        """The default export, whose name is empty, is the only one."""
        return name in (b"", self._export().name.encode())

    # -- replies -----------------------------------------------------------------------------

    def _reply(self, kind: int, data: bytes = b"") -> bytes:
        return REPLY.pack(REPLY_MAGIC, self._option, kind, len(data)) + data

    def _info(self, export: Export, wanted: frozenset[int]) -> bytes:
        infos = [struct.pack(">HQH", Info.EXPORT, export.size, export.flags)]
        # Unasked too: it binds a client that reads it, and any other ignores it.
        infos.append(
            struct.pack(">HIII", Info.BLOCK_SIZE, export.minimum, export.preferred, export.maximum)
        )
        if Info.NAME in wanted:
            infos.append(U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted:
            infos.append(U16.pack(Info.DESCRIPTION) + export.description.encode())
        return b"".join(self._reply(Rep.INFO, info) for info in infos) + self._reply(Rep.ACK)


class _Client:
    """Who is, or will next be, in transmission. `sock` until the worker has it."""

    def __init__(self, sock: socket.socket | None, pid: int, told: Export | None) -> None:
        self.sock = sock
        self.pid = pid  # 0: unknown
        self.told = told
        self.ready = False  # its handshake is complete

    def __str__(self) -> str:
        return f"pid {self.pid}" if self.pid else "a client"


class SocketTarget:
    """`target.Target` and `target.Clients` on ``run_dir/<label>.nbd``."""

    kind = "socket"
    stays = resize_waits = False
    server_pid = 0

    def __init__(self, label: str, run_dir: Path) -> None:
        self.label = label
        self._path = run_dir / f"{label}.nbd"
        self._export: Export | None = None
        self._client: _Client | None = None
        self._free = asyncio.Event()
        self._poke: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    # -- names -------------------------------------------------------------------------------

    @property
    def clients(self) -> SocketTarget:
        return self

    @property
    def name(self) -> str:
        return ""

    @property
    def path(self) -> str:
        """What NBD tools take, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md"""
        return f"nbd+unix:///?socket={quote(self.link)}" if self._listener is not None else ""

    @property
    def link(self) -> str:
        return str(self._path)

    # -- life --------------------------------------------------------------------------------

    async def adopt(self) -> bool:
        return True  # there is no device: what exports the disk is this process

    @property
    def max_queues(self) -> int:
        return 1  # a client opens one connection

    @property
    def usual_queues(self) -> int:
        return 1

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        """The socket of the client that waits, if one does."""
        client = self._client
        if client is None or not client.ready or client.sock is None:
            return []
        sock, client.sock = client.sock, None
        return [sock.detach()]

    async def publish(self, geometry: DiskGeometry) -> None:
        """Raises TargetError if the socket cannot be made."""
        self._export = Export.of(self.label, geometry)
        if self._listener is None:
            self._listener = self._listen()
            self._spawn(self._accept(self._listener), f"{self.label} clients")

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        new = self._path.with_suffix(".new")
        try:
            # Left by a supervisor that is gone: only one at a time serves a class of devices.
            new.unlink(missing_ok=True)
            listener.bind(str(new))
            new.chmod(0o600)
            listener.listen(CLIENTS)
            # Whoever sees the socket can connect to it.
            new.replace(self._path)
        except OSError as error:
            listener.close()
            with contextlib.suppress(OSError):
                new.unlink()
            raise TargetError(
                f"{self.label}: no socket can be made at {self._path}: {error.strerror or error}",
                hint="a socket's path has at most 107 bytes" if error.errno is None else None,
            ) from error
        return listener

    async def feature_off(self, feature: Feature) -> None:
        """The next client is not offered it; the present one is refused."""
        if self._export is not None:
            gone = SEND_TRIM if feature == "discard" else SEND_FLUSH | SEND_FUA
            self._export = replace(self._export, flags=self._export.flags & ~gone)

    async def fail_after(self, seconds: float) -> None:
        """A client whose worker dies is disconnected, and knows at once."""

    def busy(self) -> str | None:
        client = self._client
        if client is None or client.sock is not None:
            return None
        return f"{client} is connected to {self._path}"

    def in_flight(self) -> int:
        return 0  # nothing waits for us but a client, whose requests the worker counts

    async def close(self, *, drain: float = 10.0) -> None:
        """No client is accepted any more; one in transmission is cut off with its worker."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        self._drop()

    # -- clients -----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        client = self._client
        return client is not None and client.ready and client.sock is not None

    def on_waiting(self, poke: Callable[[], None]) -> None:
        self._poke = poke

    def served(self, connected: bool) -> None:
        if connected:
            if self._client is None:
                self._client = _Client(None, 0, None)  # of an earlier supervisor
        elif self._client is not None and self._client.sock is None:
            self._drop()

    def details(self) -> dict[str, Any]:
        client = self._client
        if client is None:
            return {"connected": False}
        found: dict[str, Any] = {"connected": True, "pid": client.pid or None}
        if client.told is not None:
            found["size"] = client.told.size
            if self._export is not None and self._export.size != client.told.size:
                found["note"] = "the disk was resized since: the next client sees the new size"
        return found

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None and client.sock is not None:
            client.sock.close()
        self._free.set()

    async def _turn(self, client: _Client) -> bool:
        """Makes `client` the one in transmission; False if another stays."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN):
                while (other := self._client) is not None:
                    if other.ready and other.sock is not None and hung_up(other.sock):
                        self._drop()  # it has gone before it was served
                        continue
                    self._free.clear()
                    await self._free.wait()
        if self._client is not None:
            return False
        self._client = client
        return True

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s failed", self.label, task.get_name(), exc_info=error)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        places = asyncio.Semaphore(CLIENTS)
        with listener:
            while True:
                await places.acquire()
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:
                    # Out of descriptors or memory: those who are here may leave some.
                    log.warning("%s: %s: %s", self.label, self._path, error)
                    places.release()
                    await asyncio.sleep(1.0)
                    continue
                self._spawn(self._serve(sock, places), f"{self.label} client")

    async def _serve(self, sock: socket.socket, places: asyncio.Semaphore) -> None:
        client = _Client(sock, _peer(sock), None)
        try:
            set_buffers(sock, SOCKET_BUFFER)
            if await self._handshake(client):
                client.ready = True
                log.info("%s: %s is connected", self.label, client)
                self._poke()
        except TimeoutError:
            log.warning("%s: %s did not end its handshake in time", self.label, client)
        except OSError as error:
            log.debug("%s: %s: %s", self.label, client, error)
        finally:
            places.release()
            if not client.ready:
                if self._client is client:
                    self._drop()
                sock.close()

    async def _handshake(self, client: _Client) -> bool:
        """True: the client is in transmission from now on, and has its turn."""
        loop = asyncio.get_running_loop()
        sock = client.sock
        assert sock is not None
        shake = Handshake(self._offered)
        async with asyncio.timeout(HANDSHAKE):
            await loop.sock_sendall(sock, shake.greeting)
            while True:
                step = shake.feed(await _exactly(sock, shake.need))
                if step.then is Then.GO:
                    if await self._turn(client):
                        await loop.sock_sendall(sock, shake.admit())
                        client.told = shake.told
                        return True
                    step = shake.refuse(f"{self._client} is connected, and one at a time can be")
                await loop.sock_sendall(sock, step.reply)
                if step.then is Then.CLOSE:
                    return False

    def _offered(self) -> Export:
        assert self._export is not None  # there is no listener before it
        return self._export


async def _exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes and not one more: what follows is the worker's."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        part = await loop.sock_recv(sock, count - len(data))
        if not part:
            raise ConnectionResetError("the client has gone")
        data += part
    return data


def _peer(sock: socket.socket) -> int:
    """The pid of who connected; 0 if it lives in another pid namespace."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid
