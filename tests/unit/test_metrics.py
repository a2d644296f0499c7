# SPDX-License-Identifier: BSD-2-Clause
"""Metrics as text, read by the parsers of who defined the formats."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from samples import console, console_queue, disk, disk_queue, net_queue, op, vif

from pvfront import __version__, metrics
from pvfront.counters import Sample
from pvfront.metrics import OPENMETRICS, Devices, buckets, label, write_textfile
from pvfront.metricsserver import answer
from pvfront.platform import Embedded
from pvfront.questions import answering


def text(*samples: Sample, **more: Any) -> str:
    return openmetrics.generate_latest(Devices(samples, **more)).decode()


def families(*samples: Sample, **more: Any) -> dict[str, Metric]:
    return {family.name: family for family in parse(text(*samples, **more))}


def value(family: Metric, suffix: str = "", **labels: str) -> float:
    (found,) = [
        sample.value
        for sample in family.samples
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
    ]
    return float(found)


DISK = disk(
    0,
    disk_queue(0, read=op(10, 40960, 1, b3=9, b23=1), notifies=5, in_flight=3),
    disk_queue(1, write=op(2)),
    cpu=1.25,
    generation=4,
    reconnects=3,
    os_device="/dev/nbd0",
)
VIF = vif(0, net_queue(0, tx={"packets": 7, "dropped": [0, 0, 0, 5, 0, 0, 0, 0]}, groups=3))


def test_every_device_and_queue_has_its_counters() -> None:
    found = families(DISK, VIF)
    of = {"device": "xvdb", "queue": "0", "operation": "read"}
    assert value(found["pvfront_vbd_requests"], "_total", **of) == 10
    assert value(found["pvfront_vbd_data_bytes"], "_total", **of) == 40960
    assert value(found["pvfront_vbd_errors"], "_total", **of) == 1
    of = {"device": "xvdb", "queue": "1", "operation": "write"}
    assert value(found["pvfront_vbd_requests"], "_total", **of) == 2
    assert value(found["pvfront_vbd_in_flight"], device="xvdb", queue="0") == 3
    assert value(found["pvfront_notifications"], "_total", device="xvdb", queue="0") == 5
    of = {"device": "vif0", "queue": "0", "direction": "tx"}
    assert value(found["pvfront_vif_packets"], "_total", **of) == 7
    assert value(found["pvfront_vif_dropped_packets"], "_total", **of, reason="csum") == 5
    assert value(found["pvfront_vif_multicast_groups"], device="vif0") == 3
    found = families(console(0, console_queue(in_bytes=9, unsent=2)))
    of = {"device": "org.example.chan1", "queue": "0"}
    assert value(found["pvfront_console_in_bytes"], "_total", **of) == 9
    assert value(found["pvfront_console_unsent_bytes"], **of) == 2


def test_a_device_has_its_state_and_its_worker_s_time() -> None:
    found = families(DISK, vif(0, queues=None, phase="reconnecting", os_device="enX0"))
    assert value(found["pvfront_device"], "_info", device="xvdb", os_device="/dev/nbd0", id="51728")
    assert value(found["pvfront_device_connected"], device="xvdb") == 1
    assert value(found["pvfront_device_connected"], device="vif0") == 0
    assert value(found["pvfront_worker_up"], device="vif0") == 0
    assert value(found["pvfront_device_generation"], device="xvdb") == 4
    assert value(found["pvfront_device_reconnects"], "_total", device="xvdb") == 3
    assert value(found["pvfront_worker_cpu_seconds"], "_total", device="xvdb") == 1.25
    assert not any(
        s.labels["device"] == "vif0" for s in found["pvfront_worker_cpu_seconds"].samples
    )


def test_types_and_units_are_those_of_openmetrics() -> None:
    found = families(DISK, VIF, services={"vbd": True, "vif": False}, limit=16384)
    assert found["pvfront_vbd_data_bytes"].unit == "bytes"
    assert found["pvfront_worker_cpu_seconds"].unit == "seconds"
    assert found["pvfront_vbd_latency_seconds"].type == "histogram"
    assert found["pvfront_device"].type == found["pvfront_build"].type == "info"
    assert value(found["pvfront_build"], "_info", version=__version__) == 1
    assert value(found["pvfront_service_up"], **{"class": "vif"}) == 0
    assert value(found["pvfront_granted_pages_limit"]) == 16384
    for family in found.values():
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
    assert text().endswith("# EOF\n")


def test_latency_is_a_histogram_of_cumulative_buckets_in_seconds() -> None:
    found = families(DISK)["pvfront_vbd_latency_seconds"]
    of = {"device": "xvdb", "queue": "0", "operation": "read"}
    assert value(found, "_bucket", **of, le="8e-06") == 0
    assert value(found, "_bucket", **of, le="1.6e-05") == 9
    assert value(found, "_bucket", **of, le="+Inf") == 10


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30))
def test_buckets_only_grow_and_end_with_all(histogram: list[int]) -> None:
    found = buckets(histogram)
    assert found[-1] == ("+Inf", float(sum(histogram)))
    assert [float(bound) for bound, _ in found] == sorted(float(bound) for bound, _ in found)
    assert [count for _, count in found] == sorted(count for _, count in found)


@pytest.mark.parametrize(
    ("queue", "tables"),
    [
        (disk_queue(), (metrics.DISK_COUNTERS, metrics.DISK_GAUGES, metrics.EVENTS,
                        dict.fromkeys(("read", "write", "flush", "discard")))),
        (net_queue(), (metrics.NET_COUNTERS, metrics.NET_GAUGES, metrics.EVENTS,
                       metrics.OF_THE_INTERFACE, dict.fromkeys(("tx", "rx")))),
        (console_queue(), (metrics.CONSOLE_COUNTERS, metrics.CONSOLE_GAUGES, metrics.EVENTS)),
        (disk_queue()["read"], (metrics.DISK_OPERATIONS, {"latency": None})),
        (net_queue()["tx"], (metrics.NET_WAYS, {"dropped": None})),
    ],
    ids=["vbd", "vif", "console", "operation", "direction"],
)  # fmt: skip
def test_no_counter_of_a_worker_s_is_forgotten(queue: dict[str, Any], tables: Any) -> None:
    exported = {key for table in tables for key in table}
    assert exported | metrics.LEFT_OUT == set(queue) | metrics.LEFT_OUT


@given(st.text(max_size=200))
def test_whatever_a_device_is_called_it_is_one_bounded_label(name: str) -> None:
    hostile = disk(0, disk_queue(), os_device=name)
    (sample,) = families(hostile)["pvfront_device"].samples
    (named,) = families(console(0, label=name))["pvfront_device"].samples
    assert len(named.labels["device"]) <= 64
    assert named.labels["device"].isprintable()
    assert sample.labels["os_device"] == label(name)
    assert len(label(name)) <= 64
    assert label(name).isprintable()
    assert "\x1b" not in text(hostile)


def test_what_the_agent_writes_into_the_store_is_counted(tmp_path: Path) -> None:
    assert "pvfront_agent_keys" not in families(DISK)
    found = families(DISK, agent={"keys": 21, "store_writes": 22})
    assert value(found["pvfront_agent_keys"]) == 21
    assert value(found["pvfront_agent_store_writes"], "_total") == 22

    said: dict[str, Any] = {"ok": True, "agent": {"publish": {"keys": 5, "store_writes": 7}}}

    async def answers(_: dict[str, Any]) -> dict[str, Any]:
        return said

    async def asked() -> dict[str, Any] | None:
        async with answering(tmp_path / "agent.sock", "agent", {"status": answers}):
            return await metrics._agent(tmp_path)

    assert asyncio.run(asked()) == {"keys": 5, "store_writes": 7}
    said = {"ok": True, "agent": {"publish": {}}}
    assert asyncio.run(asked()) is None
    assert asyncio.run(metrics._agent(tmp_path)) is None, "none runs"


def test_the_textfile_is_in_the_format_that_node_exporter_reads() -> None:
    plain = generate_latest(Devices([DISK, VIF])).decode()
    kinds = {line.split()[3] for line in plain.splitlines() if line.startswith("# TYPE")}
    assert kinds <= {"counter", "gauge", "histogram", "untyped"}, "it knows no other"
    names = {family.name for family in parse_plain(plain)}
    assert {"pvfront_device_info", "pvfront_vbd_requests"} <= names


def test_a_textfile_is_replaced_whole_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "pvfront.prom"
    path.write_text("old")
    inode = path.stat().st_ino
    write_textfile(path, Embedded(tmp_path))
    assert path.stat().st_ino != inode, "by rename"
    assert path.stat().st_mode & 0o777 == 0o644
    assert b"pvfront_build_info" in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_textfile_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pvfront.prom"
    path.write_text("old")

    def full(fd: int, mode: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fchmod", full)
    with pytest.raises(OSError, match="No space"):
        write_textfile(path, Embedded(tmp_path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def expose(accept: str) -> tuple[bytes, str]:
    return b"text\n", f"for {accept}"


@pytest.mark.parametrize(
    ("head", "begins", "ends"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\r\n\r\ntext\n"),
        (b"GET /metrics?x=1 HTTP/1.0\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"text\n"),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\r\n\r\n"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 ", b"\r\n\r\n"),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 ", b"there is /metrics\n"),
        (b"GET /\r\n\r\n", b"HTTP/1.1 400 ", b"\r\n\r\n"),
        (b"", b"HTTP/1.1 400 ", b"\r\n\r\n"),
    ],
)
def test_a_request_is_answered_by_its_method_and_target(
    head: bytes, begins: bytes, ends: bytes
) -> None:
    said = answer(head, expose)
    assert said.startswith(begins)
    assert said.endswith(ends)


def test_what_is_accepted_decides_the_format(tmp_path: Path) -> None:
    said = answer(b"GET /metrics HTTP/1.1\r\naccept: a/b\r\nACCEPT: c\r\n\r\n", expose)
    assert b"Content-Type: for  a/b, c\r\n" in said
    on = Embedded(tmp_path)
    for accept, kind in (
        (OPENMETRICS, "application/openmetrics-text"), ("", "text/plain"), ("*/*", "text/plain"),
    ):  # fmt: skip
        body, found = metrics.exposition(accept, on)
        assert found.startswith(kind)
        assert body.endswith(b"# EOF\n") is (kind != "text/plain")


@given(st.binary(max_size=100), st.text(max_size=40))
def test_any_request_has_an_answer_of_the_length_that_it_says(head: bytes, accept: str) -> None:
    on = Embedded(Path("/nonexistent"))
    head = (
        b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text;version=" + accept.encode() + head
    )
    for request in (head, head[40:]):
        said = answer(request, lambda accept: metrics.exposition(accept, on))
        fields, _, body = said.partition(b"\r\n\r\n")
        assert b"\r\nContent-Length: %d\r\n" % len(body) in fields
        assert fields.count(b"\r\n") <= 5, "nothing of the request becomes a field"
