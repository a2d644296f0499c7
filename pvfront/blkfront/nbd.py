# SPDX-License-Identifier: BSD-2-Clause
"""The kernel's nbd driver, configured through generic netlink.

Theory of operation
-------------------
Family `nbd`, version 1 (uapi linux/nbd-netlink.h). CONNECT makes a device out of a socket;
RECONFIGURE gives a device whose socket died a new one, or changes its size; DISCONNECT ends it.
The driver (drivers/block/nbd.c) has these properties that callers depend on:

- Generic netlink runs a command inside the sender's sendmsg(). A command may wait for the device's
  locks, so an asynchronous netlink socket would stop the event loop just the same, and
  pyroute2's synchronous one refuses to work in a thread whose event loop runs. Therefore this
  module is synchronous, opens its socket for each `with` block, and is called from a thread of
  its own. The descriptors in NBD_ATTR_SOCKETS are looked up in the calling process, so that any
  thread of it will do.
- RECONFIGURE with a socket answers success even if no socket of the device was dead and the
  new one was dropped (nbd_genl_reconfigure swallows ENOSPC). The caller finds out when, after it
  has closed its own copy, the other end reports the end of the stream.
- RECONFIGURE with NBD_ATTR_TIMEOUT would reset queue/io_timeout (nbd_set_cmd_timeout): it is never
  sent there. RECONFIGURE ignores NBD_ATTR_SERVER_FLAGS: a device keeps the flags of its CONNECT.
- NBD_ATTR_TIMEOUT=0 in CONNECT: a slow server is never taken for a dead one. The request timer
  then only warns, and re-sends what went out on an older socket (nbd_xmit_timeout).
- NBD_ATTR_DEAD_CONN_TIMEOUT=0 would fail every request the moment the socket dies
  (wait_for_reconnect).
- DISCONNECT first sends NBD_CMD_DISC under the socket's lock: it waits for as long as the server
  end is open and does not read.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

from .. import sysfs
from ..errors import PvfrontError
from ..netlink import (
    NLM_F_ACK,
    NLM_F_REQUEST,
    AsyncGenericNetlinkSocket,
    GenericNetlinkSocket,
    NetlinkError,
    genlmsg,
    nla,
)
from .blockdisk import modprobe

FAMILY = "nbd"
VERSION = 1

# enum in linux/nbd-netlink.h
CMD_CONNECT = 1
CMD_DISCONNECT = 2
CMD_RECONFIGURE = 3
CMD_STATUS = 5

# linux/nbd.h: what the server can do; the kernel never checks them again.
FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_CAN_MULTI_CONN = 1 << 8

CFLAG_DESTROY_ON_DISCONNECT = 1 << 0

_CREATE_DEADLINE = 5.0  # seconds for a free index; udev or a device going down may hold it
_CREATE_PAUSE = 0.02


class NbdUnavailable(PvfrontError):
    """The kernel has no nbd driver, or it cannot be loaded."""


class NbdError(PvfrontError):
    """The kernel refused a command. `errno` is its positive error number."""

    def __init__(self, operation: str, device: str, errno: int, text: str | None = None) -> None:
        detail = f": {text}" if text and text != os.strerror(errno) else ""
        super().__init__(
            f"nbd {operation} of {device} failed: "
            f"{sysfs.errno_name(errno)} ({os.strerror(errno)}){detail}",
            hint="run it as root (CAP_SYS_ADMIN)" if sysfs.errno_name(errno) == "EPERM" else None,
        )
        self.operation = operation
        self.device = device
        self.errno = errno


class NbdMessage(genlmsg):  # type: ignore[misc]
    """One message of the family; the tables below are the enums of linux/nbd-netlink.h in order."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        prefix = "NBD_SOCK_"
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            prefix = "NBD_SOCK_"
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]
        prefix = "NBD_DEVICE_"
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            prefix = "NBD_DEVICE_"
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


class _AsyncNbdSocket(AsyncGenericNetlinkSocket):  # type: ignore[misc]
    module_err_level = "debug"  # a missing family is an exception of ours, not pyroute2's log line


