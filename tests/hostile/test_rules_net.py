# SPDX-License-Identifier: BSD-2-Clause
"""Rules 9 to 16, and what 1, 2, 5, 17 and 18 are for a network: netif's rings with a liar behind.

The numbers are those of docs/security.md.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
import pytest_asyncio
from nethostile import KIND, NEEDS_CSUM, TCPV4, Wire, frame
from networld import network, networks
from waiting import eventually

from pvfront.host.netback import NetFault

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    networks,
]

WORD = 0x5EC2E7C0DEFACADE
CANARY = WORD.to_bytes(8, "little")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with network(queues=1) as made:
        for where in (made.guest, made.net):
            off = "for f in all default; do echo 1 >/proc/sys/net/ipv6/conf/$f/disable_ipv6; done"
            await where.run("sh", "-c", off)
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def wire(it):
    made = await Wire.attach(it)
    yield made
    try:
        await made.end()
    except BaseException:
        await made.remove()
        raise


async def test_a_vif_of_an_honest_backend_carries_every_size(wire: Wire) -> None:
    """What the tests below lean on."""
    await wire.crosses()
    wire.unbroken()


# -- the rings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", ["tx", "rx"])
@pytest.mark.parametrize("by", [300, 0x7FFFFFF0])
async def test_rule_01_more_answers_than_requests_break_a_network_s_ring(
    wire: Wire, ring: str, by: int
) -> None:
    await wire.fault(NetFault.producer(by, ring=ring, count=1))
    await wire.breaks(1, "rsp_prod", "guest" if ring == "tx" else "net", [frame(1)])


@pytest.mark.parametrize("ring", ["tx", "rx"])
async def test_rule_02_an_index_that_moves_backwards_breaks_a_network_s_ring(
    wire: Wire, ring: str
) -> None:
    source = "guest" if ring == "tx" else "net"
    await wire.comes(source, "net" if ring == "tx" else "guest", [frame(n) for n in range(9)])
    await wire.fault(NetFault.producer(-5, ring=ring, count=1))
    await wire.breaks(2, "rsp_prod", source, [frame(1)])


@pytest.mark.parametrize("number", [255, 256, 0xFFFF])
async def test_rule_05_an_answer_to_no_packet_breaks_the_ring(wire: Wire, number: int) -> None:
    await wire.fault(NetFault.tx_id(number, count=1))
    await wire.breaks(5, "id", "guest", [frame(1)])


async def test_rule_05_an_answer_given_twice_breaks_a_network_s_ring(wire: Wire) -> None:
    # More answers than requests are rule 1's: another packet waits for its own meanwhile.
    await wire.fault(NetFault.tx_drop(count=1), NetFault.tx_duplicate(skip=0, count=1))
    with wire.backend_stopped():
        wire.send("guest", frame(1), frame(2))
        await eventually("both are sent", lambda: _sent(wire, 2), why=lambda: wire.log)
    await wire.breaks(5, "id", "guest", [])


async def _sent(wire: Wire, packets: int) -> bool:
    return (await wire.counters("tx"))["packets"] >= packets


# -- what is received ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie", [NetFault.rx_offset(4090, count=1), NetFault.rx_offset(0xFFFF, count=1),
            NetFault.rx_status(4097, count=1), NetFault.rx_status(32767, count=1)],
)  # fmt: skip
async def test_rule_09_data_past_the_end_of_its_page_breaks_the_ring(
    wire: Wire, lie: NetFault
) -> None:
    await wire.fault(lie)
    await wire.breaks(9, "offset", "net", [frame(1)])


async def test_rule_09_a_packet_of_too_many_slots_breaks_the_ring(wire: Wire) -> None:
    await wire.fault(NetFault.rx_flags("more_data", count=18))
    frames = [frame(n) for n in range(30)]
    with wire.worker_stopped():
        wire.send("net", *frames)
        await wire.until_served("rx_packets", 30)
    await wire.breaks(9, "flags", "net", [])


@pytest.mark.parametrize("size", [0, 1, 13])
async def test_rule_09_a_packet_that_is_too_short_is_dropped(wire: Wire, size: int) -> None:
    await wire.fault(NetFault.rx_status(size, count=1))
    wire.send("net", frame(1))
    await wire.dropped("too_small")
    await wire.crosses()
    wire.unbroken()


async def test_rule_09_a_packet_that_is_too_long_is_dropped(wire: Wire) -> None:
    await wire.fault(NetFault.rx_status(4096, count=17), NetFault.rx_flags("more_data", count=16))
    with wire.worker_stopped():
        wire.send("net", *(frame(n) for n in range(17)))
        await wire.until_served("rx_packets", 17)
    await wire.dropped("too_large")
    await wire.crosses()
    wire.unbroken()


@pytest.mark.parametrize("status", [-1, -2, -32768])
async def test_rule_09_a_packet_with_an_error_is_dropped(wire: Wire, status: int) -> None:
    await wire.fault(NetFault.rx_status(status, count=1))
    wire.send("net", frame(1, 9000))
    await wire.dropped("error")
    await wire.crosses()
    wire.unbroken()


@pytest.mark.parametrize("flag", ["more_data", "extra_info"])
async def test_rule_10_a_packet_whose_rest_is_not_there_is_dropped(wire: Wire, flag: str) -> None:
    await wire.fault(NetFault.rx_flags(flag, count=1))
    wire.send("net", frame(1))
    await wire.dropped("truncated")
    await wire.crosses()
    wire.unbroken()


@pytest.mark.parametrize(
    "extra",
    [
        NetFault.rx_extra("none", count=1),
        NetFault.rx_extra(6, count=1),
        NetFault.rx_extra(255, count=1),
        NetFault.rx_extra("hash", times=2, count=1),
        NetFault.rx_extra("gso", gso_size=1400, gso_type=1, times=3, count=1),
    ],
)
async def test_rule_11_extra_info_that_makes_no_sense_drops_its_packet(
    wire: Wire, extra: NetFault
) -> None:
    await wire.fault(extra)
    wire.send("net", tcp(1000))
    await wire.dropped("extra")
    await wire.crosses()
    wire.unbroken()


@pytest.mark.parametrize(("size", "kind"), [(0, 1), (1400, 0), (1400, 3), (1400, 2), (1400, 255)])
async def test_rule_11_large_packets_that_cannot_be_cut_so_are_dropped(
    wire: Wire, size: int, kind: int
) -> None:
    await wire.fault(NetFault.rx_extra("gso", gso_size=size, gso_type=kind, count=1))
    wire.send("net", tcp(5000))
    await wire.dropped("gso")
    await wire.crosses()
    wire.unbroken()


async def test_rule_11_extra_info_that_is_of_no_use_here_is_passed_over(wire: Wire) -> None:
    for kind in ("hash", "mcast_add"):
        await wire.fault(NetFault.rx_extra(kind, count=100))
        await wire.comes("net", "guest", [frame(n) for n in range(100)])
    wire.unbroken()


async def test_rule_12_slots_of_extra_info_lose_no_page(wire: Wire) -> None:
    """More of them than there are pages: the ring is as full as before."""
    before = (await wire.counters("rx"))["rx_pool_free"]
    await wire.fault(NetFault.rx_extra("hash", times=3, count=300))
    wire.send("net", *(frame(n) for n in range(300)))
    await wire.dropped("extra", 300)
    await wire.crosses()

    async def as_full() -> bool:
        return (await wire.counters("rx"))["rx_pool_free"] == before

    await eventually("a ring as full as before", as_full, why=lambda: wire.log)
    wire.unbroken()


@pytest.mark.parametrize("number", [77, 256, 0xFFFF])
async def test_rule_13_a_packet_that_is_not_in_its_slot_breaks_the_ring(
    wire: Wire, number: int
) -> None:
    await wire.fault(NetFault.rx_id(number, count=1))
    await wire.breaks(13, "id", "net", [frame(1)])


async def test_rule_14_no_answer_to_a_request_that_wants_one_breaks_the_ring(wire: Wire) -> None:
    await wire.fault(NetFault.tx_status("null", count=1))
    await wire.breaks(14, "status", "guest", [frame(1)])


# -- what is in them -----------------------------------------------------------------------------


def ip4(protocol: int, payload: bytes, *, words: int = 5, total: int | None = None) -> bytes:
    length = words * 4 + len(payload) if total is None else total
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | words, 0, length & 0xFFFF, 1, 0, 64, protocol, 0, b"\12\7\0\1",
        b"\12\7\0\2",
    )  # fmt: skip
    return head + bytes(max(0, words * 4 - 20)) + payload


def ip6(following: int, payload: bytes, *, total: int | None = None) -> bytes:
    length = len(payload) if total is None else total
    return struct.pack("!IHBB", 0x60000000, length, following, 64) + bytes(32) + payload


def ethernet(kind: int, payload: bytes) -> bytes:
    return b"\xff" * 6 + b"\2\0\0\0\0\1" + kind.to_bytes(2, "big") + payload


def tcp(size: int) -> bytes:
    """A TCP packet over IPv4 with `size` bytes."""
    head = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 5, 0, 0)
    return ethernet(0x800, ip4(6, head + bytes(i & 0xFF for i in range(size))))


Fate = tuple[int, int, int]
"""Of a frame whose headers hold together: IP's version, the protocol, where its header begins."""


