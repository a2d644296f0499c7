# SPDX-License-Identifier: BSD-2-Clause
"""What is configured on an interface, read off one and put on another in its place.

Theory of operation
    A vif that changes hands, from the kernel to us or back, is another interface afterwards: the
    kernel forgets addresses and routes with the one that goes. `look` reads them, `put_back`
    configures the new one so; in between they lie in a note, which outlives us.

    Where somebody configures new interfaces by himself (systemd-networkd, ifup@ of ifupdown),
    addresses and routes are left to him: he has done it for the one before. What the kernel
    makes by itself (routes to the subnets of addresses, what routers advertise) comes by itself.

Limits: neighbours, queueing disciplines and sysctls are not carried over; udev sets those of
sysctl.d again on a new interface. Routes of several next hops neither.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from ..errors import PvfrontError
from ..statefile import write_json
from ..sysfs import SYSTEM, Roots

SETTLED_WITHIN = 10.0  # seconds that udev gets to name an interface

_IFF_UP = 0x1
_RTPROT_KERNEL, _RTPROT_RA = 2, 9  # linux/rtnetlink.h
_RTN_UNICAST = 1
_RTNH_F_ONLINK = 4
# linux/if_addr.h
_IFA_F_TEMPORARY = 0x01  # of IPv6; IPv4's SECONDARY
_IFA_F_NODAD = 0x02
_IFA_F_KEPT = 0x10 | 0x100 | 0x200 | 0x400  # home address, manage temporary, no prefix route, ...
_RTM_NEWADDR, _RTM_NEWROUTE = 20, 24
_NEW = 0x1 | 0x4 | 0x200 | 0x400  # request, ack, exclusive, create
_ROUTE = ("family", "dst_len", "src_len", "tos", "table", "proto", "scope", "type", "flags")
_ROUTE_ATTRIBUTES = (
    "RTA_TABLE", "RTA_DST", "RTA_SRC", "RTA_GATEWAY", "RTA_VIA", "RTA_PREFSRC", "RTA_PRIORITY",
    "RTA_METRICS", "RTA_PREF",
)  # fmt: skip
_ADDRESS_ATTRIBUTES = (
    "IFA_LOCAL", "IFA_ADDRESS", "IFA_BROADCAST", "IFA_RT_PRIORITY", "IFA_PROTO",
)  # fmt: skip
_INFINITE = 0xFFFFFFFF
_EEXIST = 17


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """An interface as somebody has set it up. Addresses and routes are netlink's attributes.

    `manager`: who does it by himself for a new one; "" if nobody does.
    """

    name: str
    address: str = ""
    mtu: int = 0
    txqlen: int = 0
    up: bool = False
    master: str = ""
    manager: str = ""
    addresses: Sequence[dict[str, Any]] = field(default_factory=tuple)
    routes: Sequence[dict[str, Any]] = field(default_factory=tuple)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """What was saved; None if there is nothing that makes sense."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**found)
        return None


@contextlib.contextmanager
def _netlink() -> Iterator[Any]:
    from ..rtnetlink import IPRoute, NetlinkError

    try:
        with IPRoute() as ipr:
            yield ipr
    except NetlinkError as error:
        raise PvfrontError(f"netlink: {error}") from error


def look(name: str, roots: Roots = SYSTEM) -> LinkConfig | None:
    """What is configured on the interface; None if there is none of that name."""
    with _netlink() as ipr:
        found = ipr.link_lookup(ifname=name)
        if not found:
            return None
        index = found[0]
        link = ipr.link("get", index=index)[0]
        master = link.get_attr("IFLA_MASTER")
        return LinkConfig(
            name=name,
            address=link.get_attr("IFLA_ADDRESS") or "",
            mtu=link.get_attr("IFLA_MTU") or 0,
            txqlen=link.get_attr("IFLA_TXQLEN") or 0,
            up=bool(link["flags"] & _IFF_UP),
            master=ipr.link("get", index=master)[0].get_attr("IFLA_IFNAME") if master else "",
            manager=_manager(index, name, roots),
            addresses=[
                made for one in ipr.get_addr(index=index) if (made := _address(one)) is not None
            ],
            routes=sorted(
                (
                    _route(one)
                    for family in (2, 10)
                    for one in ipr.route("dump", family=family)
                    if one.get_attr("RTA_OIF") == index and _is_ours(one)
                ),
                # A gateway must be on a network that has a route.
                key=lambda route: "RTA_GATEWAY" in route["attrs"],
            ),
        )


def _address(found: Any) -> dict[str, Any] | None:
    v6 = found["family"] == 10
    attrs = dict(found["attrs"])
    flags = int(attrs.get("IFA_FLAGS", found["flags"]))
    if v6 and flags & _IFA_F_TEMPORARY:
        return None  # the kernel makes them
    made = {name: _plain(attrs[name]) for name in _ADDRESS_ATTRIBUTES if name in attrs}
    made["IFA_FLAGS"] = flags & _IFA_F_KEPT | (_IFA_F_NODAD if v6 else 0)
    if not v6 and (label := attrs.get("IFA_LABEL")):
        made["IFA_LABEL"] = label
    times = attrs.get("IFA_CACHEINFO", {})
    if times.get("ifa_valid", _INFINITE) != _INFINITE:
        made["IFA_CACHEINFO"] = {
            "ifa_preferred": times["ifa_preferred"],
            "ifa_valid": times["ifa_valid"],
        }
    head = {key: found[key] for key in ("family", "prefixlen", "scope")}
    return head | {"attrs": made}


def _is_ours(route: Any) -> bool:
    """Whether somebody has made the route who will not do it again by himself."""
    return route["type"] == _RTN_UNICAST and route["proto"] not in (_RTPROT_KERNEL, _RTPROT_RA)


