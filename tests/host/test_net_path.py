# SPDX-License-Identifier: BSD-2-Clause
"""The whole path of a vif on the embedded host: `pvfront vif serve`, its worker, the rings, netback,
and a network namespace at each end. Real programs and the kernel's own stacks use it.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
import pytest_asyncio
from networld import (
    OURS4,
    OURS6,
    SPEC,
    THEIRS4,
    THEIRS6,
    Network,
    Transfer,
    network,
    require,
    why_not,
)
from waiting import eventually

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(bool(why_not()), reason=f"no networks of one's own here: {why_not()}"),
]

MIB = 1 << 20


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with network("-o", "max_queues=2", "--all", queues=2) as made:
        await made.attach(f"{SPEC},mtu=9000")
        await made.configure()
        yield made


async def transfer(it: Network, size: int = 4 * MIB) -> None:
    """Both ways, both families."""
    for source, address in (
        (it.guest, THEIRS4), (it.net, OURS4), (it.guest, THEIRS6), (it.net, OURS6),
    ):  # fmt: skip
        going = await Transfer.start(it, source, address, size)
        assert await going.ended() == size


@pytest.mark.parametrize("size", [0, 56, 1472, 1473, 4068, 8972, 8973, 32000, 65507])
@pytest.mark.parametrize("address", [THEIRS4, THEIRS6])
async def test_pings_of_all_sizes_are_answered(it: Network, address: str, size: int) -> None:
    require("ping")
    said = await it.guest.run("ping", "-c2", "-i0.05", "-W20", f"-s{size}", address, check=False)
    assert " 0% packet loss" in said, said


async def test_tcp_carries_the_same_bytes_both_ways(it: Network) -> None:
    await transfer(it, 32 * MIB)
    for queue in await it.queue_statistics():
        assert not any(queue["tx"]["dropped"].values()), queue
        assert not any(queue["rx"]["dropped"].values()), queue
    assert not (await it.backend.stats())["tx_rejected"]


async def test_bulk_tcp_crosses_the_rings_in_large_packets(it: Network) -> None:
    before = await it.backend.stats()
    for source, address in ((it.guest, THEIRS4), (it.net, OURS4)):
        await (await Transfer.start(it, source, address, 16 * MIB)).ended()
    after = await it.backend.stats()
    for way in ("tx", "rx"):
        packets, size = (after[f"{way}_{what}"] - before[f"{way}_{what}"] for what in ("gso", "bytes"))
        assert size > 16 * MIB
        assert packets > 0
        assert size / packets > 9000, f"{way}: {packets} packets for {size} bytes"


async def test_iperf3_runs_both_ways_and_over_udp(it: Network) -> None:
    require("iperf3")
    log = it.host.directory / "iperf3.log"
    server = it.net.start_command("iperf3", ["iperf3", "-s", "--forceflush"], log)
    try:
        await eventually("iperf3", lambda: "listening" in log.read_text(), why=log.read_text)
        for how in ([], ["-R"], ["-u", "-b50M", "-l1400"], ["-P4"]):
            said = await it.guest.run("iperf3", "-J", "-c", THEIRS4, "-t1", *how)
            end = json.loads(said)["end"]
            assert end.get("sum_received", end.get("sum"))["bytes"] > 0, said
    finally:
        await server.stop(signal.SIGKILL)


async def test_an_mtu_of_9000_lets_9000_bytes_pass_unfragmented(it: Network) -> None:
    require("ping")
    ping = ["ping", "-c1", "-W20", "-Mdo"]
    assert "1 received" in await it.guest.run(*ping, "-s8972", THEIRS4)
    assert "too long" in await it.guest.run(*ping, "-s8973", THEIRS4, check=False)
    assert "1 received" in await it.net.run(*ping, "-s8972", OURS4)


async def test_tagged_packets_pass(it: Network) -> None:
    require("ping")
    ends = [(it.guest, "enX0", "10.7.7.2"), (it.net, "vif1.0", "10.7.7.1")]
    for where, parent, address in ends:
        await where.run(*f"ip link add link {parent} name vlan7 type vlan id 7".split())
        await where.run("ip", "addr", "add", f"{address}/24", "dev", "vlan7")
        await where.run("ip", "link", "set", "vlan7", "up")
    try:
        for size in (56, 8000, 60000):
            said = await it.guest.run("ping", "-c1", "-W20", f"-s{size}", "10.7.7.1")
            assert "1 received" in said
        for source, address in ((it.guest, "10.7.7.1"), (it.net, "10.7.7.2")):
            assert await (await Transfer.start(it, source, address, 4 * MIB)).ended() == 4 * MIB
    finally:
        await it.guest.run("ip", "link", "del", "vlan7")
        await it.net.run("ip", "link", "del", "vlan7")


async def test_flows_use_both_queues(it: Network) -> None:
    assert it.state()["queues"] == 2

    async def used() -> bool:
        going = [
            await Transfer.start(it, source, address, MIB)
            for source, address in ((it.guest, THEIRS4), (it.net, OURS4))
            for _ in range(4)
        ]
        for each in going:
            await each.ended()
        queues = await it.queue_statistics()
        return all(queue[way]["packets"] > 100 for queue in queues for way in ("tx", "rx"))

    await eventually("packets on both queues, both ways", used)


async def test_a_tcp_stream_survives_a_worker_that_is_killed(it: Network) -> None:
    generation = it.state()["generation"]
    going = await Transfer.start(it, it.guest, THEIRS4, 8 * MIB, pause_ms=10)
    await going.begun()
    os.kill(it.state()["worker_pid"], signal.SIGKILL)
    await it.connected(after=generation)
    assert await going.ended() == 8 * MIB


