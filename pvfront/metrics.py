# SPDX-License-Identifier: BSD-2-Clause
"""Metrics of every served device and queue, for Prometheus and what reads like it.

Families are made of samples (counters.py) by the tables below: a counter that is in none of them is
in `LEFT_OUT`, with a test that nothing is forgotten. Names and units are those of OpenMetrics 1.0
(base units: bytes, seconds). `exposition` writes OpenMetrics, or the older text format: the
textfile collector of node_exporter reads only that.

Labels are few and bounded: a device is named by us, of its class and number, a console as a file
may be; what the system calls it is cut and stripped of control characters.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import exposition as plain
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from . import __version__, inventory
from .agent import SOCKET
from .counters import CLASSES, Sample, sample
from .errors import PvfrontError
from .figures import DROPS, OPERATIONS
from .platform import Platform, platform
from .questions import ask
from .xswire import printable

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"

ASKING = 5.0
"""Seconds for the agent's answer: metrics of devices do not wait longer for it."""

_QUEUE = ("device", "queue")
Table = Mapping[str, tuple[str, str, str]]
"""Of counters: its metric's name, unit ("": none), and what it counts."""

DISK_OPERATIONS: Table = {
    "requests": ("vbd_requests", "", "Requests completed."),
    "bytes": ("vbd_data_bytes", "bytes", "Data of completed requests."),
    "errors": ("vbd_errors", "", "Requests that failed."),
    "ring_requests": ("vbd_ring_requests", "", "Requests on the ring that they became."),
}
DISK_COUNTERS: Table = {
    "segments": ("vbd_segments", "", "Segments of requests on the ring."),
    "indirect": ("vbd_indirect_requests", "", "Requests on the ring with indirect descriptors."),
    "polled": ("vbd_polled", "", "Times that responses were found by looking, without an event."),
    "ring_full": ("vbd_ring_full", "", "Times that intake paused for want of a slot."),
    "pool_empty": ("vbd_pool_empty", "", "Times that intake paused for want of a granted page."),
    "target_blocked": ("vbd_client_blocked", "", "Times that replies waited for the client."),
    "rejected": ("vbd_rejected_requests", "", "Requests refused before the ring."),
}
DISK_GAUGES: Table = {
    "in_flight": ("vbd_in_flight", "", "Requests on the ring that are not answered."),
    "in_flight_peak": ("vbd_in_flight_peak", "", "The most requests that were ever on the ring."),
    "nbd_pending": ("vbd_client_pending", "", "Requests of the client that are not answered."),
    "ring_slots": ("vbd_ring_slots", "", "Slots of the ring."),
    "pool_pages": ("vbd_pool_pages", "", "Granted pages for data."),
    "pool_free": ("vbd_pool_free_pages", "", "Granted pages for data that are not in use."),
    "pool_free_low": ("vbd_pool_free_pages_low", "", "The fewest that were ever not in use."),
}
NET_WAYS: Table = {
    "packets": ("vif_packets", "", "Packets passed on; tx is what the guest sends."),
    "bytes": ("vif_data_bytes", "bytes", "Data of packets passed on."),
    "slots": ("vif_slots", "", "Slots of the ring that packets took."),
    "gso": ("vif_gso_packets", "", "Packets that are larger than the wire takes."),
    "gso_bytes": ("vif_gso_bytes", "bytes", "Data of such packets."),
    "large": ("vif_large_packets", "", "Packets of more than 16384 bytes."),
    "large_bytes": ("vif_large_bytes", "bytes", "Data of such packets."),
    "extras": ("vif_extra_slots", "", "Slots of extra info."),
    "csum_left": ("vif_checksums_left", "", "Packets whose checksum is the other end's."),
    "csum_done": ("vif_checksums_done", "", "Packets whose checksum was finished here."),
    "cut": ("vif_cut_packets", "", "Large packets that were cut here."),
    "pieces": ("vif_pieces", "", "What they were cut into."),
}
NET_COUNTERS: Table = {
    "tx_full": ("vif_tx_full", "", "Times that intake paused for want of a slot or a page."),
    "tap_errors": ("vif_tap_errors", "", "Reads of the TAP that failed."),
}
NET_GAUGES: Table = {
    "tx_in_flight": ("vif_tx_in_flight", "", "Slots of sent packets that are not answered."),
    "tx_pool_pages": ("vif_tx_pool_pages", "", "Granted pages for what is sent."),
    "tx_pool_free": ("vif_tx_pool_free_pages", "", "Those that are not in use."),
    "tx_pool_free_low": ("vif_tx_pool_free_pages_low", "", "The fewest that ever were not."),
    "rx_pool_pages": ("vif_rx_pool_pages", "", "Granted pages for what is received."),
    "rx_pool_free": ("vif_rx_pool_free_pages", "", "Those that are not on the ring."),
}
OF_THE_INTERFACE: Table = {
    "groups": ("vif_multicast_groups", "", "Multicast addresses that are listened to."),
    "groups_told": ("vif_multicast_changes", "", "Joins and leaves the backend was told of."),
    "groups_lost": ("vif_multicast_lost", "", "Addresses that it could not be asked for."),
}
CONSOLE_COUNTERS: Table = {
    "in_bytes": ("console_in_bytes", "bytes", "Data passed on to the guest."),
    "out_bytes": ("console_out_bytes", "bytes", "Data put into the ring."),
    "ring_full": ("console_ring_full", "", "Times that the backend did not read."),
    "target_blocked": ("console_client_blocked", "", "Times that the guest did not read."),
}
CONSOLE_GAUGES: Table = {
    "unsent": ("console_unsent_bytes", "bytes", "Data that the backend has not taken."),
    "undelivered": ("console_undelivered_bytes", "bytes", "Data that the guest has not taken."),
}
EVENTS: Table = {
    "notifies": ("notifications", "", "Events sent to the backend."),
    "events": ("events", "", "Events received."),
    "events_spurious": ("spurious_events", "", "Events received with nothing behind them."),
    "watchdog_hits": ("lost_events", "", "Responses that no event had told of."),
    "wakeups": ("wakeups", "", "Times that the queue's thread woke up."),
}
LEFT_OUT = frozenset({"queue", "queues", "state", "generation"})
"""A queue's page has them too: they are labels, or the device's."""


