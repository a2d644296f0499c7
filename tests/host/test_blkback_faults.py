# SPDX-License-Identifier: BSD-2-Clause
"""Faults and missteps of the block backend, told over its socket: each does what it says.

What the engine does with a rule is tested in detail in C (native/tests/test_blkback_faults.c); here
it is the way from Python to the ring, and everything that happens in the store.
"""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from blkpeer import (
    BARRIER,
    CLOSED,
    CLOSING,
    CONNECTED,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    INIT_WAIT,
    INITIALISED,
    INITIALISING,
    OKAY,
    PAGE,
    READ,
    RSP_PROD,
    WRITE,
    disk,
    pattern,
    whole,
)
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE, eventually

from pvfront.host.blkback import BlkBackend, BlkBackendError, Fault, Misstep
from pvfront.host.faults import KINDS, OPERATIONS, STEPS, FaultError
from pvfront.host.process import socket_path

WORD = 0x5AA5_1234_5678_9ABC

# -- the vocabulary ------------------------------------------------------------------------------


def test_every_kind_of_fault_has_a_constructor() -> None:
    made = {
        Fault.delay(1), Fault.stall(), Fault.reorder(4), Fault.fail(), Fault.short(), Fault.drop(),
        Fault.duplicate(), Fault.corrupt("id", 1), Fault.producer(1), Fault.lose_event(),
        Fault.storm(), Fault.rewrite_pages("idle"), Fault.rewrite_slots("idle"),
        Fault.touch_outside(), Fault.look(1), Fault.die(),
    }  # fmt: skip
    assert {fault.kind for fault in made} == set(KINDS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (lambda: Fault.delay(-1), "ms=-1"),
        (lambda: Fault.delay(5, 4), "to_ms=4"),
        (lambda: Fault.stall(op="erase"), "op='erase'"),
        (lambda: Fault.stall(chance=0), "chance=0"),
        (lambda: Fault.stall(chance=1.5), "chance=1.5"),
        (lambda: Fault.stall(sectors=(5, 4)), "sectors=4"),
        (lambda: Fault.stall(count=-1), "count=-1"),
        (lambda: Fault.stall(often=1), "often"),
        (lambda: Fault.reorder(0), "window=0"),
        (lambda: Fault.fail("bad"), "status='bad'"),
        (lambda: Fault.fail(40000), "status=40000"),
        (lambda: Fault.corrupt("color", 1), "field='color'"),
        (lambda: Fault.corrupt("id"), "exactly one"),
        (lambda: Fault.corrupt("id", 1, xor=2), "exactly one"),
        (lambda: Fault.corrupt("operation", 256), "value=256"),
        (lambda: Fault.corrupt("status", stale=True), "stale"),
        (lambda: Fault.producer(0), "by=0"),
        (lambda: Fault.producer(1 << 31), "by="),
        (lambda: Fault.storm(-1), "per_second=-1"),
        (lambda: Fault.rewrite_pages("later"), "when='later'"),
        (lambda: Fault.rewrite_pages("idle", op="read"), "idle"),
        (lambda: Fault.look(0), "pattern=0"),
        (lambda: Fault.die(256), "status=256"),
        (lambda: Misstep.state(6, at="lunch"), "at='lunch'"),
        (lambda: Misstep.state(6, at="probe", place="beside"), "place='beside'"),
        (lambda: Misstep.write({}, at="probe"), "no keys"),
        (lambda: Misstep.silence(at="probe", times=-1), "times=-1"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(arguments: object, complaint: str) -> None:
    with pytest.raises(FaultError, match=complaint.replace("'", ".")):
        arguments()  # type: ignore[operator]


@given(
    st.sampled_from(sorted(OPERATIONS)),
    st.integers(0, (1 << 64) - 1),
    st.floats(0.001, 1),
    st.integers(-(1 << 31), (1 << 31) - 1).filter(bool),
)
def test_faults_survive_json(op: str, number: int, chance: float, by: int) -> None:
    for fault in (
        Fault.short(number, op=op, chance=chance, skip=number, sectors=(0, number)),
        Fault.producer(by, op=[op, "read"]),
        Fault.corrupt("id", number),
    ):
        assert Fault.decode(json.loads(json.dumps(fault.encode()))) == fault
    for misstep in (
        Misstep.state(3, at="connect", skip=2),
        Misstep.write({"sectors": None, "info": "x"}, at="probe"),
        Misstep.vanish(at="closed", back_after_ms=4),
    ):
        assert Misstep.decode(json.loads(json.dumps(misstep.encode()))) == misstep


@pytest.mark.parametrize(
    "nonsense",
    [None, [], {}, {"kind": "love"}, {"kind": "drop", "x": 1}, {"kind": "drop", "ops": -1}],
)
def test_what_is_no_fault_is_not_decoded(nonsense: object) -> None:
    with pytest.raises(FaultError):
        Fault.decode(nonsense)
    with pytest.raises(FaultError):
        Misstep.decode(nonsense)


# -- on the ring ---------------------------------------------------------------------------------


async def fired(backend: BlkBackend, kind: str, times: int = 1) -> None:
    """Waits until a fault has fired so often."""

    async def look() -> bool:
        return (await backend.stats())[f"fired_{kind}"] >= times

    await eventually(f"{kind} fired {times} times", look)


async def pushed(backend: BlkBackend) -> None:
    """Waits until the first response has been published."""

    async def look() -> bool:
        return (await backend.stats())["pushes"] == 1

    await eventually("the response", look)


async def test_requests_are_delayed() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.delay(60, op="write"))
        began = time.monotonic()
        slow, fast = frontend.put(WRITE, 0, whole(0, 1)), frontend.put(READ, 8, whole(1, 1))
        frontend.push()
        assert (await frontend.response())[0] == fast
        assert (await frontend.response())[0] == slow
        assert time.monotonic() - began >= 0.06
        assert (await backend.stats())["fired_delay"] == 1


async def test_requests_stall_until_they_are_released() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.stall(op=["write", "flush"]))
        held = [frontend.put(WRITE, 0, whole(0, 1)), frontend.put(FLUSH)]
        frontend.push()
        await fired(backend, "stall", 2)  # else the release would come too early for them
        assert await frontend.silent()
        await backend.release()
        assert [(await frontend.response())[0] for _ in held] == held
        frontend.put(FLUSH)
        frontend.push()
        assert await frontend.silent()
        await backend.clear()
        assert (await frontend.response())[2] == OKAY
        assert await frontend.do(FLUSH) == OKAY


