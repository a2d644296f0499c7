# SPDX-License-Identifier: BSD-2-Clause
"""Counters as people read them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront import figures
from pvfront.abi import BlkOpStats, BlkStats, lib

BUCKETS = lib.PVF_LATENCY_BUCKETS


def histogram(**counts: int) -> tuple[int, ...]:
    found = [0] * BUCKETS
    for name, count in counts.items():
        found[int(name[1:])] = count
    return tuple(found)


def queue(number: int = 0, **changed: Any) -> dict[str, Any]:
    plain = {name: 0 for name in BlkStats.__dataclass_fields__ if name not in figures.OPERATIONS}
    return asdict(BlkStats(**{**plain, "queue": number, **changed}))


def test_half_of_the_requests_are_not_slower_than_the_median() -> None:
    times = histogram(b3=50, b10=49, b20=1)
    assert figures.percentile(times, 0.5) == 3
    assert figures.percentile(times, 0.51) == 10
    assert figures.percentile(times, 0.99) == 10
    assert figures.percentile(times, 1.0) == 20
    assert figures.percentile(histogram(), 0.5) is None


@given(st.lists(st.integers(0, 1 << 40), min_size=BUCKETS, max_size=BUCKETS))
def test_percentiles_are_in_order_and_in_buckets_that_have_requests(counts: list[int]) -> None:
    found = [figures.percentile(counts, share) for share in (0.5, 0.99, 1.0)]
    if not sum(counts):
        assert found == [None] * 3
        return
    buckets = [bucket for bucket in found if bucket is not None]
    assert buckets == sorted(buckets)
    assert all(counts[bucket] for bucket in buckets)
    assert not sum(counts[buckets[-1] + 1 :])


@pytest.mark.parametrize(
    ("bucket", "text"),
    [(None, "-"), (0, "<2us"), (6, "<128us"), (9, "<1.02ms"), (20, "<2.1s"), (23, ">8.39s")],
)
def test_a_bucket_is_told_by_its_bound(bucket: int | None, text: str) -> None:
    assert figures.duration(bucket, 24) == text


def test_only_operations_that_were_used_have_a_row() -> None:
    rows = figures.request_rows(
        [
            queue(0, read=BlkOpStats(10, 40960, 0, 10, histogram(b5=9, b12=1))),
            queue(1, write=BlkOpStats(1, 1 << 20, 1, 16, histogram(b9=1))),
        ]
    )
    assert rows == [
        (0, "read", 10, "40 KiB", 0, 10, "<64us", "<8.19ms", "<8.19ms"),
        (1, "write", 1, "1 MiB", 1, 16, "<1.02ms", "<1.02ms", "<1.02ms"),
    ]
    assert all(len(row) == len(figures.REQUESTS) for row in rows)


def test_each_queue_has_a_row_of_what_it_cost() -> None:
    rows = figures.event_rows(
        [
            queue(
                1, segments=7, notifies=2, events=3, events_spurious=1, wakeups=4, in_flight=1,
                in_flight_peak=9, pool_pages=704, pool_free=700, pool_free_low=4, indirect=5,
            )
        ]
    )  # fmt: skip
    assert rows == [(1, 7, 5, 2, 3, 1, 4, 0, 0, "1/9", "4/700 of 704")]
    assert len(rows[0]) == len(figures.EVENTS)
