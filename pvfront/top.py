# SPDX-License-Identifier: BSD-2-Clause
"""What `pvfront top` shows: rates from look to look, the columns they go into. No output here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import figures
from .counters import Sample, sample
from .platform import Platform, platform
from .rates import rates

GAP = 2  # spaces between columns


class Follower:
    """Each look tells what devices did since the one before."""

    def __init__(
        self,
        on: Platform | None = None,
        *,
        take: Callable[[Platform], list[Sample]] = sample,
    ) -> None:
        """`on`: None is ours. `take`: how counters are had."""
        self._on = on or platform()
        self._take = take
        self._at = time.monotonic()
        self._before = take(self._on)

    def look(self) -> dict[str, Any]:
        """ "time" (seconds since 1970), "interval" (seconds), and "devices" (rates.py)."""
        after, now = self._take(self._on), time.monotonic()
        found = {
            "time": time.time(),
            "interval": now - self._at,
            "devices": rates(self._before, after),
        }
        self._before, self._at = after, now
        return found


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _scaled(divisor: float, digits: int) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else f"{value / divisor:.{digits}f}"


def _time(microseconds: float | None) -> str:
    return "-" if microseconds is None else "<" + figures.time_text(int(microseconds))


@dataclass(frozen=True, slots=True)
class Column:
    """`rank`: those of the highest are left out first where there is no room."""

    header: str
    key: str
    text: Callable[[Any], str]
    rank: int = 0
    right: bool = True


def _word(value: Any) -> str:
    return "" if value is None else str(value)


_LAST = (
    Column("NOTIFY/S", "notifies_per_second", _count, 6),
    Column("CPU%", "cpu_percent", _count, 1),
    Column("STATE", "phase", _word, 3, right=False),
)
COLUMNS: Mapping[str, Sequence[Column]] = {
    "vbd": (
        Column("DISK", "name", _word, right=False),
        Column("QUEUE", "queue", _word, 2, right=False),
        Column("READ/S", "read_iops", _count),
        Column("WRITE/S", "write_iops", _count),
        Column("OTHER/S", "other_iops", _count, 8),
        Column("READ MB/S", "read_bytes_per_second", _scaled(1e6, 1)),
        Column("WRITE MB/S", "write_bytes_per_second", _scaled(1e6, 1)),
        Column("IN FLIGHT", "in_flight", _count, 2),
        Column("P50", "latency_p50_us", _time, 5),
        Column("P99", "latency_p99_us", _time, 4),
        Column("ERROR/S", "errors_per_second", _count, 7),
        *_LAST,
    ),
    "vif": (
        Column("NETWORK", "name", _word, right=False),
        Column("QUEUE", "queue", _word, 2, right=False),
        Column("TX PKT/S", "tx_packets_per_second", _count),
        Column("RX PKT/S", "rx_packets_per_second", _count),
        Column("TX GBIT/S", "tx_bits_per_second", _scaled(1e9, 3)),
        Column("RX GBIT/S", "rx_bits_per_second", _scaled(1e9, 3)),
        Column("IN FLIGHT", "in_flight", _count, 5),
        Column("TX DROP/S", "tx_drops_per_second", _count, 4),
        Column("RX DROP/S", "rx_drops_per_second", _count, 4),
        *_LAST,
    ),
    "console": (
        Column("CONSOLE", "name", _word, right=False),
        Column("IN B/S", "in_bytes_per_second", _count),
        Column("OUT B/S", "out_bytes_per_second", _count),
        Column("UNSENT", "in_flight", _count, 4),
        Column("UNDELIVERED", "undelivered_bytes", _count, 5),
        *_LAST,
    ),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Of one class of devices."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


def tables(found: Mapping[str, Any], width: int | None = None) -> list[Table]:
    """What a look has found, for each class a table that fits into `width` characters.

    A device with several queues has a row for each below its own. Text is as it is: who shows it
    has to escape it.
    """
    made = []
    for klass, columns in COLUMNS.items():
        lines: list[Mapping[str, Any]] = []
        for device in found["devices"]:
            if device["class"] == klass:
                queues = device["queues"] if len(device["queues"]) > 1 else ()
                whole = {**device, "queue": "all"}
                lines += [whole, *({"name": device["name"], **queue} for queue in queues)]
        if lines:
            made.append(_table(columns, lines, width))
    return made


def _table(
    columns: Sequence[Column], lines: Sequence[Mapping[str, Any]], width: int | None
) -> Table:
    cells = {
        column: [column.text(line[column.key]) if column.key in line else "" for line in lines]
        for column in columns
    }
    widths = {column: max(len(column.header), *map(len, cells[column])) for column in columns}
    kept = fitting(columns, widths, width)
    return Table(kept, [[cells[column][row] for column in kept] for row in range(len(lines))])


def fitting(
    columns: Sequence[Column], widths: Mapping[Column, int], width: int | None
) -> list[Column]:
    """The columns that there is room for, the least important left out; those of rank 0 stay."""
    kept = list(columns)
    while width is not None and sum(widths[column] + GAP for column in kept) - GAP > width:
        least = max(kept, key=lambda column: column.rank)
        if not least.rank:
            break
        kept.remove(least)
    return kept