async def test_responses_are_dropped_and_doubled() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.drop(count=1), Fault.duplicate(2, skip=1, count=1))
        frontend.put(READ, 0, whole(0, 1))
        frontend.push()
        assert await frontend.silent()
        ident = frontend.put(READ, 0, whole(0, 1))
        frontend.push()
        assert [(await frontend.response())[0] for _ in range(3)] == [ident] * 3


async def test_responses_come_in_the_order_of_the_seed() -> None:
    orders = []
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        for seed in (1, 1, 2):
            await backend.fault(Fault.reorder(16, ms=20_000), seed=seed)
            first = frontend.next_id + 1
            for i in range(16):
                frontend.put(READ, 0, whole(i, 1))
            frontend.push()
            orders.append([(await frontend.response())[0] - first for _ in range(16)])
    assert sorted(orders[0]) == list(range(16))
    assert orders[0] == orders[1] != orders[2]


async def test_every_field_of_a_response_can_be_wrong() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        faults = [
            Fault.corrupt("id", 0xFFFF_FFFF_FFFF_FFFF),
            Fault.corrupt("id", xor=1 << 40),
            Fault.corrupt("id", stale=True),
            Fault.corrupt("operation", 9),
            Fault.corrupt("status", "error"),
            Fault.corrupt("status", -32768),
            Fault.fail("eopnotsupp"),
        ]
        found = []
        for fault in faults:
            await backend.fault(fault)
            ident = frontend.put(READ, 0, whole(0, 1))
            frontend.push()
            found.append(((await frontend.response()), ident))
        ids = [ident for _, ident in found]
        assert [response for response, _ in found] == [
            (0xFFFF_FFFF_FFFF_FFFF, READ, OKAY),
            (ids[1] ^ 1 << 40, READ, OKAY),
            (ids[1], READ, OKAY),
            (ids[3], 9, OKAY),
            (ids[4], READ, ERROR),
            (ids[5], READ, -32768),
            (ids[6], READ, EOPNOTSUPP),
        ]


@pytest.mark.parametrize("by", [1000, -1])
async def test_the_producer_index_jumps(by: int) -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.producer(by, count=1))
        frontend.put(READ, 0, whole(0, 1))
        frontend.push()

        await pushed(backend)
        assert frontend.rings[0].words[RSP_PROD] == (1 + by) & 0xFFFFFFFF


