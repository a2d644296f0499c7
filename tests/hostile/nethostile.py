# SPDX-License-Identifier: BSD-2-Clause
"""A vif whose backend is told to lie, and a raw socket at each of its ends.

Nothing but what a test sends crosses it: neither end has an address. A `Wire` is one interface,
attached for a test and detached after it; that nothing of it is left then is part of every test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from networld import Network
from waiting import PATIENCE, eventually

from pvfront.abi import lib
from pvfront.errors import PvfrontError
from pvfront.host.handles import EmbeddedGrantMapper
from pvfront.host.netback import NetFault

ETH_P_ALL = 3
KIND = 0x88B5  # IEEE 802's experimental EtherType
HEAD = b"\xff" * 6 + b"\2\0\0\0\0\1"
LARGEST = 9014
SLOTS, TX_SLOT, RX_SLOT = 64, 12, 8  # io/ring.h, io/netif.h

NEEDS_CSUM, TCPV4, TCPV6 = 1, 1, 4  # linux/virtio_net.h
_VNET = struct.Struct("=BBHHHH")
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15

_BAD = ("Traceback", "Sanitizer", "assertion", "the device loop failed")

DROPS = {
    name: getattr(lib, f"PVF_DROP_{name.upper()}")
    for name in ("too_small", "too_large", "gso", "csum", "error", "truncated", "extra", "target")
}


def frame(number: int, size: int = 60, kind: int = KIND) -> bytes:
    """`size` bytes (18 at least) that follow from their number."""
    body = number.to_bytes(4, "big") + bytes((number + i) & 0xFF for i in range(size - 18))
    return HEAD + kind.to_bytes(2, "big") + body


class Wire:
    """One interface, and what the tests do with it."""

    def __init__(self, it: Network, devid: int) -> None:
        self.it = it
        self.devid = devid
        self.front = f"/local/domain/1/device/vif/{devid}"
        self.first = 0
        """The generation that a test begins with."""
        self._mark = it.service.log.stat().st_size if it.service is not None else 0
        self._ends: dict[str, socket.socket] = {}
        self._heard: dict[str, list[bytes]] = {"guest": [], "net": []}
        self.told: list[tuple[tuple[int, ...], bytes]] = []
        """What the guest's kernel was told of each frame that came, as `send` takes it."""

    @classmethod
    async def attach(cls, it: Network, options: str = "") -> Wire:
        devid = await it.host.attach_vif(1, f"mtu=9000,{options}")
        wire = cls(it, devid)
        try:
            state = await it.connected(devid)
            wire.first = state["generation"]
            await it.guest.run("ip", "link", "set", state["os_device"], "up")
            for name, where, ifname in (
                ("guest", it.guest, state["os_device"]), ("net", it.net, f"vif1.{devid}"),
            ):  # fmt: skip
                end = await where.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
                end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
                end.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
                end.bind((ifname, ETH_P_ALL))
                end.setblocking(False)
                wire._ends[name] = end
        except BaseException:
            await wire.remove()
            raise
        return wire

    # -- what can be seen ------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        return self.it.state(self.devid)

    @property
    def log(self) -> str:
        """The service's lines since it was attached."""
        assert self.it.service is not None
        with self.it.service.log.open("rb") as file:
            file.seek(self._mark)
            return file.read().decode(errors="replace")

    async def counters(self, way: str) -> dict[str, Any]:
        """Of the first queue: the backend has no other."""
        queue = (await self.it.queue_statistics(self.devid))[0]
        return {**queue, **queue[way]}

    async def dropped(self, why: str, times: int = 1) -> None:
        """Waits until so many received packets were dropped for that reason, and for no other."""

        async def look() -> bool:
            return sum((await self.counters("rx"))["dropped"]) >= times

        await eventually(f"{times} dropped", look, why=lambda: self.log)
        counted = (await self.counters("rx"))["dropped"]
        assert {n: counted[i] for n, i in DROPS.items() if counted[i]} == {why: times}

    async def served(self, name: str) -> int:
        """A counter of the backend's."""
        return (await self.it.backend.stats(vif=self.devid))[name]

    async def until_served(self, name: str, count: int) -> None:
        async def look() -> bool:
            return await self.served(name) >= count

        await eventually(f"{count} {name}", look, why=lambda: self.log)

    def unbroken(self) -> None:
        """The connection that the test began with goes on."""
        assert self.state["generation"] == self.first, self.log

    # -- frames ----------------------------------------------------------------------------------

    def send(self, end: str, *frames: bytes, vnet: tuple[int, ...] = (0, 0, 0, 0, 0, 0)) -> None:
        """From an end: "guest" or "net". vnet: flags, GSO type, header, GSO size, start, offset."""
        for data in frames:
            self._ends[end].send(_VNET.pack(*vnet) + data)

    def heard(self, end: str) -> list[bytes]:
        """All frames that have come to an end from the other one."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, _, kind, *_) = self._ends[end].recvfrom(1 << 17)
                if kind != socket.PACKET_OUTGOING:
                    self._heard[end].append(data[_VNET.size :])
                    if end == "guest":
                        self.told.append((_VNET.unpack_from(data), data[_VNET.size :]))
        return self._heard[end]

    async def crosses(self, start: int = 9000, count: int = 300) -> None:
        """Frames of all sizes pass both ways, whole and in order."""
        sizes = [18 + (i * 97) % (LARGEST - 18) for i in range(count)]
        frames = [frame(start + i, size) for i, size in enumerate(sizes)]
        for source, target in (("guest", "net"), ("net", "guest")):
            for at in range(0, count, 20):
                await self.comes(source, target, frames[at : at + 20])

    async def comes(self, source: str, target: str, frames: Sequence[bytes]) -> None:
        """They are sent, and come."""
        self.send(source, *frames)
        await self.have_come(target, frames)

    async def have_come(self, target: str, frames: Sequence[bytes]) -> None:
        """Waits until the last of them has come; then all have, once, in order."""
        wanted = list(frames)

        def look() -> bool:
            return wanted[-1] in self.heard(target)

        await eventually(f"{len(wanted)} frames at {target}", look, why=lambda: self.log)
        known = set(wanted)
        assert [data for data in self.heard(target) if data in known] == wanted
        self._heard[target].clear()

    # -- what the backend does -------------------------------------------------------------------

    async def fault(self, *faults: NetFault) -> None:
        await self.it.backend.fault(*faults, vif=self.devid)

    async def fired(self, kind: str, times: int = 1) -> None:
        await self.until_served(f"fired_{kind}", times)

    @contextlib.contextmanager
    def worker_stopped(self) -> Iterator[None]:
        """The worker stands still meanwhile."""
        with _stopped(self.state["worker_pid"]):
            yield

    @contextlib.contextmanager
    def backend_stopped(self) -> Iterator[None]:
        """The backend stands still meanwhile, whatever it was about to do."""
        with _stopped(self.it.backend.pid):
            yield

    async def breaks(self, rule: int, field: str, source: str, frames: Sequence[bytes]) -> None:
        """The frames meet the faults in force: the rule is named, with field and value; then the
        vif works again, with the same worker.
        """
        worker = self.state["worker_pid"]
        self.send(source, *frames)
        await self.logged("the backend broke rule ")
        told = self.log.partition("the backend broke rule ")[2].splitlines()[0]
        assert told.startswith(f"{rule}: {field}=0x"), told
        await self.it.backend.clear(vif=self.devid)
        state = await self.it.connected(self.devid, after=self.first)
        assert state["worker_pid"] == worker, self.log
        for end in ("guest", "net"):
            await self.running(end)
        await self.crosses()

    async def running(self, end: str) -> None:
        """Waits until an end's interface has its carrier."""
        where, ifname = (
            (self.it.guest, self.state["os_device"])
            if end == "guest"
            else (self.it.net, f"vif1.{self.devid}")
        )

        async def look() -> bool:
            return "LOWER_UP" in await where.run("ip", "link", "show", ifname)

        await eventually(f"a carrier at {end}", look, why=lambda: self.log)

    async def logged(self, text: str) -> None:
        await eventually(f"{text!r} in the log", lambda: text in self.log, why=lambda: self.log)

    async def tx_grefs(self) -> list[int]:
        """Those of the requests that are in the TX ring now; the backend is stopped meanwhile."""
        ref = await self.it.host.store.read_opt(f"{self.front}/tx-ring-ref")
        assert ref is not None
        with self.mapped([int(ref)]) as page:
            req_prod, _, rsp_prod = struct.unpack_from("=III", page)
            return [
                struct.unpack_from("=I", page, SLOTS + at % 256 * TX_SLOT)[0]
                for at in range(rsp_prod, req_prod)
            ]

    @contextlib.contextmanager
    def mapped(self, grefs: list[int]) -> Iterator[bytes]:
        """What stands in pages of the guest's, as an accomplice of the backend sees it."""
        mapper = EmbeddedGrantMapper.open(str(self.it.host.directory), own_domid=0)
        try:
            with mapper.map(1, grefs, writable=False) as mapping:
                yield bytes(mapping.memory)
        finally:
            mapper.close()

    # -- the end ---------------------------------------------------------------------------------

    async def end(self) -> None:
        """It is detached; nothing of it is left."""
        self._close()
        await self.it.backend.clear()
        if self.state:
            await self.it.detach(self.devid)
        await self.it.nothing_left()
        bad = [line for line in self.log.splitlines() if any(word in line for word in _BAD)]
        assert not bad, self.log

    async def remove(self) -> None:
        """By force, after a failed test."""
        self._close()
        with contextlib.suppress(PvfrontError):
            await self.it.backend.clear()
            await self.it.host.detach_vif(1, self.devid, force=True, timeout=2)

    def _close(self) -> None:
        while self._ends:
            self._ends.popitem()[1].close()


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        end = asyncio.get_running_loop().time() + PATIENCE
        while _state_of(pid) != "T":
            assert asyncio.get_running_loop().time() < end, f"{pid} does not stop"
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0]
