# SPDX-License-Identifier: BSD-2-Clause
"""A small honest xenstored in memory, and the two ways to reach it.

`MemStore` keeps nodes, permissions, watches and transactions by the rules of docs/misc/xenstore.txt
of Xen; `SocketServer` serves it on a Unix socket, `Xenbus` as the kernel serves /dev/xen/xenbus.
Written independently of pvfront: it shares no code with what it tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

HEADER = struct.Struct("=IIII")
(
    DEBUG,
    DIRECTORY,
    READ,
    GET_PERMS,
    WATCH,
    UNWATCH,
    TRANSACTION_START,
    TRANSACTION_END,
    INTRODUCE,
    RELEASE,
    GET_DOMAIN_PATH,
    WRITE,
    MKDIR,
    RM,
    SET_PERMS,
    WATCH_EVENT,
    ERROR,
) = range(17)
RESET_WATCHES = 21
DIRECTORY_PART = 22
PAYLOAD_MAX = 4096


def as_they_are(events: list[Callable[[], None]]) -> None:
    """In the order of the changes."""


arrange = as_they_are
"""Puts the events of one transaction, each a call, into the order in which they are sent."""


class Refused(Exception):
    """An operation failed; the argument is the name of the error."""


@dataclass
class Node:
    value: bytes = b""
    perms: list[bytes] = field(default_factory=lambda: [b"n0"])
    generation: int = 0
    children: dict[bytes, None] = field(default_factory=dict)

    def copy(self) -> Node:
        return Node(self.value, list(self.perms), self.generation, dict(self.children))


class Tree:
    """Nodes by absolute path."""

    def __init__(self, nodes: dict[bytes, Node]) -> None:
        self.nodes = nodes

    def get(self, path: bytes) -> Node:
        node = self.nodes.get(path)
        if node is None:
            raise Refused("ENOENT")
        return node

    def make(self, path: bytes, domid: int, generation: int) -> Node:
        if path in self.nodes:
            return self.nodes[path]
        parent_path, _, name = path.rpartition(b"/")
        parent = self.make(parent_path or b"/", domid, generation)
        if not may(parent, domid, b"wb"):
            raise Refused("EACCES")
        parent.children[name] = None
        parent.generation = generation
        perms = [b"n%d" % domid, *parent.perms[1:]] if domid else list(parent.perms)
        node = self.nodes[path] = Node(perms=perms, generation=generation)
        return node

    def drop(self, path: bytes, generation: int) -> None:
        parent_path, _, name = path.rpartition(b"/")
        parent = self.get(parent_path or b"/")
        del parent.children[name]
        parent.generation = generation
        for known in [p for p in self.nodes if p == path or p.startswith(path + b"/")]:
            del self.nodes[known]


def may(node: Node, domid: int, letters: bytes) -> bool:
    if domid == 0 or node.perms[0][1:] == b"%d" % domid:
        return True
    mine = [p for p in node.perms[1:] if p[1:] == b"%d" % domid] or [node.perms[0]]
    return mine[0][:1] in letters


@dataclass
class Txn:
    tree: Tree
    base: dict[bytes, int]
    """Generations at the start."""
    seen: set[bytes] = field(default_factory=set)
    writes: list[tuple[int, bytes, bytes]] = field(default_factory=list)


class Client:
    """One connection of domain `domid`. `emit` gets the bytes that the store sends to it."""

    def __init__(self, store: MemStore, domid: int, emit: Callable[[bytes], None]) -> None:
        self.store = store
        self.domid = domid
        self.emit = emit
        self.watches: list[tuple[bytes, bytes, bool]] = []
        self.txns: dict[int, Txn] = {}
        self.ops: list[tuple[int, int, bytes]] = []
        """Every (op, tx_id, payload) that came in."""
        store.clients.append(self)

    def handle(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """Answers one request."""
        self.ops.append((op, tx_id, payload))
        after: list[Callable[[], None]] = []
        try:
            reply = self.store.perform(self, op, tx_id, payload, after)
        except Refused as exc:
            op, reply = ERROR, exc.args[0].encode() + b"\0"
        self.emit(HEADER.pack(op, req_id, tx_id, len(reply)) + reply)
        arrange(after)
        for action in after:
            action()

    def close(self) -> None:
        if self in self.store.clients:
            self.store.clients.remove(self)

    def event(self, path: bytes, token: bytes, relative: bool) -> None:
        home = b"/local/domain/%d/" % self.domid
        if relative and path.startswith(home):
            path = path[len(home) :]
        body = path + b"\0" + token + b"\0"
        # /dev/xen/xenbus leaves these two fields uninitialised
        self.emit(HEADER.pack(WATCH_EVENT, 0xDEADBEEF, 0xFEEDFACE, len(body)) + body)


class MemStore:
    """The store. `domid` of a Client decides what it may do."""

    def __init__(self) -> None:
        self.tree = Tree({b"/": Node()})
        self.clients: list[Client] = []
        self.generation = 0
        self.last_txn = 0
        self.max_txns = 10
        self.on_commit: Callable[[], None] | None = None
        """Called before each commit: a test's chance to interfere."""

    def set(
        self, path: str, value: bytes = b"", perms: str | None = None, *, fired: bool = True
    ) -> None:
        """As dom0 would from outside: makes or changes a node, and fires watches.

        Without `fired` the event is still to come, as those of one transaction do, one by one.
        """
        data = path.encode("utf-8", "surrogateescape")
        self.generation += 1
        node = self.tree.make(data, 0, self.generation)
        node.value, node.generation = value, self.generation
        if perms is not None:
            node.perms = [p.encode() for p in perms.split(",")]
        if fired:
            self.fire(data)

    def value(self, path: str) -> bytes:
        return self.tree.get(path.encode("utf-8", "surrogateescape")).value

    def fire(self, path: bytes) -> None:
        for client in list(self.clients):
            for watched, token, relative in list(client.watches):
                if path == watched or path.startswith(watched.rstrip(b"/") + b"/"):
                    client.event(path, token, relative)
                elif path not in self.tree.nodes and watched.startswith(path + b"/"):
                    client.event(watched, token, relative)  # it went with its parent

    def perform(
        self,
        client: Client,
        op: int,
        tx_id: int,
        payload: bytes,
        after: list[Callable[[], None]],
    ) -> bytes:
        if op == TRANSACTION_START:
            if len(client.txns) >= self.max_txns:
                raise Refused("ENOSPC")
            self.last_txn += 1
            copy = Tree({path: node.copy() for path, node in self.tree.nodes.items()})
            base = {path: node.generation for path, node in self.tree.nodes.items()}
            client.txns[self.last_txn] = Txn(copy, base)
            return b"%d\0" % self.last_txn
        if op == TRANSACTION_END:
            return self.end(client, tx_id, payload, after)
        txn = None
        if tx_id:
            if tx_id not in client.txns:
                raise Refused("ENOENT")
            txn = client.txns[tx_id]
        if op in (WATCH, UNWATCH):
            return self.watch(client, op, payload, after)
        if op == GET_DOMAIN_PATH:
            return b"/local/domain/%d\0" % int(payload.rstrip(b"\0"))
        if op not in (READ, DIRECTORY, DIRECTORY_PART, GET_PERMS, WRITE, MKDIR, RM, SET_PERMS):
            raise Refused("ENOSYS")
        name, nul, rest = payload.partition(b"\0")
        if not nul or not name:
            raise Refused("EINVAL")
        path = self.absolute(client, name)
        tree = txn.tree if txn else self.tree
        if txn is not None:
            txn.seen.add(path)
        if op in (WRITE, MKDIR, RM, SET_PERMS):
            self.generation += 1
            changed = self.change(tree, client.domid, op, path, rest)
            if txn is not None:
                txn.writes.append((op, path, rest))
            elif changed:
                after.append(lambda: self.fire(path))
            return b"OK\0"
        node = tree.get(path)
        if not may(node, client.domid, b"rb"):
            raise Refused("EACCES")
        if op == READ:
            return node.value
        if op == GET_PERMS:
            return b"".join(p + b"\0" for p in node.perms)
        names = b"".join(child + b"\0" for child in node.children)
        if op == DIRECTORY:
            if len(names) > PAYLOAD_MAX:
                raise Refused("E2BIG")
            return names
        return self.part(node, names, int(rest.rstrip(b"\0")))

    @staticmethod
    def part(node: Node, names: bytes, offset: int) -> bytes:
        head = b"%d\0" % node.generation
        chunk = b""
        for child in names[offset:].split(b"\0")[:-1]:
            if len(head) + len(chunk) + len(child) + 2 > PAYLOAD_MAX:
                break
            chunk += child + b"\0"
        if offset + len(chunk) >= len(names):
            chunk += b"\0"
        return head + chunk

    @staticmethod
    def absolute(client: Client, path: bytes) -> bytes:
        if path.startswith((b"/", b"@")):
            return path
        return b"/local/domain/%d/%s" % (client.domid, path)

    def change(self, tree: Tree, domid: int, op: int, path: bytes, rest: bytes) -> bool:
        if op == RM:
            parent = path.rpartition(b"/")[0] or b"/"
            if path not in tree.nodes:
                tree.get(parent)
                return False
            if not may(tree.get(path), domid, b"wb"):
                raise Refused("EACCES")
            tree.drop(path, self.generation)
            return True
        if op == SET_PERMS:
            node = tree.get(path)
            if domid and node.perms[0][1:] != b"%d" % domid:
                raise Refused("EACCES")
            node.perms = rest.rstrip(b"\0").split(b"\0")
            node.generation = self.generation
            return True
        if op == MKDIR and path in tree.nodes:
            return False
        node = tree.make(path, domid, self.generation)
        if not may(node, domid, b"wb"):
            raise Refused("EACCES")
        if op == WRITE:
            if domid and len(rest) > 2048:
                raise Refused("ENOSPC")
            node.value = rest
        node.generation = self.generation
        return True

    def end(
        self, client: Client, tx_id: int, payload: bytes, after: list[Callable[[], None]]
    ) -> bytes:
        txn = client.txns.pop(tx_id, None)
        if txn is None:
            raise Refused("ENOENT")
        if payload == b"F\0":
            return b"OK\0"
        if payload != b"T\0":
            raise Refused("EINVAL")
        if self.on_commit:
            self.on_commit()
        for path in txn.seen:
            node = self.tree.nodes.get(path)
            if (node.generation if node else None) != txn.base.get(path):
                raise Refused("EAGAIN")
        for op, path, rest in txn.writes:
            self.generation += 1
            if self.change(self.tree, client.domid, op, path, rest):
                after.append(lambda path=path: self.fire(path))  # type: ignore[misc]
        return b"OK\0"

    def watch(
        self, client: Client, op: int, payload: bytes, after: list[Callable[[], None]]
    ) -> bytes:
        parts = payload.split(b"\0")
        if len(parts) != 3:
            raise Refused("EINVAL")
        path = self.absolute(client, parts[0])
        entry = (path, parts[1], not parts[0].startswith((b"/", b"@")))
        if op == UNWATCH:
            if entry not in client.watches:
                raise Refused("ENOENT")
            client.watches.remove(entry)
            return b"OK\0"
        if entry in client.watches:
            raise Refused("EEXIST")
        client.watches.append(entry)
        after.append(lambda: client.event(path, entry[1], entry[2]))
        return b"OK\0"


