# SPDX-License-Identifier: BSD-2-Clause
"""The store in memory, and the ways to reach it, as the tests of its client want them.

A test module imports the fixtures that it uses, with those that they use.
"""

import struct
from dataclasses import dataclass

import memstore
import pytest
from waiting import eventually

from pvfront import xenstore
from pvfront.xenstore import Xenstore

HOME = "/local/domain/5/"


@dataclass
class World:
    """A store, one way to reach it, and what a test may do to that way."""

    mem: memstore.MemStore
    path: str
    server: memstore.SocketServer | memstore.Xenbus
    kind: str

    @property
    def limit(self) -> int:
        """Requests that may be in flight."""
        return 1 if self.kind == "device" else 64

    async def connect(self, timeout: float = 10.0) -> Xenstore:
        home = HOME.rstrip("/") if self.kind == "home" else None
        return await Xenstore.connect(self.path, timeout=timeout, home=home)

    def hold(self) -> None:
        """From now on the store does not answer."""
        self.server.hold = True

    def release(self) -> None:
        self.server.release()

    def sent(self) -> list[tuple[int, int, bytes]]:
        """Every request that came in, of all connections."""
        sources = self.server.files if self.kind == "device" else self.server.clients
        return [op for source in sources for op in getattr(source, "client", source).ops]

    def inject(self, data: bytes) -> None:
        """The first connection's stream contains `data` next."""
        if self.kind == "device":
            self.server.files[0].queue(data)
        else:
            self.server.writers[0].write(data)

    def hang_up(self) -> None:
        if self.kind == "device":
            self.server.files[0].break_down()
        else:
            self.server.writers[0].close()


async def make_world(kind, tmp_path, monkeypatch):
    mem = memstore.MemStore()
    mem.set(HOME.rstrip("/"), perms="n5")
    if kind == "device":
        bus = memstore.Xenbus(mem)
        monkeypatch.setattr(xenstore, "_open_device", bus.open)
        return World(mem, "/dev/null", bus, kind)
    server = memstore.SocketServer(mem, domid=0 if kind == "home" else 5)
    path = str(tmp_path / "socket")
    await server.start(path)
    return World(mem, path, server, kind)


async def end_world(world):
    if world.kind == "device":
        # A watch's descriptor is closed by its writing thread if that is the last to let go.
        await eventually("the last descriptor's close", lambda: not world.server.open_files)
        assert not any(file.deadlocked for file in world.server.files)
        assert not any(file.overwritten for file in world.server.files)
    else:
        await world.server.stop()


@pytest.fixture(params=["device", "socket", "home"])
async def world(request, tmp_path, monkeypatch):
    made = await make_world(request.param, tmp_path, monkeypatch)
    yield made
    await end_world(made)


as_a_guest = pytest.mark.parametrize("world", ["device", "socket"], indirect=True)
"""For what the store refuses to a guest; a connection with a home is domain 0's."""


@pytest.fixture
async def device(tmp_path, monkeypatch):
    made = await make_world("device", tmp_path, monkeypatch)
    yield made
    await end_world(made)


@pytest.fixture
async def unix(tmp_path, monkeypatch):
    made = await make_world("socket", tmp_path, monkeypatch)
    yield made
    await end_world(made)


@pytest.fixture
async def store(world):
    async with await world.connect() as connected:
        yield connected


def packet(op: int, req_id: int, payload: bytes) -> bytes:
    return struct.pack("=IIII", op, req_id, 0, len(payload)) + payload
