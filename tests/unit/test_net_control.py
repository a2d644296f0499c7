# SPDX-License-Identifier: BSD-2-Clause
"""A vif's control ring: requests and answers, hashes, static grants; a backend that lies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
from controlpeer import (
    ADD_GREF,
    DEL_GREF,
    GET_FLAGS,
    GET_GREF_SIZE,
    GET_TABLE_SIZE,
    INVALID,
    OK,
    READ_ONLY,
    SET_ALGORITHM,
    SET_FLAGS,
    SET_KEY,
    SET_TABLE,
    SET_TABLE_SIZE,
    Asked,
    Channels,
    Guest,
    Peer,
)
from hypothesis import given
from hypothesis import strategies as st
from vclock import VirtualLoop

from pvfront import parking
from pvfront.abi import lib
from pvfront.gntalloc import GrantsExhausted
from pvfront.netfront import hashing
from pvfront.netfront.control import (
    ANSWER,
    DATA_BYTES,
    REQUESTS,
    STATUSES,
    Control,
    ControlGone,
    Refused,
    Ring,
)
from pvfront.netfront.controlside import LOST, ControlSide
from pvfront.netfront.staticgrants import PER_MESSAGE, StaticGrants, chosen
from pvfront.parking import CannotPark

LOOP_FACTORY = VirtualLoop
KEY = bytes(range(40))


def opened(peer: Peer | None) -> tuple[Guest, Control]:
    guest = Guest(peer)
    source: Any = guest
    return guest, Control.open(source, 0)


def port_of(guest: Guest) -> Channels:
    (channels,) = [handle for handle in guest.handles if isinstance(handle, Channels)]
    return channels


# -- the ring --------------------------------------------------------------------------------------


def test_layout_and_numbers_are_netif_hs() -> None:
    assert (lib.PVF_NET_CTRL_SLOTS, lib.PVF_NET_CTRL_SLOT) == (128, 16)
    assert REQUESTS[7] == "SET_HASH_ALGORITHM"
    assert REQUESTS[10] == "DEL_GREF_MAPPING"
    assert STATUSES == {
        0: "SUCCESS", 1: "NOT_SUPPORTED", 2: "INVALID_PARAMETER", 3: "BUFFER_OVERFLOW",
    }  # fmt: skip


def test_requests_go_round_the_ring_many_times() -> None:
    page, peer = bytearray(4096), Peer()
    ring = Ring(page)
    for turn in range(1000):
        ring.ask(SET_ALGORITHM, (turn & 1,))
        assert ring.answer() is None
        peer.serve(page)
        found = ring.answer()
        assert found is not None
        assert (found.kind, found.status) == (SET_ALGORITHM, OK)
    assert [one.data[0] for one in peer.asked] == [turn & 1 for turn in range(1000)]
    ring.release()


def test_only_one_request_is_under_way() -> None:
    ring = Ring(bytearray(4096))
    ring.ask(SET_ALGORITHM, ())
    with pytest.raises(ValueError, match="under way"):
        ring.ask(SET_ALGORITHM, ())


@given(st.integers(0, 3) | st.integers(0, 0xFFFFFFFF), st.binary(max_size=16))
def test_whatever_stands_in_the_page_an_answer_is_ours_or_a_lie(rsp_prod: int, slot: bytes) -> None:
    page = bytearray(4096)
    ring = Ring(page)
    ring.ask(GET_TABLE_SIZE, ())
    page[8:12] = rsp_prod.to_bytes(4, "little")
    page[64 : 64 + len(slot)] = slot
    found: object = None
    with contextlib.suppress(ControlGone):
        found = ring.answer()
    assert found is None or (page[64:66], page[66:68]) == (b"\1\0", b"\4\0")


# -- requests --------------------------------------------------------------------------------------


async def test_an_answer_comes_by_event_and_the_port_rests_masked() -> None:
    guest, control = opened(Peer())
    assert await control.request(GET_TABLE_SIZE) == 128
    assert await control.request(GET_TABLE_SIZE) == 128
    channels = port_of(guest)
    before = channels.unmasked
    channels.storm = True
    channels.fire()
    await asyncio.sleep(10)
    assert channels.unmasked == before, "nobody listens while nothing is asked"
    control.close()
    assert guest.open == []


async def test_a_lost_event_costs_a_second_look_not_the_answer() -> None:
    guest, control = opened(None)
    asking = asyncio.create_task(control.request(GET_TABLE_SIZE))
    await asyncio.sleep(0.1)
    assert Peer().serve(guest.handles[-1].first), "it wants an event"  # type: ignore[union-attr]
    assert await asking == 128
    control.close()


async def test_a_storm_of_events_without_an_answer_is_slowed_down() -> None:
    guest, control = opened(Peer(mute=True))
    port_of(guest).storm = True
    with pytest.raises(ControlGone):
        await control.request(GET_TABLE_SIZE)
    assert port_of(guest).unmasked < 20
    control.close()


async def test_no_answer_within_its_time_names_the_request_and_ends_the_ring() -> None:
    _, control = opened(Peer(mute=True))
    began = asyncio.get_running_loop().time()
    with pytest.raises(ControlGone, match=r"did not answer GET_HASH_MAPPING_SIZE .* within 2 s"):
        await control.request(GET_TABLE_SIZE)
    assert asyncio.get_running_loop().time() - began <= 2 * ANSWER
    with pytest.raises(ControlGone, match="did not answer GET_HASH_MAPPING_SIZE"):
        await control.request(GET_FLAGS)
    control.close()


async def test_a_refusal_names_request_and_status_and_the_ring_goes_on() -> None:
    _, control = opened(Peer(refuses={GET_TABLE_SIZE}))
    with pytest.raises(Refused, match="GET_HASH_MAPPING_SIZE: NOT_SUPPORTED") as refused:
        await control.request(GET_TABLE_SIZE)
    assert refused.value.unsupported
    await control.request(SET_ALGORITHM, 1)
    control.close()


async def test_an_unknown_status_is_a_refusal() -> None:
    _, control = opened(Peer(lie=lambda asked, honest: [(*honest[:2], 77, 0)]))
    with pytest.raises(Refused, match="unknown status 77"):
        await control.request(GET_TABLE_SIZE)
    control.close()


LIES: dict[str, Callable[[Asked, tuple[int, int, int, int]], list[tuple[int, int, int, int]]]] = {
    "rule 5.*control ring": lambda asked, honest: [(honest[0] + 1, *honest[1:])],
    "rule 5.*not asked": lambda asked, honest: [(honest[0], SET_KEY, 0, 0)],
    "rule 1 .*rsp_prod": lambda asked, honest: [honest, honest],
}


@pytest.mark.parametrize("rule", LIES)
async def test_an_answer_that_cannot_be_ends_the_ring_with_its_rule(rule: str) -> None:
    _, control = opened(Peer(lie=LIES[rule]))
    with pytest.raises(ControlGone, match=rule):
        await control.request(GET_TABLE_SIZE)
    with pytest.raises(ControlGone, match=rule):
        await control.request(GET_TABLE_SIZE)
    control.close()


async def test_responses_that_go_back_are_a_broken_ring() -> None:
    guest, control = opened(peer := Peer())
    await control.request(GET_TABLE_SIZE)
    peer.publish(guest.handles[-1].first, off=-1)  # type: ignore[union-attr]
    with pytest.raises(ControlGone, match="rule 2"):
        control._ring.answer()
    control.close()


async def test_a_request_that_is_cancelled_leaves_nothing_to_be_mistaken() -> None:
    _, control = opened(Peer(mute=True))
    asking = asyncio.create_task(control.request(GET_TABLE_SIZE))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    with pytest.raises(ControlGone, match="was cancelled"):
        await control.request(GET_TABLE_SIZE)
    control.close()


@pytest.mark.parametrize(("pages", "ports"), [(0, None), (1, None), (None, 0)])
async def test_a_ring_for_which_there_is_no_room_leaves_nothing_open(
    pages: int | None, ports: int | None
) -> None:
    guest = Guest()
    guest.pages_left, guest.ports_left = pages, ports
    source: Any = guest
    with pytest.raises((GrantsExhausted, OSError)):
        Control.open(source, 0)
    assert guest.open == []


async def test_what_was_written_before_does_not_stay_in_the_page() -> None:
    guest, control = opened(Peer())
    control.write(b"s" * DATA_BYTES)
    control.write(b"key")
    assert control.read(DATA_BYTES) == b"key".ljust(DATA_BYTES, b"\0")
    with pytest.raises(ValueError, match="do not fit"):
        control.write(bytes(DATA_BYTES + 1))
    control.close()
    control.close()
    assert (guest.open, guest.granted) == ([], 0)


# -- hashes ----------------------------------------------------------------------------------------


async def test_a_hash_is_set_up_with_our_key_over_all_queues() -> None:
    peer = Peer(queues=3)
    _, control = opened(peer)
    found = await hashing.set_up(control, 3, random=lambda size: KEY[:size])
    assert (peer.algorithm, peer.flags, peer.key) == (1, 15, KEY)
    assert peer.table == [entry % 3 for entry in range(128)]
    assert (found.kinds, found.entries) == (("ipv4", "ipv4-tcp", "ipv6", "ipv6-tcp"), 128)
    assert peer.names()[0] == SET_ALGORITHM, "netback answers nothing before it has one"
    assert peer.names()[-1] == SET_FLAGS, "packets are hashed when key and table are there"
    control.close()


async def test_each_connection_has_a_key_of_its_own() -> None:
    keys = set()
    for _ in range(2):
        peer = Peer()
        _, control = opened(peer)
        await hashing.set_up(control, 2)
        keys.add(peer.key)
        control.close()
    assert len(keys) == 2
    assert all(len(key) == 40 for key in keys)


@pytest.mark.parametrize(
    ("most", "queues", "entries"),
    [(128, 2, 128), (1, 2, 0), (0, 2, 0), (3, 2, 2), (100, 4, 64), (0xFFFFFFFF, 2, 128),
     (16, 16, 16), (15, 16, 0)],
)  # fmt: skip
async def test_the_table_is_no_larger_than_the_backends_and_leaves_no_queue_out(
    most: int, queues: int, entries: int
) -> None:
    peer = Peer(queues=queues, most_entries=most)
    _, control = opened(peer)
    found = await hashing.set_up(control, queues)
    assert found.entries == len(peer.table) == entries
    if entries:
        assert set(peer.table) == set(range(queues))
    else:
        assert SET_TABLE not in peer.names()
    control.close()


async def test_only_kinds_of_packets_that_the_backend_knows_are_hashed() -> None:
    peer = Peer(kinds=1 | 2 | 1 << 20)
    _, control = opened(peer)
    found = await hashing.set_up(control, 2)
    assert found.kinds == ("ipv4", "ipv4-tcp")
    assert peer.flags == 3
    control.close()


@pytest.mark.parametrize(
    "refused", [GET_FLAGS, SET_FLAGS, SET_KEY, GET_TABLE_SIZE, SET_TABLE_SIZE, SET_TABLE]
)
async def test_a_hash_that_is_refused_halfway_is_taken_back(refused: int) -> None:
    peer = Peer(refuses={refused})
    _, control = opened(peer)
    with pytest.raises(Refused, match=REQUESTS[refused]):
        await hashing.set_up(control, 2)
    assert peer.algorithm == 0
    control.close()


# -- static grants ---------------------------------------------------------------------------------


async def test_both_pools_are_mapped_tx_read_only_in_as_many_messages_as_it_takes() -> None:
    peer = Peer(greferences=5000)
    guest, control = opened(peer)
    static = StaticGrants()
    tx, rx = range(10_000, 10_700), range(20_000, 20_600)
    assert await static.give(control, 1, tx, rx) == 1300
    assert peer.names() == [GET_GREF_SIZE, ADD_GREF, ADD_GREF, ADD_GREF]
    assert [one.data[2] for one in peer.asked[1:]] == [PER_MESSAGE, PER_MESSAGE, 276]
    assert peer.mapped[1] == dict.fromkeys(tx, READ_ONLY) | dict.fromkeys(rx, 0)
    assert static.pages == 1300
    assert await static.give(control, 1, tx, rx) == 1300
    assert len(peer.asked) == 4, "what was given is not given again"
    assert await static.take_back(control, within=1) == 0
    assert peer.names()[4:] == [DEL_GREF] * 3
    assert (peer.mapped[1], static.pages) == ({}, 0)
    control.close()
    assert guest.open == []


async def test_a_backend_that_keeps_fewer_gets_some_of_both_pools() -> None:
    peer = Peer(greferences=100)
    _, control = opened(peer)
    static = StaticGrants()
    assert await static.give(control, 0, range(1000, 1288), range(2000, 2256)) == 100
    flags = list(peer.mapped[0].values())
    assert (flags.count(READ_ONLY), flags.count(0)) == (52, 48)
    control.close()


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 0xFFFFFFFF))
def test_what_is_chosen_is_never_more_than_is_kept_nor_than_there_is(
    tx: int, rx: int, most: int
) -> None:
    found = chosen(range(tx), range(1000, 1000 + rx), most)
    assert len(found) == min(most, tx + rx)
    assert len({one.ref for one in found}) == len(found)
    assert all(one.read_only == (one.ref < 1000) for one in found)


async def test_a_backend_without_static_grants_is_asked_once() -> None:
    peer = Peer()
    _, control = opened(peer)
    with pytest.raises(Refused) as refused:
        await StaticGrants().give(control, 0, [1], [2])
    assert refused.value.unsupported
    assert peer.names() == [GET_GREF_SIZE]
    control.close()


async def test_pages_that_the_backend_says_it_keeps_are_counted() -> None:
    peer = Peer(greferences=64, keeps={11, 20})
    _, control = opened(peer)
    static = StaticGrants()
    await static.give(control, 0, [10, 11], [20, 21])
    assert await static.take_back(control, within=1) == 2
    control.close()


async def test_a_count_that_cannot_be_is_not_believed() -> None:
    peer = Peer(greferences=64)
    _, control = opened(peer)
    static = StaticGrants()
    await static.give(control, 0, [10, 11], [20])
    peer.lie = lambda asked, honest: [(*honest[:3], 0xFFFFFFFF)]
    assert await static.take_back(control, within=1) == 0
    peer.lie = None
    await static.give(control, 0, [10, 11], [20])
    peer.lie = lambda asked, honest: [(*honest[:3], 1)]
    assert await static.take_back(control, within=1) == 2, "of three, whatever the entries say"
    control.close()


async def test_what_was_mapped_before_a_refusal_is_taken_back_too() -> None:
    peer = Peer(greferences=5000)
    _, control = opened(peer)
    static = StaticGrants()

    def second_fails(asked: Asked, honest: tuple[int, ...]) -> list[Any]:
        late = asked.kind == ADD_GREF and peer.names().count(ADD_GREF) > 1
        return [(*honest[:2], INVALID, 0) if late else honest]

    peer.lie = second_fails
    with pytest.raises(Refused, match="ADD_GREF_MAPPING: INVALID_PARAMETER"):
        await static.give(control, 0, range(1000, 1600), range(2000, 2600))
    assert static.pages == PER_MESSAGE
    peer.lie = None
    await static.take_back(control, within=1)
    assert static.pages == 0
    assert peer.names()[-1] == DEL_GREF
    control.close()


# -- of a connection -------------------------------------------------------------------------------


def side(peer: Peer | None, queues: int = 2) -> tuple[Guest, ControlSide]:
    guest, made = Guest(peer), ControlSide("vif-0")
    source: Any = guest
    made.open(source, 0, offered=True)
    made.has_pools(
        [(range(1000 * q, 1000 * q + 8), range(1000 * q + 500, 1000 * q + 508))
         for q in range(1, queues + 1)]
    )  # fmt: skip
    return guest, made


async def test_a_connection_gets_all_that_its_backend_can() -> None:
    peer = Peer(greferences=64)
    guest, made = side(peer)
    await made.set_up()
    details = made.details()
    assert details["state"] == "in use"
    assert details["hash"]["algorithm"] == "toeplitz"
    assert details["static"] == {"pages": 32, "queues": 2, "why": ""}
    assert (made.ports, made.pages) == (guest.bound, 2)
    await made.take_back(1.0)
    assert peer.mapped == {0: {}, 1: {}}
    made.close()
    assert (guest.open, made.ports, made.pages) == ([], [], 0)


async def test_one_queue_needs_no_hash() -> None:
    peer = Peer(queues=1)
    _, made = side(peer, queues=1)
    await made.set_up()
    assert peer.names() == [GET_GREF_SIZE]
    assert made.details()["hash"] is None
    made.close()


async def test_a_backend_that_refuses_all_is_said_once_and_nothing_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, made = side(Peer(refuses={SET_ALGORITHM}))
    await made.set_up()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "SET_HASH_ALGORITHM: NOT_SUPPORTED" in caplog.text
    assert made.details()["hash"] == "the backend refuses SET_HASH_ALGORITHM: NOT_SUPPORTED"
    made.close()


async def test_a_silent_backend_costs_one_request_s_time_and_its_name_is_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, made = side(Peer(mute=True))
    began = asyncio.get_running_loop().time()
    await made.set_up()
    assert asyncio.get_running_loop().time() - began < 2 * ANSWER
    assert "did not answer SET_HASH_ALGORITHM" in made.details()["state"]
    assert len(caplog.records) == 1
    await made.take_back(1.0)
    made.close()


async def test_taking_back_waits_for_nobody() -> None:
    peer = Peer(greferences=64)
    _, made = side(peer)
    await made.set_up()
    peer.mute = True
    began = asyncio.get_running_loop().time()
    await made.take_back(0.5)
    assert asyncio.get_running_loop().time() - began < 2
    made.close()


async def test_without_an_offer_or_room_there_is_none_and_why_is_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guest, made = Guest(), ControlSide("vif-0")
    source: Any = guest
    assert made.open(source, 0, offered=False) is None
    assert made.details()["state"] == "the backend offers none"
    assert not caplog.records
    guest.ports_left = 0
    assert made.open(source, 0, offered=True) is None
    assert "No space left" in made.details()["state"]
    assert guest.open == []
    await made.set_up()
    await made.poisoned()


async def test_after_a_supervisor_s_restart_there_is_none_until_the_next_connection() -> None:
    made = ControlSide("vif-0")
    made.lost()
    await made.set_up()
    assert made.details()["state"] == LOST
    assert made.pages == 0


async def test_a_port_that_slept_with_the_domain_is_parked_and_only_then_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest, made = side(Peer())
    (port,) = guest.bound
    steps: list[object] = []

    async def park(pid: int, *, fds: list[int]) -> tuple[int, int]:
        steps.append(fds)
        return 4711, 1

    monkeypatch.setattr(parking, "park", park)
    monkeypatch.setattr(parking.os, "close", lambda fd: steps.append(f"closed {fd}"))
    await made.poisoned()
    assert steps == [[1000 + port], f"closed {1000 + port}"]
    assert guest.granted == 0
    assert made.details()["state"] == "the domain was suspended while connected"


async def test_a_port_that_cannot_be_parked_is_never_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, made = side(Peer())

    async def park(pid: int, *, fds: list[int]) -> tuple[int, int]:
        raise CannotPark("process 1: its ports cannot be taken over: no pidfd")

    monkeypatch.setattr(parking, "park", park)
    monkeypatch.setattr(parking, "_never_closed", kept := [])
    await made.poisoned()
    assert len(kept) == 1
    assert "cannot be taken over" in caplog.text
