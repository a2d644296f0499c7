# SPDX-License-Identifier: BSD-2-Clause
"""What one generation of a disk holds: an event channel and a pool of granted pages per queue.

They are opened here, handed to the worker, and closed here again, which frees nothing that the
worker has. Each queue has descriptors of its own: notifying and unmasking take a lock of the
descriptor (drivers/xen/evtchn.c), and queues are threads of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..abi import lib
from ..evtchn import EventChannels
from ..gntalloc import GrantAllocator, GrantPool, GrantsExhausted
from ..platform import Source
from .rings import Shape


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue's port, and its pages: those of the ring first, then the pool's."""

    channels: EventChannels
    port: int
    grants: GrantAllocator
    pages: GrantPool
    ring_pages: int

    @property
    def ring_refs(self) -> Sequence[int]:
        return self.pages.grefs[: self.ring_pages]

    @property
    def pool_refs(self) -> Sequence[int]:
        return self.pages.grefs[self.ring_pages :]

    @property
    def ring_offset(self) -> int:
        return self.pages.offset

    @property
    def pool_offset(self) -> int:
        """Bytes within the descriptor of gntalloc."""
        return self.pages.offset + self.ring_pages * int(lib.PVF_PAGE_SIZE)

    def hand_over(self) -> tuple[int, int]:
        """The descriptors that give both to another process."""
        return self.channels.hand_over(self.port), self.grants.hand_over()


@dataclass(frozen=True, slots=True)
class Opened:
    """`refused`: what there was no room for before, in order."""

    shape: Shape
    queues: Sequence[Queue]
    refused: Sequence[GrantsExhausted]


@contextlib.contextmanager
def opened(source: Source, domid: int, shapes: Iterable[Shape]) -> Iterator[Opened]:
    """The first of `shapes` that there is room for, towards domain `domid`.

    Raises GrantsExhausted of the last one if there is room for none.
    """
    refused: list[GrantsExhausted] = []
    for shape in shapes:
        with contextlib.ExitStack() as stack:
            try:
                queues = [_open(stack, source, domid, shape) for _ in range(shape.queues)]
            except GrantsExhausted as error:
                refused.append(error)
                continue
            yield Opened(shape, queues, refused)
            return
    raise refused[-1]


def _open(stack: contextlib.ExitStack, source: Source, domid: int, shape: Shape) -> Queue:
    channels = stack.enter_context(source.event_channels())
    port = channels.bind_unbound(domid)
    grants = stack.enter_context(source.grant_allocator())
    pages = grants.alloc(domid, shape.ring_pages + shape.pool)
    return Queue(channels, port, grants, pages, shape.ring_pages)
