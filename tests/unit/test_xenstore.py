# SPDX-License-Identifier: BSD-2-Clause
"""The store client over both transports, against an in-memory store."""

# ruff: noqa: PT012 (what raises is the whole `async for`/`async with` of a transaction)

import asyncio
import errno
import gc
import logging
import os
import socket
import struct
import threading
from dataclasses import dataclass

import memstore
import pytest

from pvfront import xenstore
from pvfront.errors import ClosedError
from pvfront.xenstore import Permission, Xenstore, XenstoreError, XenstoreLost, XenstoreTimeout
from pvfront.xswire import Op

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
        await eventually(lambda: not world.server.open_files, "the last descriptor's close")
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


async def eventually(condition, what):
    deadline = asyncio.get_running_loop().time() + 20
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail(f"{what} never came")
        await asyncio.sleep(0.005)


def packet(op: int, req_id: int, payload: bytes) -> bytes:
    return struct.pack("=IIII", op, req_id, 0, len(payload)) + payload


# -- nodes ------------------------------------------------------------------------------------


async def test_a_written_value_is_read_back(store, world):
    await store.write("data/greeting", "hello")
    assert await store.read("data/greeting") == "hello"
    assert world.mem.value(HOME + "data/greeting") == b"hello"


async def test_an_empty_value_is_a_value(store):
    await store.write("data/empty", "")
    assert await store.read("data/empty") == ""
    assert await store.read_bytes("data/empty") == b""


async def test_all_byte_values_survive_as_bytes_and_as_text(store):
    value = bytes(range(256))
    await store.write("data/bytes", value)
    assert await store.read_bytes("data/bytes") == value
    text = await store.read("data/bytes")
    await store.write("data/copy", text)
    assert await store.read_bytes("data/copy") == value


async def test_utf8_is_read_as_text(store):
    await store.write("data/name", "Füße ✓")
    assert await store.read("data/name") == "Füße ✓"


async def test_a_missing_node_is_an_error_or_none(store):
    with pytest.raises(
        FileNotFoundError,
        match=r"^xenstore: read data/nothing: ENOENT \(No such file or directory\)$",
    ) as caught:
        await store.read("data/nothing")
    assert (caught.value.errno, caught.value.path) == (errno.ENOENT, "data/nothing")
    assert await store.read_opt("data/nothing") is None


@as_a_guest
async def test_read_opt_hides_no_other_error(store, world):
    world.mem.set("/secret", b"x", perms="n0")
    with pytest.raises(XenstoreError) as caught:
        await store.read_opt("/secret")
    assert caught.value.errno == errno.EACCES


@as_a_guest
async def test_a_node_of_somebody_else_is_refused_with_its_path(store, world):
    world.mem.set(HOME + "memory/target", b"1", perms="r0")
    with pytest.raises(PermissionError, match=r"write memory/target: EACCES"):
        await store.write("memory/target", "2")
    assert world.mem.value(HOME + "memory/target") == b"1"


async def test_mkdir_makes_parents_and_leaves_what_exists(store):
    await store.mkdir("data/a/b")
    await store.write("data/a/b", "kept")
    await store.mkdir("data/a/b")
    assert await store.read("data/a/b") == "kept"
    assert await store.directory("data/a") == ["b"]


async def test_remove_takes_what_is_below_too(store):
    await store.write("data/a/b/c", "x")
    await store.remove("data/a")
    assert await store.read_opt("data/a/b/c") is None
    assert await store.directory("data") == []


async def test_removing_below_a_missing_parent_is_forgiven_only_on_request(store):
    with pytest.raises(FileNotFoundError):
        await store.remove("data/no/such")
    await store.remove("data/no/such", missing_ok=True)


async def test_the_directory_of_a_leaf_is_empty(store):
    await store.write("data/leaf", "x")
    assert await store.directory("data/leaf") == []


async def test_a_directory_too_large_for_one_message_is_read_in_parts(store, world):
    names = [f"child-with-a-long-name-{number:04}" for number in range(1000)]
    for name in names:
        world.mem.set(HOME + "data/large/" + name)
    assert sorted(await store.directory("data/large")) == names
    parts = [op for op, _, _ in world.sent() if op == memstore.DIRECTORY_PART]
    assert len(parts) == len(b"\0".join(n.encode() for n in names)) // 4096 + 1


