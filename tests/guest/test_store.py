# SPDX-License-Identifier: BSD-2-Clause
"""The store through the real /dev/xen/xenbus, shared with the kernel and everybody else."""

import asyncio
import errno
import subprocess
from pathlib import Path

import pytest

from pvfront.xenstore import Permission, Xenstore, XenstoreError

pytestmark = [pytest.mark.core, pytest.mark.services]


def tool(*arguments: str) -> str:
    """A stock xenstore tool: another process with a connection of its own."""
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def descriptors() -> int:
    """How many descriptors of the device this process has."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()) == "/dev/xen/xenbus"
        except FileNotFoundError:  # the descriptor of this very listing
            pass
    return count


async def test_what_we_write_stock_tools_read_and_the_other_way(store, scratch):
    await store.write(f"{scratch}/ours", "hello")
    assert tool("xenstore-read", f"{scratch}/ours") == "hello\n"
    tool("xenstore-write", f"{scratch}/theirs", "world")
    assert await store.read(f"{scratch}/theirs") == "world"


async def test_empty_and_8bit_values_survive_the_real_store(store, scratch):
    await store.write(f"{scratch}/empty", "")
    assert await store.read_bytes(f"{scratch}/empty") == b""
    value = bytes(range(256))
    await store.write(f"{scratch}/bytes", value)
    assert await store.read_bytes(f"{scratch}/bytes") == value


async def test_directories_and_removal(store, scratch):
    await store.write(f"{scratch}/a/b", "x")
    await store.mkdir(f"{scratch}/c")
    assert sorted(await store.directory(scratch)) == ["a", "c"]
    await store.remove(f"{scratch}/a")
    assert await store.directory(scratch) == ["c"]
    await store.remove(f"{scratch}/no/such", missing_ok=True)


async def test_a_missing_node_is_named(store, scratch):
    with pytest.raises(FileNotFoundError, match=rf"^xenstore: read {scratch}/nothing: ENOENT"):
        await store.read(f"{scratch}/nothing")
    assert await store.read_opt(f"{scratch}/nothing") is None


async def test_what_is_not_ours_cannot_be_written(store):
    before = await store.read("memory/target")
    with pytest.raises(PermissionError, match=r"write memory/target: EACCES") as caught:
        await store.write("memory/target", "1")
    assert caught.value.errno == errno.EACCES
    assert await store.read("memory/target") == before
    with pytest.raises(PermissionError):
        await store.mkdir("/tool/pvfront")


async def test_permissions_are_those_of_the_store(store, scratch, domid):
    await store.write(f"{scratch}/node", "x")
    assert (await store.get_permissions(f"{scratch}/node"))[0].domid == domid
    wanted = [Permission(domid), Permission(0, read=True, write=True)]
    await store.set_permissions(f"{scratch}/node", wanted)
    assert await store.get_permissions(f"{scratch}/node") == wanted
    listed = tool("xenstore-ls", "-p", scratch)
    assert f"(n{domid},b0)" in listed


async def test_our_path_is_where_the_store_has_us(store, scratch, domid):
    home = await store.domain_path(domid)
    assert home == f"/local/domain/{domid}"
    await store.write(f"{scratch}/x", "same node")
    assert await store.read(f"{home}/{scratch}/x") == "same node"


async def test_a_value_at_the_limit_of_the_device(store, scratch):
    path = f"{scratch}/big"
    room = 4080 - len(path) - 1
    # Beyond the quota of a node, so the store refuses what the device let through.
    with pytest.raises(XenstoreError) as caught:
        await store.write(path, b"x" * room)
    assert caught.value.errno != errno.E2BIG
    assert caught.value.errno != errno.EINVAL
    with pytest.raises(XenstoreError, match="takes 4080"):
        await store.write(path, b"x" * (room + 1))
    await store.write(path, b"x" * 1900)
    assert len(await store.read_bytes(path)) == 1900


async def test_a_directory_read_in_parts_is_the_directory(store, scratch):
    """By itself a guest cannot make one that needs it: its quota for a node is 2048 bytes."""
    names = [f"child-with-a-rather-long-name-{'x' * 50}-{n:03}" for n in range(20)]
    for name in names:
        await store.mkdir(f"{scratch}/large/{name}")
    path = f"{scratch}/large"
    assert sorted(await store.directory(path)) == names
    assert sorted(await store._directory_in_parts(path, path.encode() + b"\0", None)) == names
    await store.mkdir(f"{scratch}/leaf")
    leaf = f"{scratch}/leaf"
    assert await store._directory_in_parts(leaf, leaf.encode() + b"\0", None) == []
    async for txn in store.transaction():
        async with txn:
            assert sorted(await txn._directory_in_parts(path, path.encode() + b"\0", None)) == names


async def test_the_quota_of_a_node_is_an_error_with_its_path(store, scratch):
    async def fill():
        for number in range(60):
            await store.mkdir(f"{scratch}/full/{'x' * 90}-{number:03}")

    with pytest.raises(XenstoreError, match=rf"mkdir {scratch}/full/x+-\d+: ENOSPC"):
        await fill()


# -- transactions ------------------------------------------------------------------------------


async def test_a_transaction_is_seen_at_its_commit_and_not_before(store, scratch):
    async for txn in store.transaction():
        async with txn:
            await txn.write(f"{scratch}/a", "1")
            await txn.write(f"{scratch}/b", "2")
            assert await store.read_opt(f"{scratch}/a") is None
    assert tool("xenstore-read", f"{scratch}/a", f"{scratch}/b") == "1\n2\n"


async def test_an_exception_aborts(store, scratch):
    async def body():
        async for txn in store.transaction():
            async with txn:
                await txn.write(f"{scratch}/a", "1")
                raise RuntimeError("on purpose")

    for _ in range(15):  # more than a domain may have open
        with pytest.raises(RuntimeError, match="on purpose"):
            await body()
    assert await store.read_opt(f"{scratch}/a") is None


async def test_a_conflict_with_another_process_is_retried(store, scratch):
    await store.write(f"{scratch}/counter", "0")
    rounds = 0
    async for txn in store.transaction():
        async with txn:
            rounds += 1
            value = int(await txn.read(f"{scratch}/counter"))
            if rounds == 1:
                tool("xenstore-write", f"{scratch}/counter", "41")
            await txn.write(f"{scratch}/counter", str(value + 1))
    assert rounds == 2
    assert await store.read(f"{scratch}/counter") == "42"


async def test_concurrent_increments_are_all_counted(store, scratch):
    await store.write(f"{scratch}/counter", "0")

    async def increment():
        async for txn in store.transaction():
            async with txn:
                value = int(await txn.read(f"{scratch}/counter"))
                await txn.write(f"{scratch}/counter", str(value + 1))

    await asyncio.gather(*(increment() for _ in range(30)))
    assert await store.read(f"{scratch}/counter") == "30"


# -- many callers, watches ---------------------------------------------------------------------


async def test_a_hundred_callers_under_watch_events_get_their_own_answers(scratch):
    fired = 0
    # A call's time includes the calls that are before it in the queue, here ninety-nine.
    store = await Xenstore.connect(timeout=80)

    async def watching(watch):
        nonlocal fired
        async for _ in watch:
            fired += 1

    async def caller(number):
        path = f"{scratch}/caller-{number}"
        for turn in range(5):
            await store.write(path, f"{number}-{turn}")
            assert await store.read(path) == f"{number}-{turn}"

    async with store, store.watch(scratch) as watch:
        watcher = asyncio.create_task(watching(watch))
        try:
            async with asyncio.timeout(90):
                await asyncio.gather(*(caller(number) for number in range(100)))
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
    assert fired >= 100


async def test_a_watch_sees_what_another_process_writes(store, scratch):
    async with store.watch(scratch) as watch:
        assert await asyncio.wait_for(anext(watch), 20) == scratch
        await asyncio.to_thread(tool, "xenstore-write", f"{scratch}/theirs", "1")
        assert await asyncio.wait_for(anext(watch), 20) == f"{scratch}/theirs"
        await asyncio.to_thread(tool, "xenstore-rm", f"{scratch}/theirs")
        assert await asyncio.wait_for(anext(watch), 20) == f"{scratch}/theirs"


async def test_watches_and_requests_at_the_same_time_do_not_hang_the_kernel(store, scratch):
    """A WATCH and a pending request on one descriptor would: every watch has its own."""
    stop = asyncio.Event()

    async def requests(number):
        while not stop.is_set():
            await store.write(f"{scratch}/{number}", "x")
            await store.read(f"{scratch}/{number}")

    async def watches(number):
        for _ in range(25):
            async with store.watch(f"{scratch}/{number}") as watch:
                assert await asyncio.wait_for(anext(watch), 20) == f"{scratch}/{number}"

    busy = [asyncio.create_task(requests(number)) for number in range(8)]
    async with asyncio.timeout(100):
        await asyncio.gather(*(watches(number) for number in range(4)))
    stop.set()
    await asyncio.gather(*busy)
    # The rest of the system still has its store.
    assert await asyncio.to_thread(tool, "xenstore-read", "domid")


async def test_more_watches_in_turn_than_a_domain_may_have_at_once(store, scratch):
    for _ in range(150):
        async with store.watch(scratch) as watch:
            assert await anext(watch) == scratch


async def test_the_kernels_own_watches_survive_us(store):
    """XS_RESET_WATCHES would delete them: no hot plug, no shutdown, no suspend from then on."""
    async with await Xenstore.connect() as other, other.watch("control") as watch:
        assert await anext(watch) == "control"
    # The kernel watches this key, acts on it ("h": prints a help text) and empties it.
    await store.write("control/sysrq", "h")
    deadline = asyncio.get_running_loop().time() + 20
    while await store.read("control/sysrq") == "h":
        assert asyncio.get_running_loop().time() < deadline, "the kernel never saw control/sysrq"
        await asyncio.sleep(0.05)


async def test_closing_gives_every_descriptor_back():
    before = descriptors()
    store = await Xenstore.connect()
    watches = [store.watch("data") for _ in range(5)]
    for watch in watches:
        await watch.__aenter__()
    assert descriptors() == before + 6
    await store.close()
    deadline = asyncio.get_running_loop().time() + 20
    while descriptors() != before:  # a watch's own thread may be the last to let go of one
        assert asyncio.get_running_loop().time() < deadline, "a descriptor is still open"
        await asyncio.sleep(0.01)


async def test_a_timed_out_call_does_no_harm_to_the_next(store, scratch):
    for _ in range(20):
        with pytest.raises(TimeoutError):
            await store.write(f"{scratch}/late", "x", timeout=0)
    await store.write(f"{scratch}/next", "y")
    assert await store.read(f"{scratch}/next") == "y"
