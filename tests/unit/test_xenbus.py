# SPDX-License-Identifier: BSD-2-Clause
"""Devices as the store shows them: what is read when, and what a view is made of."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import memstore
import pytest
from memstore import MemStore, SocketServer
from waiting import PATIENCE, eventually

from pvfront.states import XenbusState
from pvfront.xenbus import XenbusDevice
from pvfront.xenstore import Transaction, Xenstore, XenstoreError

B = 51728
GUEST = "/local/domain/5"
READABLE = "n0,r5"


def front(devid: int) -> str:
    return f"{GUEST}/device/vbd/{devid}"


def back(devid: int) -> str:
    return f"/local/domain/0/backend/vbd/5/{devid}"


class World:
    def __init__(self, store: Xenstore, server: SocketServer, mem: MemStore) -> None:
        self.store = store
        self.server = server
        self.mem = mem

    def plug(self, devid: int = B) -> None:
        for key, value in (("backend", back(devid)), ("backend-id", "0"), ("state", "1")):
            self.mem.set(f"{front(devid)}/{key}", value.encode(), "n5,r0")
        for key, value in (("state", "2"), ("online", "1")):
            self.mem.set(f"{back(devid)}/{key}", value.encode(), READABLE)

    def asked(self, op: int) -> list[str]:
        """The paths of all requests of a kind."""
        return [
            payload.partition(b"\0")[0].decode()
            for client in self.server.clients
            for asked, _, payload in client.ops
            if asked == op
        ]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    mem = MemStore()
    server = SocketServer(mem, domid=5)
    await server.start(str(tmp_path / "store"))
    async with await Xenstore.connect(str(tmp_path / "store")) as store:
        yield World(store, server, mem)
    await server.stop()


async def test_devices_share_two_watches(world: World) -> None:
    devids = range(B, B + 20 * 16, 16)
    async with AsyncExitStack() as stack:
        for devid in devids:
            world.plug(devid)
            device = await XenbusDevice.open(world.store, "vbd", devid)
            stack.push_async_callback(device.close)
        assert sorted(world.asked(memstore.WATCH)) == [back(B).rpartition("/")[0], "device"]
        world.mem.set(f"{back(B)}/state", b"4", READABLE)


async def test_an_event_costs_one_look_at_what_fired(world: World) -> None:
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    await eventually("what the watches' first events say", lambda: device.view.serial == 3)
    before = len(world.asked(memstore.READ))
    world.mem.set(f"{back(B)}/sectors", b"9", READABLE)
    world.mem.set(f"{back(B)}/state", b"4", READABLE)
    await device.until(
        lambda view: view.backend is XenbusState.CONNECTED, what="Connected", timeout=PATIENCE
    )
    assert world.asked(memstore.READ)[before:] == [f"{back(B)}/state", f"{back(B)}/online"]
    await device.close()


async def test_a_state_is_never_seen_without_the_online_of_the_same_transaction(
    world: World,
) -> None:
    """A detach writes both at once; the events come one by one, the state's first."""
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    await eventually("what the watches' first events say", lambda: device.view.serial == 3)
    world.mem.set(f"{back(B)}/online", b"0", READABLE, fired=False)
    world.mem.set(f"{back(B)}/state", b"5", READABLE)
    view = await device.until(
        lambda view: view.backend is XenbusState.CLOSING, what="Closing", timeout=PATIENCE
    )
    assert not view.online
    await device.close()


async def test_the_same_state_written_again_is_told(world: World) -> None:
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    await eventually("what the watches' first events say", lambda: device.view.serial == 3)
    told = device.view.told
    world.mem.set(f"{back(B)}/state", b"2", READABLE)
    await eventually("a look", lambda: device.view.told == told + 1)
    await device.write_state(XenbusState.CLOSING)
    await eventually("what we wrote", lambda: device.view.frontend is XenbusState.CLOSING)
    assert device.view.told == told + 1, "our own state is no news"
    await device.close()


async def test_a_look_that_began_before_our_write_does_not_take_it_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    usual, gate = world.store.read_opt, asyncio.Event()

    async def late(path: str, *, timeout: float | None = None) -> str | None:
        value = await usual(path)
        await gate.wait()
        return value

    monkeypatch.setattr(world.store, "read_opt", late)
    look = asyncio.create_task(device.refresh())
    last = f"device/vbd/{B}/backend"
    await eventually("its reads", lambda: world.asked(memstore.READ)[-1] == last)
    await device.write_state(XenbusState.CONNECTED)
    gate.set()
    assert (await look).frontend is XenbusState.CONNECTED
    await device.close()


async def test_what_may_not_be_read_is_not_there(world: World) -> None:
    """So says xenstored of a backend that the toolstack has removed."""
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    world.mem.set(f"{back(B)}/state", b"6", "n0")
    assert not (await device.refresh()).present
    await device.close()


async def test_a_device_is_closed_in_the_moment_in_which_a_read_fails(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gather() then forgets that it was cancelled."""
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    await eventually("what the watches' first events say", lambda: device.view.serial == 3)
    first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading: list[str] = []

    async def read_opt(path: str, *, timeout: float | None = None) -> str | None:
        reading.append(path)
        if not path.endswith("/state"):
            await asyncio.Event().wait()
        return await first

    monkeypatch.setattr(world.store, "read_opt", read_opt)
    world.mem.set(back(B), b"", READABLE)
    await eventually("two reads", lambda: len(reading) == 2)
    first.set_exception(XenstoreError(errno.EIO, "read", reading[0]))
    await asyncio.sleep(0)  # the read has failed, and nobody knows it yet
    async with asyncio.timeout(PATIENCE):
        await device.close()


async def test_what_another_has_written_after_our_own_state_is_not_overlooked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event of its write is read, and its value too, before the answer to our commit."""
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    await eventually("what the watches' first events say", lambda: device.view.serial == 3)
    usual = world.store.transaction

    async def transaction() -> AsyncIterator[Transaction]:
        async for attempt in usual():
            yield attempt
        world.mem.set(f"{front(B)}/state", b"5", "n5,r0")
        await eventually("a look", lambda: device.view.frontend is XenbusState.CLOSING)

    monkeypatch.setattr(world.store, "transaction", transaction)
    await device.write_state(XenbusState.CONNECTED)
    assert world.mem.value(f"{front(B)}/state") == b"5"
    assert device.view.frontend is XenbusState.CLOSING
    await device.close()


async def test_a_read_that_fails_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvfront.xenbus._LOOK_AGAIN", 0.0)
    world.plug()
    device = await XenbusDevice.open(world.store, "vbd", B)
    await eventually("what the watches' first events say", lambda: device.view.serial == 3)
    usual, failures = world.store.read_opt, 3

    async def read_opt(path: str, *, timeout: float | None = None) -> str | None:
        nonlocal failures
        if failures:
            failures -= 1
            raise XenstoreError(errno.EIO, "read", path)
        return await usual(path)

    monkeypatch.setattr(world.store, "read_opt", read_opt)
    world.mem.set(f"{back(B)}/state", b"4", READABLE)
    await device.until(
        lambda view: view.backend is XenbusState.CONNECTED, what="Connected", timeout=PATIENCE
    )
    await device.close()
