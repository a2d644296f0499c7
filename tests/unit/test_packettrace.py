# SPDX-License-Identifier: BSD-2-Clause
"""The packets that a network's worker notes, read from the pages that it writes."""

from __future__ import annotations

import asyncio
import io
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import eventually

from pvfront import packettrace
from pvfront.abi import ffi, lib
from pvfront.errors import PvfrontError
from pvfront.packettrace import PacketTrace, Reader, begin_pcap

PACKET = bytes.fromhex("ffffffffffff00163e0a0b0c0806") + bytes(46)


class Writer:
    """What a worker does with the memfd that it was given (native/trace.c)."""

    def __init__(self, fd: int, queues: int) -> None:
        import mmap

        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.queues = ffi.cast("struct pvf_trace *", ffi.from_buffer(self._map))
        for number in range(queues):
            one = self.queues[number]
            one.magic, one.version = lib.PVF_TRACE_MAGIC, lib.PVF_TRACE_VERSION
            one.packets, one.queue = lib.PVF_TRACE_PACKETS, number

    def note(self, queue: int = 0, data: bytes = PACKET, **fields: Any) -> None:
        ring = self.queues[queue]
        number = ring.written + 1
        to = ring.packet[(number - 1) % lib.PVF_TRACE_PACKETS]
        to.queue, to.length, to.captured = queue, len(data), len(data)
        to.way = to.gso_type = to.gso_size = to.flags = to.offered = 0
        to.slots, to.dropped, to.time = 1, lib.PVF_DROPS, 1000 * number
        for name, value in fields.items():
            setattr(to, name, value)
        ffi.memmove(to.bytes, data, len(data))
        to.number = ring.written = number


class Worker:
    """A worker that notes what it is told."""

    def __init__(self, queues: int = 1) -> None:
        self.hello = SimpleNamespace(queues=queues)
        self.told: list[bool] = []
        self.writer: Writer | None = None

    async def trace_packets(self, memfd: int | None) -> None:
        self.told.append(memfd is not None)
        if memfd is not None:
            self.writer = Writer(memfd, self.hello.queues)


@pytest.fixture
def trace() -> Iterator[PacketTrace]:
    made = PacketTrace("vif-0")
    yield made
    made.close()


async def begun(trace: PacketTrace, worker: Any) -> Reader:
    answer = await trace.renew(worker)
    return Reader(answer["file"])


async def test_packets_of_all_queues_come_in_the_order_of_their_times(trace: PacketTrace) -> None:
    worker = Worker(queues=2)
    reader = await begun(trace, worker)
    assert reader.news() == []
    assert worker.writer is not None
    worker.writer.note(1, time=3000, way=1, slots=2)
    worker.writer.note(0, time=2000, flags=1, offered=3, gso_type=1, gso_size=1448, length=65000)
    worker.writer.note(0, time=4000, slots=0, dropped=lib.PVF_DROP_CSUM)
    first, second, third = reader.news()
    assert (first.queue, first.sent, first.length, first.checksum) == (0, True, 65000, "left")
    assert (first.gso, first.gso_size, first.dropped) == ("tcpv4", 1448, "")
    assert (second.queue, second.sent, second.slots, second.data) == (1, False, 2, PACKET)
    assert third.dropped == "csum"
    assert "out  65000 bytes  1 slot  checksum left  gso tcpv4 1448" in first.text()
    assert "0 slots" in third.text()
    assert third.text().endswith("dropped: csum")
    assert second.as_json()["direction"] == "in"
    assert reader.news() == []
    assert reader.missed == 0
    reader.close()


async def test_what_was_overwritten_before_it_was_read_is_counted(trace: PacketTrace) -> None:
    worker = Worker()
    reader = await begun(trace, worker)
    assert worker.writer is not None
    for _ in range(lib.PVF_TRACE_PACKETS + 10):
        worker.writer.note()
    assert len(reader.news()) == lib.PVF_TRACE_PACKETS
    assert reader.missed == 10
    worker.writer.note()
    worker.writer.queues[0].packet[10].number = 0  # it is being written
    assert reader.news() == []
    assert reader.missed == 11
    reader.close()


async def test_a_worker_that_lies_about_its_pages_brings_nothing(trace: PacketTrace) -> None:
    worker = Worker()
    reader = await begun(trace, worker)
    assert worker.writer is not None
    worker.writer.note(captured=0xFFFF, dropped=200, gso_type=9, way=7)
    (packet,) = reader.news()
    assert len(packet.data) == lib.PVF_TRACE_BYTES
    assert packet.gso == "type 9"
    worker.writer.queues[0].written = (1 << 64) - 1
    assert reader.news() == []
    worker.writer.queues[0].magic = 0
    assert reader.news() == []
    reader.close()


async def test_nothing_is_noted_any_more_once_nobody_asks(
    trace: PacketTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker: Any = Worker()
    first = (await trace.renew(worker))["file"]
    assert (await trace.renew(worker))["file"] == first
    assert worker.told == [True]
    monkeypatch.setattr(packettrace, "LEASE", 0.01)
    await trace.renew(worker)
    await eventually("its end", lambda: worker.told == [True, False])
    with pytest.raises(PvfrontError):
        Reader(first)


async def test_another_worker_gets_pages_of_its_own(trace: PacketTrace) -> None:
    first: Any = Worker()
    second: Any = Worker(queues=3)
    await trace.renew(first)
    reader = Reader((await trace.renew(second))["file"])
    second.writer.note(2)
    assert [packet.queue for packet in reader.news()] == [2]
    reader.close()


async def test_a_worker_that_refuses_leaves_nothing_open(trace: PacketTrace) -> None:
    class Refusing(Worker):
        async def trace_packets(self, memfd: int | None) -> None:
            raise PvfrontError("no")

    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    worker: Any = Refusing()
    with pytest.raises(PvfrontError, match="no"):
        await trace.renew(worker)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_what_is_no_trace_is_not_read() -> None:
    with pytest.raises(PvfrontError, match="something else by now"):
        Reader("/proc/self/fd/0")


async def test_tcpdump_reads_the_file(trace: PacketTrace, tmp_path: Path) -> None:
    worker = Worker()
    reader = await begun(trace, worker)
    assert worker.writer is not None
    worker.writer.note(time=1_700_000_000_000_001_000)
    worker.writer.note(time=1_700_000_001_000_000_000, length=9000)
    file = io.BytesIO()
    begin_pcap(file)
    for packet in reader.news():
        file.write(packet.pcap())
    reader.close()
    raw = file.getvalue()
    assert struct.unpack_from("=IHHiIII", raw)[:3] == (0xA1B23C4D, 2, 4)
    assert struct.unpack_from("=IIII", raw, 24) == (1_700_000_000, 1000, 60, 60)
    assert struct.unpack_from("=IIII", raw, 24 + 16 + 60) == (1_700_000_001, 0, 60, 9000)
    (tmp_path / "x.pcap").write_bytes(raw)
    try:
        done = await asyncio.to_thread(
            subprocess.run, ["tcpdump", "-nner", str(tmp_path / "x.pcap")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no tcpdump here; its format is checked above")
    assert done.stdout.count("ARP") == 2
