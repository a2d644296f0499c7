# SPDX-License-Identifier: BSD-2-Clause
"""The store: an asyncio client of xenstored over /dev/xen/xenbus or a Unix socket.

Tasks share one connection (xslink.py, where the rules of the device are) and may call at the same
time. Every call has a timeout, which begins when its request is sent (xslink.py), and can be
cancelled; a write that timed out may still happen. When the connection breaks, all calls and
watches raise XenstoreLost with the same reason.

Text is UTF-8 with surrogateescape in both directions, so 8-bit values survive. Whatever comes out
of the store is hostile input.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import random
import socket
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from pvfront.errors import ClosedError
from pvfront.handle import check_domid
from pvfront.xslink import (
    Device,
    DeviceTransport,
    DeviceWatchTransport,
    Link,
    Slots,
    SocketTransport,
    Undo,
    XenstoreLost,
    XenstoreTimeout,
    deadline,
)
from pvfront.xswire import (
    SOCKET_REPLY_MAX,
    Op,
    Permission,
    XenstoreError,
    decode,
    encode_path,
    encode_text,
    printable,
    split_strings,
)

__all__ = [
    "Permission",
    "Transaction",
    "Watch",
    "Xenstore",
    "XenstoreError",
    "XenstoreLost",
    "XenstoreTimeout",
]

_log = logging.getLogger(__name__)

DEVICE_PATH = "/dev/xen/xenbus"
SOCKET_PATHS = ("/run/xenstored/socket", "/var/run/xenstored/socket")

_TRANSACTIONS = 2
"""Open transactions of one store object: Xen allows a domain 10, those of its kernel included."""

_open_device: Callable[[str], Device] = Device


class _Operations(ABC):
    """What can be done to nodes, with or without a transaction.

    Paths: absolute, or relative to the domain's own directory. Every call raises XenstoreError
    (by `errno`: ENOENT, EACCES, EINVAL, E2BIG, ENOSPC for a quota, …), XenstoreTimeout,
    XenstoreLost. `timeout` is in seconds; None means the store's own.
    """

    @abstractmethod
    async def _call(self, op: Op, path: str, payload: bytes, timeout: float | None) -> bytes: ...

    @abstractmethod
    def _seconds(self, timeout: float | None) -> float: ...

    @abstractmethod
    def _terminated(self, path: str, op: str) -> bytes:
        """The path as it goes to the store, NUL included."""

    async def read_bytes(self, path: str, *, timeout: float | None = None) -> bytes:
        """The value of a node: any bytes, perhaps none."""
        return await self._call(Op.READ, path, self._terminated(path, "read"), timeout)

    async def read(self, path: str, *, timeout: float | None = None) -> str:
        """The value of a node as text (UTF-8 with surrogateescape). Hostile: parse it, clamp it."""
        return decode(await self.read_bytes(path, timeout=timeout))

    async def read_opt(self, path: str, *, timeout: float | None = None) -> str | None:
        """Like `read`, None if there is no such node."""
        try:
            return await self.read(path, timeout=timeout)
        except XenstoreError as exc:
            if exc.errno == errno.ENOENT:
                return None
            raise

    async def write(self, path: str, value: str | bytes, *, timeout: float | None = None) -> None:
        """Sets the value of a node; makes it and its parents if need be."""
        data = encode_text(value) if isinstance(value, str) else value
        await self._call(Op.WRITE, path, self._terminated(path, "write") + data, timeout)

    async def mkdir(self, path: str, *, timeout: float | None = None) -> None:
        """Makes an empty node, and its parents. One that exists stays as it is."""
        await self._call(Op.MKDIR, path, self._terminated(path, "mkdir"), timeout)

    async def remove(
        self, path: str, *, missing_ok: bool = False, timeout: float | None = None
    ) -> None:
        """Removes a node and everything below it.

        The store itself forgives a missing node as long as its parent exists; `missing_ok`
        forgives a missing parent too.
        """
        try:
            await self._call(Op.RM, path, self._terminated(path, "rm"), timeout)
        except XenstoreError as exc:
            if not (missing_ok and exc.errno == errno.ENOENT):
                raise

    async def directory(self, path: str, *, timeout: float | None = None) -> list[str]:
        """The names of a node's children, however many (XS_DIRECTORY_PART if it must be).

        A large directory that changes meanwhile is read again from its start, until the timeout.
        """
        payload = self._terminated(path, "directory")
        try:
            return split_strings(await self._call(Op.DIRECTORY, path, payload, timeout))
        except XenstoreError as exc:
            if exc.errno != errno.E2BIG:
                raise
        async with deadline("directory", path, self._seconds(timeout)):
            while True:
                names = await self._directory_in_parts(path, payload, timeout)
                if names is not None:
                    return names

    async def _directory_in_parts(
        self, path: str, payload: bytes, timeout: float | None
    ) -> list[str] | None:
        """None if the directory changed between two parts."""
        # reply: generation NUL (name NUL)*, and one more NUL after the last name of all
        names = b""
        generation: bytes | None = None
        while True:
            request = payload + b"%d\0" % len(names)
            reply = await self._call(Op.DIRECTORY_PART, path, request, timeout)
            found, nul, part = reply.partition(b"\0")
            if not nul or not part.endswith(b"\0"):
                raise XenstoreError(
                    errno.EPROTO, "directory", path, "the store's answer makes no sense"
                )
            if generation is not None and found != generation:
                return None
            generation = found
            if part == b"\0" or part.endswith(b"\0\0"):
                return split_strings(names + part)
            names += part

    async def get_permissions(self, path: str, *, timeout: float | None = None) -> list[Permission]:
        """A node's permissions; the first names the owner."""
        payload = self._terminated(path, "get_perms")
        reply = await self._call(Op.GET_PERMS, path, payload, timeout)
        try:
            return [Permission.parse(text) for text in split_strings(reply)]
        except ValueError as exc:
            raise XenstoreError(errno.EPROTO, "get_perms", path, str(exc)) from exc

    async def set_permissions(
        self, path: str, permissions: Iterable[Permission], *, timeout: float | None = None
    ) -> None:
        """Replaces a node's permissions; the first names the owner. Raises ValueError for none."""
        encoded = [permission.encode() + b"\0" for permission in permissions]
        if not encoded:
            raise ValueError("a node has at least one permission, its owner's")
        payload = self._terminated(path, "set_perms") + b"".join(encoded)
        await self._call(Op.SET_PERMS, path, payload, timeout)


