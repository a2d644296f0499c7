# SPDX-License-Identifier: BSD-2-Clause
"""Watches of the store client, and what is different about them on the device."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

import asyncio
import errno
import os
import threading

import memstore
import pytest
from storeworld import HOME, device, packet, store, unix, world
from waiting import eventually

from pvfront import xenstore
from pvfront.errors import ClosedError
from pvfront.xenstore import Xenstore, XenstoreError, XenstoreTimeout
from pvfront.xswire import Op


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
        await eventually("the last event", lambda: "data/last" in watch._pending)
        assert [await anext(watch) for _ in range(3)] == ["data/a", "data/b", "data/last"]
        assert not watch._pending


async def test_too_many_different_paths_become_one_event_for_the_watched_path(store, world):
    async with store.watch("data") as watch:
        assert await anext(watch) == "data"
        for number in range(watch.MAX_PENDING * 3):
            world.mem.set(f"{HOME}data/{number}")
            assert len(watch._pending) <= watch.MAX_PENDING
        last = f"data/{watch.MAX_PENDING * 3 - 1}"
        await eventually("the last event", lambda: last in watch._pending)
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
        "the end of the watch", lambda: not any(client.watches for client in world.mem.clients)
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
                got = await asyncio.wait_for(anext(watch), 60)
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
        await eventually("the descriptor's close", lambda: len(device.server.open_files) == 1)
        await store.write("data/x", "still fine")


async def test_each_watch_on_the_device_has_a_descriptor_of_its_own(device):
    async with await device.connect() as store:
        async with store.watch("data") as one, store.watch("data/x") as two:
            assert len(device.server.open_files) == 3
            assert await anext(one) == "data"
            assert await anext(two) == "data/x"
        await eventually("both descriptors' close", lambda: len(device.server.open_files) == 1)


async def test_a_watch_is_never_written_where_a_reply_is_pending(device):
    """The kernel's reader thread would wait for the writer, and the writer for it."""
    async with await device.connect() as store:
        device.hold()
        pending = asyncio.create_task(store.read_opt("data/x"))
        await eventually("the pending request", lambda: store._link._requests)
        async with store.watch("data") as watch:
            assert await anext(watch) == "data"
        device.release()
        assert await pending is None
        assert not any(file.deadlocked for file in device.server.files)


async def test_the_request_descriptor_refuses_watches_and_the_watch_descriptor_all_else(device):
    async with await device.connect() as store:
        for op in (Op.WATCH, Op.UNWATCH):
            with pytest.raises(ValueError, match="must not be sent on this descriptor"):
                await store._link.request(op, "data", b"data\0x\0", seconds=10.0)
        async with store.watch("data") as watch:
            for op in (Op.UNWATCH, Op.READ, Op.TRANSACTION_START):
                with pytest.raises(ValueError, match="must not be sent on this descriptor"):
                    await watch._link.request(op, "data", b"data\0", seconds=10.0)


async def test_unwatch_is_never_sent_to_the_device(device):
    async with await device.connect() as store, store.watch("data"):
        pass
    assert memstore.UNWATCH not in [op for op, _, _ in device.sent()]


async def test_a_watch_that_the_device_does_not_accept_yet_blocks_nobody_else(device):
    gate = device.server.watch_gate = threading.Event()
    async with await device.connect() as store:
        watching = asyncio.create_task(store.watch("data").__aenter__())
        await eventually("the watch's descriptor", lambda: len(device.server.files) == 2)
        await store.write("data/x", "meanwhile")
        assert await store.read("data/x") == "meanwhile"
        assert not watching.done()
        gate.set()
        watch = await watching
        assert await anext(watch) == "data"
        await watch.__aexit__(None, None, None)


async def test_a_watch_that_times_out_gives_its_descriptor_back_when_the_write_returns(device):
    gate = device.server.watch_gate = threading.Event()
    async with await device.connect() as store:
        store.timeout = 0.05
        with pytest.raises(XenstoreTimeout, match="watch data"):
            await store.watch("data").__aenter__()
        assert len(device.server.open_files) == 2, "closed under the thread that writes to it"
        gate.set()
        await eventually(
            "the watch's descriptor closed", lambda: len(device.server.open_files) == 1
        )


async def test_no_descriptor_left_for_a_watch_is_an_error_with_its_path(device, monkeypatch):
    async with await device.connect() as store:

        def none_left(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(xenstore, "_open_device", none_left)
        with pytest.raises(XenstoreError, match="watch data: EMFILE"):
            await store.watch("data").__aenter__()
