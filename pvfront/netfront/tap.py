# SPDX-License-Identifier: BSD-2-Clause
"""The OS device of a vif: a persistent TAP, of as many queues as the connection has.

Theory of operation
    The TAP outlives its worker and this process (TUNSETPERSIST): addresses, routes and sockets
    stay with it while nobody serves it, and its carrier is off meanwhile. Each queue is a
    descriptor of its own, opened here, where the privilege is, and handed to the worker; the
    packets of a queue without a descriptor go to the others.

    Packets carry a virtio_net_hdr (IFF_VNET_HDR) of `VNET_HDR` bytes. What the kernel may leave
    to us, checksums and the cutting of large TCP packets, is told by `set_offloads`; it applies
    to packets that are sent from then on, so one more that wants it may come.

    The kernel's side: drivers/net/tun.c, linux/if_tun.h.

Limits: a frame of netif has at most 65,535 bytes with its Ethernet header, so gso_max_size is
what is left of that. The kernel drops packets when a queue is full rather than stop their
senders: `TX_QUEUE` is long.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any, Self

from ..errors import PvfrontError

TUN = "/dev/net/tun"
VNET_HDR = 10  # sizeof(struct virtio_net_hdr)
TX_QUEUE = 1000  # packets
GSO_MAX_SIZE = 65535 - 14

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_TUN_F_CSUM = 0x01
_TUN_F_TSO4 = 0x02
_TUN_F_TSO6 = 0x04
_TUN_F_TSO_ECN = 0x08
_FLAGS = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE
_IFREQ = struct.Struct("16sH22x")

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")


class TapError(PvfrontError):
    """The TAP could not be made, or not be set up; the message names it and says why."""


class Tap:
    """One TAP and its queues. Not async: a few system calls, none of which waits for anybody."""

    def __init__(self, name: str, fds: list[int]) -> None:
        self.name = name
        self._fds = fds

    @classmethod
    def open(cls, name: str, queues: int = 1) -> Self:
        """Makes the TAP, or takes up the one that is there, with so many queues.

        Raises TapError: the name is none, or another interface's; somebody else has this TAP;
        there is no /dev/net/tun, or no right to it.
        """
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise TapError(f"{name!r} cannot be the name of a network interface")
        fds: list[int] = []
        try:
            for _ in range(queues):
                fds.append(_queue(name))
            ioctl(fds[0], _TUNSETPERSIST, 1)
        except OSError as error:
            _close(fds)
            raise _refusal(name, error) from error
        except BaseException:
            _close(fds)
            raise
        return cls(name, fds)

    @property
    def queues(self) -> int:
        return len(self._fds)

    def give(self) -> list[int]:
        """The queues' descriptors, which are the caller's from now on."""
        fds, self._fds = self._fds, []
        return fds

    def set_offloads(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        """What the kernel may leave to us in packets that it sends. Raises TapError."""
        flags = 0
        if csum:
            flags |= _TUN_F_CSUM
            flags |= (_TUN_F_TSO4 | _TUN_F_TSO_ECN) if tso4 else 0
            flags |= (_TUN_F_TSO6 | _TUN_F_TSO_ECN) if tso6 else 0
        if not self._fds:
            raise TapError(f"{self.name}: no queue of it is open here")
        try:
            ioctl(self._fds[0], _TUNSETOFFLOAD, flags)
        except OSError as error:
            raise TapError(f"{self.name}: its offloads cannot be set: {error.strerror}") from error

    def configure(self, *, mac: bytes, mtu: int) -> None:
        """Address, MTU, lengths. What is so already is left alone. Raises TapError."""
        with _netlink(self.name) as (ipr, index, link):
            wanted: dict[str, Any] = {}
            address = ":".join(f"{byte:02x}" for byte in mac)
            if link.get("address") != address:
                wanted["address"] = address
            for key, value in {
                "mtu": mtu, "txqlen": TX_QUEUE, "gso_max_size": GSO_MAX_SIZE,
            }.items():  # fmt: skip
                if link.get(key) != value:
                    wanted[key] = value
            if wanted:
                ipr.link("set", index=index, **wanted)

    def close(self) -> None:
        """Our descriptors only: the interface stays, without carrier if nobody else has one."""
        _close(self._fds)


def set_carrier(name: str, up: bool) -> None:
    """Raises TapError. An interface without any queue has none, whatever is said here."""
    with _netlink(name) as (ipr, index, _):
        ipr.link("set", index=index, carrier=int(up))


def announce(name: str) -> None:
    """Has the kernel tell the neighbours where this interface's addresses are now, by gratuitous
    ARP and unsolicited neighbour advertisements. Raises TapError.

    It does so when the interface gets its address, where arp_notify and ndisc_notify are set.
    """
    for key in (f"ipv4/conf/{name}/arp_notify", f"ipv6/conf/{name}/ndisc_notify"):
        with contextlib.suppress(OSError):  # IPv6 may be off
            (Path("/proc/sys/net") / key).write_text("1")
    with _netlink(name) as (ipr, index, link):
        ipr.link("set", index=index, address=link["address"])


def delete(name: str) -> None:
    """The interface goes, whoever has its queues. Nothing if there is none. Raises TapError."""
    with contextlib.suppress(_NoInterface), _netlink(name) as (ipr, index, _):
        ipr.link("del", index=index)


class _NoInterface(TapError):
    pass


def is_tap(name: str) -> bool:
    """Whether there is an interface of that name and it is a TAP or TUN."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        for link in ipr.link("dump", ifname=name):
            info = link.get_attr("IFLA_LINKINFO")
            return info is not None and info.get_attr("IFLA_INFO_KIND") == "tun"
    return False


def _queue(name: str) -> int:
    fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _FLAGS))
        ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("=i", VNET_HDR))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refusal(name: str, error: OSError) -> TapError:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO if error.filename == TUN:
            return TapError(f"{TUN} is missing", hint="modprobe tun")
        case errno.EPERM | errno.EACCES:
            return TapError(f"{name}: no right to make a TAP", hint="run as root (CAP_NET_ADMIN)")
        case errno.EINVAL if not is_tap(name):
            return TapError(
                f"{name}: there is an interface of this name, and it is no TAP",
                hint="unbind its driver first, or give the vif another name",
            )
        case errno.EINVAL | errno.EBUSY:
            return TapError(
                f"{name}: this TAP is in use, or was made in another way",
                hint=f"`ip link del {name}` removes it",
            )
        case errno.E2BIG:
            return TapError(f"{name}: more queues than the kernel lets one TAP have")
    return TapError(f"{name}: the TAP cannot be made: {error.strerror}")


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


@contextlib.contextmanager
def _netlink(name: str) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """A route socket, the interface's index, and what it says of itself."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ipr:
            found = ipr.link_lookup(ifname=name)
            if not found:
                raise _NoInterface(f"{name}: there is no such interface any more")
            message = ipr.link("get", index=found[0])[0]
            names = {
                "address": "IFLA_ADDRESS", "mtu": "IFLA_MTU", "txqlen": "IFLA_TXQLEN",
                "gso_max_size": "IFLA_GSO_MAX_SIZE",
            }  # fmt: skip
            link = {key: message.get_attr(attribute) for key, attribute in names.items()}
            yield ipr, found[0], link
    except NetlinkError as error:
        raise TapError(f"{name}: the kernel refuses its settings: {error}") from error
