# SPDX-License-Identifier: BSD-2-Clause
"""Rules 1 to 8: a ring whose other end lies. The numbers are those of docs/security.md."""

from __future__ import annotations

import os
import struct

import pytest
from hostileworld import MASK, MIB, REQ_PROD, RSP_PROD, SLOT, SLOTS, Disk
from nbdclient import (
    EINVAL,
    EIO,
    ENOTSUP,
    FLUSH,
    READ,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    TRIM,
    WRITE,
    Client,
    NbdError,
    finished,
    outcome,
)
from waiting import eventually

from pvfront.host.blkback import Fault

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def write(client: Client) -> None:
    await client.write(0, bytes(4096))


async def write_twice(client: Client) -> None:
    await write(client)
    await write(client)


@pytest.mark.parametrize("by", [1, 31, 1000, 0x7FFFFFF0])
async def test_rule_01_more_responses_than_requests_break_the_ring(disk: Disk, by: int) -> None:
    await disk.breaks(1, "rsp_prod", write, Fault.producer(by, op="write", count=1))


async def test_rule_01_an_index_that_jumps_while_nothing_is_asked_breaks_the_ring(
    disk: Disk,
) -> None:
    ring = await disk.ring()

    async def act(client: Client) -> None:
        await write(client)
        ring.words[RSP_PROD] = (ring.words[RSP_PROD] + 5) & MASK
        await disk.fault(Fault.storm(count=1))

    await disk.breaks(1, "rsp_prod", act)


@pytest.mark.parametrize("by", [-2, -1000, -0x7FFFFFF0])
async def test_rule_02_an_index_that_moves_backwards_breaks_the_ring(disk: Disk, by: int) -> None:
    await disk.breaks(2, "rsp_prod", write_twice, Fault.producer(by, op="write", skip=1, count=1))


async def test_rule_02_an_index_that_stands_still_only_delays_the_answer(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, bytes(4096))
    await disk.fault(Fault.producer(-1, op="write", count=1))
    late = client.start(WRITE, 4096, 4096, bytes(4096))
    await disk.fired("producer")
    assert not late.done()
    await client.flush()  # publishes the index as it is
    await finished(late)
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_03_slots_rewritten_after_they_were_read_change_nothing(disk: Disk) -> None:
    """How often each is read is shown by native/tests/test_fetch.c."""
    ring = await disk.ring()
    client = await disk.client()
    model = bytearray(64 * 4096)
    for turn in range(100):
        at = turn % 64 * 4096
        model[at : at + 4096] = os.urandom(4096)
        await client.write(at, bytes(model[at : at + 4096]))
        ring.junk(turn)
    assert await client.read(0, len(model)) == model
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_03_slots_rewritten_as_they_are_published_end_well_or_with_rule_5(
    disk: Disk,
) -> None:
    client = await disk.client()
    await disk.fault(Fault.rewrite_slots("after", op="write", chance=0.2))
    for turn in range(100):
        data = os.urandom(4096)
        if not isinstance(await outcome(client.start(WRITE, turn * 4096, 4096, data)), Exception):
            continue
        await client.gone()
        await disk.leave()
        client = await disk.client()
    await disk.fault()
    broken = [line for line in disk.log.splitlines() if "broke rule" in line]
    assert all("broke rule 5: id=" in line for line in broken), broken
    await disk.works()


@pytest.mark.parametrize("ahead", [1, 32, 33, 0x5A5A5A5A])
async def test_rule_04_what_the_backend_writes_over_our_index_is_never_read(
    disk: Disk, ahead: int
) -> None:
    ring = await disk.ring()
    client = await disk.client()
    ours = lie = 0

    async def published() -> bool:
        return lie == ours or ring.words[REQ_PROD] != lie

    for turn in range(10):
        await client.write(0, bytes([turn]) * 4096)
        with disk.world.backend_stopped():  # it must see what we publish next, not this
            ours = (ring.words[RSP_PROD] + 1) & MASK
            lie = (ring.words[RSP_PROD] + ahead) & MASK
            ring.words[REQ_PROD] = lie
            reply = client.start(READ, 0, 4096)
            await disk.counted("the read in the ring", lambda stats: stats.in_flight == 1)
            await eventually("an index of ours", published)
            assert ring.words[REQ_PROD] == ours
        assert await finished(reply) == bytes([turn]) * 4096
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_04_a_request_is_judged_by_what_was_asked_not_by_its_slot(disk: Disk) -> None:
    """Nor by the page of an indirect request's descriptors."""
    ring = await disk.ring()
    client = await disk.client()
    data = os.urandom(512 << 10)
    await client.write(0, data)
    await disk.fault(Fault.stall(op="read"))
    reply = client.start(READ, 0, len(data))
    await disk.fired("stall", 2)
    assert await disk.served("indirect")
    ring.junk()
    await disk.release()
    assert await finished(reply) == data
    assert (await disk.shown())["generation"] == disk.first


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault.corrupt("id", 0, op="write", count=1), id="zero"),
        pytest.param(Fault.corrupt("id", xor=0xFFFF, op="write", count=1), id="index-too-large"),
        pytest.param(Fault.corrupt("id", xor=1, op="write", count=1), id="of-no-request"),
        pytest.param(Fault.corrupt("id", xor=1 << 63, op="write", count=1), id="high-bit"),
        pytest.param(Fault.corrupt("id", xor=1 << 16, op="write", count=1), id="other-serial"),
    ],
)
async def test_rule_05_an_unknown_id_breaks_the_ring(disk: Disk, fault: Fault) -> None:
    await disk.breaks(5, "id", write, fault)


