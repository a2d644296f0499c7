# SPDX-License-Identifier: BSD-2-Clause
"""One watch for all who follow something in a directory."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

import contextlib
import errno

import memstore
import pytest
from storeworld import HOME, device, store, unix, world
from waiting import eventually

from pvfront import sharedwatch
from pvfront.sharedwatch import Following
from pvfront.xenstore import XenstoreLost


def watches(world):
    return [payload for op, _, payload in world.sent() if op == memstore.WATCH]


async def told(following, path):
    """Waits for this event; what else came with it."""
    seen = set()
    while path not in seen:
        seen |= await following.news()
    return seen


async def test_all_who_follow_something_in_a_directory_share_one_watch(store, world):
    async with contextlib.AsyncExitStack() as stack:
        for number in range(40):
            following = Following(store, "data", f"data/{number}")
            assert await stack.enter_async_context(following) is following
            assert "data" in await told(following, "data") if not number else True
        world.mem.set(f"{HOME}data/39/state", b"4")
        await told(following, "data/39/state")
    assert len(watches(world)) == 1


async def test_a_follower_is_told_what_happens_at_it_below_and_above_and_nothing_else(store, world):
    for name in ("a/state", "b/state", "aa/state"):
        world.mem.set(f"{HOME}data/{name}", b"1")
    async with Following(store, "data", "data/a") as a, Following(store, "data", "data/b") as b:
        await told(a, "data")
        await told(b, "data")
        world.mem.set(f"{HOME}data/aa/state", b"2")
        world.mem.set(f"{HOME}data/a/state", b"2")
        world.mem.set(f"{HOME}data/b", b"2")
        assert await a.news() == {"data/a/state"}
        assert await told(b, "data/b") == {"data/b"}
        await store.remove("data")
        await told(a, "data")
        await told(b, "data")


async def test_events_that_nobody_took_become_one_set_and_a_flood_the_followed_path(store, world):
    async with Following(store, "data", "data/a") as a, Following(store, "data", "data") as whole:
        await told(a, "data")
        await told(whole, "data")
        for number in range(2000):
            world.mem.set(f"{HOME}data/a/{number}")
        world.mem.set(f"{HOME}data/last")
        while not {"data", "data/last"} & await whole.news():
            pass
        assert {"data", "data/a"} & await a.news()


async def test_who_joins_a_watch_that_is_set_already_is_told_that_it_is_live(store, world):
    async with Following(store, "data", "data/a") as a:
        assert not a.live
        await told(a, "data")
        async with Following(store, "data", "data/b") as b:
            assert b.live
            world.mem.set(f"{HOME}data/b/state")
            assert await b.news() == {"data/b/state"}
    assert not a.live


async def test_the_watch_ends_with_its_last_follower_and_the_next_one_has_another(store, world):
    for turn in (1, 2):
        async with Following(store, "data", "data/a") as a:
            async with Following(store, "data", "data/a") as b:
                await told(a, "data")
            world.mem.set(f"{HOME}data/a/state", b"%d" % turn)
            await told(a, "data/a/state")
            assert await b.news()  # what it was told before it left, or with the other
        assert len(watches(world)) == turn


async def test_the_loss_of_the_connection_is_told_to_all(store, world):
    async with Following(store, "data", "data/a") as a, Following(store, "data", "data/b") as b:
        await told(a, "data")
        await told(b, "data")
        if world.kind == "device":  # the watch has a descriptor of its own
            for file in world.server.files:
                file.break_down()
        else:
            world.hang_up()
        for following in (a, b):
            with pytest.raises(XenstoreLost):
                await following.news()


async def test_a_watch_that_the_store_refuses_is_asked_for_again(device, monkeypatch, caplog):
    monkeypatch.setattr(sharedwatch, "AGAIN", 0.01)
    device.server.write_errors[memstore.WATCH] = errno.E2BIG  # the quota
    async with await device.connect() as store, Following(store, "data", "data/a") as a:
        await eventually("the refusal", lambda: "E2BIG" in caplog.text)
        assert not a.live
        device.server.write_errors.clear()
        await told(a, "data")
        assert a.live
