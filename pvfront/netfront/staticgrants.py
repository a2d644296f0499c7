# SPDX-License-Identifier: BSD-2-Clause
"""Pages of ours that the backend keeps mapped: static grants, over the control ring (io/netif.h).

Without them a backend maps or copies each page of each packet by a call of the hypervisor. Our
pools are granted for the whole connection as it is, so a backend that can keep mappings is given
their references once; the data path does not change. Whether it can only its answer to
GET_GREF_MAPPING_SIZE tells: there is no key for it. Linux's netback cannot.

A pool that is larger than what the backend keeps is given in part, of both ways alike: the backend
takes the other pages as ever. Nothing of ours is made weaker that the grant had not given away:
docs/security.md says what remains of rules 17 and 18.

Taken back while the rings are at rest, before Closing. What a backend does not give back then it
must at Closed; if it never does, the pages are freed all the same and the kernel keeps those that
are still mapped (gntalloc.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..abi import ffi, lib
from .control import DATA_BYTES, Control, Refused

ENTRY = int(ffi.sizeof("struct xen_netif_gref"))
PER_MESSAGE = DATA_BYTES // ENTRY
READ_ONLY = int(lib.XEN_NETIF_CTRLF_GREF_readonly)


@dataclass(frozen=True, slots=True)
class Reference:
    """A page of a pool."""

    ref: int
    read_only: bool


@dataclass(slots=True)
class StaticGrants:
    """What the backend keeps mapped of each queue, by its number."""

    given: dict[int, list[Reference]] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        return sum(map(len, self.given.values()))

    async def give(self, control: Control, queue: int, tx: Sequence[int], rx: Sequence[int]) -> int:
        """Offers the pools of a queue, `tx` read-only; returns how many pages are mapped.

        A queue that was given is not given again. Raises Refused (`unsupported`: there is no such
        thing), ControlGone; what was given until then stays given.
        """
        if queue in self.given:
            return len(self.given[queue])
        most = await control.request(lib.XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE, queue)
        if not most:
            raise Refused(
                lib.XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE,
                lib.XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED,
            )
        given: list[Reference] = []
        for part in _parts(chosen(tx, rx, most)):
            control.write(listed(part))
            await control.request(
                lib.XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING, queue, control.data_ref, len(part)
            )
            given += part
            self.given[queue] = given
        return len(given)

    async def take_back(self, control: Control, *, within: float) -> int:
        """Has everything unmapped; returns how many pages the backend says it has not let go of.

        `within`: seconds for each message. Raises Refused, ControlGone.
        """
        kept = 0
        while self.given:
            queue, given = next(iter(self.given.items()))
            part = given[:PER_MESSAGE]
            control.write(listed(part))
            del given[: len(part)]  # not asked for twice, whatever the answer
            if not given:
                del self.given[queue]
            gone = await control.request(
                lib.XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING,
                queue,
                control.data_ref,
                len(part),
                within=within,
            )
            failed = sum(map(bool, statuses(control.read(len(part) * ENTRY))))
            kept += max(failed, len(part) - min(gone, len(part)))
        return kept


def chosen(tx: Sequence[int], rx: Sequence[int], most: int) -> list[Reference]:
    """At most `most` pages of both pools, each in proportion to its size."""
    total = len(tx) + len(rx)
    most = min(most, total)
    of_tx = len(tx) * most // total
    return [Reference(ref, True) for ref in tx[:of_tx]] + [
        Reference(ref, False) for ref in rx[: most - of_tx]
    ]


def listed(references: Sequence[Reference]) -> bytes:
    """An array of struct xen_netif_gref."""
    entries = [(one.ref, READ_ONLY if one.read_only else 0, 0) for one in references]
    return bytes(ffi.buffer(ffi.new("struct xen_netif_gref[]", entries)))


def statuses(data: bytes) -> list[int]:
    """What the backend says of each entry of such an array."""
    return [int(one.status) for one in ffi.from_buffer("struct xen_netif_gref[]", data)]


def _parts(references: Sequence[Reference]) -> Iterator[list[Reference]]:
    for start in range(0, len(references), PER_MESSAGE):
        yield list(references[start : start + PER_MESSAGE])