async def test_rule_05_the_id_of_a_finished_request_breaks_the_ring(disk: Disk) -> None:
    stale = Fault.corrupt("id", stale=True, op="write", skip=1, count=1)
    await disk.breaks(5, "id", write_twice, stale)


async def test_rule_05_an_answer_given_twice_breaks_the_ring(disk: Disk) -> None:
    async def act(client: Client) -> None:
        client.start(READ, 0, 4096)
        await disk.fired("stall")
        await write(client)

    await disk.breaks(5, "id", act, Fault.stall(op="read"), Fault.duplicate(1, op="write", count=1))


async def test_rule_05_one_request_answered_in_the_place_of_another_breaks_the_ring(
    disk: Disk,
) -> None:
    """The first answer passes for the other's; when that comes, it has been answered."""

    async def act(client: Client) -> None:
        mistaken = client.start(WRITE, 0, 4096, bytes(4096))
        await disk.fired("stall")
        client.start(WRITE, 4096, 4096, bytes(4096))
        await finished(mistaken)
        await disk.release()
        await client.gone()

    await disk.breaks(
        5,
        "id",
        act,
        Fault.stall(op="write", sectors=(0, 7)),
        Fault.corrupt("id", other=True, op="write", sectors=(8, 15)),
    )


@pytest.mark.parametrize("operation", [0, 3, 6, 255])
async def test_rule_06_an_answer_with_another_operation_breaks_the_ring(
    disk: Disk, operation: int
) -> None:
    fault = Fault.corrupt("operation", operation, op="write", count=1)
    await disk.breaks(6, "operation", write, fault)


@pytest.mark.parametrize("status", [-1, -2, -3, 1, 32767, -32768])
async def test_rule_07_any_status_but_okay_is_an_error(disk: Disk, status: int) -> None:
    client = await disk.client()
    await client.write(0, b"\x11" * 4096)
    await disk.fault(Fault.fail(status, op=["read", "write"]))
    for reply in (
        client.start(READ, 0, 4096),
        client.start(WRITE, 0, 4096, b"\x22" * 4096),
        client.start(READ, 0, MIB),
        client.start(WRITE, 0, MIB, bytes(MIB)),
    ):
        with pytest.raises(NbdError) as caught:
            await finished(reply)
        assert caught.value.number == EIO
    await disk.fault()
    assert await client.read(0, 4096) == b"\x11" * 4096
    assert (await disk.shown())["generation"] == disk.first


@pytest.mark.parametrize(
    ("kind", "name", "flags"),
    [(FLUSH, "flush", SEND_FLUSH | SEND_FUA), (TRIM, "discard", SEND_TRIM)],
    ids=["flush", "discard"],
)
async def test_rule_07_eopnotsupp_is_an_error_and_turns_the_feature_off(
    disk: Disk, kind: int, name: str, flags: int
) -> None:
    client = await disk.client()
    assert client.flags & flags == flags
    await disk.fault(Fault.fail("eopnotsupp", op="flush" if kind == FLUSH else "discard"))
    length = 0 if kind == FLUSH else 65536
    for _ in range(3):
        with pytest.raises(NbdError) as caught:
            await finished(client.start(kind, 0, length))
        assert caught.value.number == ENOTSUP
    assert await disk.served("fired_fail") == 1  # never asked again
    await disk.until(f"{name} is off", lambda s: not s["geometry"][name])
    await disk.logged(f"the backend does not support {name} after all")
    await disk.leave()
    client = await disk.client()
    assert not client.flags & flags
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_07_a_flush_that_failed_is_no_success_of_a_fua_write(disk: Disk) -> None:
    client = await disk.client()
    await disk.fault(Fault.fail(-1, op="flush"))
    with pytest.raises(NbdError) as caught:
        await client.write(0, bytes(4096), fua=True)
    assert caught.value.number == EIO


async def test_rule_08_a_flood_of_requests_is_taken_in_several_turns(disk: Disk) -> None:
    """How many at a time is shown by native/tests/test_engine.c."""
    client = await disk.client()
    await client.read(0, 4096)
    before = (await disk.stats()).wakeups
    # Refused at once, so that neither slot nor page stops the intake; in one write, so that
    # the worker could take them all at once.
    for reply in [client.start(READ, 1, 512) for _ in range(500)]:
        error = await outcome(reply)
        assert isinstance(error, NbdError)
        assert error.number == EINVAL
    await disk.counted("two turns", lambda s: s.wakeups - before >= 2)


async def test_rule_08_a_backend_that_answers_without_end_does_not_keep_others_waiting(
    disk: Disk,
) -> None:
    """Slots full of answers and events without end: the control socket is served all the same."""
    client = await disk.client()
    await disk.fault(Fault.storm())
    replies = [client.start(READ, 4096 * i, 4096) for i in range(300)]
    assert (await disk.shown())["phase"] == "connected"
    for reply in replies:
        await finished(reply)
    await disk.fault()


async def test_responses_that_the_backend_prepares_ahead_are_no_answers(disk: Disk) -> None:
    """What lies in a slot counts only when rsp_prod says so."""
    ring = await disk.ring()
    client = await disk.client()
    await disk.fault(Fault.stall(op="read"))
    reply = client.start(READ, 0, 4096)
    await disk.fired("stall")
    index = ring.words[RSP_PROD] % ring.slots
    at = SLOTS + SLOT * index
    ring.page[at : at + 16] = struct.pack("<QBxhxxxx", 1 << 16, 0, 0)
    await disk.fault(Fault.stall(op="read"), Fault.storm(count=20))
    await disk.fired("storm", 20)
    assert not reply.done()
    await disk.release()
    await finished(reply)