class Devices(Collector):
    """The metrics of these devices."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        services: Mapping[str, bool] | None = None,
        limit: int | None = None,
        agent: Mapping[str, Any] | None = None,
    ) -> None:
        """`services`: whether that of a class runs; `limit`: of granted pages, None: not known.

        `agent`: what the guest agent says of what it publishes; None: none answers.
        """
        self._samples = samples
        self._services = services or {}
        self._limit = limit
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        """Every family that has something to say."""
        for family in self._families():
            if family.samples:
                yield family

    def _families(self) -> Iterator[Metric]:
        build = InfoMetricFamily("pvfront_build", "Which pvfront this is.")
        build.add_metric([], {"version": __version__})
        yield build
        up = GaugeMetricFamily("pvfront_service_up", "Whether a service runs.", labels=["class"])
        for klass, runs in self._services.items():
            up.add_metric([klass], int(runs))
        yield up
        if self._limit is not None:
            yield GaugeMetricFamily(
                "pvfront_granted_pages_limit",
                "Pages that user space may grant to other domains.",
                self._limit,
            )
        yield from self._of_the_agent()
        yield from self._of_devices()
        disks = [one for one in self._samples if one.klass == "vbd"]
        networks = [one for one in self._samples if one.klass == "vif"]
        yield from _operations(disks)
        yield from _queues(disks, DISK_COUNTERS, CounterMetricFamily)
        yield from _queues(disks, DISK_GAUGES, GaugeMetricFamily)
        yield from _ways(networks)
        yield from _queues(networks, NET_COUNTERS, CounterMetricFamily)
        yield from _queues(networks, NET_GAUGES, GaugeMetricFamily)
        yield from _interfaces(networks)
        consoles = [one for one in self._samples if one.klass == "console"]
        yield from _queues(consoles, CONSOLE_COUNTERS, CounterMetricFamily)
        yield from _queues(consoles, CONSOLE_GAUGES, GaugeMetricFamily)
        yield from _queues(self._samples, EVENTS, CounterMetricFamily)

    def _of_the_agent(self) -> Iterator[Metric]:
        if self._agent is not None:
            yield GaugeMetricFamily(
                "pvfront_agent_keys", "Keys that the agent has published.", self._agent["keys"]
            )
            yield CounterMetricFamily(
                "pvfront_agent_store_writes",
                "Writes and removals in the store to publish them.",
                self._agent["store_writes"],
            )

    def _of_devices(self) -> Iterator[Metric]:
        info = InfoMetricFamily("pvfront_device", "A served device.", labels=["device"])
        simple: list[tuple[Any, Callable[[Sample], float | None]]] = [
            (_device(GaugeMetricFamily, "device_connected", "Whether both ends are connected."),
             lambda one: int(one.phase == "connected")),
            (_device(GaugeMetricFamily, "worker_up", "Whether its worker's counters are there."),
             lambda one: int(one.queues is not None)),
            (_device(GaugeMetricFamily, "device_generation", "The number of its connection."),
             lambda one: one.generation),
            (_device(CounterMetricFamily, "device_reconnects", "Times it was connected again."),
             lambda one: one.reconnects),
            (_device(CounterMetricFamily, "worker_cpu_seconds", "Processor time of its worker.",
                     "seconds"), lambda one: one.cpu),
        ]  # fmt: skip
        for one in self._samples:
            what = {"class": one.klass, "id": str(one.id), "os_device": label(one.os_device)}
            info.add_metric([one.name], what)
            for family, value in simple:
                if (found := value(one)) is not None:
                    family.add_metric([one.name], found)
        yield info
        yield from (family for family, _ in simple)


def label(text: str) -> str:
    """Text of others as the value of a label: printable, at most 64 characters."""
    return printable(text)[:64]


def _device(kind: Any, name: str, text: str, unit: str = "") -> Any:
    return kind(f"pvfront_{name}", text, labels=["device"], unit=unit)


def _made(kind: Any, entry: tuple[str, str, str], *labels: str) -> Any:
    name, unit, text = entry
    return kind(f"pvfront_{name}", text, labels=[*_QUEUE, *labels], unit=unit)


def _each(samples: Iterable[Sample]) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """The labels and the counters of each queue."""
    for one in samples:
        for queue in one.queues or ():
            yield [one.name, str(queue["queue"])], queue


def _queues(samples: Sequence[Sample], table: Table, kind: Any) -> Iterator[Metric]:
    for key, entry in table.items():
        family = _made(kind, entry)
        for labels, queue in _each(samples):
            family.add_metric(labels, queue[key])
        yield family


def _operations(disks: Sequence[Sample]) -> Iterator[Metric]:
    for key, entry in DISK_OPERATIONS.items():
        family = _made(CounterMetricFamily, entry, "operation")
        for labels, queue in _each(disks):
            for operation in OPERATIONS:
                family.add_metric([*labels, operation], queue[operation][key])
        yield family
    latency = HistogramMetricFamily(
        "pvfront_vbd_latency",
        "How long requests took, to the next power of two of microseconds.",
        labels=[*_QUEUE, "operation"],
        unit="seconds",
    )
    for labels, queue in _each(disks):
        for operation in OPERATIONS:
            latency.add_metric([*labels, operation], buckets(queue[operation]["latency"]), None)
    yield latency


def buckets(histogram: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, by their upper bounds in seconds (figures.py); the last has none."""
    found, seen = [], 0
    for number, count in enumerate(histogram):
        seen += count
        last = number == len(histogram) - 1
        found.append(("+Inf" if last else str((2 << number) / 1e6), float(seen)))
    return found


