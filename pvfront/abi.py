# SPDX-License-Identifier: BSD-2-Clause
"""The structures shared with C: the control protocol, the statistics page, the ring.

``ffi`` and ``lib`` come from the compiled extension, which takes every layout from the C headers
(native/abi_build.py). The ring functions serve a network's control ring (netfront/control.py), and
tests against an independent model; the data path never runs in Python.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, field
from typing import Any

from pvfront._abi import ffi, lib

__all__ = [
    "BlkOpStats",
    "BlkStats",
    "StatsUnreadable",
    "ffi",
    "lib",
    "read_all_stats",
    "read_stats",
]


class StatsUnreadable(ValueError):
    """The page is no statistics page of this build, or its writer died while writing."""


@dataclass(frozen=True, slots=True)
class BlkOpStats:
    """struct pvf_blk_op_stats. `latency`: requests that took [2^i, 2^(i+1)) us, see there."""

    requests: int = 0
    bytes: int = 0
    errors: int = 0
    ring_requests: int = 0
    latency: tuple[int, ...] = (0,) * lib.PVF_LATENCY_BUCKETS


@dataclass(frozen=True, slots=True)
class BlkStats:
    """struct pvf_blk_stats: a consistent copy of one queue's. Counters only grow over a worker's
    life.
    """

    state: int
    generation: int
    in_flight: int
    in_flight_peak: int
    pool_pages: int
    pool_free: int
    pool_free_low: int
    ring_slots: int
    nbd_pending: int
    queue: int
    queues: int
    segments: int
    indirect: int
    notifies: int
    events: int
    events_spurious: int
    polled: int
    watchdog_hits: int
    wakeups: int
    ring_full: int
    pool_empty: int
    target_blocked: int
    rejected: int
    read: BlkOpStats = field(default_factory=BlkOpStats)
    write: BlkOpStats = field(default_factory=BlkOpStats)
    flush: BlkOpStats = field(default_factory=BlkOpStats)
    discard: BlkOpStats = field(default_factory=BlkOpStats)


_OPS = ("read", "write", "flush", "discard")
_PLAIN = tuple(n for n in BlkStats.__dataclass_fields__ if n not in _OPS)


def read_all_stats(fd: int) -> list[BlkStats]:
    """A snapshot of each queue the worker was started with, as read_stats()."""
    return [read_stats(fd, queue) for queue in range(os.fstat(fd).st_size // lib.PVF_PAGE_SIZE)]


def read_stats(fd: int, queue: int = 0, *, attempts: int = 1000) -> BlkStats:
    """A consistent snapshot of a queue's page in the statistics memfd that HELLO carried.

    Raises StatsUnreadable for another magic or version, or if no quiet moment was found (a writer
    that was killed inside an update leaves the sequence odd for ever), OSError if it cannot be
    mapped.
    """
    s = _page(fd, "struct pvf_blk_stats", queue, attempts)
    values: dict[str, Any] = {name: int(getattr(s, name)) for name in _PLAIN}
    for name in _OPS:
        op = getattr(s, name)
        values[name] = BlkOpStats(
            int(op.requests),
            int(op.bytes),
            int(op.errors),
            int(op.ring_requests),
            tuple(op.latency),
        )
    return BlkStats(**values)


def read_all_net_stats(fd: int) -> list[dict[str, Any]]:
    """The same of a network's worker: each queue's counters, named as in struct pvf_net_stats."""
    pages = os.fstat(fd).st_size // lib.PVF_PAGE_SIZE
    return [_plain(_page(fd, "struct pvf_net_stats", queue, 1000)) for queue in range(pages)]


def read_all_cons_stats(fd: int) -> list[dict[str, Any]]:
    """The same of a console's: struct pvf_cons_stats."""
    pages = os.fstat(fd).st_size // lib.PVF_PAGE_SIZE
    return [_plain(_page(fd, "struct pvf_cons_stats", queue, 1000)) for queue in range(pages)]


def _plain(struct: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    kind = ffi.typeof(struct)
    for name, member in (kind.item if kind.kind == "pointer" else kind).fields:
        value = getattr(struct, name)
        match member.type.kind:
            case "struct":
                values[name] = _plain(value)
            case "array":
                values[name] = [int(one) for one in value]
            case _:
                values[name] = int(value)
    return values


def _page(fd: int, kind: str, queue: int, attempts: int) -> Any:
    size, offset = ffi.sizeof(kind), queue * lib.PVF_PAGE_SIZE
    if os.fstat(fd).st_size < offset + lib.PVF_PAGE_SIZE:
        raise StatsUnreadable(f"the statistics have no page of queue {queue}")
    with mmap.mmap(fd, lib.PVF_PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as page:
        for attempt in range(attempts):
            before = page[8:12]
            copy = page[:size]
            if before == page[8:12] and not before[0] & 1:
                break
            if attempt > 100:
                time.sleep(0.0001)
        else:
            raise StatsUnreadable("the statistics never stood still: did the worker die?")
    s = ffi.new(f"{kind} *")
    ffi.memmove(s, copy, size)
    if (s.magic, s.version) != (lib.PVF_STATS_MAGIC, lib.PVF_STATS_VERSION):
        raise StatsUnreadable("not a statistics page of this version of pvfront")
    return s
