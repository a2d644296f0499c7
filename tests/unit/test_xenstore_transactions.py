# SPDX-License-Identifier: BSD-2-Clause
"""Transactions of the store client: all or nothing, again after a conflict, never left open."""

# ruff: noqa: PT012 (what raises is the whole `async for`/`async with` of a transaction)
# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

import asyncio
import errno
import gc
import logging

import memstore
import pytest
from storeworld import HOME, store, world

from pvfront.errors import ClosedError
from pvfront.xenstore import Permission, XenstoreError, XenstoreTimeout


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


async def test_a_transaction_that_waits_for_others_of_ours_does_not_blame_the_store(store):
    async for first in store.transaction():
        async with first:
            async for second in store.transaction():
                async with second:
                    usual, store.timeout = store.timeout, 0.05
                    with pytest.raises(XenstoreTimeout) as caught:
                        async for third in store.transaction():
                            async with third:
                                raise AssertionError("never entered")
                    store.timeout = usual
    assert str(caught.value) == (
        "xenstore: transaction: 2 transactions of this connection are open, "
        "and none ended within 0.05 s"
    )


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
