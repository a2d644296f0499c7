# SPDX-License-Identifier: BSD-2-Clause
"""How the backend spreads packets over our queues: a Toeplitz hash, set up over the control ring.

Without it a backend takes whatever queue it likes, Linux's one by a hash of its own. With it all
packets of a flow come on the queue that the table names for their hash, whichever end began the
flow, and the key is ours: nobody outside can choose addresses that all fall on one queue, because
it is random and of this connection only.

The order: the algorithm first, since Linux's netback answers nothing about hashes before it has
one; the kinds of packets last, so that no packet is spread before key and table are there. What
fails is taken back by the algorithm "none", which is what a backend begins with.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..abi import lib
from .control import DATA_BYTES, Control, ControlGone, Refused

KEY_BYTES = 40  # what Linux's netback takes at most: enough for a pair of IPv6 addresses and ports
TABLE = 128  # entries; Linux's netback takes no more
KINDS = {
    "ipv4": int(lib.XEN_NETIF_CTRL_HASH_TYPE_IPV4),
    "ipv4-tcp": int(lib.XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP),
    "ipv6": int(lib.XEN_NETIF_CTRL_HASH_TYPE_IPV6),
    "ipv6-tcp": int(lib.XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP),
}


@dataclass(frozen=True, slots=True)
class Hashing:
    """What the backend does: `kinds` of packets (of KINDS), `entries` of the table; 0: the hash
    modulo the queues.
    """

    kinds: tuple[str, ...]
    entries: int


def entries_for(most: int, queues: int) -> int:
    """Entries of the table for a backend that takes `most`: a power of two; 0: it is not used.

    A table with fewer entries than queues would leave queues empty.
    """
    most = min(most, TABLE, DATA_BYTES // 4)
    return 1 << (most.bit_length() - 1) if most >= queues else 0


def table(entries: int, queues: int) -> bytes:
    """The queue of each hash modulo `entries`, as SET_HASH_MAPPING wants it."""
    return struct.pack(f"={entries}I", *(entry % queues for entry in range(entries)))


async def set_up(
    control: Control, queues: int, *, random: Callable[[int], bytes] = os.urandom
) -> Hashing:
    """Raises Refused, ControlGone: packets then are spread as the backend likes."""
    ask = control.request
    toeplitz = lib.XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ
    await ask(lib.XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, toeplitz)
    try:
        offered = await ask(lib.XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS)
        kinds = tuple(name for name, bit in KINDS.items() if offered & bit)
        if not kinds:
            raise Refused(
                lib.XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS, lib.XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED
            )
        control.write(random(KEY_BYTES))
        await ask(lib.XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, control.data_ref, KEY_BYTES)
        most = await ask(lib.XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE)
        entries = entries_for(most, queues)
        await ask(lib.XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE, entries)
        if entries:
            control.write(table(entries, queues))
            await ask(lib.XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, control.data_ref, entries, 0)
        wanted = sum(KINDS[name] for name in kinds)
        await ask(lib.XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, wanted)
    except Refused:
        with contextlib.suppress(Refused, ControlGone):
            none = lib.XEN_NETIF_CTRL_HASH_ALGORITHM_NONE
            await ask(lib.XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, none)
        raise
    return Hashing(kinds, entries)
