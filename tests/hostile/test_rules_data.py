# SPDX-License-Identifier: BSD-2-Clause
"""Rules 17 to 22: what stands in granted pages, and when they may be used again.

Secrets are canaries: a word that a request carries, and that the backend counts (`Fault.look`) in
every granted byte that is not the request's own.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from hostileworld import MIB, REQ_PROD, Attach, Disk, World
from nbdclient import EIO, READ, WRITE, NbdError, finished, outcome
from waiting import eventually

from pvfront.abi import lib
from pvfront.blkfront.settings import DiskSettings
from pvfront.host.blkback import Fault, Misstep

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORD = 0x5EC2E7C0DEFACADE
CANARY = WORD.to_bytes(8, "little")
SECRET = CANARY * 512  # a page of it
PIECE = 11 * 4096
"""Bytes of one direct blkif request."""


async def test_rule_17_a_short_write_shows_nothing_of_earlier_writes(disk: Disk) -> None:
    client = await disk.client()
    await disk.fault(Fault.look(WORD))
    for _ in range(4):
        await asyncio.gather(
            *(finished(client.start(WRITE, PIECE * i, PIECE, SECRET * 11)) for i in range(32))
        )
        for length in (512, 1024, 3584, 4096 + 512, PIECE - 512):
            await client.write(4 * MIB, bytes(length))
    assert await disk.served("fired_look") > 100
    assert await disk.served("canaries") == 0


async def test_rule_17_a_descriptor_page_shows_nothing_but_descriptors(
    disk: Disk,
) -> None:
    """The page of an indirect request held data before: only its entries may stand in it now."""
    client = await disk.client()
    await client.write(0, SECRET * 256)
    assert await client.read(0, MIB) == SECRET * 256
    await disk.fault(Fault.look(WORD))
    for length in (12 * 4096, 64 * 4096, MIB):
        await client.write(4 * MIB, bytes(length))
        await client.read(4 * MIB, length)
    assert await disk.served("indirect") > 4
    assert await disk.served("canaries") == 0


async def test_rule_17_a_read_shows_nothing_of_earlier_writes_and_reads(disk: Disk) -> None:
    client = await disk.client()
    await disk.fault(Fault.look(WORD))
    for _ in range(2):
        await client.write(0, SECRET * 256)
        for length in (512, 4096, PIECE, MIB):
            await client.read(4 * MIB, length)
        assert await client.read(0, MIB) == SECRET * 256
        for length in (512, 4096, PIECE, MIB):
            await client.read(4 * MIB, length)
    assert await disk.served("fired_look") > 30
    assert await disk.served("canaries") == 0


async def test_rule_17_a_new_connection_shows_nothing_of_the_former(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, SECRET * 256)
    await disk.state(6)
    await disk.connected(after=disk.first)
    await disk.fault(Fault.look(WORD))
    await disk.leave()
    client = await disk.client()
    await client.write(4 * MIB, bytes(512))
    await client.read(4 * MIB, MIB)
    assert await disk.served("canaries") == 0


@pytest.mark.parametrize(
    ("option", "seen"), [("untrusted", False), ("trusted", True)], ids=["untrusted", "trusted"]
)
async def test_rule_18_for_an_untrusted_backend_pages_are_cleared_whole(
    attach: Attach, option: str, seen: bool
) -> None:
    """For a trusted one what only it put there is left alone: that shows the look works."""
    disk = await attach(option)
    client = await disk.client()
    await client.write(0, bytes(512))
    await disk.fault(Fault.rewrite_pages("idle", pattern=WORD, count=3))
    await disk.fired("pages", 3)
    await disk.fault(Fault.look(WORD))
    await client.write(0, bytes(512))
    assert bool(await disk.served("canaries")) is seen


@pytest.mark.parametrize("length", [512, 4096, 65536, MIB])
async def test_rule_19_a_read_that_brought_nothing_returns_nothing_stale(
    disk: Disk, length: int
) -> None:
    client = await disk.client()
    for at in range(0, 4 * MIB, MIB):
        await client.write(at, SECRET * 256)
        assert await client.read(at, MIB) == SECRET * 256
    await disk.fault(Fault.short(0, op="read"))
    assert await client.read(0, length) == bytes(length)


async def test_rule_19_a_read_that_ended_early_has_zeroes_behind_its_end(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, SECRET * 11)
    await disk.fault(Fault.short(3, op="read"))
    assert await client.read(0, PIECE) == CANARY * 192 + bytes(PIECE - 1536)


async def test_rule_19_a_failed_read_has_an_error_and_no_payload(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, SECRET * 256)
    # One piece of many fails, after others have brought their data.
    await disk.fault(Fault.fail(op="read", sectors=(1000, 1000)), Fault.delay(2, op="read"))
    replies = [client.start(READ, 0, MIB) for _ in range(3)]
    for reply in replies:
        error = await outcome(reply)
        assert isinstance(error, NbdError)
        assert error.number == EIO
    await disk.fault()
    # Had a payload followed, the next reply would not be where it is looked for.
    await client.write(0, b"\x01" * 512)
    assert await client.read(0, 1024) == b"\x01" * 512 + CANARY * 64


async def test_rule_20_pages_of_an_unanswered_read_are_not_used_again(disk: Disk) -> None:
    """One piece of a read fails, the other is late: its pages are still the backend's."""
    client = await disk.client()
    segments = DiskSettings().max_indirect_segments  # of one ring request: the read takes two
    await client.write(0, SECRET * 2 * segments)
    first, second = (0, segments * 8 - 1), (segments * 8, segments * 16 - 1)
    await disk.fault(
        Fault.fail(op="read", sectors=first),
        Fault.stall(op="read", sectors=second),
        Fault.delay(20, op="write"),
    )
    failing = client.start(READ, 0, 2 * segments * 4096)
    await disk.fired("stall")
    await disk.fired("fail")
    # Writes wait in the backend, in whatever pages there are, when the late read is done.
    data = [os.urandom(PIECE) for _ in range(28)]
    writes = [client.start(WRITE, MIB + PIECE * i, PIECE, data[i]) for i in range(28)]
    await disk.fired("delay", 28)
    await disk.release()
    await asyncio.gather(*map(finished, writes))
    assert isinstance(await outcome(failing), NbdError)
    await disk.fault()
    for i in range(28):
        assert await client.read(MIB + PIECE * i, PIECE) == data[i]
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_20_no_client_is_served_before_the_former_s_requests_are_answered(
    disk: Disk,
) -> None:
    """The fence: an old write that lands late must not overwrite a newer one."""
    client = await disk.client()
    await disk.fault(Fault.stall(op="write", count=1))
    client.start(WRITE, 0, 4096, b"o" * 4096)
    await disk.fired("stall")
    await disk.leave()
    await disk.until("the client has left", lambda s: not s["client"]["connected"])
    client = await disk.client()
    new = client.start(WRITE, 0, 4096, b"n" * 4096)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(new), 0.5)
    assert (await disk.stats()).in_flight == 1
    assert await disk.served("requests") == 1
    await disk.release()
    await finished(new)
    assert await client.read(0, 4096) == b"n" * 4096
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_20_grants_that_are_mapped_are_never_granted_again(
    disk: Disk, world: World
) -> None:
    """A worker dies while the backend has its pages mapped: a later generation has others."""
    before = await disk.ring_refs()
    ring = await disk.ring()  # mapped for longer than any backend
    client = await disk.client()
    await disk.fault(Fault.stall(op="write", count=1))
    client.start(WRITE, 0, 4096, b"x" * 4096)
    await disk.fired("stall")
    os.kill((await disk.shown())["worker_pid"], 9)
    await disk.logged("ended by signal 9")
    await disk.release()
    await disk.connected(after=disk.first)
    assert not set(await disk.ring_refs()) & set(before)
    assert world.host.dump()["deferred"] >= 1
    ring.junk()  # of nobody any more
    await disk.works()