class _NbdSocket(GenericNetlinkSocket):  # type: ignore[misc]
    async_class: ClassVar[type] = _AsyncNbdSocket


def size_attributes(size: int | None, block_size: int | None) -> list[tuple[str, Any]]:
    """The size attributes of CONNECT and RECONFIGURE, checked as the kernel would check them."""
    attributes: list[tuple[str, Any]] = []
    if size is not None:
        if not 0 <= size < 1 << 63:
            raise ValueError(f"size {size} is not within 0..2^63-1")
        attributes.append(("NBD_ATTR_SIZE_BYTES", size))
    if block_size is not None:
        if block_size not in (512, 1024, 2048, 4096):
            raise ValueError(f"block size {block_size} is none of 512, 1024, 2048, 4096")
        attributes.append(("NBD_ATTR_BLOCK_SIZE_BYTES", block_size))
    return attributes


def socket_attribute(fds: Sequence[int]) -> tuple[str, Any]:
    """The nested list of sockets."""
    items = [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]}) for fd in fds]
    return ("NBD_ATTR_SOCKETS", {"attrs": items})


@dataclass(frozen=True)
class NbdDevice:
    """What sysfs says of one nbd device."""

    index: int
    backend: str | None  # the identifier of its CONNECT, if it had one
    connected: bool  # by netlink or by ioctl

    @property
    def name(self) -> str:
        return f"nbd{self.index}"


def devices(roots: sysfs.Roots = sysfs.SYSTEM) -> list[NbdDevice]:
    """Every nbd device there is, by index."""
    found = []
    for name in sysfs.listdir(roots.sys / "block"):
        if name.startswith("nbd") and name[3:].isdigit():
            directory = roots.sys / "block" / name
            backend = sysfs.read(directory / "backend")
            connected = (directory / "pid").exists()
            found.append(NbdDevice(int(name[3:]), backend, connected))
    return sorted(found, key=lambda device: device.index)


def free_index(roots: sysfs.Roots = sysfs.SYSTEM) -> int:
    """The lowest index that no connected device has and that the module did not make itself."""
    first = sysfs.read_int(roots.sys / "module" / "nbd" / "parameters" / "nbds_max") or 0
    used = {device.index for device in devices(roots) if device.connected}
    return next(index for index in itertools.count(first) if index not in used)


