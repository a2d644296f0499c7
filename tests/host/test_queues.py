# SPDX-License-Identifier: BSD-2-Clause
"""A disk with several queues: how many there are, and what ends and begins with all of them."""

from __future__ import annotations

import os

from queueworld import place
from waiting import eventually

from pvfront.blkfront.frontend import DiskFrontend
from pvfront.blkfront.settings import DiskSettings
from pvfront.host.blkback import BlkBackend
from pvfront.platform import Embedded


async def test_each_queue_has_a_ring_of_its_own_and_all_are_one_disk() -> None:
    async with place(queues=4, target=3) as it:
        details = it.frontend.details()["rings"]
        assert (details["queues"], details["granted"]["got"]) == (3, 3 * 708)
        assert len(it.target.ends) == 3
        keys = await it.keys()
        assert {"queue-0", "queue-1", "queue-2", "multi-queue-num-queues"} <= keys
        assert not keys & {"event-channel", "ring-ref", "ring-ref0", "queue-3"}
        await it.exchange()
        await eventually("3 reads of each counted", lambda: it.requests() == [3, 3, 3])


async def test_there_are_as_many_queues_as_the_least_of_all_can() -> None:
    async with place(queues=2, target=4) as it:
        assert it.frontend.details()["rings"]["queues"] == 2
        await it.exchange()
    async with place(queues=4, target=4, settings=DiskSettings(max_queues=1)) as it:
        assert it.frontend.details()["rings"]["queues"] == 1
        assert "queue-0" not in await it.keys()
        await it.exchange()


async def test_without_room_for_all_queues_there_are_fewer() -> None:
    async with place(queues=4, target=4, limit=4000) as it:
        details = it.frontend.details()["rings"]
        assert (details["queues"], details["granted"]["asked"]) == (2, 4 * 708)
        assert details["granted"]["why"] == "a share of 4000 pages for 1 device"
        await it.exchange()


async def test_a_backend_that_comes_back_with_other_queues_is_served_with_those() -> None:
    async with place(queues=4, target=4) as it:
        await it.exchange()
        pid = it.frontend.details()["worker_pid"]
        for queues in (2, 1, 4):
            generation = it.frontend.generation + 1
            await it.backend.stop()
            it.backend = await BlkBackend.start(
                it.host, queues=queues, ring_order=generation % 2 + 1
            )
            await it.connected(generation)
            assert it.frontend.details()["rings"]["queues"] == queues
            assert len(it.target.ends) == queues
            keys = await it.keys()
            assert ("queue-1" in keys) is (queues > 1)
            assert "queue-3" not in keys or queues == 4, "a key of before was left"
            await it.exchange()
        assert it.frontend.details()["worker_pid"] == pid


async def test_the_loss_of_one_socket_ends_the_generation_of_all() -> None:
    async with place(queues=2, target=2) as it:
        await it.exchange()
        first, second = it.target.ends
        first.close()
        await it.connected(2)
        assert second.fileno() == -1, "it was replaced with the other"
        assert it.target.attached == 2
        await it.exchange()


async def test_a_worker_that_dies_takes_all_its_queues_along_and_the_next_has_as_many() -> None:
    async with place(queues=2, target=2) as it:
        pid = it.frontend.details()["worker_pid"]
        os.kill(pid, 9)
        await it.connected(2)
        assert it.frontend.details()["rings"]["queues"] == 2
        await it.exchange()


async def test_a_later_supervisor_adopts_all_queues() -> None:
    async with place(queues=3, target=3) as it:
        await it.exchange()
        worker = it.frontend._worker
        assert worker is not None
        worker.close()  # as the end of a supervisor does
        on = Embedded(it.host.directory)
        later = DiskFrontend("vbd-51728", 51728, "xvdb", on, it.target)
        assert await later.adopt(it.loop.device)
        rings = later.details()["rings"]
        assert (rings["queues"], rings["slots"], rings["pool_pages"]) == (3, 128, 704)
        assert later.budget.held == 3 * 708
        await it.exchange()
        assert later._worker is not None
        later._worker.close()
        assert await it.frontend.adopt(it.loop.device)
