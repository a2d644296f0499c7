# SPDX-License-Identifier: BSD-2-Clause
"""Which multicast packets an interface listens to, as the kernel has it.

The worker learns of joins while it serves, from the IGMP and MLD packets that it sends; those of
before stand in /proc/net/dev_mcast, which a connection begins with. An interface that listens to
all (a bridge's, a sniffer's) has no such list.
"""

from __future__ import annotations

from pathlib import Path

LIST = Path("/proc/net/dev_mcast")
MOST = 64  # netback's limit (XEN_NETBK_MCAST_MAX)


def joined(ifname: str, path: Path = LIST) -> list[bytes]:
    """The addresses, of 6 bytes, at most `MOST`; none if nobody knows."""
    try:
        return parse(path.read_text(), ifname)[:MOST]
    except OSError:
        return []


def parse(text: str, ifname: str) -> list[bytes]:
    """Those of an interface in the text of /proc/net/dev_mcast (net/core/dev_addr_lists.c)."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 5 and fields[1] == ifname and len(fields[4]) == 12:
            found.append(bytes.fromhex(fields[4]))
    return found
