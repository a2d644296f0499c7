# SPDX-License-Identifier: BSD-2-Clause
"""How large a disk's rings are: what both ends can, what is wanted, what there is room for. Pure.

A `Shape` is the answer: queues, the size of each one's ring, and of its pool of granted pages.

* A ring of 2^order pages has 32 << order slots (__CONST_RING_SIZE of io/ring.h with the entries of
  io/blkif.h). A slot carries one request: 11 segments of a page, or with indirect descriptors up
  to 256, whose list takes one page more.
* So `slots * segments` pages could be in flight. More than the setting `max_pool_pages` are not
  granted: the default is what still makes a difference, and the most what blkback keeps mapped of
  one ring (max_persistent_grants).
* In less room, `fit` gives up first what costs least: pages above `POOL_GOOD` for each queue, then
  queues, then pages of the last one. With the pool the segments shrink, so that at least four of
  the largest requests fit into it at a time, and the ring, which has no more slots than the pool
  has pages.
* `POOL_LEAST` is one direct request. Below it there is no disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..abi import lib
from .features import DIRECT_SEGMENTS, RingLimits
from .settings import DiskSettings

SLOTS = lib.PVF_BLK_RING_SLOTS  # of a ring of one page
POOL_GOOD = SLOTS * DIRECT_SEGMENTS
POOL_LEAST = DIRECT_SEGMENTS
AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """`order` and `pool` (pages) are each queue's. `segments` above 11: indirect requests."""

    queues: int = 1
    order: int = 0
    pool: int = POOL_GOOD
    segments: int = DIRECT_SEGMENTS

    @property
    def ring_pages(self) -> int:
        """Of each queue."""
        return 1 << self.order

    @property
    def slots(self) -> int:
        """Of each queue."""
        return int(SLOTS << self.order)

    @property
    def pages(self) -> int:
        """All that is granted."""
        return self.queues * (self.ring_pages + self.pool)

    @property
    def indirect(self) -> bool:
        return self.segments > DIRECT_SEGMENTS

    def __str__(self) -> str:
        return (
            f"{self.queues} queue{'s' * (self.queues != 1)} of {self.slots} slots and {self.pool} "
            f"pages, {self.segments} segments"
        )


LEAST = Shape(pool=POOL_LEAST)


def wanted(limits: RingLimits, settings: DiskSettings, most_queues: int) -> Shape:
    """The shape for a backend with room for everything. `most_queues`: the target's and worker's.

    Indirect requests that carry no more than direct ones are not used. The setting `max_queues`
    has been applied to `most_queues`, which knows what suits the target.
    """
    segments = min(limits.max_indirect, settings.max_indirect_segments)
    if segments <= DIRECT_SEGMENTS:
        segments = DIRECT_SEGMENTS
    order = min(limits.max_ring_page_order, settings.max_ring_page_order)
    each = segments + (segments > DIRECT_SEGMENTS)
    return Shape(
        queues=max(1, min(limits.max_queues, most_queues)),
        order=order,
        pool=min((SLOTS << order) * each, settings.max_pool_pages),
        segments=segments,
    )


def fit(asked: Shape, pages: int) -> Shape:
    """The best shape of at most `pages` pages, but never less than `LEAST`, nor more than asked."""
    queues = asked.queues
    while queues > 1:
        pool = pages // queues - asked.ring_pages
        if pool >= min(asked.pool, POOL_GOOD):
            break
        queues //= 2
    else:
        pool = pages - asked.ring_pages
    order = asked.order
    # What a smaller ring sets free goes to the pool.
    while order and SLOTS << order > max(pool, 0):
        order -= 1
        pool = pages // queues - (1 << order)
    pool = min(max(pool, POOL_LEAST), asked.pool)
    return Shape(queues, order, pool, min(asked.segments, most_segments(pool)))


def most_segments(pool: int) -> int:
    """Segments of the largest request that a pool of so many pages is used for."""
    return max(DIRECT_SEGMENTS, pool // AT_A_TIME - 1)


def smaller(asked: Shape, begin: int | None = None) -> Iterator[Shape]:
    """Shapes to try one after the other, from `begin` pages (None: all) by halves to the least."""
    shape = asked if begin is None else fit(asked, begin)
    while True:
        yield shape
        if shape.pages <= LEAST.pages:
            return
        shape = fit(asked, max(shape.pages // 2, LEAST.pages))


def started(shape: Shape, limits: RingLimits, settings: DiskSettings) -> Shape:
    """The shape as it is used, with what the backend says at Connected.

    Rings and pools are made already; segments may be other than at InitWait, when some backends
    have not said anything yet, and the pool bounds them.
    """
    segments = wanted(limits, settings, 1).segments
    return replace(shape, segments=min(segments, most_segments(shape.pool)))
