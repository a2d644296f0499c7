# SPDX-License-Identifier: BSD-2-Clause
"""What devices do a second, of two samples of their counters. Pure.

A device, or a queue, that was not there before has no rates yet (None), nor has one whose counters
begin anew because its worker does. A worker that took over from another goes on with its counters
(upgrade.md): a new pid alone means nothing, a counter that has become less means a new beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import figures
from .counters import Sample

Figures = dict[str, Any]
"""The rates and levels of a device, or of one queue; of a rate None: nobody knows yet."""

_DISK_RATES = {
    "read_iops": lambda q: q["read"]["requests"],
    "write_iops": lambda q: q["write"]["requests"],
    "other_iops": lambda q: q["flush"]["requests"] + q["discard"]["requests"],
    "read_bytes_per_second": lambda q: q["read"]["bytes"],
    "write_bytes_per_second": lambda q: q["write"]["bytes"],
    "errors_per_second": lambda q: sum(q[op]["errors"] for op in figures.OPERATIONS),
    "notifies_per_second": lambda q: q["notifies"],
    "events_per_second": lambda q: q["events"],
}
_NET_RATES = {
    "tx_packets_per_second": lambda q: q["tx"]["packets"],
    "rx_packets_per_second": lambda q: q["rx"]["packets"],
    "tx_bits_per_second": lambda q: 8 * q["tx"]["bytes"],
    "rx_bits_per_second": lambda q: 8 * q["rx"]["bytes"],
    "tx_drops_per_second": lambda q: sum(q["tx"]["dropped"]),
    "rx_drops_per_second": lambda q: sum(q["rx"]["dropped"]),
    "notifies_per_second": lambda q: q["notifies"],
    "events_per_second": lambda q: q["events"],
}
_CONSOLE_RATES = {
    "in_bytes_per_second": lambda q: q["in_bytes"],
    "out_bytes_per_second": lambda q: q["out_bytes"],
    "notifies_per_second": lambda q: q["notifies"],
    "events_per_second": lambda q: q["events"],
}
_RATES: Mapping[str, Mapping[str, Any]] = {
    "vbd": _DISK_RATES,
    "vif": _NET_RATES,
    "console": _CONSOLE_RATES,
}
_LEVELS: Mapping[str, Mapping[str, str]] = {
    "vbd": {"in_flight": "in_flight"},
    "vif": {"in_flight": "tx_in_flight"},
    "console": {"in_flight": "unsent", "undelivered_bytes": "undelivered"},
}
"""What they are called here, and in a queue's page. In flight are requests, slots, bytes."""


def rates(before: Iterable[Sample], after: Iterable[Sample]) -> list[Figures]:
    """Of each device in `after`: what it is, its figures, and those of each queue ("queues")."""
    known = {one.bus_name: one for one in before}
    return [_device(known.get(one.bus_name), one) for one in after]


def _device(before: Sample | None, after: Sample) -> Figures:
    then = {queue["queue"]: queue for queue in (before.queues if before else None) or ()}
    now = after.queues or ()
    seconds = after.at - before.at if before is not None else 0.0
    if seconds <= 0 or any(
        _began_anew(then[queue["queue"]], queue) for queue in now if queue["queue"] in then
    ):
        then = {}
    queues = [_queue(after.klass, then.get(queue["queue"]), queue, seconds) for queue in now]
    return {
        "class": after.klass,
        "id": after.id,
        "name": after.name,
        "os_device": after.os_device,
        "phase": after.phase,
        "generation": after.generation,
        "worker_pid": after.pid,
        "cpu_percent": _cpu(before, after, seconds),
        **_whole(after.klass, [then[q["queue"]] for q in now if q["queue"] in then], now, queues),
        "queues": queues,
    }


def _began_anew(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether one of the counters that only grow has become less."""
    return any(after[key] < before[key] for key in ("notifies", "events", "wakeups"))


def _cpu(before: Sample | None, after: Sample, seconds: float) -> float | None:
    """Of one processor: 200 is two of them."""
    if before is None or before.cpu is None or after.cpu is None or seconds <= 0:
        return None
    if (before.pid, before.started) != (after.pid, after.started):
        return None
    return max(0.0, 100 * (after.cpu - before.cpu) / seconds)


def _queue(
    klass: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float
) -> Figures:
    levels = {name: after[key] for name, key in _LEVELS[klass].items()}
    found: Figures = {"queue": after["queue"], **levels}
    for name, counter in _RATES[klass].items():
        grown = None if before is None else counter(after) - counter(before)
        found[name] = None if grown is None else max(0.0, grown / seconds)
    if klass == "vbd":
        found |= _latency([] if before is None else [before], [after])
    return found


def _whole(
    klass: str,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    queues: Sequence[Figures],
) -> Figures:
    """Of all queues together. One that is new has nothing to add yet."""
    found: Figures = {name: sum(queue[name] for queue in queues) for name in _LEVELS[klass]}
    for name in _RATES[klass]:
        known = [queue[name] for queue in queues if queue[name] is not None]
        found[name] = sum(known) if known else None
    if klass == "vbd":
        there = {queue["queue"] for queue in before}
        found |= _latency(before, [queue for queue in after if queue["queue"] in there])
    return found


def _latency(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Figures:
    """Bounds that half, and 99 %, of the requests of this time stayed below; None: there were none.

    In microseconds; of the slowest bucket, which has no bound, what all in it took at least.
    """
    ended = _histogram(after)
    grown = [max(0, new - old) for new, old in zip(ended, _histogram(before), strict=False)]
    return {
        f"latency_p{name}_us": bound(figures.percentile(grown, share), len(grown))
        for name, share in (("50", 0.5), ("99", 0.99))
    }


def _histogram(queues: Sequence[Mapping[str, Any]]) -> list[int]:
    columns = [queue[op]["latency"] for queue in queues for op in figures.OPERATIONS]
    return [sum(column) for column in zip(*columns, strict=True)]


def bound(bucket: int | None, buckets: int) -> int | None:
    """The bound of a bucket in microseconds (figures.py)."""
    if bucket is None:
        return None
    return 1 << (bucket if bucket == buckets - 1 else bucket + 1)