def _route(found: Any) -> dict[str, Any]:
    attrs = dict(found["attrs"])
    made = {key: found[key] for key in _ROUTE}
    made["flags"] &= _RTNH_F_ONLINK
    made["attrs"] = {name: _plain(attrs[name]) for name in _ROUTE_ATTRIBUTES if name in attrs}
    return made


def _plain(value: Any) -> Any:
    """An attribute as JSON has it."""
    if isinstance(value, dict):
        if "attrs" in value:
            return {"attrs": [[name, _plain(inner)] for name, inner in value["attrs"]]}
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _manager(index: int, name: str, roots: Roots) -> str:
    links = roots.root / "run" / "systemd"
    with contextlib.suppress(OSError):
        state = (links / "netif" / "links" / str(index)).read_text(encoding="utf-8")
        if "ADMIN_STATE=unmanaged" not in state and "ADMIN_STATE=" in state:
            return "systemd-networkd"
    if (links / "units" / f"invocation:ifup@{name}.service").is_symlink():
        return "ifupdown"
    return ""


def put_back(name: str, config: LinkConfig) -> list[str]:
    """Configures the interface as the other one was; what could not be done, for the log.

    Raises PvfrontError if there is no such interface.
    """
    problems = []
    with _netlink() as ipr:
        found = ipr.link_lookup(ifname=name)
        if not found:
            raise PvfrontError(f"{name}: there is no such interface any more")
        index = found[0]
        link = ipr.link("get", index=index)[0]

        def done(what: str, work: Callable[[], Any]) -> None:
            from ..rtnetlink import NetlinkError

            try:
                work()
            except NetlinkError as error:
                if error.code != _EEXIST:
                    problems.append(f"{what}: {error.args[-1]}")

        wanted = {"address": config.address, "mtu": config.mtu, "txqlen": config.txqlen}
        for what, value in wanted.items():
            if value and link.get_attr(f"IFLA_{what.upper()}") != value:
                done(f"{what} {value}", partial(ipr.link, "set", index=index, **{what: value}))
        if config.manager:
            return problems
        if config.master and (master := ipr.link_lookup(ifname=config.master)):
            set_master = partial(ipr.link, "set", index=index, master=master[0])
            done(f"master {config.master}", set_master)
        if config.up:
            done("up", partial(ipr.link, "set", index=index, state="up"))
        for address in config.addresses:
            attrs = address["attrs"]
            text = f"{attrs.get('IFA_LOCAL') or attrs.get('IFA_ADDRESS')}/{address['prefixlen']}"
            message = _address_of(address, index, name)
            done(text, partial(_request, ipr, message, _RTM_NEWADDR))
        for route in config.routes if config.up else ():
            text = f"route {route['attrs'].get('RTA_DST', 'default')}/{route['dst_len']}"
            done(text, partial(_request, ipr, _route_of(route, index), _RTM_NEWROUTE))
    return problems


def _request(ipr: Any, message: Any, kind: int) -> None:
    # Messages as they are: the filters of `ipr.addr` and `ipr.route` drop what they do not know.
    ipr.status.setdefault("nlm_generator", False)  # which pyroute2 0.9.7 forgets, and asks for
    ipr.nlm_request(message, kind, _NEW)


def _address_of(address: dict[str, Any], index: int, name: str) -> Any:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    made = ifaddrmsg()
    for key in ("family", "prefixlen", "scope"):
        made[key] = address[key]
    made["index"] = index
    attrs = dict(address["attrs"])
    label = attrs.pop("IFA_LABEL", None)
    if label and ":" in label:
        attrs["IFA_LABEL"] = f"{name}:{label.partition(':')[2]}"
    made["attrs"] = list(attrs.items())
    return made


def _route_of(route: dict[str, Any], index: int) -> Any:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    made = rtmsg()
    for key in _ROUTE:
        made[key] = route[key]
    made["attrs"] = [*route["attrs"].items(), ("RTA_OIF", index)]
    return made


# -- what an interface is to others ----------------------------------------------------------------


def default_routes() -> set[str]:
    """The interfaces that a default route goes through, of either family and any table."""
    with _netlink() as ipr:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
        found = set()
        for family in (2, 10):
            for route in ipr.route("dump", family=family):
                if route["dst_len"] or route["type"] != _RTN_UNICAST:
                    continue
                hops = route.get_attr("RTA_MULTIPATH") or ()
                out = {route.get_attr("RTA_OIF"), *(hop["oif"] for hop in hops)}
                found |= {names[index] for index in out if index in names}
        return found


def built_on(name: str) -> list[str]:
    """The interfaces that are built on this one (VLANs and the like), and go with it."""
    with _netlink() as ipr:
        found = ipr.link_lookup(ifname=name)
        if not found:
            return []
        return sorted(
            link.get_attr("IFLA_IFNAME")
            for link in ipr.get_links()
            if link.get_attr("IFLA_LINK") == found[0] and link["index"] != found[0]
        )


def rename(name: str, to: str) -> None:
    """Raises PvfrontError: the name is taken, the interface is up or gone."""
    with _netlink() as ipr:
        found = ipr.link_lookup(ifname=name)
        if not found:
            raise PvfrontError(f"{name}: there is no such interface any more")
        ipr.link("set", index=found[0], ifname=to)


def settle(ifindex: int, roots: Roots = SYSTEM, *, timeout: float = SETTLED_WITHIN) -> bool:
    """Waits until udev has seen to a new interface: then it has its name. False: it has not.

    Blocks; at once where no udev runs.
    """
    udev = roots.root / "run" / "udev"
    end = time.monotonic() + timeout
    while (udev / "control").exists() and not (udev / "data" / f"n{ifindex}").exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True
