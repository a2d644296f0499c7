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

Whose a TAP is, its alias tells (IFLA_IFALIAS, ``pvfront:vif-0``): whoever renames it, we find it
again, and one of another owner is not touched.

Limits: a frame of netif has at most 65,535 bytes with its Ethernet header, so gso_max_size is
what is left of that. The kernel drops packets when a queue is full rather than stop their
senders: `TX_QUEUE` is long.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
import time
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
# linux/if.h, linux/if_arp.h, linux/sockios.h, linux/ethtool.h, linux/rtnetlink.h
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_SIOCSIFHWADDR = 0x8924
_SIOCETHTOOL = 0x8946
_HWADDR = struct.Struct("=16sH6s16x")
_ARPHRD_ETHER = 1
_IFREQ_POINTER = struct.Struct("=16sQ16x")
_ETHTOOL_CMD = struct.Struct("=IIIHBBBBBBIIHBBI2I")  # struct ethtool_cmd
_ETHTOOL_SSET = 2
_SPEED_UNKNOWN = 0xFFFFFFFF
_DUPLEX_FULL, _DUPLEX_UNKNOWN = 1, 0xFF
_PORT_OTHER = 0xFF
_RTM_NEWLINK = 16
_REQUEST = 0x1 | 0x4  # and an ack

ALIAS = "pvfront:"
_CARRIER_WITHIN = 5.0  # seconds

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")


class TapError(PvfrontError):
    """The TAP could not be made, or not be set up; the message names it and says why."""


class Tap:
    """One TAP and its queues. Not async: a few system calls, none of which waits for anybody."""

    def __init__(self, name: str, fds: list[int], *, made: bool = False) -> None:
        """`made`: it was not there before."""
        self.name = name
        self.made = made
        self._fds = fds

    @classmethod
    def open(cls, name: str, queues: int = 1, *, owner: str = "", mac: bytes | None = None) -> Self:
        """Makes the TAP, or takes up the one that `owner` has, whatever its name is now.

        `mac`: of one that is made; without it the kernel makes it up.
        Raises TapError: the name is none, or another interface's; somebody else has this TAP;
        there is no /dev/net/tun, or no right to it.
        """
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise TapError(f"{name!r} cannot be the name of a network interface")
        ours = find(owner) if owner else None
        if ours is not None:
            name = ours[1]
        elif owner and is_tap(name):
            raise TapError(
                f"{name}: there is a TAP of this name, and it is not ours",
                hint=f"`ip link del {name}` removes it, `ip link set {name} name ...` renames it",
            )
        fds: list[int] = []
        try:
            for _ in range(queues):
                fds.append(_queue(name))
                if mac is not None and ours is None and len(fds) == 1:
                    # At once: udev makes up an address for interfaces that have a random one.
                    ioctl(fds[0], _SIOCSIFHWADDR, _HWADDR.pack(name.encode(), _ARPHRD_ETHER, mac))
            if owner and ours is None:
                _set_alias(name, f"{ALIAS}{owner}")  # before it can outlive us
            ioctl(fds[0], _TUNSETPERSIST, 1)
        except OSError as error:
            _close(fds)
            raise _refusal(name, error) from error
        except BaseException:
            _close(fds)
            raise
        return cls(name, fds, made=ours is None)

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

    def configure(self, *, mtu: int | None, most: int) -> None:
        """Lengths; `mtu`: None leaves it, as far as it is no more than `most`. Raises TapError."""
        with _netlink(self.name) as (ipr, index, link):
            wanted: dict[str, Any] = {}
            if mtu is not None or link["mtu"] > most:
                wanted["mtu"] = min(mtu or most, most)
            if self.made:
                wanted["txqlen"] = TX_QUEUE
            wanted["gso_max_size"] = GSO_MAX_SIZE
            changes = {key: value for key, value in wanted.items() if link.get(key) != value}
            if changes:
                ipr.link("set", index=index, **changes)

    def close(self) -> None:
        """Our descriptors only: the interface stays, without carrier if nobody else has one."""
        _close(self._fds)


def find(owner: str) -> tuple[int, str] | None:
    """The index and the name of the TAP that `owner` has; None if there is none."""
    from ..rtnetlink import IPRoute

    with IPRoute() as ipr:
        for link in ipr.get_links():
            if link.get_attr("IFLA_IFALIAS") == f"{ALIAS}{owner}" and _is_tun(link):
                return link["index"], link.get_attr("IFLA_IFNAME")
    return None


