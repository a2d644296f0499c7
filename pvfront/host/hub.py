# SPDX-License-Identifier: BSD-2-Clause
"""The hub of the embedded host: gives out ports, references and shared memory, and knows whose
they are.

    python -m pvfront.host.hub DIR

Theory of operation. Clients talk to it at DIR/hub.sock (docs/host.md has the protocol), as they
would to the device nodes of Xen, when they open, bind, grant and close; events and pages then pass
without it. A connection is an open device node: whatever it made goes with it, also when its
process dies. One thread, one request after the other, no request waits for anything: books are in
domains.py.

Backends are hostile, and they are its clients: a request is checked in full before anything is
done, a client that does not read its answers is dropped. A mapper gets whole arenas, though, and
honours the table of its own will: the hub keeps processes apart that fail, not processes that
attack each other's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pvfront.handle import MAX_DOMID, PAGE_SIZE
from pvfront.host._host import ffi, lib
from pvfront.host.child import answers
from pvfront.host.domains import GRANTS, MAX_ARENAS, Arena, Domain, Maptrack, Port

log = logging.getLogger(__name__)

SOCKET_NAME = "hub.sock"
LIMITS_NAME = "limits.json"
DEFAULT_GNTALLOC_LIMIT = 1024
"""The kernel module's own default (pages)."""

RETRY_SECONDS = 0.1
"""How often grants that are still mapped are tried again, as the kernel does."""

MAX_DOMAINS = 64

_REQUEST_MAX = 4096
_SEND_BUFFER = 1 << 20
"""Bytes; the kernel halves it to what it allows. An answer with every reference has 230 KB."""

_CREDENTIALS = struct.Struct("=iII")
_DEVICES = ("evtchn", "gntalloc", "gntdev")

Answer = tuple[dict[str, Any] | bytes, Sequence[int]]


class Refused(OSError):
    """A request that is refused, with the errno and the text of the answer."""


def _invalid(text: str) -> Refused:
    return Refused(errno.EINVAL, text)


