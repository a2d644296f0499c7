# SPDX-License-Identifier: BSD-2-Clause
"""The xenstore wire protocol without I/O: packets, names, permissions, errors.

Layout and operation numbers: xen/include/public/io/xs_wire.h; rules of paths and permissions:
docs/misc/xenstore.txt of Xen. pyxs supplies the numbers, the header's layout and the validation
rules. What it gets wrong (a newline at the end of a name, the length of relative paths) is added
here.

Text: names and values are UTF-8 with `surrogateescape`, so that any bytes of a hostile store come
in, and go out again unchanged. Nothing decoded here is safe to print or to trust.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Self

from pyxs._internal import Op as _PyxsOp
from pyxs._internal import Packet as _PyxsPacket
from pyxs.exceptions import InvalidPath, InvalidPermission
from pyxs.helpers import check_path, check_perms, check_watch_path

from pvfront.errors import PvfrontError

_HEADER = _PyxsPacket._struct  # struct xsd_sockmsg: type, req_id, tx_id, len

HEADER_SIZE: int = _HEADER.size
PAYLOAD_MAX = 4096
"""Largest payload of the protocol, XENSTORE_PAYLOAD_MAX; exceeding it costs the connection."""
DEVICE_PAYLOAD_MAX = PAYLOAD_MAX - HEADER_SIZE
"""Largest payload that /dev/xen/xenbus takes: its buffer of 4096 bytes holds the header too."""
SOCKET_REPLY_MAX = 1 << 20
"""Largest reply taken from a socket: oxenstored sends a large directory there in one packet."""
REL_PATH_MAX = 2048
"""Longest relative path, XENSTORE_REL_PATH_MAX."""


class Op(IntEnum):
    """The operations that a frontend uses, and the two that only the store sends.

    XS_RESET_WATCHES (21) is not among them and never may be: /dev/xen/xenbus passes it through on
    the connection that is shared with the kernel, and the store drops the kernel's own watches.
    """

    DIRECTORY = _PyxsOp.DIRECTORY
    READ = _PyxsOp.READ
    GET_PERMS = _PyxsOp.GET_PERMS
    WATCH = _PyxsOp.WATCH
    UNWATCH = _PyxsOp.UNWATCH
    TRANSACTION_START = _PyxsOp.TRANSACTION_START
    TRANSACTION_END = _PyxsOp.TRANSACTION_END
    GET_DOMAIN_PATH = _PyxsOp.GET_DOMAIN_PATH
    WRITE = _PyxsOp.WRITE
    MKDIR = _PyxsOp.MKDIR
    RM = _PyxsOp.RM
    SET_PERMS = _PyxsOp.SET_PERMS
    WATCH_EVENT = _PyxsOp.WATCH_EVENT
    ERROR = _PyxsOp.ERROR
    DIRECTORY_PART = 22  # younger than pyxs


REQUESTS: frozenset[Op] = frozenset(Op) - {Op.WATCH_EVENT, Op.ERROR}
"""All that `encode` ever lets out."""


class Packet(NamedTuple):
    op: Op
    req_id: int
    tx_id: int
    payload: bytes


class WireError(Exception):
    """The other side does not speak the protocol; the stream cannot be trusted any further."""


class XenstoreError(PvfrontError, OSError):
    """A store operation failed.

    `errno` and `path` say what and where, `op` names the operation in lower case. The text reads
    `xenstore: read device/vbd/51728/state: ENOENT (No such file or directory)`. As with OSError
    itself, ENOENT, EEXIST and EACCES or EPERM are also FileNotFoundError, FileExistsError and
    PermissionError.
    """

    def __new__(cls, *args: object, **kwargs: object) -> XenstoreError:
        if cls is XenstoreError and args and isinstance(args[0], int):
            cls = _BY_ERRNO.get(args[0], cls)
        return super().__new__(cls)

    def __init__(
        self, code: int, op: str, path: str, detail: str | None = None, *, hint: str | None = None
    ) -> None:
        name = errno.errorcode.get(code, str(code))
        if detail is None:
            detail = f"{name} ({os.strerror(code)})"
        what = f"{op} {printable(path)}" if path else op
        text = f"xenstore: {what}: {detail}"
        PvfrontError.__init__(self, text, hint=hint)
        # OSError takes its fields from the arguments of __new__, which are not these.
        self.errno = code
        self.strerror = os.strerror(code)
        self.op = op
        self.path = path
        self._text = text

    def __str__(self) -> str:
        return self._text


class XenstoreNotFound(XenstoreError, FileNotFoundError):
    """ENOENT: no such node."""


class XenstoreExists(XenstoreError, FileExistsError):
    """EEXIST."""


class XenstoreDenied(XenstoreError, PermissionError):
    """EACCES, EPERM: the node is not this domain's to read or write."""


_BY_ERRNO: dict[int, type[XenstoreError]] = {
    errno.ENOENT: XenstoreNotFound,
    errno.EEXIST: XenstoreExists,
    errno.EACCES: XenstoreDenied,
    errno.EPERM: XenstoreDenied,
}