async def test_rule_21_a_broken_ring_is_left_alone_until_the_backend_has_closed(
    disk: Disk, world: World
) -> None:
    """The backend does not close: nothing is published, nothing freed, however long it takes."""

    def held() -> tuple[int, int]:
        (grants,) = world.host.dump()["grants"]
        return grants["pages"], len(world.host.dump()["ports"])

    client = await disk.client()
    await client.write(0, bytes(4096))
    ring, before = await disk.ring(), held()
    await disk.misstep(Misstep.silence(at="closing"))
    await disk.fault(Fault.corrupt("operation", 255, op="write", skip=2, count=1))
    doomed = [client.start(WRITE, 4096 * i, 4096, bytes(4096)) for i in range(3)]
    await disk.logged("the backend broke rule 6: operation=0xff")
    shared = bytes(ring.page)
    for _ in range(8):
        doomed += [client.start(WRITE, 0, 4096, b"!" * 4096), client.start(READ, 0, 4096)]
    await disk.until("the wait is over", lambda s: "backend Closing" in s["reason"])
    assert bytes(ring.page) == shared
    assert held() == before
    assert (await disk.stats()).state == lib.PVF_BROKEN
    await disk.misstep()
    await disk.connected(after=disk.first)
    ends = [await outcome(reply) for reply in doomed]
    assert all(isinstance(end, bytes | ConnectionError) for end in ends)
    await disk.works()


