# SPDX-License-Identifier: BSD-2-Clause
"""Rules 23 and 24: too many events, and too few. What they cost is counted, not timed."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from hostileworld import MIB, RSP_EVENT, Disk
from nbdclient import WRITE, finished
from waiting import eventually

from pvfront.host.blkback import Fault

pytestmark = pytest.mark.asyncio(loop_scope="session")

STORM = 20_000
CALM = 30
"""Four wake-ups at once, then 1, 2, 4 … 1000 ms apart: so many, and one for each second more."""


async def stormed(disk: Disk, events: int) -> None:
    async def look() -> bool:
        return await disk.served("fired_storm") >= events

    await eventually(f"{events} events of a storm", look)


async def test_rule_23_a_storm_of_events_wakes_an_idle_worker_a_few_times(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, bytes(4096))
    began, before = time.monotonic(), await disk.stats()
    await disk.fault(Fault.storm())
    await stormed(disk, STORM)
    now = await disk.counted(
        "four events for nothing", lambda s: s.events_spurious - before.events_spurious >= 4
    )
    most = CALM + time.monotonic() - began
    assert now.events_spurious - before.events_spurious < most
    assert now.wakeups - before.wakeups < 2 * most
    # The disk works in the middle of it, and afterwards.
    for i in range(5):
        data = os.urandom(4096)
        await client.write(4096 * i, data)
        assert await client.read(4096 * i, 4096) == data
    await disk.fault()
    await client.flush()
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_23_wake_ups_of_a_masked_port_stop_nothing(disk: Disk) -> None:
    """On the embedded host only (docs/host.md): an eventfd is one open file for both ends."""
    client = await disk.client()
    await disk.fault(Fault.storm(5000, wakes=True))
    await stormed(disk, 200)
    for i in range(20):
        data = os.urandom(65536)
        await client.write(0, data)
        assert await client.read(0, 65536) == data, i
    await disk.fault()
    assert (await disk.shown())["generation"] == disk.first


@pytest.mark.parametrize("op", ["read", "write", "flush", "discard"])
async def test_rule_24_a_lost_event_is_found_by_the_watchdog(disk: Disk, op: str) -> None:
    client = await disk.client()
    await client.write(0, b"\x07" * 4096)

    async def hit() -> int:
        """Not each time: what is answered before the worker sleeps needs no event."""
        await disk.fault(Fault.lose_event(op=op, count=1))  # type: ignore[arg-type]
        if op == "read":
            assert await client.read(0, 4096) == b"\x07" * 4096
        elif op == "write":
            await client.write(0, b"\x07" * 4096)
        elif op == "flush":
            await client.flush()
        else:
            await client.trim(MIB, 65536)
        return (await disk.stats()).watchdog_hits

    await eventually("a hit of the watchdog", hit)
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_24_a_request_for_events_that_is_overwritten_is_found_by_the_watchdog(
    disk: Disk,
) -> None:
    client = await disk.client()
    await client.write(0, bytes(4096))
    ring = await disk.ring()
    stalls = 0

    async def hit() -> int:
        """Not each time: a worker that was about to ask for events does so after this."""
        nonlocal stalls
        stalls += 1
        await disk.fault(Fault.stall(op="write", count=1))
        reply = client.start(WRITE, 0, 4096, b"\x09" * 4096)
        await disk.fired("stall", stalls)
        ring.words[RSP_EVENT] ^= 0x40000000
        await disk.release()
        await finished(reply)
        return (await disk.stats()).watchdog_hits

    await eventually("a hit of the watchdog", hit)


async def test_rule_24_nobody_watches_a_ring_without_requests(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, bytes(4096))

    async def asleep() -> bool:
        before = (await disk.stats()).wakeups
        await asyncio.sleep(0.6)  # more than two ticks
        return (await disk.stats()).wakeups == before

    await eventually("no wake-up in the time of two ticks", asleep)


async def test_storm_losses_delays_and_reordering_at_once_keep_every_byte(disk: Disk) -> None:
    client = await disk.client()
    await disk.fault(
        Fault.storm(2000),
        Fault.lose_event(chance=0.01),
        Fault.delay(0.1, 3, chance=0.3),
        Fault.reorder(8, ms=1, chance=0.3),
    )
    model = os.urandom(4 * MIB)
    size = 32768
    for at in range(0, len(model), 32 * size):
        parts = range(at, min(at + 32 * size, len(model)), size)
        await asyncio.gather(
            *(finished(client.start(WRITE, p, size, model[p : p + size])) for p in parts)
        )
    await disk.fault()
    assert await client.read(0, len(model)) == model
    assert (await disk.shown())["generation"] == disk.first
