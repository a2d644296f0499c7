# SPDX-License-Identifier: BSD-2-Clause
"""Rules 1, 2, 5, 7, 16, 23 to 25, 27 and 28 on the control ring of a network.

Whatever a backend does there, the vif connects and carries packets, with what the ring would have
brought or without it, and the reason is shown; nothing of it is left after a detach.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio
from nethostile import Wire, frame
from networld import network, networks
from waiting import eventually

from pvfront.host.netback import NetFault

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    networks,
]

FIRST = "set_hash_algorithm"
ALL_KINDS = ["ipv4", "ipv4-tcp", "ipv6", "ipv6-tcp"]
NO_ANSWER = "the backend did not answer SET_HASH_ALGORITHM on the control ring within 2 s"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with network("-o", "max_queues=2", "--all", queues=2) as made:
        yield made


class Vif:
    """A vif that connects while the backend lies on its control ring."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    @property
    def control(self) -> dict[str, Any]:
        found: dict[str, Any] = self.wire.state["control"]
        return found

    async def carries(self) -> None:
        """Frames pass both ways; the connection is the first one still."""
        for number in range(3):
            for source, target in (("guest", "net"), ("net", "guest")):
                await self.wire.comes(source, target, [frame(number, 60 + 4000 * number)])
        self.wire.unbroken()

    async def fired(self, kind: str, times: int = 1) -> None:
        await self.wire.fired(kind, times)


@pytest_asyncio.fixture(loop_scope="module")
async def meets(it):
    wires = []

    async def attach(*faults: NetFault) -> Vif:
        await it.backend.fault(*faults)
        wires.append(await Wire.attach(it))
        return Vif(wires[-1])

    yield attach
    try:
        for wire in wires:
            await wire.end()
    except BaseException:
        for wire in wires:
            await wire.remove()
        raise


async def test_an_honest_backend_is_asked_for_a_hash_and_keeps_pages(meets) -> None:
    """What the tests below lean on."""
    vif = await meets()
    assert vif.control["state"] == "in use"
    assert vif.control["hash"] == {"algorithm": "toeplitz", "kinds": ALL_KINDS, "table": 128}
    assert vif.control["static"]["queues"] == 2
    await vif.carries()


@pytest.mark.parametrize(("rule", "by"), [(1, 300), (2, -1)])
async def test_rule_01_and_02_an_impossible_index_ends_the_control_ring(
    meets, rule: int, by: int
) -> None:
    # Behind a first answer, so that there is something to move back from.
    vif = await meets(NetFault.control_producer(by - (by < 0), skip=1, count=1))
    assert vif.control["state"].startswith(f"the backend broke rule {rule} on the control ring")
    assert vif.control["hash"] == vif.control["state"]
    assert vif.control["static"]["pages"] == 0
    await vif.carries()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (NetFault.control("id", 999, of=FIRST), "an answer to request 999 (SET_HASH_ALGORITHM)"),
        (NetFault.control("id", 1, of="get_hash_flags"), "request 1 (GET_HASH_FLAGS)"),
        (NetFault.control("id", 3, of="get_hash_flags"), "request 3 (GET_HASH_FLAGS)"),
        (NetFault.control("type", 9, of=FIRST), "request 1 (ADD_GREF_MAPPING)"),
    ],
    ids=["unknown", "answered", "not-yet-asked", "other-type"],
)
async def test_rule_05_an_answer_to_what_was_not_asked_ends_the_control_ring(
    meets, lie: NetFault, said: str
) -> None:
    vif = await meets(lie)
    assert vif.control["state"].startswith("the backend broke rule 5 on the control ring")
    assert said in vif.control["state"]
    await vif.carries()


async def test_rule_05_an_answer_given_twice_ends_the_control_ring(meets) -> None:
    vif = await meets(NetFault.control_answers("duplicate", of=FIRST))
    # One request, two answers: there are more of them than of requests.
    assert vif.control["state"].startswith("the backend broke rule 1 on the control ring")
    await vif.carries()


@pytest.mark.parametrize("status", [2, 0xFFFFFFFF])
async def test_rule_07_a_status_that_is_no_success_is_a_refusal(meets, status: int) -> None:
    vif = await meets(NetFault.control("status", status, of="set_hash_key"))
    assert vif.control["state"] == "in use"
    assert vif.control["hash"].startswith("the backend refuses SET_HASH_KEY: ")
    if status > 3:
        assert f"unknown status {status}" in vif.control["hash"]
    assert vif.control["static"]["queues"] == 2  # asked for behind it
    await vif.carries()


