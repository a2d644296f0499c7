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

_U32 = (1 << 32) - 1
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_STALE = re.compile(
    r"(tx|rx|ctrl)-ring-ref|event-channel(-tx|-rx|-ctrl)?|multi-queue-num-queues|queue-\d+"
    r"|request-.+|feature-.+"
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
    "multi-queue-max-queues",
)


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
    csum4 = not keys.flag("feature-no-csum-offload")
    csum6 = keys.flag("feature-ipv6-csum-offload")
    return Offer(
        sg=sg,
        # Whoever cuts a packet makes each piece's checksum.
        gso_tcpv4=sg and csum4 and gso["tcpv4"],
        gso_tcpv6=sg and csum6 and gso["tcpv6"],
        csum_ipv4=csum4,
        csum_ipv6=csum6,
        multicast_control=keys.flag("feature-multicast-control"),
        dynamic_multicast_control=keys.flag("feature-dynamic-multicast-control"),
        split_event_channels=keys.flag("feature-split-event-channels"),
        ctrl_ring=keys.flag("feature-ctrl-ring"),
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


def parse_mtu(frontend: Mapping[str, str], *, sg: bool) -> tuple[int, list[Problem]]:
    """The payload of the largest packet, in bytes: the toolstack's `mtu`, or 1500."""
    keys = Keys(frontend)
    mtu = keys.uint("mtu", default=MTU_DEFAULT, lo=MTU_LEAST, hi=MTU_LARGEST)
    if mtu > MTU_ONE_PAGE and not sg:
        keys.problems.append(
            Problem("mtu", str(mtu), f"the backend has no feature-sg; taken as {MTU_ONE_PAGE}")
        )
        mtu = MTU_ONE_PAGE
    return mtu, keys.problems


def carrier(backend: Mapping[str, str], frontend: Mapping[str, str]) -> bool:
    """Whether the link is up: the backend's `carrier` (netif.h), and nobody's `disconnect`."""
    return backend.get("carrier", "1").strip() != "0" and not Keys(frontend).flag("disconnect")


def frontend_keys(queues: Sequence[QueueKeys], *, offer: Offer) -> dict[str, str]:
    """What the frontend publishes with Initialised.

    As netback's connect() reads it: one queue stands in the directory itself, and then
    `multi-queue-num-queues` is left out, which a backend of old would not know; several stand in
    queue-0, queue-1 and so on. Ours can receive whatever netif has, so every feature is said.
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
    if offer.multicast_control or offer.dynamic_multicast_control:
        keys["request-multicast-control"] = "0"
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


def stale_key(key: str) -> bool:
    """Whether a key of the frontend's directory is left over from an earlier connection.

    Everything else there belongs to the toolstack and stays: mac, mtu, trusted, disconnect, speed.
    """
    return _STALE.fullmatch(key.partition("/")[0]) is not None