async def test_a_large_directory_that_changes_meanwhile_is_read_again(store, world):
    for number in range(1000):
        world.mem.set(f"{HOME}data/large/name-{number:04}")
    honest = world.mem.part

    def changing(node, names, offset):
        reply = honest(node, names, offset)
        if offset and "late" not in world.mem.tree.nodes[b"/"].children:
            world.mem.part = honest
            world.mem.set(HOME + "data/large/late")
            node = world.mem.tree.get((HOME + "data/large").encode())
            names = b"".join(child + b"\0" for child in node.children)
            return honest(node, names, offset)
        return reply

    world.mem.part = changing
    found = await store.directory("data/large")
    assert len(found) == len(set(found)) == 1001
    assert "late" in found


async def test_a_directory_part_that_makes_no_sense_is_an_error(store, world):
    for number in range(1000):
        world.mem.set(f"{HOME}data/large/name-{number:04}")
    world.mem.part = lambda node, names, offset: b"17\0"
    with pytest.raises(XenstoreError, match="makes no sense"):
        await store.directory("data/large")


async def test_permissions_are_written_and_read(store):
    await store.write("data/mine", "x")
    assert (await store.get_permissions("data/mine"))[0] == Permission(5)
    wanted = [Permission(5), Permission(0, read=True, write=True), Permission(7, read=True)]
    await store.set_permissions("data/mine", wanted)
    assert await store.get_permissions("data/mine") == wanted


async def test_no_permissions_at_all_is_a_value_error(store):
    with pytest.raises(ValueError, match="at least one"):
        await store.set_permissions("data", [])


async def test_permissions_that_make_no_sense_are_an_error_of_that_call(store, world):
    world.mem.set(HOME + "data/odd", perms="n5,hello")
    with pytest.raises(XenstoreError, match="hello"):
        await store.get_permissions("data/odd")
    await store.write("data/odd", "the connection is fine")


async def test_the_path_of_a_domain_is_told(store):
    assert await store.domain_path(7) == "/local/domain/7"
    with pytest.raises(ValueError, match="40000"):
        await store.domain_path(40000)


@pytest.mark.parametrize("path", ["", "a b", "data/", "data\0x", "data\n"])
async def test_a_bad_path_never_reaches_the_store(store, world, path):
    with pytest.raises(XenstoreError) as caught:
        await store.read(path)
    assert caught.value.errno == errno.EINVAL
    assert world.sent() == []


@as_a_guest
async def test_the_largest_message_passes_and_one_byte_more_is_refused(store, world):
    world.mem.tree.get(b"/local/domain/5").perms = [b"n5"]
    limit = 4080 if world.kind == "device" else 4096
    room = limit - len("data/big") - 1
    # the store's own quota of 2048 bytes refuses it: it did arrive
    with pytest.raises(XenstoreError) as caught:
        await store.write("data/big", b"x" * room)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(XenstoreError, match=f"{limit + 1} bytes.* takes {limit}") as caught:
        await store.write("data/big", b"x" * (room + 1))
    assert caught.value.errno == errno.E2BIG
    await store.write("data/big", b"still in step")
    assert await store.read("data/big") == "still in step"


# -- many callers ------------------------------------------------------------------------------


async def test_a_hundred_callers_under_a_flood_of_events_get_their_own_answers(store, world):
    if world.kind == "device":
        world.server.max_read = 100  # most reads cut a packet
    flood = asyncio.Event()

    async def flooding():
        number = 0
        while not flood.is_set():
            for _ in range(50):
                number += 1
                world.mem.set(f"{HOME}data/flood/{number % 3000}", b"x")
            await asyncio.sleep(0)

    async def caller(number):
        for turn in range(10):
            await store.write(f"data/callers/{number}", f"{number}-{turn}")
            assert await store.read(f"data/callers/{number}") == f"{number}-{turn}"

    async with store.watch("data/flood") as watch, asyncio.TaskGroup() as group:
        flooder = group.create_task(flooding())
        async with asyncio.timeout(60), asyncio.TaskGroup() as callers:
            for number in range(100):
                callers.create_task(caller(number))
        flood.set()
        await flooder
        assert len(watch._pending) <= watch.MAX_PENDING
        assert (await anext(watch)).startswith("data/flood")


async def test_no_more_requests_are_in_flight_than_the_transport_allows(store, world):
    world.hold()
    calls = [asyncio.create_task(store.read("data/x", timeout=30)) for _ in range(200)]
    await eventually(lambda: len(store._link._queue) == 200 - world.limit, "a full queue")
    assert len(store._link._requests) == world.limit
    world.release()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, FileNotFoundError) for outcome in outcomes)