@pytest.mark.parametrize(
    ("lie", "kinds", "table"),
    [
        (NetFault.control("data", 0xFFFFFFFF, of="get_hash_mapping_size"), ALL_KINDS, 128),
        (NetFault.control("data", 1, of="get_hash_mapping_size"), ALL_KINDS, 0),
        (NetFault.control("data", 0xFFFFFFF2, of="get_hash_flags"), ["ipv4-tcp"], 128),
    ],
)
async def test_rule_25_numbers_beyond_all_limits_are_taken_as_the_limit(
    meets, lie: NetFault, kinds: list[str], table: int
) -> None:
    vif = await meets(lie)
    assert vif.control["hash"] == {"algorithm": "toeplitz", "kinds": kinds, "table": table}
    await vif.carries()


@pytest.mark.parametrize("most", [1, 0xFFFFFFFF])
async def test_rule_25_a_backend_that_would_keep_more_pages_than_there_are_gets_those(
    meets, most: int
) -> None:
    vif = await meets(NetFault.control("data", most, of="get_gref_mapping_size"))
    assert vif.control["state"] == "in use"
    granted = vif.wire.state["rings"]["granted"]["got"]
    assert vif.control["static"]["pages"] <= granted
    assert vif.control["static"]["queues"] == 2
    if most == 1:
        assert vif.control["static"]["pages"] == 2
    await vif.carries()


async def test_rule_27_a_request_that_is_never_answered_is_waited_for_two_seconds(meets) -> None:
    vif = await meets(NetFault.control_answers("drop", of=FIRST))
    assert vif.control["state"] == NO_ANSWER
    await vif.carries()


async def test_an_answer_that_comes_when_nobody_waits_any_more_changes_nothing(meets) -> None:
    vif = await meets(NetFault.control_answers("hold", of=FIRST))
    assert vif.control["state"] == NO_ANSWER
    await vif.wire.it.backend.clear()  # lets it go
    await vif.carries()
    assert vif.control["state"] == NO_ANSWER


async def test_rule_23_a_storm_of_events_on_the_control_ring_does_no_harm(meets) -> None:
    vif = await meets(NetFault.control_storm())
    assert vif.control["state"] == "in use"
    assert vif.control["static"]["queues"] == 2
    await vif.fired("ctrl_storm", 50)  # the port stays masked while nothing is asked
    await vif.carries()


async def test_rule_24_a_lost_event_of_the_control_ring_is_found_out(meets) -> None:
    vif = await meets(NetFault.control_silent(count=2))
    assert vif.control["state"] == "in use"
    assert vif.control["static"]["queues"] == 2
    await vif.carries()


@pytest.mark.parametrize(
    "lie",
    [
        NetFault.control_scribble(of="del_gref_mapping"),
        NetFault.control("data", 0xFFFFFFFF, of="del_gref_mapping"),
        NetFault.control("id", 999, of="del_gref_mapping"),
        NetFault.control_answers("drop", of="del_gref_mapping"),
    ],
    ids=["garbage", "more", "wrong-id", "no-answer"],
)
async def test_rule_28_pages_that_are_not_given_back_keep_no_vif_from_going(
    meets, lie: NetFault
) -> None:
    vif = await meets()
    await vif.carries()
    await vif.wire.fault(lie)
    assert vif.control["static"]["pages"] > 0
    before = (await vif.wire.it.backend.stats())["fired_" + lie.kind]
    await vif.wire.it.detach(vif.wire.devid)
    await vif.wire.it.nothing_left()

    async def counted() -> bool:
        # What has gone is summed up a moment after its nodes went.
        stats = await vif.wire.it.backend.stats()
        return stats["fired_" + lie.kind] > before and stats["kept"] == 0

    await eventually("the lie, and nothing that stays mapped", counted)


async def test_rule_16_lists_that_the_backend_overwrites_cost_what_they_were_for(meets) -> None:
    """The page is his to write: what was asked for holds, as he copied it before."""
    vif = await meets(NetFault.control_scribble())
    await vif.fired("ctrl_scribble", 4)
    assert vif.control["state"] == "in use"

    async def stands() -> bool:
        return bool(vif.control["static"]["pages"])

    await eventually("pages that stay mapped", stands)
    await vif.carries()