class Xenstore(_Operations):
    """A connection to the store. Made by `connect`; an async context manager that closes it.

    `timeout` is the number of seconds that a call may take if it does not say otherwise.
    """

    def __init__(
        self, path: str, timeout: float, link: Link, *, device: bool, home: str | None = None
    ) -> None:
        self.path = path
        self.home = home
        self.timeout = timeout
        self._link = link
        self._device = device
        self._watch_links: set[Link] = set()
        self._tokens = itertools.count()
        self._transactions = Slots(_TRANSACTIONS)

    @classmethod
    async def connect(
        cls, path: str | None = None, *, timeout: float = 10.0, home: str | None = None
    ) -> Self:
        """Connects to the store at `path`, a Unix socket or a character device.

        None: /dev/xen/xenbus if it is there, else $XENSTORED_PATH, else xenstored's usual socket.
        home: the absolute directory that relative paths begin at, "/local/domain/1", for a
        connection that the store takes for another domain's (every socket is dom0's); None: the
        store knows whose they are.
        Raises XenstoreError; its hint says what to do.
        """
        if home is not None and (not home.startswith("/") or home.endswith("/")):
            raise ValueError(f"home {home!r} is no absolute directory")
        where = _find_store() if path is None else path
        try:
            device = _is_device(where)
            link = Link(where) if device else Link(where, SOCKET_REPLY_MAX)
            if device:
                DeviceTransport(link, _open_device(where))
            else:
                async with deadline("connect", where, timeout):
                    await asyncio.get_running_loop().create_unix_connection(
                        lambda: SocketTransport(link), sock=await _connected(where)
                    )
        except OSError as exc:
            if isinstance(exc, XenstoreError):
                raise
            raise _cannot_connect(where, exc) from exc
        return cls(where, timeout, link, device=device, home=home)

    async def domain_path(self, domid: int, *, timeout: float | None = None) -> str:
        """The directory of a domain, `/local/domain/N`; it need not exist."""
        reply = await self._call(
            Op.GET_DOMAIN_PATH, str(domid), b"%d\0" % check_domid(domid), timeout
        )
        return decode(reply.rstrip(b"\0"))

    def transaction(self, retries: int = 50) -> _Attempts:
        """A transaction, tried again when it conflicts with somebody else's change:

            async for txn in store.transaction():
                async with txn:
                    await txn.write(...)

        The block runs on a snapshot and commits at its end. On a conflict (EAGAIN) it runs again,
        up to `retries` times, so it must be repeatable. An exception aborts and is raised. Do not
        `return` or `break` out of it: a commit that conflicts then has nobody to repeat it (an
        error is logged). Raises XenstoreError EAGAIN when all attempts conflict.
        """
        return _Attempts(self, retries)

    def watch(self, path: str) -> Watch:
        """A watch on a node and all below it: `async with store.watch(path) as w: async for …`."""
        return Watch(self, path)

    async def close(self) -> None:
        """Closes the connection; whoever waits on it gets XenstoreLost. Twice is harmless."""
        links = [self._link, *self._watch_links]
        self._watch_links.clear()
        for link in links:
            await link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __del__(self) -> None:
        link = getattr(self, "_link", None)
        if link is not None and link.failure is None:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Xenstore {self.path}>"

    def _seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    def _wire_path(self, path: str, op: str, *, watch: bool = False) -> bytes:
        data = encode_path(path, op, watch=watch)
        if self.home is None or data[:1] in (b"/", b"@"):
            return data
        return encode_path(f"{self.home}/{path}", op)

    def _shown_path(self, path: str, watched: str) -> str:
        """The path of an event as the store reports it for a watch on `watched`."""
        if self.home is None or watched[:1] in ("/", "@"):
            return path
        return path.removeprefix(f"{self.home}/")

    def _terminated(self, path: str, op: str) -> bytes:
        return self._wire_path(path, op) + b"\0"

    async def _call(
        self,
        op: Op,
        path: str,
        payload: bytes,
        timeout: float | None,
        *,
        tx_id: int = 0,
        undo: Undo | None = None,
    ) -> bytes:
        return await self._link.request(
            op, path, payload, tx_id, undo, seconds=self._seconds(timeout)
        )

    def _watch_link(self, path: str) -> Link:
        """The link that a new watch lives on: its own on the device, the common one on a socket."""
        if self._link.failure is not None:
            raise self._link.failure.error("watch", path)
        if not self._device:
            return self._link
        link = Link(self.path)
        try:
            DeviceWatchTransport(link, _open_device(self.path))
        except OSError as exc:
            raise XenstoreError(exc.errno or errno.EIO, "watch", path) from exc
        self._watch_links.add(link)
        return link

    async def _end_watch(self, link: Link, payload: bytes, path: str) -> None:
        if link is self._link:
            try:
                await self._call(Op.UNWATCH, path, payload, None)
            except XenstoreError as exc:
                _log.debug("%s", exc)  # the store has forgotten it, or is gone: it fires no more
        else:
            self._watch_links.discard(link)
            await link.close("the watch has ended")