def _ways(networks: Sequence[Sample]) -> Iterator[Metric]:
    for key, entry in NET_WAYS.items():
        family = _made(CounterMetricFamily, entry, "direction")
        for labels, queue in _each(networks):
            for way in ("tx", "rx"):
                family.add_metric([*labels, way], queue[way][key])
        yield family
    dropped = _made(
        CounterMetricFamily,
        ("vif_dropped_packets", "", "Packets that were not passed on."),
        "direction",
        "reason",
    )
    for labels, queue in _each(networks):
        for way in ("tx", "rx"):
            for reason, count in zip(DROPS, queue[way]["dropped"], strict=False):
                dropped.add_metric([*labels, way, reason], count)
    yield dropped


def _interfaces(networks: Sequence[Sample]) -> Iterator[Metric]:
    """What is of the whole interface: the page of each queue may have it, or the first's alone."""
    for key, (name, _, text) in OF_THE_INTERFACE.items():
        kind = GaugeMetricFamily if key == "groups" else CounterMetricFamily
        family = _device(kind, name, text)
        for one in networks:
            if one.queues:
                family.add_metric([one.name], max(queue[key] for queue in one.queues))
        yield family


# -- text ---------------------------------------------------------------------------------------


def devices(on: Platform | None = None) -> Devices:
    """The metrics as they are now. `on`, here and below: None is ours."""
    on = on or platform()
    services = {klass: inventory.supervisor(klass, on.run_dir) is not None for klass in CLASSES}
    agent = asyncio.run(_agent(on.run_dir))
    return Devices(sample(on), services=services, limit=on.grant_limit(), agent=agent)


async def _agent(run_dir: Path) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(ASKING):
            answer = await ask(run_dir / SOCKET, {"verb": "status"})
        return {name: int(answer["agent"]["publish"][name]) for name in ("keys", "store_writes")}
    except (OSError, PvfrontError, LookupError, TypeError, ValueError):
        return None  # it does not run, is about to end, or hangs


def exposition(accept: str = OPENMETRICS, on: Platform | None = None) -> tuple[bytes, str]:
    """The text that an Accept header asks for, and its media type."""
    kinds = {kind.partition(";")[0].strip().lower() for kind in accept.split(",")}
    if "application/openmetrics-text" in kinds:
        text: bytes = openmetrics.generate_latest(devices(on))  # type: ignore[no-untyped-call]
        return text, OPENMETRICS
    return plain.generate_latest(devices(on)), PLAIN


def write_textfile(path: Path, on: Platform | None = None) -> None:
    """Replaces a file for node_exporter's textfile collector in one step. Raises OSError."""
    text = plain.generate_latest(devices(on))
    # Not .prom: the collector reads every such file of its directory.
    fd, new = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(text)
        Path(new).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(new).unlink()
        raise