class Request:
    """One request, read with care: every field has a type and a range."""

    def __init__(self, packet: bytes) -> None:
        try:
            found = json.loads(packet)
        except (ValueError, RecursionError):
            raise _invalid("the request is no JSON") from None
        if not isinstance(found, dict):
            raise _invalid("the request is no JSON object")
        self._fields = found
        self.do = self.text("do")

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise _invalid(f"{name} is not a string")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _invalid(f"{name} is not an integer in {low}..{high}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self._fields.get(name) is None else self.integer(name, low, high)

    def domid(self, name: str) -> int:
        return self.integer(name, 0, MAX_DOMID)

    def boolean(self, name: str) -> bool:
        value = self._fields.get(name)
        if not isinstance(value, bool):
            raise _invalid(f"{name} is neither true nor false")
        return value


class Connection:
    """One client: an open device node of a domain, once it has said which."""

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        self.hub = hub
        self.sock = sock
        self.pid = _peer_pid(sock)
        self.device = ""
        self.domain: Domain | None = None
        self.ports: dict[int, Port] = {}
        self.arena: Arena | None = None
        self.maptracks: dict[int, Maptrack] = {}
        self._handlers: dict[str, Callable[[Request], Answer]] = {}

    def handle(self, packet: bytes) -> Answer:
        """The answer to one request. Raises OSError: the request was refused."""
        request = Request(packet)
        if request.do == "dump":
            return self.hub.dump(), ()
        if self.domain is None:
            if request.do != "open":
                raise _invalid(f"{request.do} before open")
            return self._open(request)
        handler = self._handlers.get(request.do)
        if handler is None:
            raise _invalid(f"{self.device} has no {request.do!r}")
        return handler(request)

    def close(self) -> None:
        """Everything that it holds goes; what others still map goes later."""
        ports, self.ports = self.ports, {}
        for port in ports.values():
            port.close()
        tracks, self.maptracks = self.maptracks, {}
        for domid, track in tracks.items():
            domain = self.hub.domain(domid)
            domain.reclaim(track)
            track.close()
            for arena in list(domain.arenas.values()):
                arena.readers.discard(self)
                arena.drop_if_unused()
        own, self.arena = self.arena, None
        if own is not None:
            own.domain.close_arena(own)

    # -- requests --------------------------------------------------------------------------

    def _open(self, request: Request) -> Answer:
        device = request.text("device")
        domid = request.domid("domid")
        if device not in _DEVICES:
            raise Refused(errno.ENODEV, f"there is no device {device!r}")
        domain = self.hub.domain(domid)
        fds: Sequence[int] = ()
        if device == "gntalloc":
            self.arena = domain.open_arena()
            fds = (self.arena.fd,)
        self.device, self.domain = device, domain
        handlers: dict[str, dict[str, Callable[[Request], Answer]]] = {
            "evtchn": {
                "bind_unbound": self._bind_unbound,
                "bind_interdomain": self._bind_interdomain,
                "unbind": self._unbind,
                "hand_over": self._hand_over_port,
            },
            "gntalloc": {
                "alloc": self._alloc,
                "free": self._free,
                "unmap_notify": self._unmap_notify,
                "hand_over": self._hand_over_pages,
            },
            "gntdev": {"domain": self._domain, "arena": self._arena},
        }
        self._handlers = handlers[device]
        return {}, fds

    def _bind_unbound(self, request: Request) -> Answer:
        return self._bound(self._own.bind_unbound(request.domid("remote")))

    def _bind_interdomain(self, request: Request) -> Answer:
        remote = self.hub.domain(request.domid("remote"))
        return self._bound(self._own.bind_interdomain(remote, self._number(request, "remote_port")))

    def _bound(self, port: Port) -> Answer:
        self.ports[port.number] = port
        return {"port": port.number, "side": port.side}, port.fds

    def _unbind(self, request: Request) -> Answer:
        port = self._mine(request)
        del self.ports[port.number]
        port.close()
        return {}, ()

    def _hand_over_port(self, request: Request) -> Answer:
        port = self._mine(request)
        return _packet(lib.PVF_HOST_EVENT, port.number, port.side), port.fds

    def _alloc(self, request: Request) -> Answer:
        assert self.arena is not None
        domid, pages = request.domid("domid"), request.integer("pages", 1, GRANTS)
        offset, refs = self._own.grant(
            self.arena,
            domid,
            pages,
            writable=request.boolean("writable"),
            limit=self.hub.gntalloc_limit(),
        )
        return {"offset": offset, "grefs": refs}, ()

    def _free(self, request: Request) -> Answer:
        assert self.arena is not None
        offset = request.integer("offset", 0, self.arena.pages * PAGE_SIZE)
        pages = request.integer("pages", 1, GRANTS)
        if offset % PAGE_SIZE:
            raise _invalid("offset is not at a page")
        first = offset // PAGE_SIZE
        self._own.free(self.arena, range(first, first + pages))
        self.hub.retry_later()
        return {}, ()

    def _unmap_notify(self, request: Request) -> Answer:
        assert self.arena is not None
        self._own.set_notify(
            self.arena,
            request.integer("offset", 0, max(0, self.arena.pages * PAGE_SIZE - 1)),
            clear=request.boolean("clear_byte"),
            port=request.optional_integer("port", 0, 0xFFFFFFFF),
        )
        return {}, ()

    def _hand_over_pages(self, request: Request) -> Answer:
        assert self.arena is not None
        return _packet(lib.PVF_HOST_PAGES, 0, 0), (self.arena.fd,)

    def _domain(self, request: Request) -> Answer:
        domain = self.hub.domain(request.domid("domid"))
        track = self.maptracks.get(domain.domid)
        if track is None:
            track = self.maptracks[domain.domid] = Maptrack(domain.domid)
        return {}, (domain.table, track.fd)

    def _arena(self, request: Request) -> Answer:
        domid, number = request.domid("domid"), request.integer("arena", 0, MAX_ARENAS - 1)
        if domid not in self.maptracks:
            raise _invalid(f"arena of domain {domid} before its grant table")
        arena = self.hub.domain(domid).arenas.get(number)
        if arena is None or arena.fd < 0:
            raise Refused(errno.ENOENT, f"domain {domid} has no arena {number}")
        arena.readers.add(self)
        return {}, (arena.fd,)

    @property
    def _own(self) -> Domain:
        assert self.domain is not None
        return self.domain

    def _number(self, request: Request, name: str) -> int:
        return request.integer(name, 0, 0xFFFFFFFF)

    def _mine(self, request: Request) -> Port:
        number = self._number(request, "port")
        port = self.ports.get(number)
        if port is None:
            raise Refused(errno.ENOTCONN, f"port {number} is not bound here")
        return port


class Hub:
    """All domains and all connections."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._domains: dict[int, Domain] = {}
        self._connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    def start(self) -> None:
        """Listens. Raises OSError (EADDRINUSE: another hub lives there)."""
        path = self.directory / SOCKET_NAME
        if answers(path, socket.SOCK_SEQPACKET):
            raise OSError(errno.EADDRINUSE, f"a hub runs at {path} already")
        path.unlink(missing_ok=True)
        before = os.umask(0o077)
        try:
            self._listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        self._listener.listen(128)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        (self.directory / SOCKET_NAME).unlink(missing_ok=True)
        for connection in list(self._connections):
            self._drop(connection)
        if self._retry is not None:
            self._retry.cancel()

    def domain(self, domid: int) -> Domain:
        """Domains are not announced: one exists when somebody first speaks of it."""
        found = self._domains.get(domid)
        if found is None:
            if len(self._domains) >= MAX_DOMAINS:
                raise Refused(errno.ENOSPC, f"there are {MAX_DOMAINS} domains already")
            found = self._domains[domid] = Domain(domid)
        return found

    def gntalloc_limit(self) -> int:
        """Pages that a domain may have granted, as DIR/limits.json says now."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            limits = json.loads((self.directory / LIMITS_NAME).read_bytes())
            limit = limits.get("gntalloc") if isinstance(limits, dict) else None
            if isinstance(limit, int):
                return limit
        return DEFAULT_GNTALLOC_LIMIT

    def dump(self) -> dict[str, Any]:
        """Who holds what: bound ports, arenas with grants, and how many grants are ending."""
        ports = []
        grants = []
        holders = {
            port: connection.pid
            for connection in self._connections
            for port in connection.ports.values()
        }
        owners = {c.arena: c.pid for c in self._connections if c.arena is not None}
        for domain in self._domains.values():
            for port in domain.ports.values():
                peer = port.peer
                ports.append(
                    {
                        "domid": domain.domid,
                        "port": port.number,
                        "remote": port.remote,
                        "remote_port": None if peer is None else peer.number,
                        "pid": holders.get(port),
                    }
                )
            for arena in domain.arenas.values():
                if arena.granted:
                    grants.append(
                        {
                            "domid": domain.domid,
                            "arena": arena.number,
                            "first_ref": arena.granted[min(arena.granted)].ref,
                            "pages": len(arena.granted),
                            "mapped": sum(map(bool, map(domain.mapped, arena.granted.values()))),
                            "pid": owners.get(arena),
                        }
                    )
        deferred = sum(len(domain.deferred) for domain in self._domains.values())
        return {"ports": ports, "grants": grants, "deferred": deferred}

    # -- connections -----------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as exc:
            # Out of descriptors: those who wait in the queue get their turn when others leave.
            log.warning("a connection was refused: %s", exc)
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(RETRY_SECONDS, self._listen_again)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        connection = Connection(self, sock)
        self._connections.add(connection)
        self._loop.add_reader(sock.fileno(), self._serve, connection)

    def _listen_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _serve(self, connection: Connection) -> None:
        try:
            # No room for descriptors: the kernel closes what a client sends along.
            packet, _, flags, _ = connection.sock.recvmsg(_REQUEST_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet, flags = b"", 0
        if not packet:
            self._drop(connection)
            return
        fds: Sequence[int] = ()
        try:
            if flags & socket.MSG_TRUNC:
                raise Refused(errno.EMSGSIZE, f"a request has at most {_REQUEST_MAX} bytes")
            answer, fds = connection.handle(packet)
        except OSError as exc:
            answer = {
                "ok": False,
                "errno": errno.errorcode.get(exc.errno or 0, "EIO"),
                "text": exc.strerror or str(exc),
            }
        else:
            if isinstance(answer, dict):
                answer = {"ok": True, **answer}
        if isinstance(answer, dict):
            answer = json.dumps(answer, separators=(",", ":")).encode()
        try:
            socket.send_fds(connection.sock, [answer], list(fds))
        except OSError as exc:
            log.warning("pid %d does not read its answers: %s", connection.pid, exc)
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._loop.remove_reader(connection.sock.fileno())
        connection.sock.close()
        connection.close()
        self.retry_later()

    # -- grants that are still mapped ------------------------------------------------------

    def retry_later(self) -> None:
        if self._retry is None and any(d.deferred for d in self._domains.values()):
            self._retry = self._loop.call_later(RETRY_SECONDS, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        for domain in self._domains.values():
            domain.retry_deferred()
        self.retry_later()


def _packet(kind: int, port: int, side: int) -> bytes:
    packet = ffi.new(
        "struct pvf_host_packet *",
        {"magic": lib.PVF_HOST_MAGIC, "kind": kind, "port": port, "side": side},
    )
    return bytes(ffi.buffer(packet))


def _peer_pid(sock: socket.socket) -> int:
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(peer)[0])


async def serve(directory: Path) -> None:
    """Runs a hub until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hub = Hub(directory)
    hub.start()
    try:
        await stop.wait()
    finally:
        hub.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pvfront.host.hub", description=__doc__)
    parser.add_argument("directory", type=Path, help="the host's directory")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="hub: %(message)s", level=logging.INFO)
    # Three descriptors a channel: the usual 1024 are few.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(serve(options.directory))
    except OSError as exc:
        print(f"hub: {exc.strerror or exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