class _Attempts:
    """The attempts of one transaction, in turn."""

    def __init__(self, store: Xenstore, retries: int) -> None:
        self._store = store
        self._retries = retries
        self._attempts = 0
        self._last: Transaction | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Transaction:
        if self._last is not None and not self._last.conflicted:
            raise StopAsyncIteration
        if self._attempts > self._retries:
            self._last = None
            raise XenstoreError(
                errno.EAGAIN,
                "transaction",
                "",
                f"EAGAIN (still in conflict after {self._attempts} attempts)",
            )
        if self._attempts:
            # Two that conflict for ever would be in step for ever.
            await asyncio.sleep(random.uniform(0, min(0.001 * 2**self._attempts, 0.1)))
        self._attempts += 1
        self._last = Transaction(self._store)
        return self._last

    def __del__(self) -> None:
        if self._last is not None and self._last.conflicted:
            _log.error(
                "xenstore: a transaction was left by return or break and then conflicted: "
                "its changes are lost"
            )


class Transaction(_Operations):
    """One attempt of `Xenstore.transaction`: the operations of the store on a snapshot."""

    def __init__(self, store: Xenstore) -> None:
        self._store = store
        self._tx_id: int | None = None
        self.conflicted = False

    async def __aenter__(self) -> Self:
        store = self._store
        await store._transactions.acquire(store.timeout)
        try:
            reply = await store._call(
                Op.TRANSACTION_START, "", b"\0", None, undo=lambda reply: _abort(_number(reply))
            )
            self._tx_id = _number(reply)
        except BaseException:
            store._transactions.release()
            raise
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        assert self._tx_id is not None
        tx_id, self._tx_id = self._tx_id, None
        store = self._store
        try:
            if exc_type is not None:
                # Not awaited: an abort must also get through when this task is being cancelled.
                store._link.post(*_abort(tx_id))
                return
            await store._call(Op.TRANSACTION_END, "", b"T\0", None, tx_id=tx_id)
        except XenstoreError as error:
            if error.errno != errno.EAGAIN:
                raise
            self.conflicted = True
        finally:
            store._transactions.release()

    def _seconds(self, timeout: float | None) -> float:
        return self._store._seconds(timeout)

    def _terminated(self, path: str, op: str) -> bytes:
        return self._store._terminated(path, op)

    async def _call(self, op: Op, path: str, payload: bytes, timeout: float | None) -> bytes:
        if self._tx_id is None:
            raise ClosedError(f"xenstore: {op.name.lower()} {printable(path)}: no open transaction")
        return await self._store._call(op, path, payload, timeout, tx_id=self._tx_id)