class NbdControl:
    """The driver's command socket, for the length of a `with` block and within one thread.

    Entering loads the module if need be; raises NbdUnavailable if there is none.
    Every command raises NbdError.
    """

    def __init__(self, roots: sysfs.Roots = sysfs.SYSTEM) -> None:
        self._roots = roots
        self._socket: Any = None

    def __enter__(self) -> Self:
        try:
            self._socket = self._open()
        except NetlinkError:
            problem = load_module()
            try:
                self._socket = self._open()
            except NetlinkError as error:
                raise NbdUnavailable(
                    f"the kernel has no nbd driver: {problem or 'family nbd not registered'}",
                    hint="install the kernel package that holds nbd.ko, then "
                    "`modprobe nbd nbds_max=0 max_part=16` and "
                    "`echo nbd > /etc/modules-load.d/nbd.conf`",
                ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def connect(
        self,
        sock_fds: Sequence[int],
        *,
        size: int,
        block_size: int,
        server_flags: int,
        identifier: str,
        dead_conn_timeout: int,
        index: int | None = None,
        destroy_on_disconnect: bool = True,
    ) -> int:
        """Make a device from connected stream sockets; returns its index.

        Without `index` it is a device that was, or is, made on demand, so that it can be destroyed
        with the connection: one that somebody's `modprobe nbd` made stays as it is. `size` in
        bytes may be 0: the device exists but accepts no request until RECONFIGURE gives a size.
        `dead_conn_timeout` in seconds is how long requests wait for a new socket.
        """
        attributes = [
            *size_attributes(size, block_size),
            ("NBD_ATTR_TIMEOUT", 0),
            ("NBD_ATTR_SERVER_FLAGS", server_flags | FLAG_HAS_FLAGS),
            ("NBD_ATTR_CLIENT_FLAGS", CFLAG_DESTROY_ON_DISCONNECT if destroy_on_disconnect else 0),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_conn_timeout),
            ("NBD_ATTR_BACKEND_IDENTIFIER", identifier),
            socket_attribute(sock_fds),
        ]
        if index is not None:
            return self._connect_at(index, attributes)
        until = time.monotonic() + _CREATE_DEADLINE
        while True:
            index = free_index(self._roots)
            try:
                return self._connect_at(index, attributes)
            except NbdError as error:
                # EBUSY: udev has opened the new device already and closes it in a moment; giving
                # up here would leave it behind, unused, for ever. EEXIST: somebody else made it.
                # EINVAL: the last device of this index is still on its way out (the other causes
                # of EINVAL are excluded by the checks above).
                retry = sysfs.errno_name(error.errno) in ("EBUSY", "EEXIST", "EINVAL")
                if not retry or time.monotonic() > until:
                    raise
            time.sleep(_CREATE_PAUSE)

    def _connect_at(self, index: int, attributes: list[tuple[str, Any]]) -> int:
        replies = self._request(
            CMD_CONNECT, "connect", f"nbd{index}", [("NBD_ATTR_INDEX", index), *attributes]
        )
        for reply in replies:
            answered = reply.get_attr("NBD_ATTR_INDEX")
            if answered is not None:
                return int(answered)
        return index

    def reconfigure(
        self,
        index: int,
        *,
        identifier: str,
        sock_fds: Sequence[int] = (),
        size: int | None = None,
        block_size: int | None = None,
        dead_conn_timeout: int | None = None,
    ) -> None:
        """Replace dead sockets, change the size, or both.

        Success does not mean that a socket was taken: see the module's text. EINVAL: no such
        device, not connected, or connected under another identifier.
        """
        attributes: list[tuple[str, Any]] = [
            ("NBD_ATTR_INDEX", index),
            ("NBD_ATTR_BACKEND_IDENTIFIER", identifier),
            *size_attributes(size, block_size),
        ]
        if dead_conn_timeout is not None:
            attributes.append(("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_conn_timeout))
        if sock_fds:
            attributes.append(socket_attribute(sock_fds))
        self._request(CMD_RECONFIGURE, "reconfigure", f"nbd{index}", attributes)

    def disconnect(self, index: int) -> None:
        """End the device's connection; requests in flight fail with EIO.

        Waits while the server end is open and does not read: close that end to be sure.
        """
        self._request(CMD_DISCONNECT, "disconnect", f"nbd{index}", [("NBD_ATTR_INDEX", index)])

    def status(self, index: int) -> bool:
        """Whether the device exists and is configured (it may be without a live socket)."""
        replies = self._request(CMD_STATUS, "status", f"nbd{index}", [("NBD_ATTR_INDEX", index)])
        for reply in replies:
            listed = reply.get_attr("NBD_ATTR_DEVICE_LIST")
            for item in listed.get_attrs("NBD_DEVICE_ITEM") if listed is not None else ():
                if item.get_attr("NBD_DEVICE_INDEX") == index:
                    return bool(item.get_attr("NBD_DEVICE_CONNECTED"))
        return False

    def _open(self) -> Any:
        sock = _NbdSocket(ext_ack=True)
        try:
            sock.bind(FAMILY, NbdMessage)
        except BaseException:
            sock.close()
            raise
        return sock

    def _request(
        self, command: int, operation: str, device: str, attributes: list[tuple[str, Any]]
    ) -> list[Any]:
        if self._socket is None:
            raise RuntimeError("NbdControl is used outside its with block")
        message = NbdMessage()
        message["cmd"] = command
        message["version"] = VERSION
        message["attrs"] = [list(attribute) for attribute in attributes]
        try:
            return list(
                self._socket.nlm_request(
                    message, msg_type=self._socket.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK
                )
            )
        except NetlinkError as error:
            text = error.args[1] if len(error.args) > 1 else None
            raise NbdError(operation, device, int(error.code), text) from error


def load_module() -> str | None:
    """Load nbd without any device of its own; returns what went wrong, or None.

    `max_part` cannot be changed later, and 0 would leave disks without partitions.
    """
    return modprobe("nbd", "nbds_max=0", "max_part=16")