def headers() -> list[tuple[bytes, Fate | None]]:
    """Frames of every protocol that is looked at, whose headers hold together, or (None) lie or end
    too early.
    """
    udp = struct.pack("!HHHH", 1, 2, 8 + 40, 0) + bytes(40)
    segment = tcp(40)[34:]
    chain = b"".join(bytes([60, 0]) + bytes(6) for _ in range(40))  # options behind options
    found: list[tuple[bytes, Fate | None]] = []
    for payload in (udp, segment):
        protocol = 17 if payload is udp else 6
        options = bytes([protocol, 1]) + bytes(14)
        four, six = (
            ethernet(0x800, ip4(protocol, payload)),
            ethernet(0x86DD, ip6(protocol, payload)),
        )
        optional = ethernet(0x86DD, ip6(60, options + payload))
        found += [
            (four, (4, protocol, 34)),
            (six, (6, protocol, 54)),
            (optional, (6, protocol, 70)),
        ]
        found.append((ethernet(0x800, ip4(protocol, payload, words=15)), (4, protocol, 74)))
        tagged = ethernet(0x8100, b"\0\7\x08\0" + ip4(protocol, payload))
        found.append((tagged, (4, protocol, 34)))  # the kernel puts the tag beside the frame
        lies = [four[:cut] for cut in (18, 20, 33, 34, 35, 40, 41, 49, 53, 54, 81)]
        lies += [ethernet(0x800, ip4(protocol, payload, words=words)) for words in (0, 1, 4)]
        lies += [ethernet(0x800, ip4(protocol, payload, total=n)) for n in (0, 19, 20, 27, 0xFFFF)]
        lies += [six[:cut] for cut in (18, 53, 54, 55, 61, 62, 73, 74, 101)]
        lies += [ethernet(0x86DD, ip6(protocol, payload, total=n)) for n in (0, 7, 0xFFFF)]
        # Options that end behind their packet, in bytes that are there.
        lies.append(ethernet(0x86DD, ip6(60, options + payload, total=8)))
        for n in (0, 1, 4, 7, 12, 15, 17, 19):  # honest of lengths, but too short
            lies.append(ethernet(0x800, ip4(protocol, payload[:n])))
            lies.append(ethernet(0x86DD, ip6(protocol, payload[:n])))
        for following in (0, 43, 44, 50, 51, 60, 135):
            lies.append(ethernet(0x86DD, ip6(following, bytes([protocol, 0xFF]) + payload)))
            lies.append(ethernet(0x86DD, ip6(following, bytes([following, 0]) + chain + payload)))
        found += [(data, None) for data in lies if len(data) >= 18]
    data_offset = bytes([0] * 12 + [0xF0]) + bytes(20)
    found.append((ethernet(0x800, ip4(6, data_offset)), None))
    found.append((ethernet(0x8100, b"\0\7\x81\0\0\7\x81\0\0\7" + bytes(40)), None))
    return found