async def test_pages_and_slots_are_rewritten() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect(persistent=True)
        await backend.fault(Fault.rewrite_pages("before", pattern=WORD))
        assert await frontend.read_back(0, 2) == WORD.to_bytes(8, "little") * (PAGE // 4)
        await backend.fault(Fault.rewrite_pages("idle", pattern=WORD + 1, count=4))
        assert await frontend.silent()

        async def rewritten() -> bool:
            return frontend.data[20 * PAGE : 20 * PAGE + 8] == (WORD + 1).to_bytes(8, "little")

        await eventually("rewriting", rewritten)
        await backend.fault(Fault.rewrite_slots("before", pattern=WORD))
        frontend.put(READ, 0, whole(0, 1))
        frontend.push()
        assert (await frontend.response())[0] == WORD
        await backend.clear()
        assert await frontend.read_back(0, 1) == bytes(PAGE)


async def test_a_read_is_answered_without_being_done() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.short(1, op="read"))
        assert await frontend.read_back(0, 1) == bytes(512) + b"\xee" * (PAGE - 512)


async def test_bytes_outside_are_touched_and_canaries_found() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.look(WORD), Fault.touch_outside(pattern=WORD, op="read"))
        assert await frontend.do(READ, 0, [(0, 1, 6)]) == OKAY
        word = WORD.to_bytes(8, "little")
        assert frontend.data[:PAGE] == word * 64 + bytes(6 * 512) + word * 64
        assert await frontend.do(WRITE, 0, [(0, 0, 6)]) == OKAY
        assert (await backend.stats())["canaries"] == 64


async def test_events_are_lost_and_storm() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.lose_event(count=1))
        frontend.put(READ, 0, whole(0, 1))
        frontend.push()
        await pushed(backend)  # else the next wait would be for the lost one
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(frontend.events.wait(), 0.05)
        assert (await frontend.response())[2] == OKAY
        await backend.fault(Fault.storm(1000))
        began = time.monotonic()
        for _ in range(20):
            frontend.events.unmask(*await asyncio.wait_for(frontend.events.wait(), PATIENCE))
        assert time.monotonic() - began >= 0.01
        assert (await backend.stats())["fired_storm"] >= 20


async def test_a_rule_counts_over_all_queues() -> None:
    async with disk(queues=2) as (_, backend, frontend):
        await frontend.connect(queues=2)
        await backend.fault(Fault.fail(count=3))
        failed = 0
        for i in range(8):
            frontend.put(READ, 0, whole(i, 1), queue=i % 2)
            frontend.push(i % 2)
            failed += (await frontend.response(queue=i % 2))[2] == ERROR
        assert failed == 3


async def test_it_dies_at_the_request_that_is_named() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await backend.fault(Fault.die(42, op="barrier", skip=1))
        assert await frontend.do(BARRIER, 0, whole(0, 1)) == OKAY
        frontend.put(BARRIER, 0, whole(0, 1))
        frontend.push()
        assert await backend.wait() == 42
        with pytest.raises(BlkBackendError, match="does not answer"):
            await backend.stats()


async def test_faults_are_for_one_disk_or_for_all_that_come() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        await host.attach_disk(1, "vdev=xvdc,target=memory:1M")

        async def two() -> bool:
            return len(await backend.vbds()) == 2

        await eventually("the second disk", two)
        await backend.fault(Fault.fail(), vbd=51744)
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY
        await backend.fault(Fault.fail())
        assert await frontend.do(READ, 0, whole(0, 1)) == ERROR
        await frontend.reconnect()
        assert await frontend.do(READ, 0, whole(0, 1)) == ERROR


# -- in the store --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [0, 1, 3, 6, 7, 8, 99, -5])
async def test_the_backend_jumps_to_any_state_instead_of_connecting(state: int) -> None:
    async with disk() as (_, backend, frontend):
        await backend.misstep(Misstep.state(state, at="connect"))
        await frontend.backend_is(INIT_WAIT)
        await frontend.publish()
        await frontend.backend_is(state)
        await frontend.disconnect()
        await frontend.say(INITIALISING)
        await frontend.connect()
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


@pytest.mark.parametrize("step", STEPS)
async def test_each_step_can_be_left_out(step: str) -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        await frontend.disconnect()
        await backend.misstep(Misstep.silence(at=step))
        if step == "probe":
            await backend.vanish()
            await backend.come_back()
            await frontend.backend_is(CLOSED)  # as its frontend is; it published nothing before
            assert await frontend.read("max-ring-page-order") is None
            return
        walk = [
            ("reconnect", INITIALISING, INIT_WAIT), ("connect", INITIALISED, CONNECTED),
            ("closing", CLOSING, CLOSING), ("closed", CLOSED, CLOSED),
        ]  # fmt: skip
        before = CLOSED
        for name, says, expected in walk:
            if says == INITIALISED:
                await frontend.publish()
            else:
                await frontend.say(says)
            if name == step:
                await asyncio.sleep(0.05)
                assert await frontend.read("state") == str(before)
                return
            await frontend.backend_is(expected)
            before = expected
        raise AssertionError(f"{step} was not reached")


