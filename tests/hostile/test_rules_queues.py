# SPDX-License-Identifier: BSD-2-Clause
"""A backend that keeps the rules on one queue of two and breaks them on the other."""

from __future__ import annotations

import asyncio
import os

import pytest
from queueworld import BLOCK, Nbd, Place, place
from waiting import PATIENCE, eventually

from pvfront.host.blkback import Fault

KEPT, BROKEN = 0, 1
"""Queues, and the numbers of the blocks that each one's requests are for."""
SECTORS = BLOCK // 512


def of(queue: int) -> tuple[int, int]:
    """The sectors of a queue's block, to choose its requests by."""
    return queue * SECTORS, (queue + 1) * SECTORS - 1


def users(it: Place) -> list[Nbd]:
    """The client's ends of the present generation."""
    return [Nbd(end) for end in it.target.ends]


async def fired(it: Place, kind: str, times: int = 1) -> None:
    async def look() -> bool:
        return (await it.backend.stats())[f"fired_{kind}"] >= times

    await eventually(f"{kind} fired {times} times", look)


def held(it: Place) -> tuple[int, int, int]:
    """Ports and pages of everybody, and pages that only a mapping keeps."""
    found = it.host.dump()
    return len(found["ports"]), sum(g["pages"] for g in found["grants"]), found["deferred"]


async def trouble(it: Place) -> str:
    """Why the connection ended, as status says it."""
    await eventually("trouble", lambda: it.loop.last_trouble)
    assert it.loop.last_trouble is not None
    return it.loop.last_trouble[1]


async def write_both(it: Place, blocks: list[bytes]) -> None:
    """A write on each queue, as the kernel sends what was never answered."""

    def both() -> None:
        sent = [
            (user, user.request(Nbd.WRITE, queue * BLOCK, BLOCK, blocks[queue]))
            for queue, user in enumerate(users(it))
        ]
        for user, handle in sent:
            user.check(handle)

    await asyncio.to_thread(both)


@pytest.mark.parametrize(
    ("rule", "field", "lie"),
    [
        pytest.param(1, "rsp_prod", Fault.producer(1000, sectors=of(BROKEN), count=1), id="far"),
        pytest.param(2, "rsp_prod", Fault.producer(-2, sectors=of(BROKEN), count=1), id="back"),
        pytest.param(5, "id", Fault.corrupt("id", xor=1, sectors=of(BROKEN), count=1), id="id"),
        pytest.param(
            5, "id", Fault.corrupt("id", xor=0xFFFF, sectors=of(BROKEN), count=1), id="range"
        ),
        pytest.param(
            6, "operation", Fault.corrupt("operation", 3, sectors=of(BROKEN), count=1), id="op"
        ),
    ],
)
async def test_rule_21_a_lie_on_one_queue_of_two_ends_the_generation_of_both(
    rule: int, field: str, lie: Fault
) -> None:
    async with place(queues=2, target=2) as it:
        await it.exchange()
        worker, before = it.frontend.details()["worker_pid"], held(it)
        generation, blocks = it.frontend.generation, [os.urandom(BLOCK) for _ in range(2)]
        await it.backend.fault(Fault.stall(op="write", sectors=of(KEPT)), lie)
        kept, broken = users(it)
        kept.request(Nbd.WRITE, KEPT * BLOCK, BLOCK, blocks[KEPT])
        await fired(it, "stall")
        broken.request(Nbd.WRITE, BROKEN * BLOCK, BLOCK, blocks[BROKEN])
        told = await trouble(it)
        assert told.startswith(f"the backend broke rule {rule}: {field}=0x"), told
        # Neither request has an answer, whatever its own queue's backend was like.
        for user in (kept, broken):
            with pytest.raises(ConnectionError):
                await asyncio.to_thread(user.reply)
        await it.backend.clear()
        await it.connected(generation + 1)
        assert it.frontend.details()["worker_pid"] == worker
        await write_both(it, blocks)
        for user in users(it):
            for queue, block in enumerate(blocks):
                assert await asyncio.to_thread(user.read, queue * BLOCK, BLOCK) == block
        await eventually("what was held before", lambda: held(it) == before, why=lambda: held(it))


async def test_rule_21_answers_in_the_place_of_each_other_on_one_queue_end_both() -> None:
    """The first passes for the other's; when that comes, it has been answered."""
    async with place(queues=2, target=2) as it:
        generation = it.frontend.generation
        one, other = of(BROKEN), of(BROKEN + 1)
        await it.backend.fault(
            Fault.stall(op="write", sectors=one),
            Fault.corrupt("id", other=True, op="write", sectors=other),
        )
        kept, broken = users(it)
        mistaken = broken.request(Nbd.WRITE, BROKEN * BLOCK, BLOCK, bytes(BLOCK))
        await fired(it, "stall")
        broken.request(Nbd.WRITE, (BROKEN + 1) * BLOCK, BLOCK, bytes(BLOCK))
        await asyncio.to_thread(broken.check, mistaken)
        await asyncio.to_thread(kept.write, KEPT, b"k" * BLOCK)  # the other queue works on
        await it.backend.release()
        assert (await trouble(it)).startswith("the backend broke rule 5: id=0x")
        await it.backend.clear()
        await it.connected(generation + 1)
        await write_both(it, [b"k" * BLOCK, b"b" * BLOCK])
        assert await asyncio.to_thread(users(it)[0].read, BROKEN * BLOCK, BLOCK) == b"b" * BLOCK


async def test_rule_24_a_lost_event_of_one_queue_delays_that_queue_alone() -> None:
    async with place(queues=2, target=2) as it:
        generation = it.frontend.generation
        await it.backend.fault(Fault.lose_event(sectors=of(BROKEN), count=1))
        kept, broken = users(it)
        late = broken.request(Nbd.WRITE, BROKEN * BLOCK, BLOCK, b"l" * BLOCK)
        for turn in range(20):
            await asyncio.to_thread(kept.write, KEPT * BLOCK, bytes([turn]) * BLOCK)
        await asyncio.to_thread(broken.check, late)
        assert await asyncio.to_thread(kept.read, BROKEN * BLOCK, BLOCK) == b"l" * BLOCK
        assert it.frontend.generation == generation


async def test_rule_23_a_storm_on_all_queues_keeps_none_from_working() -> None:
    async with place(queues=2, target=2) as it:
        await it.backend.fault(Fault.storm(2000))
        await fired(it, "storm", 100)
        async with asyncio.timeout(2 * PATIENCE):
            for _ in range(10):
                await it.exchange()
        assert it.frontend.generation == 1
