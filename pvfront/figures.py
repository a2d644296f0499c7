# SPDX-License-Identifier: BSD-2-Clause
"""A worker's counters, made readable. Pure: numbers in, rows of text out.

Latencies come as a histogram (native/include/pvf_ctl.h): bucket i counts requests that took 2^i to
2^(i+1) microseconds. So what is shown is a bound: half of the requests took less than `p50`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DROPS = ("too_small", "too_large", "gso", "csum", "error", "truncated", "extra", "target")
"""Why a packet was not passed on: enum pvf_net_drop."""

OPERATIONS = ("read", "write", "flush", "discard")
REQUESTS = ("QUEUE", "OPERATION", "REQUESTS", "BYTES", "ERRORS", "ON THE RING", "P50", "P99", "MAX")
EVENTS = (
    *("QUEUE", "SEGMENTS", "INDIRECT", "NOTIFIES", "EVENTS", "SPURIOUS", "WAKE-UPS"),
    *("RING FULL", "POOL EMPTY", "RING NOW/PEAK", "POOL USED/PEAK"),
)


def percentile(histogram: Sequence[int], share: float) -> int | None:
    """The bucket that the request is in which `share` (0..1) of all are not slower than."""
    total = sum(histogram)
    seen = 0
    for bucket, count in enumerate(histogram):
        seen += count
        if count and seen >= share * total:
            return bucket
    return None


def duration(bucket: int | None, buckets: int) -> str:
    """The bound of a bucket: `<128us`, `<2.1s`; the last one has none: `>8.4s`."""
    if bucket is None:
        return "-"
    if bucket == buckets - 1:
        return ">" + time_text(1 << bucket)
    return "<" + time_text(1 << (bucket + 1))


def time_text(microseconds: int) -> str:
    if microseconds < 1000:
        return f"{microseconds}us"
    if microseconds < 1000_000:
        return f"{microseconds / 1000:.3g}ms"
    return f"{microseconds / 1000_000:.3g}s"


def amount(size: int) -> str:
    """`64 MiB`, `1.5 GiB`."""
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if number < 1024 or unit == "PiB":
            break
        number /= 1024
    return f"{number:.1f}".removesuffix(".0") + f" {unit}"


def request_rows(queues: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """Rows under `REQUESTS`, for each queue and operation that has been used."""
    rows = []
    for queue in queues:
        for name in OPERATIONS:
            op = queue[name]
            if not op["requests"] and not op["errors"]:
                continue
            times = op["latency"]
            bounds = (duration(percentile(times, share), len(times)) for share in (0.5, 0.99, 1.0))
            rows.append(
                (
                    *(queue["queue"], name, op["requests"], amount(op["bytes"])),
                    *(op["errors"], op["ring_requests"], *bounds),
                )
            )
    return rows


def event_rows(queues: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """Rows under `EVENTS`, one for each queue."""
    names = ("segments", "indirect", "notifies", "events", "events_spurious", "wakeups")
    rows = []
    for queue in queues:
        pool = queue["pool_pages"]
        rows.append(
            (
                queue["queue"],
                *(queue[name] for name in (*names, "ring_full", "pool_empty")),
                f"{queue['in_flight']}/{queue['in_flight_peak']}",
                f"{pool - queue['pool_free']}/{pool - queue['pool_free_low']} of {pool}",
            )
        )
    return rows


def net_rows(queues: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """A network's counters as `ethtool -S` has them: a name and a number each."""
    rows: list[tuple[str, int]] = []
    for queue in queues:
        head = f"queue_{queue['queue']}"
        for way in ("tx", "rx"):
            for name, value in queue[way].items():
                if name == "dropped":
                    rows += [
                        (f"{head}_{way}_dropped_{reason}", count)
                        for reason, count in zip(DROPS, value, strict=False)
                    ]
                else:
                    rows.append((f"{head}_{way}_{name}", value))
        rows += [
            (f"{head}_{name}", value)
            for name, value in queue.items()
            if name not in ("tx", "rx", "state", "generation", "queue", "queues")
        ]
    return rows
