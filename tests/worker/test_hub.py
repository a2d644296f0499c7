# SPDX-License-Identifier: BSD-2-Clause
"""The worker on a real hub: what it is handed works, and what it holds ends with it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded import Host
from ringbackend import PAGE, Backend, Pages
from waiting import PATIENCE, wait_for

from pvfront.abi import lib
from pvfront.host.child import answers
from pvfront.host.handles import (
    EmbeddedEventChannels,
    EmbeddedGrantAllocator,
    EmbeddedGrantMapper,
)

GUEST, DOM0 = 1, 0
POOL = 32


class Mapped(Pages):
    """What the frontend has granted, as a backend process maps it."""

    def __init__(self, memory: Any, grefs: list[int]) -> None:
        self.ring_offset, self.pool_offset = 0, PAGE
        self.ring_pages, self.pool_pages = 1, len(grefs)
        self.map = memory
        self.grefs = grefs
        self._words = memoryview(memory).cast("I")
        self._page = {gref: i for i, gref in enumerate(grefs)}

    def close(self) -> None:
        self._words.release()


class Hub:
    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        # -P: the installed package, wherever the tests run.
        command = [sys.executable, "-P", "-m", "pvfront.host.hub", self.directory]
        self.process = subprocess.Popen(command)
        self.path = directory / "hub.sock"
        wait_for("the hub", lambda: answers(self.path, socket.SOCK_SEQPACKET))

    def dump(self) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.connect(str(self.path))
            asking.send(b'{"do": "dump"}')
            answer: dict[str, Any] = json.loads(asking.recv(1 << 16))
            return answer

    def held(self, domid: int) -> tuple[int, int, int]:
        """Ports and grants of a domain, and grants that are ending."""
        found = self.dump()
        ports = sum(entry["domid"] == domid for entry in found["ports"])
        grants = sum(entry["pages"] for entry in found["grants"] if entry["domid"] == domid)
        return ports, grants, found["deferred"]

    def attach(self, host: Host) -> tuple[int, tuple[int, ...]]:
        """What a supervisor does up to ATTACHED: the port and the references for the store."""
        with (
            EmbeddedEventChannels.open(self.directory, domid=GUEST) as channels,
            EmbeddedGrantAllocator.open(self.directory, domid=GUEST) as allocator,
        ):
            port = channels.bind_unbound(DOM0)
            granted = allocator.alloc(DOM0, 1 + POOL)
            host.pages = Pages(1, POOL)  # for attach_body(); nobody gets it
            host.pages.grefs = list(granted.grefs[1:])
            body = host.attach_body(
                port=port, ring_offset=granted.offset, pool_offset=granted.offset + PAGE
            )
            host.generation = 1
            host.supervisor.send(
                lib.PVF_CTL_ATTACH, body, 1, [channels.hand_over(port), allocator.hand_over()]
            )
        host.supervisor.wait(lib.PVF_CTL_ATTACHED)
        return port, granted.grefs


class Dom0:
    """A backend in this process that acts when it is told to."""

    def __init__(self, hub: Hub, port: int, grefs: tuple[int, ...], disk: bytearray) -> None:
        self.channels = EmbeddedEventChannels.open(hub.directory, domid=DOM0)
        self.mapper = EmbeddedGrantMapper.open(hub.directory, own_domid=DOM0)
        self.port = self.channels.bind_interdomain(GUEST, port)
        self.mapping = self.mapper.map(GUEST, grefs)
        self.pages = Mapped(self.mapping.memory, list(grefs[1:]))
        self.backend = Backend(self.pages, self, disk)  # type: ignore[arg-type]
        assert self.served()  # a fresh port fires once

    def notify(self) -> None:
        self.channels.notify(self.port)

    def served(self) -> bool:
        """Takes an event, if there is one, and does what is in the ring."""
        if not self.channels.read():
            return False
        self.backend.work()
        self.channels.unmask(self.port)
        return True

    def close(self) -> None:
        self.pages.close()
        self.mapping.unmap()
        self.mapper.close()
        self.channels.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.process.terminate()
    assert hub.process.wait(PATIENCE) == 0


def test_a_worker_serves_a_disk_over_a_hubs_port_and_pages(hub: Hub) -> None:
    with Host(pool_pages=POOL) as host:
        dom0 = Dom0(hub, *hub.attach(host), host.disk)
        host.start()
        nbd = host.nbd()
        for i in range(20):
            data = bytes([i]) * 8192
            handle = nbd.request(nbd.WRITE, 8192 * i, len(data), data)
            wait_for("the write's event", dom0.served)
            nbd.check(handle)
        assert host.disk[: 8192 * 20] == b"".join(bytes([i]) * 8192 for i in range(20))
        handle = nbd.request(nbd.READ, 8192, 4096)
        wait_for("the read's event", dom0.served)
        nbd.check(handle)
        assert nbd.exactly(4096) == b"\1" * 4096
        assert hub.held(GUEST) == (1, 1 + POOL, 0)
        host.detach()
        # The port is gone; the pages wait for who has mapped them.
        wait_for(
            "the port and the grants are given up", lambda: hub.held(GUEST) == (0, 0, 1 + POOL)
        )
        dom0.close()
        wait_for("the last grant's end", lambda: hub.dump()["deferred"] == 0)


@pytest.mark.parametrize("how", ["killed", "parked"])
def test_the_hub_takes_back_what_a_worker_held(hub: Hub, how: str) -> None:
    with Host(pool_pages=POOL) as host:
        dom0 = Dom0(hub, *hub.attach(host), host.disk)
        host.start()
        dom0.close()
        if how == "parked":
            host.detach(lib.PVF_DETACH_PARK)
            wait_for("the grants' end", lambda: hub.held(GUEST)[1:] == (0, 0))
            assert hub.held(GUEST)[0] == 1  # the port stays bound
        host.process.send_signal(signal.SIGKILL)
        host.process.wait(PATIENCE)
        wait_for("everything is given up", lambda: hub.held(GUEST) == (0, 0, 0))