class Watch:
    """A watch, as async context manager and async iterator of the paths that changed.

    The first event comes at once and names the watched path itself. An event says that something
    at or below its path may have changed, nothing else: read it. Paths are relative if the watched
    path was; after a resume of the domain every watch fires.

    Events that nobody has taken yet are coalesced: one per path, in the order of the first. If
    more than MAX_PENDING different paths wait, all of them become one event for the watched path.
    So a flood costs neither memory nor knowledge that something changed.

    Iterating raises XenstoreLost when the connection ends. One consumer at a time.
    """

    MAX_PENDING = 1024

    def __init__(self, store: Xenstore, path: str) -> None:
        self.path = path
        self._store = store
        self._pending: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._link: Link | None = None
        self._token = b""
        self._payload = b""

    async def __aenter__(self) -> Self:
        if self._token:
            raise RuntimeError("a watch can be entered only once: make another one")
        wire_path = self._store._wire_path(self.path, "watch", watch=True)
        link = self._store._watch_link(self.path)
        token = self._token = b"%d" % next(self._store._tokens)
        payload = self._payload = wire_path + b"\0" + token + b"\0"
        self._link = link
        link.watches[token] = self._event
        undo: Undo | None = None
        if link is self._store._link:
            undo = lambda reply: (Op.UNWATCH, 0, payload)  # noqa: E731
        try:
            await link.request(Op.WATCH, self.path, payload, undo=undo, seconds=self._store.timeout)
        except BaseException:
            self._link = None
            del link.watches[token]
            if link is not self._store._link:
                await self._store._end_watch(link, payload, self.path)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        link.watches.pop(self._token, None)
        self._pending.clear()
        self._changed.set()
        await self._store._end_watch(link, self._payload, self.path)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._pending:
            if self._link is None:
                raise ClosedError(
                    f"xenstore: watch {printable(self.path)}: used outside of its block"
                )
            if self._link.failure is not None:
                raise self._link.failure.error("watch", self.path)
            self._changed.clear()
            await self._changed.wait()
        path = next(iter(self._pending))
        del self._pending[path]
        return path

    def _event(self, path: str | None) -> None:
        if path is not None:
            path = self._store._shown_path(path, self.path)
            if len(self._pending) >= self.MAX_PENDING and path not in self._pending:
                self._pending.clear()
                path = self.path
            self._pending[path] = None
        self._changed.set()


def _number(reply: bytes) -> int:
    digits = reply.rstrip(b"\0")
    # 0 would mean: in no transaction.
    if not digits.isdigit() or len(digits) > 10 or not 0 < int(digits) < 1 << 32:
        raise XenstoreError(
            errno.EPROTO, "transaction_start", "", "the store's answer is no transaction id"
        )
    return int(digits)


def _abort(tx_id: int) -> tuple[Op, int, bytes]:
    return Op.TRANSACTION_END, tx_id, b"F\0"


def _is_device(where: str) -> bool:
    return stat.S_ISCHR(Path(where).stat().st_mode)


async def _connected(where: str) -> socket.socket:
    """A socket that is connected to the store.

    Not asyncio's own connect: while the queue of the listener is full (oxenstored's holds one), a
    Unix socket's connect fails with EAGAIN and nothing is under way, which asyncio takes for
    EINPROGRESS and then for success.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(where)
            except BlockingIOError:
                await asyncio.sleep(random.uniform(0.001, 0.01))
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def _find_store() -> str:
    named = os.environ.get("XENSTORED_PATH")
    candidates: list[str] = [DEVICE_PATH, *([named] if named else SOCKET_PATHS)]
    for path in candidates:
        if Path(path).exists():
            return path
    raise XenstoreError(
        errno.ENOENT,
        "connect",
        DEVICE_PATH,
        "no store found",
        hint="is this a Xen guest? The store is " + " or ".join(candidates),
    )


def _cannot_connect(where: str, exc: OSError) -> XenstoreError:
    code = exc.errno or errno.EIO
    hint = None
    if code in (errno.EACCES, errno.EPERM):
        hint = "the store is for root only: run as root"
    elif code == errno.ECONNREFUSED:
        hint = "xenstored is not running"
    return XenstoreError(code, "connect", where, hint=hint)
