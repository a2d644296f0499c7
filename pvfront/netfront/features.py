# SPDX-License-Identifier: BSD-2-Clause
"""What the store's keys say of a network interface, and what we write. Pure: text in, values out.

The keys are those of Xen's public header io/netif.h. netback writes all of its own before
InitWait, but nobody has to: they are read then, where they shape the rings, and again at
Connected.

What the header leaves open is taken as Linux takes it: without `feature-no-csum-offload` a
backend finishes IPv4 checksums, without `feature-ipv6-csum-offload` none of IPv6; large packets
want feature-sg.

Backend contents are hostile. Without `feature-rx-copy` (or with 0) there is no interface to be
had: the other way, page flipping, has been gone from Linux since 2.6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PvfrontError
from ..negotiate import Keys, Problem

MTU_DEFAULT = 1500
MTU_LARGEST = 65517  # XEN_NETIF_MAX_TX_SIZE - VLAN_ETH_HLEN: netback's ETH_MAX_MTU
MTU_LEAST = 68  # ETH_MIN_MTU
MTU_ONE_PAGE = 1500  # without feature-sg: what Linux's netfront keeps to
MAX_QUEUES = 16

REQUEST_MULTICAST = "request-multicast-control"

_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_STALE = re.compile(
    r"(tx|rx|ctrl)-ring-ref|event-channel(-tx|-rx|-ctrl)?|multi-queue-num-queues|queue-\d+"
    r"|request-.+|feature-.+|xdp-headroom"
)

BACKEND_KEYS = (
    "feature-rx-copy",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "feature-multicast-control",
    "feature-dynamic-multicast-control",
    "feature-split-event-channels",
    "feature-ctrl-ring",
    "feature-xdp-headroom",
    "multi-queue-max-queues",
    "mac",
    "mtu",
)
"""All that is read of a backend but the state of the link (link.py); toolstacks and hotplug scripts
keep more there."""

FRONTEND_KEYS = ("mac", "mtu", "trusted")
"""The toolstack's keys in our own directory that shape a connection."""


class NetError(PvfrontError):
    """A key without which there is no interface is missing or impossible."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What the backend can; each is already within our own limits."""

    sg: bool = False
    gso_tcpv4: bool = False
    gso_tcpv6: bool = False
    csum_ipv4: bool = True
    csum_ipv6: bool = False
    multicast_control: bool = False
    dynamic_multicast_control: bool = False
    split_event_channels: bool = False
    ctrl_ring: bool = False
    xdp_headroom: bool = False
    max_queues: int = 1


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """One queue's ends: event channels and references of its two rings, a page each."""

    tx_ring_ref: int
    rx_ring_ref: int
    port: int
    rx_port: int | None = None  # None: `port` is of both rings


def parse_offer(backend: Mapping[str, str]) -> tuple[Offer, list[Problem]]:
    """Raises NetError if the backend cannot copy what we are to receive."""
    keys = Keys(backend)
    if not keys.flag("feature-rx-copy"):
        raise NetError(
            "backend key feature-rx-copy is not 1: it cannot copy received packets",
            hint="this backend is too old for any frontend of today",
        )
    sg = keys.flag("feature-sg")
    gso = {key: keys.flag(f"feature-gso-{key}") for key in ("tcpv4", "tcpv6")}
    if not sg:
        keys.problems += [
            Problem(f"feature-gso-{key}", "1", "large packets want feature-sg; taken as 0")
            for key, offered in gso.items()
            if offered
        ]
    multicast = {
        key: keys.flag(f"feature-{key}")
        for key in ("multicast-control", "dynamic-multicast-control")
    }
    if multicast["dynamic-multicast-control"] and not multicast["multicast-control"]:
        reason = "means nothing without feature-multicast-control; taken as 0"
        keys.problems.append(Problem("feature-dynamic-multicast-control", "1", reason))
        multicast["dynamic-multicast-control"] = False
    csum4 = not keys.flag("feature-no-csum-offload")
    csum6 = keys.flag("feature-ipv6-csum-offload")
    return Offer(
        sg=sg,
        # Whoever cuts a packet makes each piece's checksum.
        gso_tcpv4=sg and csum4 and gso["tcpv4"],
        gso_tcpv6=sg and csum6 and gso["tcpv6"],
        csum_ipv4=csum4,
        csum_ipv6=csum6,
        multicast_control=multicast["multicast-control"],
        dynamic_multicast_control=multicast["dynamic-multicast-control"],
        split_event_channels=keys.flag("feature-split-event-channels"),
        ctrl_ring=keys.flag("feature-ctrl-ring"),
        xdp_headroom=keys.flag("feature-xdp-headroom"),
        max_queues=keys.uint("multi-queue-max-queues", default=1, lo=1, hi=MAX_QUEUES),
    ), keys.problems