@pytest.mark.parametrize(
    ("said", "large"),
    [
        ((), None),
        ((NetFault.rx_extra("gso", gso_size=1, gso_type=1),), 4),
        ((NetFault.rx_extra("gso", gso_size=1400, gso_type=2),), 6),
    ],
    ids=["unfinished", "large-v4", "large-v6"],
)
async def test_rule_15_headers_that_lie_cost_their_own_packet_at_most(
    wire: Wire, said: tuple[NetFault, ...], large: int | None
) -> None:
    """A frame is delivered, and the kernel is told where its checksum is, just where its headers
    hold together. Each other one is dropped, by us: the kernel refuses none.
    """
    await wire.fault(NetFault.rx_flags("csum_blank", "data_validated"), *said)
    worker = wire.state["worker_pid"]
    wanted = {}
    for number, (data, fate) in enumerate(headers()):
        # Its number is the address that it comes from.
        wire.send("net", data[:6] + b"\2\0\0\0" + number.to_bytes(2, "big") + data[12:])
        if fate is not None and (large is None or (fate[0], fate[1]) == (large, 6)):
            wanted[number] = fate[2], 16 if fate[1] == 6 else 6
    count = number + 1
    await wire.until_served("rx_packets", count)
    await wire.it.backend.clear(vif=wire.devid)
    wire.told.clear()
    await wire.comes("net", "guest", [frame(7777)])
    told = {
        int.from_bytes(data[10:12], "big"): (vnet[4], vnet[5])
        for vnet, data in wire.told
        if vnet[0] & NEEDS_CSUM
    }
    assert told == wanted

    async def shown() -> dict[str, Any]:
        # At the end of a turn, after the packet.
        found = await wire.counters("rx")
        return found if found["packets"] > len(wanted) else {}

    counted = await eventually("the last one counted", shown, why=lambda: wire.log)
    assert counted["packets"] == len(wanted) + 1
    assert counted["dropped"][wire_drop("gso" if said else "csum")] == count - len(wanted)
    assert sum(counted["dropped"]) == count - len(wanted)
    assert wire.state["worker_pid"] == worker
    wire.unbroken()