def index_of(name: str) -> int:
    """Raises TapError."""
    with _netlink(name) as (_, index, _link):
        return index


def set_carrier(name: str, up: bool) -> None:
    """Raises TapError. An interface without any queue has none, whatever is said here."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    with _netlink(name) as (ipr, index, _):
        message = ifinfmsg()
        message["index"] = index
        message["attrs"] = [("IFLA_CARRIER", int(up))]
        # As it is: the filters of `ipr.link` drop a carrier.
        ipr.status.setdefault("nlm_generator", False)  # which pyroute2 0.9.7 forgets, and asks for
        ipr.nlm_request(message, _RTM_NEWLINK, _REQUEST)


def set_mtu(name: str, mtu: int) -> None:
    """Raises TapError."""
    with _netlink(name) as (ipr, index, _):
        ipr.link("set", index=index, mtu=mtu)


def set_speed(name: str, mbits: int | None) -> None:
    """What ethtool(8) shows, in Mbit/s; None: nobody knows. Raises TapError."""
    speed = _SPEED_UNKNOWN if mbits is None else min(mbits, _SPEED_UNKNOWN - 1)
    duplex = _DUPLEX_UNKNOWN if mbits is None else _DUPLEX_FULL
    command = ctypes.create_string_buffer(
        _ETHTOOL_CMD.pack(
            _ETHTOOL_SSET, 0, 0, speed & 0xFFFF, duplex, _PORT_OTHER, 0, 0, 0, 0, 0, 0,
            speed >> 16, 0, 0, 0, 0, 0,
        )
    )  # fmt: skip
    request = _IFREQ_POINTER.pack(name.encode(), ctypes.addressof(command))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            ioctl(sock.fileno(), _SIOCETHTOOL, request)
        except OSError as error:
            raise TapError(f"{name}: its speed cannot be told: {error.strerror}") from error


def announce(name: str) -> None:
    """Has the kernel tell the neighbours where this interface's addresses are now, by gratuitous
    ARP and unsolicited neighbour advertisements. Raises TapError.

    It does so when the interface gets its address, where arp_notify and ndisc_notify are set: so
    they are, for that moment. What is sent before the kernel has seen the carrier is lost, so
    that is waited for. Nothing is sent by an interface that is down.
    """
    end = time.monotonic() + _CARRIER_WITHIN
    while not (running := _is_running(name)) and time.monotonic() < end:
        if running is None:
            return
        time.sleep(0.02)
    with contextlib.ExitStack() as stack:
        for key in (f"ipv4/conf/{name}/arp_notify", f"ipv6/conf/{name}/ndisc_notify"):
            path = Path("/proc/sys/net") / key
            with contextlib.suppress(OSError):  # IPv6 may be off
                before = path.read_text()
                if before.strip() == "0":
                    path.write_text("1")
                    stack.callback(_restore, path, before)
        with _netlink(name) as (ipr, index, link):
            ipr.link("set", index=index, address=link["address"])


def _restore(path: Path, before: str) -> None:
    with contextlib.suppress(OSError):
        path.write_text(before)


def _is_running(name: str) -> bool | None:
    """Whether it can send; None if it is down."""
    with _netlink(name) as (_, _index, link):
        return bool(link["flags"] & _IFF_RUNNING) if link["flags"] & _IFF_UP else None


def delete(name: str) -> None:
    """The interface goes, whoever has its queues. Nothing if there is none. Raises TapError."""
    with contextlib.suppress(_NoInterface), _netlink(name) as (ipr, index, _):
        ipr.link("del", index=index)


class _NoInterface(TapError):
    pass


def is_tap(name: str) -> bool:
    """Whether there is an interface of that name and it is a TAP or TUN."""
    from ..rtnetlink import IPRoute

    with IPRoute() as ipr:
        return any(_is_tun(link) for link in ipr.link("dump", ifname=name))


def _is_tun(link: Any) -> bool:
    info = link.get_attr("IFLA_LINKINFO")
    return info is not None and info.get_attr("IFLA_INFO_KIND") == "tun"


def _set_alias(name: str, alias: str) -> None:
    with _netlink(name) as (ipr, index, _):
        ipr.link("set", index=index, ifalias=alias)


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
    from ..rtnetlink import IPRoute, NetlinkError

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
            link["flags"] = message["flags"]
            yield ipr, found[0], link
    except NetlinkError as error:
        raise TapError(f"{name}: the kernel refuses its settings: {error}") from error