def encode(op: Op, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """The bytes of one request. Every byte that goes to a store is made here.

    Raises ValueError for an operation outside of REQUESTS (XS_RESET_WATCHES above all) and for a
    payload beyond the protocol's limit.
    """
    if op not in REQUESTS:
        raise ValueError(f"xenstore operation {int(op)} must not be sent")
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(f"xenstore payload of {len(payload)} bytes")
    header: bytes = _HEADER.pack(op, req_id, tx_id, len(payload))
    return header + payload


class Parser:
    """Cuts a byte stream into packets, however it arrives; none has more than `payload_max`."""

    def __init__(self, payload_max: int = PAYLOAD_MAX) -> None:
        self._payload_max = payload_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Yields the packets that `data` completes. Raises WireError at the first that is none."""
        self._buffer += data
        while len(self._buffer) >= HEADER_SIZE:
            number, req_id, tx_id, length = _HEADER.unpack_from(self._buffer)
            if length > self._payload_max:
                raise WireError(f"a packet claims {length} bytes, more than {self._payload_max}")
            try:
                op = Op(number)
            except ValueError:
                raise WireError(f"a packet of unknown type {number}") from None
            end = HEADER_SIZE + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER_SIZE:end])
            del self._buffer[:end]
            yield Packet(op, req_id, tx_id, payload)

    @property
    def partial(self) -> int:
        """Bytes of an incomplete packet that wait for the rest."""
        return len(self._buffer)


def next_request_id(last: int, taken: Container[int]) -> int:
    """The first request id after `last`, in 32 bits, that is not `taken` by a pending request."""
    while True:
        last = (last + 1) & 0xFFFFFFFF
        if last not in taken:
            return last


def error_from_reply(op: str, path: str, payload: bytes) -> XenstoreError:
    """The error that an XS_ERROR packet with `payload` (b"ENOENT\\0") means for `op` on `path`."""
    name = decode(payload.rstrip(b"\0"))
    code = getattr(errno, name, None) if name.isascii() and name.startswith("E") else None
    if not isinstance(code, int):
        return XenstoreError(errno.EPROTO, op, path, f"the store's error {printable(name)}")
    return XenstoreError(code, op, path)


def encode_text(text: str) -> bytes:
    """The bytes of `text`, exactly those that `decode` made it from."""
    return text.encode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """Any bytes as text; what is not UTF-8 becomes lone surrogates."""
    return str(data, "utf-8", "surrogateescape")


def printable(text: str) -> str:
    """`text` for a log line: no control characters, no lone surrogates, at most 200 characters."""
    safe = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return safe if len(safe) <= 200 else safe[:200] + "…"


def encode_path(path: str, op: str, *, watch: bool = False) -> bytes:
    """The bytes of `path`, without the final NUL. Raises XenstoreError EINVAL if it cannot exist.

    Relative paths begin at the domain's own directory. `watch` allows the special names
    @introduceDomain and @releaseDomain.
    """
    data = encode_text(path)
    try:
        (check_watch_path if watch else check_path)(data)
    except InvalidPath:
        raise XenstoreError(errno.EINVAL, op, path, "not a valid store path") from None
    if data[-1:] in (b"\0", b"\n"):
        raise XenstoreError(errno.EINVAL, op, path, "not a valid store path")
    if len(data) > REL_PATH_MAX and not posixpath.isabs(data):
        raise XenstoreError(
            errno.EINVAL, op, path, f"a relative path is longer than {REL_PATH_MAX} bytes"
        )
    return data


def split_strings(payload: bytes) -> list[str]:
    """The NUL-terminated strings of a reply; a missing last NUL is forgiven."""
    return [decode(part) for part in payload.split(b"\0") if part]


@dataclass(frozen=True, slots=True)
class Permission:
    """What domain `domid` may do with a node.

    The first permission of a node names its owner, who may do everything; its `read` and `write`
    hold for every domain that is not listed.
    """

    domid: int
    read: bool = False
    write: bool = False

    def __str__(self) -> str:
        letter = ("b" if self.write else "r") if self.read else ("w" if self.write else "n")
        return f"{letter}{self.domid}"

    def encode(self) -> bytes:
        """As the protocol writes it: b"r5". Raises ValueError for an impossible domain id."""
        data = str(self).encode()
        try:
            check_perms([data])
        except InvalidPermission:
            raise ValueError(f"domain id {self.domid} cannot have permissions") from None
        return data

    @classmethod
    def parse(cls, text: str) -> Self:
        """The permission that `text` ("b0") means. Raises ValueError for anything else."""
        letter, number = text[:1], text[1:]
        if letter not in {"n", "r", "w", "b"} or not (number.isascii() and number.isdigit()):
            raise ValueError(f"not a store permission: {printable(text)}")
        if len(number) > 5 or int(number) > 0xFFFF:
            raise ValueError(f"not a domain id: {printable(text)}")
        return cls(int(number), read=letter in "rb", write=letter in "wb")