def wire_drop(name: str) -> int:
    from nethostile import DROPS

    return DROPS[name]


async def test_rule_16_pages_rewritten_under_way_harm_nothing_but_their_packet(
    wire: Wire,
) -> None:
    """What was looked at is private: the kernel refuses no packet for a header that has changed."""
    await wire.fault(NetFault.rx_rewrite(), NetFault.rx_flags("csum_blank", "data_validated"))
    large = tcp(8000)
    with wire.worker_stopped():
        # Rewritten before they are looked at.
        for n in range(20):
            wire.send("net", frame(n, 3000), large)
        await wire.until_served("rx_packets", 40)
    for n in range(400):
        wire.send("net", frame(n, 60 + n), large)
        wire.send("net", tcp(30000), vnet=(NEEDS_CSUM, TCPV4, 54, 1400, 34, 16))
    await wire.until_served("rx_packets", 40 + 1200)
    await wire.it.backend.clear(vif=wire.devid)
    await wire.crosses()
    assert not (await wire.counters("rx"))["dropped"][wire_drop("target")]
    wire.unbroken()


# -- what leaks ----------------------------------------------------------------------------------


async def test_rule_17_a_sent_packet_shows_nothing_of_earlier_ones(wire: Wire) -> None:
    await wire.fault(NetFault.look(WORD))
    secret = b"\xff" * 6 + b"\2\0\0\0\0\1" + KIND.to_bytes(2, "big") + CANARY * 1120
    for turn in range(20):
        wire.send("guest", *[secret[: 8000 + turn]] * 20)
        await wire.comes("guest", "net", [frame(n, 18 + 150 * turn + n) for n in range(20)])
    assert await wire.served("fired_tx_look") >= 800
    assert await wire.served("canaries") == 0
    wire.unbroken()


@pytest.mark.parametrize(("option", "seen"), [("trusted", True), ("untrusted", False)])
async def test_rule_18_for_an_untrusted_backend_a_packet_s_pages_are_cleared_whole(
    it, option: str, seen: bool
) -> None:
    """Those of an earlier packet, taken for a later one that does not fill them. For a trusted
    backend what lies in them stays, which shows that the look works.
    """
    wire = await Wire.attach(it, option)
    try:
        secret = b"\xff" * 6 + b"\2\0\0\0\0\1" + KIND.to_bytes(2, "big") + CANARY * 1000
        with wire.backend_stopped():
            wire.send("guest", secret)
            await eventually("it is sent", lambda: _sent(wire, 1), why=lambda: wire.log)
            grefs = await wire.tx_grefs()
        assert len(grefs) == 2
        await wire.have_come("net", [secret])
        await wire.comes("guest", "net", [frame(1)])  # of one page; it was read into many
        with wire.mapped(grefs) as pages:
            assert (CANARY in pages) is seen
    finally:
        await wire.end()