async def test_a_state_is_written_at_once_when_it_is_told() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        for state in (CLOSED, CLOSING, 2):
            await backend.state(state)
            assert await frontend.read("state") == str(state)
        await backend.state(CLOSING)
        await frontend.reconnect()
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def test_a_step_comes_late() -> None:
    async with disk() as (_, backend, frontend):
        await backend.misstep(Misstep.pause(150, at="connect"))
        await frontend.backend_is(INIT_WAIT)
        began = time.monotonic()
        await frontend.publish()
        await frontend.backend_is(CONNECTED)
        assert time.monotonic() - began >= 0.15


async def test_keys_are_published_wrong() -> None:
    async with disk() as (_, backend, frontend):
        await backend.override({"sectors": "-1", "sector-size": "banana", "info": None})
        await frontend.connect()
        keys = await frontend.keys()
        assert (keys["sectors"], keys["sector-size"]) == ("-1", "banana")
        assert "info" not in keys
        await backend.clear()
        await frontend.reconnect()
        assert await frontend.read("sectors") == str(8 * 2048)


async def test_keys_are_written_at_a_step_and_at_once() -> None:
    async with disk() as (_, backend, frontend):
        await backend.misstep(
            Misstep.write({"sectors": "18446744073709551616", "extra": "x"}, at="connect")
        )
        await frontend.connect()
        await eventually("the key", lambda: frontend.read("extra"))
        assert await frontend.read("sectors") == "18446744073709551616"
        await backend.write({"extra": None, "info": "77"})
        assert await frontend.read("extra") is None
        assert await frontend.read("info") == "77"


async def test_keys_change_all_the_time() -> None:
    async with disk() as (host, backend, frontend):
        await frontend.connect()
        await backend.flicker({"sectors": ["1", "2", "3"]}, every_ms=1)
        seen = set()
        async with host.store.watch(f"{frontend.back}/sectors") as watch:
            async with asyncio.timeout(PATIENCE):
                async for _ in watch:
                    seen.add(await frontend.read("sectors"))
                    if seen >= {"1", "2", "3"}:
                        break
        await backend.flicker({})


async def test_the_backend_vanishes_and_returns_with_its_disk() -> None:
    async with disk() as (_, backend, frontend):
        await frontend.connect()
        assert await frontend.write(0, pattern(3, 1)) == OKAY
        await backend.vanish()
        await frontend.backend_is(None)
        await backend.come_back()
        # A new device sees a frontend that says Connected, and takes it at its word.
        await frontend.backend_is(CONNECTED)
        await frontend.reconnect()
        assert await frontend.read_back(0, 1) == pattern(3, 1)
        with pytest.raises(BlkBackendError, match="nothing has vanished"):
            await backend.come_back()


async def test_the_backend_vanishes_in_the_middle_of_the_handshake() -> None:
    async with disk() as (_, backend, frontend):
        await backend.misstep(Misstep.vanish(at="connect", back_after_ms=50))
        await frontend.backend_is(INIT_WAIT)
        # It may be back before anybody looks: what shows that it was away is what it left behind.
        await frontend.store.write(f"{frontend.back}/mark", "1")
        await frontend.publish()

        async def vanished() -> bool:
            return await frontend.read("mark") is None

        await eventually("the backend without its nodes", vanished)
        await backend.misstep()
        await frontend.backend_is(CONNECTED)
        assert await frontend.do(READ, 0, whole(0, 1)) == OKAY


async def test_the_control_socket_answers_nonsense_with_an_error() -> None:
    async with disk() as (host, backend, _):
        reader, writer = await asyncio.open_unix_connection(
            socket_path("blkback", host.directory, 0)
        )
        for line in (
            b"{",
            b"[]",
            b'{"do": "fly"}',
            b'{"do": "faults"}',
            b'{"do": "resize"}',
            b"\xff",
        ):
            writer.write(line + b"\n")
            answer = json.loads(await reader.readline())
            assert answer["ok"] is False
            assert answer["error"]
        writer.close()
        await writer.wait_closed()
        assert len(await backend.vbds()) == 1