def parse_mac(text: str | None) -> bytes:
    """The six bytes of a frontend's `mac`. Raises NetError, for the address of a group too."""
    if text is None:
        raise NetError("frontend key mac is missing: the interface has no address")
    if not _MAC.fullmatch(text.strip()):
        raise NetError(f"frontend key mac={text[:40]!a}: not six bytes as 00:16:3e:01:02:03")
    mac = bytes.fromhex(text.strip().replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise NetError(f"frontend key mac={text.strip()}: not the address of one machine")
    return mac


def parse_mtu(
    frontend: Mapping[str, str], backend: Mapping[str, str], *, sg: bool
) -> tuple[int, list[Problem]]:
    """The payload of the largest packet, in bytes: the toolstack's `mtu`, or 1500.

    It stands in the frontend's directory (netif.h); libxl writes it into the backend's too, which
    counts where the frontend's is missing.
    """
    keys = Keys(frontend if "mtu" in frontend else backend)
    mtu = keys.uint("mtu", default=MTU_DEFAULT, lo=MTU_LEAST, hi=MTU_LARGEST)
    if mtu > MTU_ONE_PAGE and not sg:
        keys.problems.append(
            Problem("mtu", str(mtu), f"the backend has no feature-sg; taken as {MTU_ONE_PAGE}")
        )
        mtu = MTU_ONE_PAGE
    return mtu, keys.problems


def trusted(frontend: Mapping[str, str]) -> tuple[bool, list[Problem]]:
    """The toolstack's `trusted`; nonsense means no."""
    text = frontend.get("trusted", "1").strip()
    if text in ("0", "1"):
        return text == "1", []
    return False, [Problem("trusted", text, "neither 0 nor 1; the backend is not trusted")]


def lost(before: Offer, now: Offer) -> list[str]:
    """What a backend could and cannot do any more, for people."""
    names = {
        "sg": "no packets of several pages",
        "gso_tcpv4": "no large TCP packets over IPv4",
        "gso_tcpv6": "no large TCP packets over IPv6",
        "csum_ipv4": "no checksums over IPv4",
        "csum_ipv6": "no checksums over IPv6",
        "multicast_control": "no multicast control",
        "split_event_channels": "no split event channels",
        "ctrl_ring": "no control ring",
    }
    gone = [text for name, text in names.items() if getattr(before, name) > getattr(now, name)]
    if now.max_queues < before.max_queues:
        gone.append(f"{now.max_queues} queues at most, not {before.max_queues}")
    return gone


def frontend_keys(
    queues: Sequence[QueueKeys],
    *,
    offer: Offer,
    control: tuple[int, int] | None = None,
    multicast_filter: bool = False,
) -> dict[str, str]:
    """What the frontend publishes with Connected.

    As netback's connect() reads it: one queue stands in the directory itself, and then
    `multi-queue-num-queues` is left out, which a backend of old would not know; several stand in
    queue-0, queue-1 and so on. Ours can receive whatever netif has, so every feature is said.

    `control`: reference and port of the control ring. `multicast_filter`: the backend is to pass on
    what was joined only. One that looks at that key at any time is told later, when it knows what
    was joined (`multicast_later`); any other looks at it now and never again.
    """
    if not queues:
        raise ValueError("an interface has at least one queue")
    keys = {
        "request-rx-copy": "1",
        "feature-rx-notify": "1",
        "feature-sg": "1",
        "feature-gso-tcpv4": "1",
        "feature-gso-tcpv6": "1",
        "feature-no-csum-offload": "0",
        "feature-ipv6-csum-offload": "1",
    }
    if offer.multicast_control:
        now = multicast_filter and not offer.dynamic_multicast_control
        keys[REQUEST_MULTICAST] = "1" if now else "0"
    if offer.xdp_headroom:
        keys["xdp-headroom"] = "0"  # there may be one of a kernel's frontend
    if control is not None:
        keys["ctrl-ring-ref"], keys["event-channel-ctrl"] = map(str, control)
    if len(queues) > 1:
        keys["multi-queue-num-queues"] = str(len(queues))
    for number, queue in enumerate(queues):
        where = f"queue-{number}/" if len(queues) > 1 else ""
        keys[f"{where}tx-ring-ref"] = str(queue.tx_ring_ref)
        keys[f"{where}rx-ring-ref"] = str(queue.rx_ring_ref)
        if queue.rx_port is None:
            keys[f"{where}event-channel"] = str(queue.port)
        else:
            keys[f"{where}event-channel-tx"] = str(queue.port)
            keys[f"{where}event-channel-rx"] = str(queue.rx_port)
    return keys


def multicast_later(offer: Offer, *, multicast_filter: bool) -> bool:
    """Whether REQUEST_MULTICAST becomes "1" once the backend has been told what was joined."""
    return multicast_filter and offer.multicast_control and offer.dynamic_multicast_control


def stale_key(key: str) -> bool:
    """Whether a key of the frontend's directory is left over from an earlier connection.

    Everything else there belongs to the toolstack and stays: mac, mtu, trusted, disconnect, speed.
    """
    return _STALE.fullmatch(key.partition("/")[0]) is not None
