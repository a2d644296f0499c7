# SPDX-License-Identifier: BSD-2-Clause
"""What the kernel and the hotplug script do for an interface of netback's, for a TAP: make it, give
it its MTU and addresses, put it into a bridge, take it away. In the namespace of this process.
"""

from __future__ import annotations

from collections.abc import Sequence

from pvfront.errors import PvfrontError
from pvfront.netfront.tap import Tap, TapError, delete

MTU = 1500


def online(name: str, mtu: int, addresses: Sequence[str], bridge: str, queues: int) -> None:
    """Makes the TAP, for so many queues, and configures it. Raises PvfrontError."""
    from pvfront.rtnetlink import IPRoute, NetlinkError

    # One that a killed backend left behind may have too few queues.
    delete(name)
    Tap.open(name, queues).close()
    try:
        with IPRoute() as ipr:
            found = ipr.link_lookup(ifname=name)
            if not found:
                raise TapError(f"{name}: it is gone again")
            index = found[0]
            ipr.link("set", index=index, mtu=mtu, txqlen=1000)
            for address in addresses:
                host, _, length = address.partition("/")
                six = ":" in host
                prefix = int(length) if length.isdecimal() else (128 if six else 32)
                # An address that is looked for on the link first is not there yet.
                flags = {"flags": _IFA_F_NODAD} if six else {}
                ipr.addr("replace", index=index, address=host, prefixlen=prefix, **flags)
            if bridge:
                masters = ipr.link_lookup(ifname=bridge)
                if not masters:
                    raise PvfrontError(f"there is no bridge {bridge}")
                ipr.link("set", index=index, master=masters[0])
            ipr.link("set", index=index, state="up")
    except (NetlinkError, OSError) as error:
        raise PvfrontError(f"{name} cannot be configured: {error}") from error


def offline(name: str) -> None:
    """It goes. Nothing if it is not there. Raises TapError."""
    delete(name)


_IFA_F_NODAD = 0x02  # linux/if_addr.h