async def test_rule_21_what_a_broken_connection_had_acknowledged_is_on_the_disk(
    disk: Disk,
) -> None:
    client = await disk.client()
    data = [os.urandom(4096) for _ in range(64)]
    await disk.fault(Fault.corrupt("id", xor=1, op="write", skip=40, count=1))
    ends = [await outcome(client.start(WRITE, 4096 * i, 4096, data[i])) for i in range(len(data))]
    done = [i for i, end in enumerate(ends) if not isinstance(end, Exception)]
    assert len(done) == 40
    await disk.connected(after=disk.first)
    await disk.leave()
    client = await disk.client()
    for i in done:
        assert await client.read(4096 * i, 4096) == data[i]


async def test_rule_22_scribbling_over_completed_pages_reaches_no_other_request(
    disk: Disk,
) -> None:
    """Accepted: what it scribbles over, or into the next write, is its own disk's content."""
    client = await disk.client()
    await disk.fault(
        Fault.rewrite_pages("after", pattern=WORD), Fault.touch_outside(pattern=WORD, op="read")
    )
    before = (await disk.stats()).wakeups
    for i in range(50):
        data = os.urandom(1024)
        await client.write(4096 * i, data)
        # Its own data or its own scribbles, never another's: whole words of one or the other.
        got = await client.read(4096 * i, 1024)
        words = {got[at : at + 8] for at in range(0, 1024, 8)}
        assert words <= {data[at : at + 8] for at in range(0, 1024, 8)} | {CANARY}
    assert (await disk.stats()).wakeups - before < 2000
    await disk.fault()
    await client.flush()
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_22_pages_that_a_backend_keeps_mapped_are_scribbled_over_while_free(
    disk: Disk,
) -> None:
    """Persistent grants: it may write at any time, into pages of no request. Nothing shows it."""
    client = await disk.client()
    data = os.urandom(2 * MIB)
    await client.write(0, data)
    assert await client.read(0, len(data)) == data
    assert await disk.served("persistent") > 0, "the backend kept no page mapped"
    await disk.fault(Fault.rewrite_pages("idle", pattern=WORD, count=20))
    await disk.fired("pages", 20)
    await disk.fault()
    # Every page is used anew, by reads that end early and by short writes too.
    assert await client.read(0, len(data)) == data
    await disk.fault(Fault.short(0, op="read"))
    # What it wrote where nothing of ours had stood may be what its own reads leave.
    got = await client.read(0, len(data))
    assert {got[at : at + 8] for at in range(0, len(got), 8)} <= {bytes(8), CANARY}
    await disk.fault()
    for length in (512, 4096 + 512, 100 * 512, MIB):
        await client.write(4 * MIB, data[:length])
        assert await client.read(4 * MIB, length) == data[:length]
    assert await client.read(0, len(data)) == data
    assert (await disk.shown())["generation"] == disk.first


async def test_a_page_rewritten_while_its_payload_is_sent_stays_within_its_reply(
    disk: Disk,
) -> None:
    """The client gets the read's length, whatever stands in it, and the next reply in step."""
    client = await disk.client()
    await client.write(0, bytes(4 * MIB))
    await disk.fault(Fault.rewrite_pages("after", op="read"))
    for _ in range(4):
        replies = [client.start(READ, MIB * i, MIB) for i in range(4)]
        assert [len(await finished(reply)) for reply in replies] == [MIB] * 4
    ring = await disk.ring()
    asked = ring.words[REQ_PROD]

    async def asleep() -> bool:
        return ring.words[REQ_PROD] == asked and (await disk.stats()).in_flight == 0

    await eventually("nothing is in flight", asleep)
    await disk.fault()
    assert await client.read(0, 4096) == bytes(4096)
