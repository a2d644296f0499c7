# SPDX-License-Identifier: BSD-2-Clause
"""The store client against a store that nobody here wrote: Debian's oxenstored, without Xen."""

import asyncio
import errno

import pytest

from pvfront.errors import PvfrontError
from pvfront.host.store import SOCKET_NAME, find, start
from pvfront.xenstore import Permission, Xenstore, XenstoreError


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    try:
        find()
    except PvfrontError as error:
        pytest.skip(f"{error}")
    folder = tmp_path_factory.mktemp("oxenstored")
    # Values up to a whole message: it is the client that is tested, not the quota.
    child = asyncio.run(start(folder, {"quota-maxentity": 5000, "quota-maxsize": 8192}))
    yield str(folder / SOCKET_NAME)
    assert child.process.poll() is None, f"oxenstored died in these tests: {child.said()}"
    asyncio.run(child.stop())


@pytest.fixture
async def store(daemon):
    async with await Xenstore.connect(daemon) as connected:
        yield connected
        await connected.remove("/test", missing_ok=True)


async def test_values_of_every_kind_survive(store):
    for value in (b"", b"hello", bytes(range(256)), b"x" * 4000):
        await store.write("/test/value", value)
        assert await store.read_bytes("/test/value") == value


async def test_directories_permissions_and_removal(store):
    await store.write("/test/a/b", "x")
    await store.mkdir("/test/c")
    assert sorted(await store.directory("/test")) == ["a", "c"]
    wanted = [Permission(0), Permission(7, read=True), Permission(8, write=True)]
    await store.set_permissions("/test/c", wanted)
    assert await store.get_permissions("/test/c") == wanted
    await store.remove("/test/a")
    assert await store.read_opt("/test/a/b") is None
    with pytest.raises(FileNotFoundError):
        await store.remove("/test/no/such")
    await store.remove("/test/no/such", missing_ok=True)
    assert await store.domain_path(7) == "/local/domain/7"


async def test_a_directory_beyond_one_message(store):
    names = [f"a-rather-long-name-of-a-child-{number:05}" for number in range(1000)]
    await asyncio.gather(*(store.mkdir(f"/test/large/{name}") for name in names))
    assert sorted(await store.directory("/test/large")) == names


async def test_the_largest_message_is_taken_and_one_byte_more_refused_here(store):
    room = 4096 - len("/test/big") - 1
    await store.write("/test/big", b"x" * room)
    with pytest.raises(XenstoreError) as caught:
        await store.write("/test/big", b"x" * (room + 1))
    assert caught.value.errno == errno.E2BIG
    assert len(await store.read_bytes("/test/big")) == room


async def test_a_conflicting_transaction_runs_again(store, daemon):
    await store.write("/test/counter", "0")
    rounds = 0
    async with await Xenstore.connect(daemon) as other:
        async for txn in store.transaction():
            async with txn:
                rounds += 1
                value = int(await txn.read("/test/counter"))
                if rounds == 1:
                    await other.write("/test/counter", "41")
                await txn.write("/test/counter", str(value + 1))
    assert rounds == 2
    assert await store.read("/test/counter") == "42"


async def test_concurrent_increments_from_several_connections_are_all_counted(store, daemon):
    await store.write("/test/counter", "0")

    async def increments(count):
        async with await Xenstore.connect(daemon) as own:
            for _ in range(count):
                async for txn in own.transaction():
                    async with txn:
                        value = int(await txn.read("/test/counter"))
                        await txn.write("/test/counter", str(value + 1))

    async with asyncio.timeout(60):
        await asyncio.gather(*(increments(10) for _ in range(5)))
    assert await store.read("/test/counter") == "50"


async def test_watches_see_others_write_and_end_with_their_block(store, daemon):
    async with await Xenstore.connect(daemon) as other:
        async with store.watch("/test") as watch:
            assert await asyncio.wait_for(anext(watch), 60) == "/test"
            await other.write("/test/x", "1")
            async with asyncio.timeout(60):
                async for fired in watch:
                    if fired == "/test/x":
                        break
        await other.write("/test/x", "2")
        assert await store.read("/test/x") == "2"


async def test_a_hundred_callers_under_watch_events(store):
    async def caller(number):
        for turn in range(5):
            await store.write(f"/test/callers/{number}", f"{number}-{turn}")
            assert await store.read(f"/test/callers/{number}") == f"{number}-{turn}"

    async with store.watch("/test/callers") as watch, asyncio.timeout(60):
        await asyncio.gather(*(caller(number) for number in range(100)))
        assert (await anext(watch)).startswith("/test/callers")


async def test_an_aborted_transaction_changes_nothing(store):
    async def body():
        async for txn in store.transaction():
            async with txn:
                await txn.write("/test/a", "1")
                raise RuntimeError("on purpose")

    for _ in range(30):
        with pytest.raises(RuntimeError, match="on purpose"):
            await body()
    assert await store.read_opt("/test/a") is None
