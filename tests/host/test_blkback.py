# SPDX-License-Identifier: BSD-2-Clause
"""The block backend as a process, honest: its walk in the store and every feature it offers."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from blkpeer import (
    BARRIER,
    CLOSED,
    CLOSING,
    CONNECTED,
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    INDIRECT,
    INIT_WAIT,
    INITIALISING,
    OKAY,
    PAGE,
    READ,
    SECTOR,
    SPEC,
    VBD,
    WRITE,
    Frontend,
    disk,
    pattern,
    whole,
)
from waiting import PATIENCE, eventually

from pvfront.errors import PvfrontError
from pvfront.host import Host
from pvfront.host.blkback import BlkBackend, BlkBackendError, Fault
from pvfront.host.params import Source, parse_params, parse_size

LATE = (
    "feature-flush-cache", "feature-discard", "discard-granularity", "discard-alignment",
    "discard-secure", "feature-barrier", "feature-persistent", "sectors", "info", "sector-size",
    "physical-sector-size",
)  # fmt: skip


async def test_limits_come_with_init_wait_and_the_disk_with_connected() -> None:
    async with disk(queues=3) as (_, _, frontend):
        await frontend.backend_is(INIT_WAIT)
        keys = await frontend.keys()
        assert keys["feature-max-indirect-segments"] == "256"
        assert keys["max-ring-page-order"] == "4"
        assert keys["multi-queue-max-queues"] == "3"
        assert not keys.keys() & set(LATE)
        await frontend.connect()
        keys = await frontend.keys()
        assert {key: keys[key] for key in LATE} == {
            "feature-flush-cache": "1",
            "feature-discard": "1",
            "discard-granularity": "4096",
            "discard-alignment": "0",
            "discard-secure": "0",
            "feature-barrier": "1",
            "feature-persistent": "1",
            "sectors": str(8 * 2048),
            "info": "0",
            "sector-size": "512",
            "physical-sector-size": "512",
        }


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("order", [None, 0, 1, 4])
async def test_data_goes_there_and_back(order: int | None, persistent: bool) -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect(order=order, persistent=persistent)
        payload = pattern(1, 11)
        for round_ in range(40):  # more than a ring of one page
            assert await frontend.write(88 * round_, payload) == OKAY
        assert await frontend.read_back(88 * 39, 11) == payload
        stats = await backend.stats()
        assert (stats["reads"], stats["writes"], stats["rejected"]) == (1, 40, 0)
        assert bool(stats["persistent"]) == persistent


async def test_each_queue_has_a_ring_of_its_own() -> None:
    async with disk(queues=4) as (_, _, frontend):
        await frontend.connect(order=2, queues=4)
        for queue in range(4):
            page = pattern(queue, 1)
            frontend.data[queue * PAGE : (queue + 1) * PAGE] = page
            frontend.put(WRITE, queue * 8, whole(queue, 1), queue=queue)
            frontend.push(queue)
        for queue in range(4):
            assert (await frontend.response(queue=queue))[2] == OKAY
        assert await frontend.read_back(0, 4) == b"".join(pattern(i, 1) for i in range(4))


async def test_indirect_requests_move_a_megabyte() -> None:
    async with disk() as (_, _, frontend):
        await frontend.connect()
        payload = pattern(5, 256)
        frontend.data[: 256 * PAGE] = payload
        for op in (WRITE, READ):
            ident = frontend.put_indirect(op, 512, whole(0, 256), table=280)
            frontend.push()
            assert await frontend.response() == (ident, op, OKAY)
            if op == WRITE:
                frontend.data[: 256 * PAGE] = bytes(256 * PAGE)
        assert frontend.data[: 256 * PAGE] == payload


async def test_what_is_switched_off_is_neither_offered_nor_done() -> None:
    off = {"flush": False, "barrier": False, "discard": False, "persistent": False}
    async with disk(**off, indirect=0, ring_order=0, queues=1) as (_, _, frontend):
        await frontend.connect(persistent=True)
        keys = await frontend.keys()
        assert "feature-max-indirect-segments" not in keys
        assert keys["max-ring-page-order"] == "0"
        assert "discard-granularity" not in keys
        for key in ("flush-cache", "barrier", "discard", "persistent"):
            assert keys[f"feature-{key}"] == "0"
        assert await frontend.do(FLUSH) == EOPNOTSUPP
        assert await frontend.do(BARRIER, 0, whole(0, 1)) == EOPNOTSUPP
        ident = frontend.put_discard(0, 8)
        frontend.push()
        assert await frontend.response() == (ident, DISCARD, EOPNOTSUPP)
        ident = frontend.put_indirect(READ, 0, whole(0, 1), table=9)
        frontend.push()
        assert await frontend.response() == (ident, INDIRECT, EOPNOTSUPP)


async def test_features_are_switched_while_it_runs() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        assert await frontend.do(FLUSH) == OKAY
        await backend.features(flush=False, indirect=32)
        assert await frontend.do(FLUSH) == EOPNOTSUPP
        assert await frontend.read("feature-flush-cache") == "1"
        await frontend.reconnect()
        assert await frontend.read("feature-flush-cache") == "0"
        with pytest.raises(BlkBackendError, match="indirect=999"):
            await backend.features(indirect=999)


async def test_a_discard_leaves_zeroes() -> None:
    async with disk(discard_granularity=8192) as (_, _, frontend):
        await frontend.connect()
        await frontend.write(0, b"\x77" * 4 * PAGE)
        ident = frontend.put_discard(0, 24)
        frontend.push()
        assert await frontend.response() == (ident, DISCARD, OKAY)
        assert await frontend.read_back(0, 4) == bytes(2 * PAGE) + b"\x77" * 2 * PAGE


async def test_the_toolstack_can_forbid_discard() -> None:
    async with disk(SPEC.replace("target", "no-discard,target")) as (_, _, frontend):
        await frontend.connect()
        assert await frontend.read("feature-discard") is None


async def test_a_read_only_disk_says_so_and_keeps_to_it() -> None:
    async with disk(SPEC.replace("rw", "ro")) as (_, _, frontend):
        await frontend.connect()
        assert await frontend.read("info") == "4"
        assert await frontend.write(0, pattern(1, 1)) == ERROR
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def test_large_sectors_are_published_and_kept_to() -> None:
    async with disk(sector_size=4096) as (_, _, frontend):
        await frontend.connect()
        keys = await frontend.keys()
        assert (keys["sectors"], keys["sector-size"], keys["physical-sector-size"]) == (
            str(8 * 2048), "4096", "4096",
        )  # fmt: skip
        assert await frontend.do(READ, 8, whole(0, 1)) == OKAY
        assert await frontend.do(READ, 8, [(0, 0, 3)]) == ERROR


async def test_a_file_is_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with disk(f"format=raw,vdev=xvdb,access=rw,target={image}") as (_, _, frontend):
        await frontend.connect()
        assert await frontend.read("sectors") == "2048"
        assert await frontend.write(16, pattern(3, 2)) == OKAY
        assert await frontend.do(FLUSH) == OKAY
        assert image.read_bytes()[16 * SECTOR : 16 * SECTOR + 2 * PAGE] == pattern(3, 2)


async def test_a_disk_of_8_exbibytes_is_sparse() -> None:
    sectors = (8 << 60) // SECTOR - 8
    spec = f"format=raw,vdev=xvdb,access=rw,target=memory:{sectors * SECTOR}"
    async with disk(spec) as (_, _, frontend):
        await frontend.connect()
        assert await frontend.read("sectors") == str(sectors)
        assert await frontend.write(sectors - 8, pattern(3, 1)) == OKAY
        assert await frontend.read_back(sectors - 8, 1) == pattern(3, 1)


async def test_a_disk_that_is_not_there_is_an_error_in_the_store() -> None:
    async with disk("vdev=xvdb,target=/nonexistent/disk") as (host, _, frontend):
        await frontend.backend_is(CLOSING)
        error = await host.store.read(f"/local/domain/0/error/backend/vbd/1/{VBD}/error")
        assert "/nonexistent/disk" in error


async def test_a_disk_that_is_not_there_is_looked_for_once_in_each_walk(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    async with disk(f"vdev=xvdb,target={image}") as (_, backend, frontend):
        await frontend.backend_is(CLOSING)
        for state, answer in ((CLOSING, CLOSING), (CLOSED, CLOSED), (INITIALISING, INIT_WAIT)):
            await frontend.say(state)
            await frontend.backend_is(answer)
        assert backend.log.read_text().count("cannot open") == 1
        await frontend.publish()
        await frontend.backend_is(CLOSING)
        await frontend.say(CLOSED)
        await frontend.backend_is(CLOSED)
        assert backend.log.read_text().count("cannot open") == 2
        image.write_bytes(bytes(8 << 20))
        await frontend.reconnect()
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def test_a_resize_rewrites_the_size_and_the_state() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        assert await frontend.do(READ, 8 * 2048, whole(0, 1)) == ERROR
        async with host.store.watch(f"{frontend.back}/state") as watch:
            await anext(watch)
            await backend.resize(16 << 20)
            await asyncio.wait_for(anext(watch), PATIENCE)
        assert await frontend.read("state") == str(CONNECTED)
        assert await frontend.read("sectors") == str(16 * 2048)
        assert await frontend.do(READ, 8 * 2048, whole(0, 1)) == OKAY


async def test_the_disk_survives_its_frontends() -> None:
    async with disk() as (_, _, frontend):
        await frontend.connect()
        assert await frontend.write(0, pattern(8, 1)) == OKAY
        for how in ({"order": 3}, {"persistent": True}, {"order": 0}):
            await frontend.reconnect(**how)
            assert await frontend.read_back(0, 1) == pattern(8, 1)


async def test_a_frontend_that_died_connected_walks_again() -> None:
    async with disk() as (_, _, frontend):
        await frontend.connect()
        frontend.drop()
        frontend._open()
        await frontend.reconnect()
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def test_closed_is_said_with_requests_in_flight_and_the_next_is_refused() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.stall(count=1))
        frontend.data[:PAGE] = pattern(4, 1)
        frontend.put(WRITE, 0, whole(0, 1))
        frontend.push()

        async def in_flight() -> bool:
            return (await backend.stats())["in_flight"] == 1

        await eventually("a request in flight", in_flight)
        await frontend.disconnect()
        await frontend.say(INITIALISING)
        await frontend.backend_is(INIT_WAIT)
        await frontend.publish()
        await frontend.backend_is(CLOSING)
        error = await host.store.read(f"/local/domain/0/error/backend/vbd/1/{VBD}/error")
        assert error.endswith("pending I/O")
        await frontend.disconnect()
        # The old write lands late, and only then can somebody connect.
        await backend.release()

        async def done() -> bool:
            return (await backend.stats())["in_flight"] == 0

        await eventually("the old request's end", done)
        await frontend.say(INITIALISING)
        await frontend.connect()
        assert await frontend.read_back(0, 1) == pattern(4, 1)


async def test_the_toolstack_takes_a_disk_away_and_brings_another() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        detach = asyncio.create_task(host.detach_disk(1, VBD, timeout=PATIENCE))
        await frontend.backend_is(CLOSING)
        await frontend.say(CLOSING)
        await frontend.say(CLOSED)
        await detach
        assert await frontend.read("state") is None
        await eventually("no disk", lambda: _none(backend))
        frontend.drop()
        frontend._open()
        await host.attach_disk(1, SPEC)
        await frontend.connect()
        assert await frontend.read_back(0, 1) == bytes(PAGE)


async def test_a_device_that_is_closed_while_offline_goes_and_its_nodes_stay() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        await frontend.disconnect()
        assert len(await backend.vbds()) == 1  # it may come again
        await frontend.say(INITIALISING)
        await frontend.connect()
        await host.store.write(f"{frontend.back}/online", "0")
        await frontend.disconnect()
        await eventually("its end", lambda: _none(backend))
        assert await frontend.read("state") == str(CLOSED)


async def _none(backend: BlkBackend) -> bool:
    return not await backend.vbds()


async def test_nodes_that_go_are_the_end_of_the_device() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        await host.store.remove(frontend.back)
        await eventually("no disk", lambda: _none(backend))
        assert await frontend.read("state") is None


async def test_a_frontend_without_protocol_or_with_too_much_is_refused() -> None:
    refused = {
        "protocol": ("", "x86_32"),
        "ring-page-order": ("5", "order 5"),
        "multi-queue-num-queues": ("99", "99 queues"),
        "event-channel": ("", "event-channel"),
        "ring-ref": ("4000000000", "ring-ref 4000000000"),
    }
    async with disk() as (host, _, frontend):
        for key, (value, reason) in refused.items():
            await frontend.backend_is(INIT_WAIT)
            await frontend.publish(keys={key: value})
            await frontend.backend_is(CLOSING)
            error = await host.store.read(f"/local/domain/0/error/backend/vbd/1/{VBD}/error")
            assert reason in error
            await frontend.disconnect()
            await frontend.say(INITIALISING)
        await frontend.connect()


async def test_many_disks_are_served_at_once() -> None:
    async with disk() as (host, backend, frontend):
        vdevs = [51744 + 16 * i for i in range(8)]
        for index, vdev in enumerate(vdevs):
            name = f"xvd{'cdefghij'[index]}"
            await host.attach_disk(1, f"vdev={name},target=memory:1M")
            other = Frontend(host, vdev, pages=30)
            await other.connect()
            assert await other.write(0, pattern(index, 1)) == OKAY
            other.drop()
        assert len(await backend.vbds()) == 9
        await frontend.connect()
        assert await frontend.read_back(0, 1) == bytes(PAGE)
        assert (await backend.stats(vbd=51744))["writes"] == 1
        assert (await backend.stats())["writes"] == 8
        with pytest.raises(BlkBackendError, match="no vbd 1"):
            await backend.stats(vbd=1)


async def test_a_backend_that_was_killed_comes_back_with_fewer_features() -> None:
    async with await Host.start() as host:
        await host.create_domain()
        await host.attach_disk(1, SPEC)
        first = await BlkBackend.start(host)
        frontend = Frontend(host)
        try:
            await frontend.connect(order=4)
            await first.kill()
            assert await frontend.read("state") == str(CONNECTED)
            async with await BlkBackend.start(host, indirect=0, ring_order=0, queues=1):
                await frontend.backend_is(CLOSING)  # the ring is too large for it
                assert await frontend.read("max-ring-page-order") == "0"
                assert await frontend.read("feature-max-indirect-segments") is None
                await frontend.reconnect()
                assert await frontend.do(READ, 0, whole(0, 1)) == OKAY
        finally:
            frontend.drop()


async def test_a_killed_backend_s_requests_are_not_done_again_by_the_next(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with disk(f"vdev=xvdb,target={image}") as (host, backend, frontend):
        await frontend.connect(persistent=True)
        await backend.fault(Fault.stall(op="read", count=1))
        frontend.put(READ, 64, whole(10, 1))
        frontend.data[:PAGE] = pattern(1, 1)
        write = frontend.put(WRITE, 8, whole(0, 1))
        frontend.push()
        # Answered out of order: the ring's consumer is before this write, its page is free again.
        assert (await frontend.response())[0] == write
        frontend.data[:PAGE] = pattern(2, 1)
        await backend.kill()
        async with await BlkBackend.start(host):
            await frontend.backend_is(CLOSING)
            assert image.read_bytes()[8 * SECTOR :][:PAGE] == pattern(1, 1)
            await frontend.reconnect()
            assert await frontend.read_back(8, 1) == pattern(1, 1)


async def test_a_backend_that_was_stopped_in_order_goes_on_with_its_rings(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with disk(f"vdev=xvdb,target={image}") as (host, backend, frontend):
        await frontend.connect(order=1, persistent=True)
        assert await frontend.write(0, pattern(1, 1)) == OKAY
        await backend.stop()
        frontend.put(WRITE, 8, whole(0, 1))
        frontend.push()
        async with await BlkBackend.start(host):
            assert (await frontend.response())[2] == OKAY
            await frontend.backend_is(CONNECTED)
            assert await frontend.read_back(8, 1) == pattern(1, 1)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_ring_with_requests_held_back_is_not_taken_up(tmp_path: Path, how: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with disk(f"vdev=xvdb,target={image}") as (host, backend, frontend):
        await frontend.connect()
        # The first successor has its mark, and leaves none.
        await backend.stop()
        assert re.fullmatch(r"\d+:0", await frontend.read("rings-in-order") or "")
        second = await BlkBackend.start(host)
        # Its state was Connected all the while: the mark says when it has taken the ring up.
        await eventually("the mark taken away", lambda: _unmarked(frontend))
        await second.fault(Fault.stall())
        frontend.put(READ, 0, whole(0, 1))
        frontend.push()
        await eventually("a request held", lambda: _held(second))
        await getattr(second, how)()
        async with await BlkBackend.start(host):
            await frontend.backend_is(CLOSING)
            error = await host.store.read(f"/local/domain/0/error/backend/vbd/1/{VBD}/error")
            assert "not left in order" in error
            await frontend.reconnect()
            assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def _unmarked(frontend: Frontend) -> bool:
    return await frontend.read("rings-in-order") is None


async def _held(backend: BlkBackend) -> bool:
    return (await backend.stats())["in_flight"] == 1


async def test_two_backends_cannot_serve_one_domain() -> None:
    async with disk() as (host, _, frontend):
        await frontend.connect()
        with pytest.raises(PvfrontError, match="a blkback of domain 0 runs at"):
            await BlkBackend.start(host)
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def test_a_backend_that_cannot_start_says_why(tmp_path: Path) -> None:
    class Nowhere:
        directory = tmp_path

    with pytest.raises(PvfrontError, match=r"store\.sock"):
        await BlkBackend.start(Nowhere())
    with pytest.raises(PvfrontError, match="sector_size=513"):
        await BlkBackend.start(Nowhere(), sector_size=513)
    with pytest.raises(TypeError):
        await BlkBackend.start(Nowhere(), telepathy=True)


def test_params_name_memory_or_a_path() -> None:
    assert parse_params("memory:64M") == Source(None, 64 << 20)
    assert parse_params("aio:/a/b") == Source(Path("/a/b"))
    assert parse_params("/dev/x:y") == Source(Path("/dev/x:y"))
    assert parse_size("1k") == 1024
    assert parse_size("3GiB") == 3 << 30
    for bad in ("", "0", "-1M", "8E", "64 megabytes"):
        with pytest.raises(PvfrontError):
            parse_size(bad)