class SocketServer:
    """Serves a MemStore on a Unix socket. `hold`: requests wait until `release`."""

    def __init__(self, store: MemStore, domid: int = 0) -> None:
        self.store = store
        self.domid = domid
        self.hold = False
        self.clients: list[Client] = []
        self.writers: list[asyncio.StreamWriter] = []
        self._held: list[Callable[[], None]] = []
        self._server: asyncio.Server | None = None

    async def start(self, path: str) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self.writers:
            writer.transport.abort()
        await self._server.wait_closed()
        for writer in self.writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def release(self) -> None:
        self.hold = False
        held, self._held = self._held, []
        for action in held:
            action()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(self.store, self.domid, writer.write)
        self.clients.append(client)
        self.writers.append(writer)
        try:
            while True:
                op, req_id, tx_id, length = HEADER.unpack(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(length)
                if self.hold:
                    request = (op, req_id, tx_id, payload)
                    self._held.append(lambda request=request: client.handle(*request))  # type: ignore[misc]
                else:
                    client.handle(op, req_id, tx_id, payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            client.close()
            writer.close()


class Xenbus:
    """The kernel's side of /dev/xen/xenbus: `open` is what opening the node gives."""

    def __init__(self, store: MemStore, domid: int = 5) -> None:
        self.store = store
        self.domid = domid
        self.files: list[XenbusFile] = []
        self.hold = False
        self.max_read = 1 << 16
        """Largest number of bytes that one read returns."""
        self.watch_gate: threading.Event | None = None
        """write() of WATCH waits for it, as it waits for a slow store."""
        self.write_errors: dict[int, int] = {}
        """By operation, the errno that write() fails with."""

    def open(self, path: str) -> XenbusFile:
        file = XenbusFile(self)
        self.files.append(file)
        return file

    def release(self) -> None:
        self.hold = False
        for file in self.files:
            file.release()

    @property
    def open_files(self) -> list[XenbusFile]:
        return [file for file in self.files if not file.closed]


class XenbusFile:
    """One open descriptor, with the rules of drivers/xen/xenbus/xenbus_dev_frontend.c."""

    def __init__(self, bus: Xenbus) -> None:
        self.bus = bus
        self.client = Client(bus.store, bus.domid, self.queue)
        self.read_error = 0
        self.eof = False
        self.closed = False
        self.deadlocked = False
        """A watch was written while a request was pending: the kernel would have hung."""
        self.overwritten = False
        """A message was written over one that the kernel had not copied to the ring yet."""
        self._buffer = b""
        """The file's only message buffer: a queued request has no other copy of its payload."""
        self._held: list[tuple[int, int, int, int]] = []
        self._queue = bytearray()
        self._lock = threading.Lock()
        self._poll = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        assert not self.closed
        return self._poll

    def queue(self, data: bytes) -> None:
        with self._lock:
            self._queue += data
            if not self.closed:
                os.eventfd_write(self._poll, 1)

    def break_down(self, *, error: int = 0) -> None:
        """From now on reads fail with `error`, or find the end of the file."""
        self.read_error, self.eof = error, not error
        os.eventfd_write(self._poll, 1)

    def read(self, size: int) -> bytes:
        assert not self.closed
        if self.read_error:
            raise OSError(self.read_error, os.strerror(self.read_error))
        with self._lock:
            data = bytes(self._queue[: min(size, self.bus.max_read)])
            del self._queue[: len(data)]
            if not self._queue and not self.eof:
                try:
                    os.eventfd_read(self._poll)
                except BlockingIOError:
                    pass
        if not data and not self.eof:
            raise BlockingIOError(errno.EAGAIN, "nothing queued")
        return data

    def write(self, frame: bytes) -> int:
        assert not self.closed
        if len(frame) > 4096:
            raise OSError(errno.EINVAL, "longer than the kernel's buffer")
        op, req_id, tx_id, length = HEADER.unpack_from(frame)
        payload = frame[HEADER.size :]
        assert len(payload) == length, "not exactly one message in a write"
        if op in self.bus.write_errors:
            code = self.bus.write_errors[op]
            raise OSError(code, os.strerror(code))
        if op in (WATCH, UNWATCH):
            self._watch(op, req_id, tx_id, payload)
        else:
            self.overwritten = self.overwritten or bool(self._held)
            self._buffer = payload + self._buffer[len(payload) :]
            self._held.append((op, req_id, tx_id, length))
            if not self.bus.hold:
                # The kernel's thread comes by later.
                asyncio.get_running_loop().call_soon(self.release)
        return len(frame)

    def _watch(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        self.deadlocked = self.deadlocked or bool(self._held)
        if op == WATCH and self.bus.watch_gate is not None:
            assert self.bus.watch_gate.wait(30)
        self.client.ops.append((op, tx_id, payload))
        after: list[Callable[[], None]] = []
        try:
            reply = self.bus.store.watch(self.client, op, payload, after)
        except Refused as exc:
            code = getattr(errno, exc.args[0])
            raise OSError(code, os.strerror(code)) from exc
        self.queue(HEADER.pack(op, req_id, tx_id, len(reply)) + reply)
        for action in after:
            action()

    def release(self) -> None:
        if self.bus.hold:
            return
        held, self._held = self._held, []
        for op, req_id, tx_id, length in held:
            self.client.handle(op, req_id, tx_id, self._buffer[:length])

    def close(self) -> None:
        assert not self.closed, "closed twice"
        with self._lock:
            self.closed = True
            os.close(self._poll)
        self.client.close()
