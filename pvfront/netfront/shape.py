# SPDX-License-Identifier: BSD-2-Clause
"""How many queues and pages a vif has: what both ends can, and what there is room for. Pure.

* A queue has two rings of a page, 256 slots each (__CONST_RING_SIZE of io/ring.h with the entries
  of io/netif.h). RX has a page for each slot, so that the ring can be kept full. TX has a page for
  each slot and those of the packet that is read while all are out.
* In less room, `fit` takes what costs least first: pages above `GOOD` for each queue, then queues,
  then pages of the last one, half of them RX's.
* `LEAST` moves one packet of the largest size each way: netback gives a packet to a ring only when
  slots for all of it are there, 17 pages and its extra info.
* Where event channels run out, one of two for each queue is given up first, then queues.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .features import Offer

RING_PAGES = 2
SLOTS = 256
TX_SPARE = 32  # two packets of 16 pages
TX_LEAST, RX_LEAST = 18, 20
GOOD = 192  # pages of a queue's pools


@dataclass(frozen=True, slots=True)
class Shape:
    """`tx`, `rx`: pages of each queue's pools. `split`: each queue has two event channels."""

    queues: int = 1
    tx: int = SLOTS + TX_SPARE
    rx: int = SLOTS
    split: bool = False

    @property
    def pages(self) -> int:
        """All that is granted."""
        return self.queues * (RING_PAGES + self.tx + self.rx)

    @property
    def ports(self) -> int:
        return self.queues * (1 + self.split)

    def __str__(self) -> str:
        return (
            f"{self.queues} queue{'s' * (self.queues != 1)} of {self.tx} TX and {self.rx} RX pages"
            + ", two event channels each" * self.split
        )


LEAST = Shape(1, TX_LEAST, RX_LEAST)


def wanted(offer: Offer, most_queues: int, *, split: bool = True) -> Shape:
    """The shape for a backend with room for everything. `most_queues`: ours and the worker's;
    `split`: whether two event channels for each queue are wanted.

    Without scatter/gather a packet has one page.
    """
    return Shape(
        queues=max(1, min(offer.max_queues, most_queues)),
        tx=SLOTS + (TX_SPARE if offer.sg else 1),
        split=offer.split_event_channels and split,
    )


def fit(asked: Shape, pages: int) -> Shape:
    """The best shape of at most `pages` pages, but never less than `LEAST`, nor more than asked."""
    queues = asked.queues
    while queues > 1 and pages // queues < RING_PAGES + min(GOOD, asked.tx + asked.rx):
        queues //= 2
    pool = pages // queues - RING_PAGES
    rx = min(asked.rx, max(RX_LEAST, pool // 2))
    tx = min(asked.tx, max(TX_LEAST, pool - rx))
    return replace(asked, queues=queues, tx=tx, rx=rx)


def fewer_pages(asked: Shape, shape: Shape) -> Shape | None:
    """What to try when there was no room for the pages of `shape`: about half. None: no less."""
    if shape.pages <= LEAST.pages:
        return None
    smaller = fit(asked, max(shape.pages // 2, LEAST.pages))
    return replace(smaller, split=shape.split, queues=min(smaller.queues, shape.queues))


def fewer_ports(shape: Shape) -> Shape | None:
    """What to try when there were not enough event channels for `shape`. None: no fewer."""
    if shape.split:
        return replace(shape, split=False)
    if shape.queues > 1:
        return replace(shape, queues=shape.queues // 2)
    return None
