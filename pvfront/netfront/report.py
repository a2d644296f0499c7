# SPDX-License-Identifier: BSD-2-Clause
"""What status and the worker are told of a connection. Pure."""

from __future__ import annotations

from typing import Any

from ..abi import lib
from ..budget import Grant
from .features import Offer
from .shape import Shape


def rings(shape: Shape | None, grant: Grant | None) -> dict[str, Any] | None:
    """Queues and pools, and why they are not larger."""
    if shape is None:
        return None
    granted = None
    if grant is not None:
        granted = {"asked": grant.asked, "got": grant.got, "why": grant.why}
    return {
        "queues": shape.queues,
        "tx_pages": shape.tx,
        "rx_pages": shape.rx,
        "split_event_channels": shape.split,
        "granted": granted,
    }


def offered(offer: Offer | None) -> dict[str, Any] | None:
    """What the backend can."""
    if offer is None:
        return None
    return {name: getattr(offer, name) for name in offer.__dataclass_fields__}


def bits(offer: Offer) -> int:
    """The same for START_NET: PVF_NET_*."""
    found = {
        lib.PVF_NET_SG: offer.sg,
        lib.PVF_NET_CSUM4: offer.csum_ipv4,
        lib.PVF_NET_CSUM6: offer.csum_ipv6,
        lib.PVF_NET_GSO4: offer.gso_tcpv4,
        lib.PVF_NET_GSO6: offer.gso_tcpv6,
        lib.PVF_NET_MULTICAST: offer.multicast_control,
    }
    return sum(bit for bit, has in found.items() if has)