async def test_the_device_gets_the_next_request_only_after_the_reply_of_the_last(device):
    """Its one buffer holds the payload of a request until the kernel's thread has copied it."""
    async with await device.connect() as store:
        await asyncio.gather(*(store.write(f"data/{'x' * n}", f"{n}") for n in range(1, 60)))
        values = await asyncio.gather(*(store.read(f"data/{'x' * n}") for n in range(1, 60)))
        assert values == [str(n) for n in range(1, 60)]
        assert not device.server.files[0].overwritten


async def test_an_abort_waits_for_its_turn_too(device):
    async with await device.connect() as store:
        inside = asyncio.Event()

        async def body():
            async for txn in store.transaction():
                async with txn:
                    inside.set()
                    await asyncio.sleep(60)

        task = asyncio.create_task(body())
        await inside.wait()
        device.hold()
        other = asyncio.create_task(store.read_opt("data/x"))
        await eventually(lambda: store._link._requests, "the other request")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not device.server.files[0].overwritten
        device.release()
        assert await other is None
        await eventually(lambda: not device.mem.clients[0].txns, "the abort")


async def test_request_ids_wrap_without_touching_a_pending_request(unix):
    async with await unix.connect() as store:
        await store.write("data/x", "value")
        unix.hold()
        slow = asyncio.create_task(store.read("data/x"))
        await eventually(lambda: store._link._requests, "the slow request")
        (pending,) = store._link._requests
        store._link._last_id = (pending - 2) & 0xFFFFFFFF
        others = [asyncio.create_task(store.read("data/x")) for _ in range(5)]
        await eventually(lambda: len(store._link._requests) == 6, "five more requests")
        assert max(store._link._requests) <= 0xFFFFFFFF
        unix.release()
        assert set(await asyncio.gather(slow, *others)) == {"value"}


# -- timeouts and cancellation -----------------------------------------------------------------


async def test_a_store_that_does_not_answer_is_named_with_operation_and_path(store, world):
    world.hold()
    with pytest.raises(
        XenstoreTimeout, match=r"^xenstore: read data/x: no answer within 0.05 s$"
    ) as caught:
        await store.read("data/x", timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, XenstoreError)
    world.release()
    await store.write("data/x", "the late reply did no harm")
    assert await store.read("data/x") == "the late reply did no harm"


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.read("data", timeout=0.05),
        lambda s: s.read_opt("data", timeout=0.05),
        lambda s: s.write("data", "x", timeout=0.05),
        lambda s: s.mkdir("data", timeout=0.05),
        lambda s: s.remove("data", missing_ok=True, timeout=0.05),
        lambda s: s.directory("data", timeout=0.05),
        lambda s: s.get_permissions("data", timeout=0.05),
        lambda s: s.set_permissions("data", [Permission(5)], timeout=0.05),
        lambda s: s.domain_path(5, timeout=0.05),
        lambda s: s.transaction().__aiter__().__anext__(),
    ],
)
async def test_every_call_has_a_timeout(world, call):
    async with await world.connect(timeout=0.05) as store:
        world.hold()
        with pytest.raises(XenstoreTimeout):
            attempt = await call(store)
            await attempt.__aenter__()
        world.release()


async def test_a_caller_in_the_queue_times_out_too(store, world):
    world.hold()
    calls = [asyncio.create_task(store.read("data/x", timeout=30)) for _ in range(64)]
    await eventually(lambda: len(store._link._requests) == world.limit, "a full link")
    queued = len(store._link._queue)
    with pytest.raises(XenstoreTimeout):
        await store.read("data/y", timeout=0.05)
    assert len(store._link._queue) == queued
    world.release()
    await asyncio.gather(*calls, return_exceptions=True)
    assert not any(b"data/y" in payload for _, _, payload in world.sent())


async def test_calls_that_were_given_up_do_not_leak_places_in_the_queue(store, world):
    world.hold()
    calls = [asyncio.create_task(store.read("data/x")) for _ in range(64)]
    await eventually(lambda: len(store._link._requests) == world.limit, "a full link")
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    world.release()
    await eventually(lambda: not store._link._requests, "all late replies")
    await store.write("data/x", "fine")
    assert await asyncio.gather(*(store.read("data/x") for _ in range(64))) == ["fine"] * 64


