# SPDX-License-Identifier: BSD-2-Clause
"""The store client over both transports, against an in-memory store."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

import asyncio
import errno
import socket

import memstore
import pytest
from storeworld import HOME, as_a_guest, device, store, unix, world
from waiting import eventually

from pvfront import xenstore
from pvfront.xenstore import Permission, Xenstore, XenstoreError, XenstoreTimeout
from pvfront.xswire import Op

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
    await eventually("a full queue", lambda: len(store._link._queue) == 200 - world.limit)
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
        await eventually("the other request", lambda: store._link._requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not device.server.files[0].overwritten
        device.release()
        assert await other is None
        await eventually("the abort", lambda: not device.mem.clients[0].txns)


async def test_request_ids_wrap_without_touching_a_pending_request(unix):
    async with await unix.connect() as store:
        await store.write("data/x", "value")
        unix.hold()
        slow = asyncio.create_task(store.read("data/x"))
        await eventually("the slow request", lambda: store._link._requests)
        (pending,) = store._link._requests
        store._link._last_id = (pending - 2) & 0xFFFFFFFF
        others = [asyncio.create_task(store.read("data/x")) for _ in range(5)]
        await eventually("five more requests", lambda: len(store._link._requests) == 6)
        assert max(store._link._requests) <= 0xFFFFFFFF
        unix.release()
        assert set(await asyncio.gather(slow, *others)) == {"value"}


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
