# SPDX-License-Identifier: BSD-2-Clause
"""The packets of a network's worker, as it notes them, and a file of them for tcpdump.

Theory of operation
    A supervisor that is asked for packets gives the worker a memfd (`PacketTrace`); for each queue
    the worker writes into a ring there (``struct pvf_trace``, native/include/pvf_ctl.h): no system
    call, no wait, the oldest goes. Who reads maps the same pages (`Reader`). It must ask again from
    time to time: a worker notes nothing any more some seconds after the last reader has gone.

    A packet is whole if its number stood still while it was read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .abi import ffi, lib
from .errors import PvfrontError
from .figures import DROPS
from .worker import Worker

log = logging.getLogger(__name__)

LEASE = 15.0  # seconds after which nobody reads, it seems
RENEW = 5.0

_NAME = "pvfront-packets"
_PACKET = ffi.sizeof("struct pvf_trace_packet")
_QUEUE = ffi.sizeof("struct pvf_trace")
_NEEDS_CSUM = 1  # linux/virtio_net.h
_GSO = {1: "tcpv4", 4: "tcpv6"}
_GSO_ECN = 0x80
# pcap-savefile(5): nanoseconds, version 2.4, Ethernet.
_PCAP = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 1 << 18, 1)
_RECORD = struct.Struct("=IIII")


@dataclass(frozen=True, slots=True)
class Packet:
    """`time`: ns since 1970. `checksum`: "done", or "left" to whoever is behind the ring.

    `gso`: what it is to be cut into, "" if nothing; `gso_size`: bytes of payload of each piece.
    `slots`: of the ring, 0 if it came to none. `dropped`: why, "" if it was not.
    """

    time: int
    queue: int
    sent: bool
    length: int
    slots: int
    checksum: str
    gso: str
    gso_size: int
    dropped: str
    data: bytes  # the first of it

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"time": self.time / 1e9, "data": self.data.hex()}
        del found["sent"]
        return {"direction": "out" if self.sent else "in"} | found

    def text(self) -> str:
        parts = [
            f"queue {self.queue}",
            "out" if self.sent else "in ",
            f"{self.length} bytes",
            f"{self.slots} slot{'s' * (self.slots != 1)}",
            f"checksum {self.checksum}",
        ]
        if self.gso:
            parts.append(f"gso {self.gso} {self.gso_size}")
        if self.dropped:
            parts.append(f"dropped: {self.dropped}")
        return "  ".join(parts)

    def pcap(self) -> bytes:
        """A record of a pcap file: what was captured of it."""
        seconds, ns = divmod(self.time, 10**9)
        return _RECORD.pack(seconds, ns, len(self.data), self.length) + self.data


class PacketTrace:
    """A supervisor's side: the memfd of one device's worker, as long as somebody reads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._fd = -1
        self._worker: Worker | None = None
        self._end: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def renew(self, worker: Worker) -> dict[str, Any]:
        """Where the packets are, for at least `LEASE` seconds. Raises PvfrontError."""
        if self._worker is not worker or self._fd < 0:
            self.close()
            queues = worker.hello.queues if worker.hello is not None else 1
            fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, queues * _QUEUE)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                await worker.trace_packets(fd)
            except BaseException:
                os.close(fd)
                raise
            self._fd, self._worker = fd, worker
        if self._end is not None:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(LEASE, self._lease_ended)
        return {"file": f"/proc/{os.getpid()}/fd/{self._fd}", "renew": RENEW}

    def _lease_ended(self) -> None:
        self._ending = asyncio.create_task(self._stop(), name=f"{self._name} packets end")

    async def _stop(self) -> None:
        worker = self._worker
        self.close()
        if worker is not None:
            with contextlib.suppress(PvfrontError):
                await worker.trace_packets(None)

    def close(self) -> None:
        """Forgets the memfd; a worker that writes there goes on until it is told, or ends."""
        if self._end is not None:
            self._end.cancel()
        self._end = None
        self._worker = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Reader:
    """Reads what comes, of all queues."""

    def __init__(self, file: str) -> None:
        """Raises PvfrontError if there is no such memfd any more."""
        self.missed = 0
        try:
            if not str(Path(file).readlink()).startswith(f"/memfd:{_NAME}"):
                raise PvfrontError(f"{file}: is something else by now")
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PvfrontError(f"{file}: {error.strerror}") from error
        try:
            size = os.fstat(fd).st_size
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self._last = [0] * (size // _QUEUE)

    def close(self) -> None:
        self._map.close()

    def news(self) -> list[Packet]:
        """The packets since the last call, in the order of their times."""
        found = [packet for queue in range(len(self._last)) for packet in self._queue(queue)]
        return sorted(found, key=lambda packet: packet.time)

    def _queue(self, queue: int) -> Iterator[Packet]:
        ring = ffi.cast("struct pvf_trace *", ffi.from_buffer(self._map)) + queue
        if (ring.magic, ring.version, ring.packets) != (
            lib.PVF_TRACE_MAGIC, lib.PVF_TRACE_VERSION, lib.PVF_TRACE_PACKETS,
        ):  # fmt: skip
            return  # not begun yet
        written = int(ring.written)
        first = max(self._last[queue], written - lib.PVF_TRACE_PACKETS) + 1
        self.missed += first - 1 - self._last[queue]
        self._last[queue] = written
        for number in range(first, written + 1):
            at = ffi.offsetof("struct pvf_trace", "packet")
            at += queue * _QUEUE + (number - 1) % lib.PVF_TRACE_PACKETS * _PACKET
            before = self._map[at : at + 8]
            copy = self._map[at : at + _PACKET]
            if before != copy[:8] or self._map[at : at + 8] != before:
                self.missed += 1  # overwritten just now
            elif (packet := _packet(copy, number)) is not None:
                yield packet
            else:
                self.missed += 1


def _packet(copy: bytes, number: int) -> Packet | None:
    found = ffi.from_buffer("struct pvf_trace_packet *", copy)
    if found.number != number:
        return None
    kind = int(found.gso_type)
    left = bool(found.flags & _NEEDS_CSUM)
    return Packet(
        time=int(found.time),
        queue=int(found.queue),
        sent=found.way == 0,
        length=int(found.length),
        slots=int(found.slots),
        checksum="left" if left and (found.way or found.offered & 1) else "done",
        gso=_GSO.get(kind & ~_GSO_ECN, f"type {kind}" if kind else ""),
        gso_size=int(found.gso_size) if kind else 0,
        dropped=DROPS[found.dropped] if found.dropped < len(DROPS) else "",
        data=bytes(ffi.buffer(found.bytes, min(int(found.captured), lib.PVF_TRACE_BYTES))),
    )


def begin_pcap(file: BinaryIO) -> None:
    """Writes a pcap file's beginning, pcap-savefile(5)."""
    file.write(_PCAP)