async def test_a_transaction_that_starts_too_late_is_aborted(store, world):
    world.hold()
    store.timeout = 0.05
    with pytest.raises(XenstoreTimeout):
        async for txn in store.transaction():
            async with txn:
                raise AssertionError("never entered")
    world.release()
    await eventually(
        lambda: any(op == memstore.TRANSACTION_END and p == b"F\0" for op, _, p in world.sent()),
        "the abort of the late transaction",
    )
    await eventually(lambda: not any(c.txns for c in world.mem.clients), "no open transaction")


async def test_a_watch_that_is_set_too_late_is_taken_back(unix):
    async with await unix.connect(timeout=0.05) as store:
        unix.hold()
        with pytest.raises(XenstoreTimeout, match="watch data"):
            await store.watch("data").__aenter__()
        unix.release()
        await eventually(
            lambda: any(op == memstore.UNWATCH for op, _, _ in unix.sent()), "the unwatch"
        )
        await eventually(lambda: not unix.server.clients[0].watches, "no watch left")
        await eventually(lambda: not store._link._requests, "every reply")


# -- a connection that breaks ------------------------------------------------------------------

BREAKS = {
    "a reply that nobody asked for": (packet(memstore.READ, 999, b"x"), "request 999"),
    "a reply of another operation": (packet(memstore.WRITE, 0, b"OK\0"), "WRITE as the reply to"),
    "an unknown packet type": (packet(77, 0, b""), "unknown type 77"),
    "a packet larger than the protocol allows": (
        struct.pack("=IIII", memstore.READ, 0, 0, 0xFFFFFFFF),
        "4294967295 bytes",
    ),
    "an event without a token": (packet(memstore.WATCH_EVENT, 0, b"data"), "without path"),
    "an event for a watch never set": (
        packet(memstore.WATCH_EVENT, 0, b"data\0mytoken\0"),
        "mytoken",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
async def test_all_calls_fail_at_once_after(store, world, what):
    garbage, reason = BREAKS[what]
    world.hold()
    calls = [asyncio.create_task(store.read("data/x", timeout=60)) for _ in range(100)]
    await eventually(lambda: len(store._link._requests) == world.limit, "requests in flight")
    world.inject(garbage)
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {XenstoreLost}
    assert len(set(map(id, outcomes))) == 100
    assert all(reason in str(outcome) for outcome in outcomes)
    with pytest.raises(XenstoreLost, match=reason):
        await store.write("data/x", "later")
    with pytest.raises(XenstoreLost, match=reason):
        await store.watch("data").__aenter__()


async def test_a_store_that_hangs_up_fails_what_is_pending(store, world):
    world.hold()
    call = asyncio.create_task(store.read("data/x", timeout=60))
    await eventually(lambda: store._link._requests, "the request")
    world.hang_up()
    with pytest.raises(XenstoreLost, match=r"the store closed it$"):
        await call


async def test_a_packet_that_is_cut_short_is_told(store, world):
    world.hold()
    call = asyncio.create_task(store.read("data/x", timeout=60))
    await eventually(lambda: store._link._requests, "the request")
    world.inject(packet(memstore.READ, 0, b"half of it")[:-4])
    await asyncio.sleep(0.01)
    world.hang_up()
    with pytest.raises(XenstoreLost, match=r"in the middle of a packet \(22 bytes\)"):
        await call


async def test_a_watch_ends_when_its_connection_breaks(unix):
    async with await unix.connect() as store, store.watch("data") as watch:
        assert await anext(watch) == "data"
        waiting = asyncio.create_task(anext(watch))
        await asyncio.sleep(0)
        unix.hang_up()
        with pytest.raises(XenstoreLost, match="the store closed it"):
            await waiting


async def test_a_device_that_fails_to_read_fails_everything_with_that_reason(device):
    world = device
    async with await device.connect() as store:
        device.hold()
        calls = [asyncio.create_task(store.read("data/x", timeout=60)) for _ in range(100)]
        await eventually(lambda: len(store._link._requests) == world.limit, "requests in flight")
        device.server.files[0].break_down(error=errno.EIO)
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {(type(o), o.errno) for o in outcomes} == {(XenstoreLost, errno.EIO)}
        assert "read: EIO (Input/output error)" in str(outcomes[0])


async def test_a_device_that_fails_to_write_fails_everything(device):
    async with await device.connect() as store:
        device.server.write_errors[memstore.WRITE] = errno.EIO
        calls = [asyncio.create_task(store.write("data/x", "y", timeout=60)) for _ in range(3)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {(type(o), o.errno) for o in outcomes} == {(XenstoreLost, errno.EIO)}
        with pytest.raises(XenstoreLost, match="write: EIO"):
            await store.read("data/x")


async def test_a_message_that_the_device_refuses_concerns_only_its_caller(device):
    async with await device.connect() as store:
        device.server.write_errors[memstore.WRITE] = errno.ENOMEM
        for _ in range(100):  # more than there are places in the queue
            with pytest.raises(XenstoreError, match="write data/x: ENOMEM") as caught:
                await store.write("data/x", "y")
            assert not isinstance(caught.value, XenstoreLost)
        device.server.write_errors.clear()
        await store.write("data/x", "y")


async def test_a_watch_on_a_broken_device_ends(device):
    async with await device.connect() as store, store.watch("data") as watch:
        assert await anext(watch) == "data"
        device.server.files[1].break_down(error=errno.EIO)
        with pytest.raises(XenstoreLost, match="EIO"):
            await anext(watch)


async def test_closing_ends_calls_and_watches_that_wait(world):
    store = await world.connect()
    async with asyncio.TaskGroup() as group:
        entered = asyncio.Event()

        async def watching():
            with pytest.raises(XenstoreLost, match="closed by this process"):
                async with store.watch("data") as watch:
                    async for _ in watch:
                        entered.set()

        group.create_task(watching())
        await entered.wait()
        world.hold()
        call = group.create_task(expect_lost(store.read("data/x", timeout=60)))
        await eventually(lambda: store._link._requests, "the request")
        await store.close()
        await call
    await store.close()
    with pytest.raises(XenstoreLost, match="closed by this process"):
        await store.read("data/x")
    world.release()


async def expect_lost(call):
    with pytest.raises(XenstoreLost, match="closed by this process"):
        await call


async def test_a_store_that_is_forgotten_open_warns(device):
    store = await device.connect()
    link = store._link
    with pytest.warns(ResourceWarning, match="never closed"):  # noqa: PT031
        del store
        gc.collect()
    await link.close()


# -- connecting --------------------------------------------------------------------------------


async def test_no_store_at_all_says_what_to_look_for(monkeypatch, tmp_path):
    monkeypatch.setattr(xenstore, "DEVICE_PATH", str(tmp_path / "xenbus"))
    monkeypatch.setenv("XENSTORED_PATH", str(tmp_path / "socket"))
    with pytest.raises(XenstoreError, match="no store found") as caught:
        await Xenstore.connect()
    assert caught.value.errno == errno.ENOENT
    assert "is this a Xen guest?" in caught.value.hint
    assert str(tmp_path / "socket") in caught.value.hint


async def test_the_device_is_preferred_to_the_socket(monkeypatch, device, tmp_path):
    monkeypatch.setattr(xenstore, "DEVICE_PATH", "/dev/null")
    monkeypatch.setenv("XENSTORED_PATH", str(tmp_path / "socket"))
    async with await Xenstore.connect() as store:
        assert store.path == "/dev/null"


async def test_the_socket_named_by_the_environment_is_found(monkeypatch, unix, tmp_path):
    monkeypatch.setattr(xenstore, "DEVICE_PATH", str(tmp_path / "no-device"))
    monkeypatch.setenv("XENSTORED_PATH", unix.path)
    async with await Xenstore.connect() as store:
        await store.write("data/x", "y")


async def test_a_socket_without_a_server_says_so(tmp_path):
    import socket

    path = str(tmp_path / "dead")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(XenstoreError, match="ECONNREFUSED") as caught:
        await Xenstore.connect(path)
    assert caught.value.hint == "xenstored is not running"


# -- transactions ------------------------------------------------------------------------------


async def test_a_transaction_is_seen_by_others_only_when_it_has_committed(store, world):
    async for txn in store.transaction():
        async with txn:
            await txn.write("data/a", "1")
            await txn.write("data/b", "2")
            assert await txn.read("data/a") == "1"
            assert await store.read_opt("data/a") is None
    assert world.mem.value(HOME + "data/b") == b"2"


async def test_a_transaction_that_raises_changes_nothing(store, world):
    with pytest.raises(RuntimeError, match="on purpose"):
        async for txn in store.transaction():
            async with txn:
                await txn.write("data/a", "1")
                raise RuntimeError("on purpose")
    assert await store.read_opt("data/a") is None
    assert not any(client.txns for client in world.mem.clients)


async def test_a_cancelled_transaction_is_aborted(store, world):
    inside = asyncio.Event()

    async def body():
        async for txn in store.transaction():
            async with txn:
                await txn.write("data/a", "1")
                inside.set()
                await asyncio.sleep(60)

    task = asyncio.create_task(body())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.read_opt("data/a") is None
    assert not any(client.txns for client in world.mem.clients)


async def test_a_conflicting_transaction_runs_again(store, world):
    await store.write("data/counter", "0")
    rounds = 0
    async for txn in store.transaction():
        async with txn:
            rounds += 1
            value = int(await txn.read("data/counter"))
            if rounds <= 3:
                world.mem.set(HOME + "data/counter", b"%d" % (10 * rounds))
            await txn.write("data/counter", str(value + 1))
    assert rounds == 4
    assert await store.read("data/counter") == "31"


async def test_a_transaction_that_always_conflicts_gives_up(store, world):
    world.mem.on_commit = lambda: world.mem.set(HOME + "data/x", b"theirs")
    rounds = 0
    with pytest.raises(XenstoreError, match="still in conflict after 4 attempts") as caught:
        async for txn in store.transaction(retries=3):
            async with txn:
                rounds += 1
                await txn.write("data/x", "ours")
    assert (rounds, caught.value.errno) == (4, errno.EAGAIN)
    assert await store.read("data/x") == "theirs"


async def test_another_error_at_the_commit_is_raised(store, world):
    def forget():
        for client in world.mem.clients:
            client.txns.clear()

    with pytest.raises(XenstoreError, match="transaction_end") as caught:
        async for txn in store.transaction():
            async with txn:
                await txn.write("data/x", "y")
                forget()
    assert caught.value.errno == errno.ENOENT


async def test_a_hundred_concurrent_increments_are_all_counted(store):
    await store.write("data/counter", "0")

    async def increment():
        async for txn in store.transaction():
            async with txn:
                await txn.write("data/counter", str(int(await txn.read("data/counter")) + 1))

    async with asyncio.timeout(60):
        await asyncio.gather(*(increment() for _ in range(100)))
    assert await store.read("data/counter") == "100"


async def test_all_operations_work_in_a_transaction(store):
    await store.write("data/old", "x")
    async for txn in store.transaction():
        async with txn:
            await txn.mkdir("data/dir")
            await txn.write("data/dir/leaf", b"\xff")
            await txn.set_permissions("data/dir", [Permission(5), Permission(0, read=True)])
            await txn.remove("data/old")
            assert await txn.directory("data") == ["dir"]
            assert await txn.read_bytes("data/dir/leaf") == b"\xff"
            assert await txn.read_opt("data/old") is None
            assert len(await txn.get_permissions("data/dir")) == 2
    assert await store.directory("data") == ["dir"]


async def test_a_finished_transaction_cannot_be_used(store):
    async for txn in store.transaction():
        async with txn:
            pass
    with pytest.raises(ClosedError, match="no open transaction"):
        await txn.read("data")


async def test_a_conflict_that_nobody_repeats_is_logged(store, world, caplog):
    async def leave_early():
        async for txn in store.transaction():
            async with txn:
                await txn.write("data/x", "ours")
                return

    world.mem.on_commit = lambda: world.mem.set(HOME + "data/x", b"theirs")
    with caplog.at_level(logging.ERROR, logger="pvfront.xenstore"):
        await leave_early()
        gc.collect()
    assert "its changes are lost" in caplog.text


@pytest.mark.parametrize("answer", [b"0\0", b"hello\0", b"\0", b"-1\0", b"99999999999\0"])
async def test_a_transaction_id_that_makes_no_sense_is_an_error(store, world, answer):
    honest = world.mem.perform

    def lying(client, op, tx_id, payload, after):
        return (
            answer
            if op == memstore.TRANSACTION_START
            else honest(client, op, tx_id, payload, after)
        )

    world.mem.perform = lying
    for _ in range(5):  # more than there are places for transactions
        with pytest.raises(XenstoreError, match="no transaction id"):
            async for txn in store.transaction():
                async with txn:
                    raise AssertionError("never entered")
    assert await store.read_opt("data") is None


# -- watches -----------------------------------------------------------------------------------


async def test_the_first_event_names_the_watched_path(store):
    async with store.watch("data/x") as watch:
        assert await anext(watch) == "data/x"


async def test_events_below_the_path_come_relative_or_absolute_as_it_was_given(store, world):
    async with store.watch("data") as relative, store.watch(HOME + "data") as absolute:
        assert await anext(relative) == "data"
        assert await anext(absolute) == HOME + "data"
        world.mem.set(HOME + "data/new", b"x")
        assert await anext(relative) == "data/new"
        assert await anext(absolute) == HOME + "data/new"


@pytest.mark.parametrize("home", ["local/domain/5", "/local/domain/5/", ""])
async def test_a_home_that_is_no_absolute_directory_is_a_value_error(unix, home):
    with pytest.raises(ValueError, match="home"):
        await Xenstore.connect(unix.path, home=home)


async def test_events_of_one_path_that_nobody_took_become_one(store, world):
    async with store.watch("data") as watch:
        assert await anext(watch) == "data"
        for number in range(1000):
            world.mem.set(HOME + "data/a", b"%d" % number)
            world.mem.set(HOME + "data/b", b"%d" % number)
        world.mem.set(HOME + "data/last")
        await eventually(lambda: "data/last" in watch._pending, "the last event")
        assert [await anext(watch) for _ in range(3)] == ["data/a", "data/b", "data/last"]
        assert not watch._pending


async def test_too_many_different_paths_become_one_event_for_the_watched_path(store, world):
    async with store.watch("data") as watch:
        assert await anext(watch) == "data"
        for number in range(watch.MAX_PENDING * 3):
            world.mem.set(f"{HOME}data/{number}")
            assert len(watch._pending) <= watch.MAX_PENDING
        last = f"data/{watch.MAX_PENDING * 3 - 1}"
        await eventually(lambda: last in watch._pending, "the last event")
        seen = [await anext(watch) for _ in range(len(watch._pending))]
        assert seen[0] == "data"
        assert len(seen) <= watch.MAX_PENDING


async def test_two_watches_of_the_same_path_both_fire(store, world):
    async with store.watch("data") as one, store.watch("data") as two:
        assert await anext(one) == await anext(two) == "data"
        world.mem.set(HOME + "data/x")
        assert await anext(one) == await anext(two) == "data/x"


async def test_a_watch_is_gone_from_the_store_after_its_block(store, world):
    async with store.watch("data"):
        assert sum(len(client.watches) for client in world.mem.clients) == 1
    await eventually(
        lambda: not any(client.watches for client in world.mem.clients), "the end of the watch"
    )
    world.mem.set(HOME + "data/x")
    assert await store.read("data/x") == ""


async def test_a_watch_cannot_be_used_outside_of_its_block(store):
    watch = store.watch("data")
    with pytest.raises(ClosedError):
        await anext(watch)
    async with watch:
        pass
    with pytest.raises(ClosedError):
        await anext(watch)
    with pytest.raises(RuntimeError, match="only once"):
        await watch.__aenter__()


async def test_a_cancelled_wait_loses_no_event(store, world):
    async with store.watch("data") as watch:
        assert await anext(watch) == "data"
        for number in range(50):
            waiting = asyncio.create_task(anext(watch))
            await asyncio.sleep(0)
            world.mem.set(f"{HOME}data/{number}")
            if number % 2:
                await asyncio.sleep(0.001)
            waiting.cancel()
            try:
                got = await waiting
            except asyncio.CancelledError:
                got = await asyncio.wait_for(anext(watch), 20)
            assert got == f"data/{number}"


async def test_special_watches_are_possible(store, world):
    async with store.watch("@releaseDomain") as watch:
        assert await anext(watch) == "@releaseDomain"


async def test_an_event_for_a_watch_that_just_ended_is_ignored(unix):
    async with await unix.connect() as store:
        async with store.watch("data"):
            pass
        unix.inject(packet(memstore.WATCH_EVENT, 0, b"data\x000\0"))
        await store.write("data/x", "still fine")


async def test_a_watch_that_the_store_refuses_is_an_error(unix):
    async with await unix.connect() as store:
        await store.mkdir("data")
        unix.server.clients[0].watches.append((b"/local/domain/5/data", b"0", True))
        with pytest.raises(FileExistsError, match="watch data: EEXIST"):
            await store.watch("data").__aenter__()


async def test_a_watch_that_the_device_refuses_is_the_errno_of_the_write(device):
    async with await device.connect() as store:
        device.server.write_errors[memstore.WATCH] = errno.EEXIST
        with pytest.raises(FileExistsError, match="watch data: EEXIST"):
            await store.watch("data").__aenter__()
        await eventually(lambda: len(device.server.open_files) == 1, "the descriptor's close")
        await store.write("data/x", "still fine")


async def test_each_watch_on_the_device_has_a_descriptor_of_its_own(device):
    async with await device.connect() as store:
        async with store.watch("data") as one, store.watch("data/x") as two:
            assert len(device.server.open_files) == 3
            assert await anext(one) == "data"
            assert await anext(two) == "data/x"
        await eventually(lambda: len(device.server.open_files) == 1, "both descriptors' close")


async def test_a_watch_is_never_written_where_a_reply_is_pending(device):
    """The kernel's reader thread would wait for the writer, and the writer for it."""
    async with await device.connect() as store:
        device.hold()
        pending = asyncio.create_task(store.read_opt("data/x"))
        await eventually(lambda: store._link._requests, "the pending request")
        async with store.watch("data") as watch:
            assert await anext(watch) == "data"
        device.release()
        assert await pending is None
        assert not any(file.deadlocked for file in device.server.files)


async def test_the_request_descriptor_refuses_watches_and_the_watch_descriptor_all_else(device):
    async with await device.connect() as store:
        for op in (Op.WATCH, Op.UNWATCH):
            with pytest.raises(ValueError, match="must not be sent on this descriptor"):
                await store._link.request(op, "data", b"data\0x\0")
        async with store.watch("data") as watch:
            for op in (Op.UNWATCH, Op.READ, Op.TRANSACTION_START):
                with pytest.raises(ValueError, match="must not be sent on this descriptor"):
                    await watch._link.request(op, "data", b"data\0")


async def test_unwatch_is_never_sent_to_the_device(device):
    async with await device.connect() as store, store.watch("data"):
        pass
    assert memstore.UNWATCH not in [op for op, _, _ in device.sent()]


async def test_a_watch_that_the_device_does_not_accept_yet_blocks_nobody_else(device):
    gate = device.server.watch_gate = threading.Event()
    async with await device.connect() as store:
        watching = asyncio.create_task(store.watch("data").__aenter__())
        await eventually(lambda: len(device.server.files) == 2, "the watch's descriptor")
        await store.write("data/x", "meanwhile")
        assert await store.read("data/x") == "meanwhile"
        assert not watching.done()
        gate.set()
        watch = await watching
        assert await anext(watch) == "data"
        await watch.__aexit__(None, None, None)


async def test_a_watch_that_times_out_gives_its_descriptor_back_when_the_write_returns(device):
    gate = device.server.watch_gate = threading.Event()
    async with await device.connect(timeout=0.05) as store:
        with pytest.raises(XenstoreTimeout, match="watch data"):
            await store.watch("data").__aenter__()
        assert len(device.server.open_files) == 2, "closed under the thread that writes to it"
        gate.set()
        await eventually(
            lambda: len(device.server.open_files) == 1, "the watch's descriptor closed"
        )


async def test_no_descriptor_left_for_a_watch_is_an_error_with_its_path(device, monkeypatch):
    async with await device.connect() as store:

        def none_left(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(xenstore, "_open_device", none_left)
        with pytest.raises(XenstoreError, match="watch data: EMFILE"):
            await store.watch("data").__aenter__()


async def test_a_whole_session_sends_nothing_but_known_operations(store, world):
    await store.write("data/a", "1")
    await store.directory("data")
    await store.get_permissions("data")
    await store.domain_path(5)
    async for txn in store.transaction():
        async with txn:
            await txn.remove("data/a")
    async with store.watch("data") as watch:
        await anext(watch)
    sent = {op for op, _, _ in world.sent()}
    assert memstore.RESET_WATCHES not in sent
    assert sent <= {int(op) for op in Op}


async def test_a_store_whose_queue_is_full_is_waited_for(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(XenstoreTimeout):
            await Xenstore.connect(path, timeout=0.2)
        connecting = asyncio.create_task(Xenstore.connect(path, timeout=20))
        await asyncio.sleep(0.05)
        assert not connecting.done()
        listener.accept()[0].close()
        store = await connecting
        await store.close()
