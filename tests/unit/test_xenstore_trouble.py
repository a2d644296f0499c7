# SPDX-License-Identifier: BSD-2-Clause
"""The store client when the store does not answer, answers nonsense, or goes."""

# ruff: noqa: PT012 (what raises is the whole `async for`/`async with` of a transaction)
# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

import asyncio
import errno
import gc
import struct

import memstore
import pytest
from storeworld import device, packet, store, unix, world
from waiting import eventually

from pvfront.xenstore import Permission, XenstoreError, XenstoreLost, XenstoreTimeout

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
    async with await world.connect() as store:
        store.timeout = 0.05
        world.hold()
        with pytest.raises(XenstoreTimeout):
            attempt = await call(store)
            await attempt.__aenter__()
        world.release()


async def test_a_call_without_time_waits_for_no_answer_however_quick_it_is(store):
    for _ in range(20):
        with pytest.raises(XenstoreTimeout):
            await store.write("data/late", "x", timeout=0)
    await store.write("data/next", "y")
    assert await store.read("data/next") == "y"
    assert await store.read("data/late") == "x"


async def test_a_caller_in_the_queue_times_out_too(store, world):
    world.hold()
    calls = [asyncio.create_task(store.read("data/x", timeout=30)) for _ in range(64)]
    await eventually("a full link", lambda: len(store._link._requests) == world.limit)
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
    await eventually("a full link", lambda: len(store._link._requests) == world.limit)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    world.release()
    await eventually("all late replies", lambda: not store._link._requests)
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
        "the abort of the late transaction",
        lambda: any(op == memstore.TRANSACTION_END and p == b"F\0" for op, _, p in world.sent()),
    )
    await eventually("no open transaction", lambda: not any(c.txns for c in world.mem.clients))


async def test_a_watch_that_is_set_too_late_is_taken_back(unix):
    async with await unix.connect() as store:
        store.timeout = 0.05
        unix.hold()
        with pytest.raises(XenstoreTimeout, match="watch data"):
            await store.watch("data").__aenter__()
        unix.release()
        await eventually(
            "the unwatch", lambda: any(op == memstore.UNWATCH for op, _, _ in unix.sent())
        )
        await eventually("no watch left", lambda: not unix.server.clients[0].watches)
        await eventually("every reply", lambda: not store._link._requests)


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
    await eventually("requests in flight", lambda: len(store._link._requests) == world.limit)
    world.inject(garbage)
    async with asyncio.timeout(60):
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
    await eventually("the request", lambda: store._link._requests)
    world.hang_up()
    with pytest.raises(XenstoreLost, match=r"the store closed it$"):
        await call


async def test_a_packet_that_is_cut_short_is_told(store, world):
    world.hold()
    call = asyncio.create_task(store.read("data/x", timeout=60))
    await eventually("the request", lambda: store._link._requests)
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
        await eventually("requests in flight", lambda: len(store._link._requests) == world.limit)
        device.server.files[0].break_down(error=errno.EIO)
        async with asyncio.timeout(60):
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
        await eventually("the request", lambda: store._link._requests)
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


async def test_a_request_is_late_by_the_time_since_it_was_sent_or_the_store_last_answered(
    store, world
):
    """What waits in our own queue is not the store's fault, as long as that moves."""
    world.hold()
    calls = [asyncio.create_task(store.read("data/x", timeout=60)) for _ in range(world.limit + 1)]
    link, now = store._link, asyncio.get_running_loop().time
    await eventually("one more than may be sent", lambda: len(link._queue) == 1)
    (queued,), sent = link._queue, next(iter(link._requests.values()))
    queued.since -= 1000
    link._heard = now()
    link._late(queued, 60)
    assert not queued.reply.done()
    link._heard -= 1000
    link._late(queued, 60)
    with pytest.raises(XenstoreTimeout, match="no answer within 60 s"):
        await calls[-1]
    assert not link._queue
    link._heard = now()
    link._late(sent, 60)
    assert not sent.reply.done()
    sent.since -= 1000
    link._late(sent, 60)
    with pytest.raises(XenstoreTimeout, match="no answer within 60 s"):
        await calls[0]
    world.release()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_transactions_go_before_what_waits_outside_of_them(store, world):
    await store.write("data/x", "x")
    world.hold()
    reads = [asyncio.create_task(store.read("data/x")) for _ in range(10 * world.limit)]
    await eventually("a full link", lambda: len(store._link._requests) == world.limit)

    async def increment():
        async for txn in store.transaction():
            async with txn:
                await txn.write("data/y", "y")

    transaction = asyncio.create_task(increment())
    await eventually("the transaction in the queue", lambda: store._link._first)
    world.release()
    await transaction
    await asyncio.gather(*reads)
    ops = [op for op, _, _ in world.sent()]
    end = ops.index(memstore.TRANSACTION_END)
    assert ops[:end].count(memstore.READ) <= 5 * world.limit  # a turn of others for each request
