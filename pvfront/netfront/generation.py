# SPDX-License-Identifier: BSD-2-Clause
"""What one generation of a vif holds: for each queue event channels, rings and pools of pages.

They are opened here, handed to the worker, and closed here again, which frees nothing that the
worker has. Each port has a descriptor of its own: notifying and unmasking take a lock of the
descriptor (drivers/xen/evtchn.c), and queues are threads of their own.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import PvfrontError
from ..evtchn import EventChannels
from ..gntalloc import GrantAllocator, GrantPool, GrantsExhausted
from ..platform import Source
from .features import QueueKeys
from .shape import RING_PAGES, Shape, fewer_pages, fewer_ports


class PortsExhausted(PvfrontError):
    """The domain has no event channel left."""

    def __init__(self) -> None:
        super().__init__(
            "no event channel is left in this domain",
            hint="max_event_channels in the domain's xl configuration says how many it has",
        )


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue: its port, RX's own one if there are two, and its pages."""

    channels: EventChannels
    port: int
    rx_channels: EventChannels | None
    rx_port: int  # 0: `port` is of both rings
    grants: GrantAllocator
    ring: GrantPool
    tx: GrantPool
    rx: GrantPool

    @property
    def pool_refs(self) -> tuple[int, ...]:
        """TX's first."""
        return (*self.tx.grefs, *self.rx.grefs)

    @property
    def keys(self) -> QueueKeys:
        return QueueKeys(self.ring.grefs[0], self.ring.grefs[1], self.port, self.rx_port or None)

    @property
    def first_refs(self) -> list[int]:
        """The first reference of what was granted at once, each time."""
        return [pool.grefs[0] for pool in (self.ring, self.tx, self.rx)]

    @property
    def ports(self) -> list[int]:
        return [self.port] if self.rx_channels is None else [self.port, self.rx_port]

    def hand_over(self) -> tuple[int, ...]:
        """The descriptors that give all of it to another process: event channel, grants, and RX's
        event channel.
        """
        fds = self.channels.hand_over(self.port), self.grants.hand_over()
        if self.rx_channels is None:
            return fds
        return (*fds, self.rx_channels.hand_over(self.rx_port))


@dataclass(frozen=True, slots=True)
class Opened:
    """`refused`: what there was no room for before, in order."""

    shape: Shape
    queues: Sequence[Queue]
    refused: Sequence[PvfrontError]


@contextlib.contextmanager
def opened(source: Source, domid: int, asked: Shape, first: Shape) -> Iterator[Opened]:
    """The largest shape that there is room for, towards domain `domid`, beginning with `first`.

    Raises GrantsExhausted, PortsExhausted if there is room for none.
    """
    refused: list[PvfrontError] = []
    shape: Shape | None = first
    while shape is not None:
        with contextlib.ExitStack() as stack:
            try:
                queues = [_open(stack, source, domid, shape) for _ in range(shape.queues)]
            except GrantsExhausted as error:
                refused.append(error)
                shape = fewer_pages(asked, shape)
                continue
            except PortsExhausted as error:
                refused.append(error)
                shape = fewer_ports(shape)
                continue
            yield Opened(shape, queues, refused)
            return
    raise refused[-1]


def _open(stack: contextlib.ExitStack, source: Source, domid: int, shape: Shape) -> Queue:
    channels, port = _bound(stack, source, domid)
    rx_channels, rx_port = _bound(stack, source, domid) if shape.split else (None, 0)
    grants = stack.enter_context(source.grant_allocator())
    # The worker maps them as two runs: the rings, and both pools.
    ring = grants.alloc(domid, RING_PAGES)
    tx = grants.alloc(domid, shape.tx, writable=False)
    rx = grants.alloc(domid, shape.rx)
    return Queue(channels, port, rx_channels, rx_port, grants, ring, tx, rx)


def _bound(stack: contextlib.ExitStack, source: Source, domid: int) -> tuple[EventChannels, int]:
    channels = stack.enter_context(source.event_channels())
    try:
        return channels, channels.bind_unbound(domid)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PortsExhausted from error
        raise
