# SPDX-License-Identifier: BSD-2-Clause
"""Rates from two looks at counters: `pvfront top`'s numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import BUCKETS, console, console_queue, disk, disk_queue, net_queue, op, vif

from pvfront.rates import bound, rates


def test_a_disk_s_rates_are_what_its_counters_grew_by_a_second() -> None:
    before = disk(10.0, disk_queue(read=op(100, 1000), write=op(5), notifies=7), cpu=1.0, pid=9)
    after = disk(
        12.0,
        disk_queue(read=op(300, 9000, 4), write=op(5), flush=op(6), notifies=17, in_flight=3),
        cpu=1.5,
        pid=9,
    )
    (found,) = rates([before], [after])
    assert found["name"] == "xvdb"
    assert (found["read_iops"], found["write_iops"], found["other_iops"]) == (100, 0, 3)
    assert found["read_bytes_per_second"] == 4000
    assert (found["errors_per_second"], found["notifies_per_second"]) == (2, 5)
    assert (found["in_flight"], found["cpu_percent"]) == (3, 25)
    assert found["queues"][0]["read_iops"] == 100


def test_a_network_s_rates_are_packets_bits_and_drops_each_way() -> None:
    before = vif(0.0, net_queue(tx={"packets": 5, "bytes": 100}))
    after = vif(
        0.5,
        net_queue(
            tx={"packets": 15, "bytes": 1100, "dropped": [0, 1, 0, 0, 2, 0, 0, 0]},
            rx={"packets": 4},
            tx_in_flight=2,
        ),
    )
    (found,) = rates([before], [after])
    assert (found["tx_packets_per_second"], found["rx_packets_per_second"]) == (20, 8)
    assert (found["tx_bits_per_second"], found["tx_drops_per_second"]) == (16000, 6)
    assert (found["rx_drops_per_second"], found["in_flight"]) == (0, 2)


def test_a_console_s_rates_are_bytes_each_way_and_what_nobody_has_read() -> None:
    before = console(0, console_queue(in_bytes=5))
    after = console(2, console_queue(in_bytes=25, out_bytes=8, unsent=3, undelivered=4))
    (found,) = rates([before], [after])
    assert found["name"] == "org.example.chan1"
    assert (found["in_bytes_per_second"], found["out_bytes_per_second"]) == (10, 4)
    assert (found["in_flight"], found["undelivered_bytes"]) == (3, 4)


def test_queues_are_told_one_by_one_and_together() -> None:
    before = disk(0, disk_queue(0, read=op(10)), disk_queue(1, read=op(0)))
    after = disk(1, disk_queue(0, read=op(15)), disk_queue(1, read=op(2)), disk_queue(2))
    (found,) = rates([before], [after])
    assert [queue["read_iops"] for queue in found["queues"]] == [5, 2, None]
    assert found["read_iops"] == 7


def test_latency_is_that_of_the_interval_not_of_the_life() -> None:
    before = disk(0, disk_queue(read=op(1000, b20=1000)))
    after = disk(1, disk_queue(read=op(1100, b20=1001, b4=99)))
    (found,) = rates([before], [after])
    assert (found["latency_p50_us"], found["latency_p99_us"]) == (32, 32)
    assert rates([after], [after])[0]["latency_p50_us"] is None


def test_a_device_that_has_come_has_no_rates_yet_and_one_that_has_gone_is_gone() -> None:
    (found,) = rates([vif(0, net_queue())], [disk(1, disk_queue(read=op(5), in_flight=2))])
    assert found["class"] == "vbd"
    assert (found["read_iops"], found["cpu_percent"], found["latency_p50_us"]) == (None, None, None)
    assert found["in_flight"] == 2
    assert rates([disk(0)], []) == []


def test_counters_that_begin_anew_give_no_rates_once() -> None:
    before = disk(0, disk_queue(0, read=op(100), wakeups=50), disk_queue(1, wakeups=1), pid=1)
    after = disk(1, disk_queue(0, read=op(150), wakeups=3), disk_queue(1, wakeups=2), pid=2)
    (found,) = rates([before], [after])
    assert found["read_iops"] is None
    assert [queue["read_iops"] for queue in found["queues"]] == [None, None]


def test_a_worker_that_took_over_goes_on_with_its_counters_but_not_with_its_cpu_time() -> None:
    before = disk(0, disk_queue(read=op(100), wakeups=5), pid=1, started=1, cpu=9.0)
    after = disk(1, disk_queue(read=op(150), wakeups=9), pid=2, started=2, cpu=0.1)
    (found,) = rates([before], [after])
    assert (found["read_iops"], found["cpu_percent"]) == (50, None)


def test_a_device_whose_counters_cannot_be_read_is_told_all_the_same() -> None:
    (found,) = rates([disk(0, queues=None)], [disk(1, queues=None)])
    assert (found["name"], found["read_iops"], found["queues"]) == ("xvdb", None, [])


@pytest.mark.parametrize(
    ("bucket", "found"), [(None, None), (0, 2), (3, 16), (BUCKETS - 1, 1 << (BUCKETS - 1))]
)
def test_the_slowest_bucket_has_no_upper_bound(bucket: int | None, found: int | None) -> None:
    assert bound(bucket, BUCKETS) == found


COUNTS = st.integers(0, 2**64 - 1)
QUEUES = st.lists(
    st.builds(
        lambda number, requests, size, wakeups: disk_queue(
            number, read=op(requests, size, b5=requests), wakeups=wakeups, notifies=wakeups
        ),
        st.integers(0, 15), COUNTS, COUNTS, COUNTS,
    ),
    max_size=3,
    unique_by=lambda queue: queue["queue"],
)  # fmt: skip


@given(QUEUES, QUEUES, st.floats(-1, 10))
def test_whatever_the_counters_no_rate_is_negative_or_infinite(
    old: list[dict[str, Any]], new: list[dict[str, Any]], seconds: float
) -> None:
    (found,) = rates([disk(5, *old, cpu=3.0)], [disk(5 + seconds, *new, cpu=2.0)])
    for figures in (found, *found["queues"]):
        for name, value in figures.items():
            if isinstance(value, float):
                assert value >= 0, name
                assert math.isfinite(value), name
