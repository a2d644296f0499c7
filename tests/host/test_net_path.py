# SPDX-License-Identifier: BSD-2-Clause
"""The whole path of a vif on the embedded host: `pvfront vif serve`, its worker, the rings,
netback, and a network namespace at each end. Real programs and the kernel's stacks use it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from networld import (
    OURS4,
    OURS6,
    PYTHON,
    SPEC,
    THEIRS4,
    THEIRS6,
    Network,
    Transfer,
    network,
    networks,
    require,
)
from waiting import eventually

from pvfront.host import iperf
from pvfront.host.netns import NetNamespace

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    networks,
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


async def answers(network: NetNamespace, *options: str) -> int:
    """So many came to a ping. With -w one that a busy machine has lost is sent again, and where it
    is late only, the answers of both are counted: more than -c says.
    """
    said = await network.run("ping", "-w60", *options, check=False)
    found = re.search(r"(\d+) received", said)
    assert found, said
    return int(found[1])


@pytest.mark.parametrize("size", [0, 56, 1472, 1473, 4068, 8972, 8973, 32000, 65507])
@pytest.mark.parametrize("address", [THEIRS4, THEIRS6])
async def test_pings_of_all_sizes_are_answered(it: Network, address: str, size: int) -> None:
    require("ping")
    assert await answers(it.guest, "-c2", "-i0.05", f"-s{size}", address) >= 2


async def test_tcp_carries_the_same_bytes_both_ways(it: Network) -> None:
    async def dropped() -> list[list[int]]:
        queues = await it.queue_statistics()
        return [queue[way]["dropped"] for queue in queues for way in ("tx", "rx")]

    before = await dropped()
    await transfer(it, 32 * MIB)
    assert await dropped() == before
    assert not (await it.backend.stats())["tx_rejected"]


async def test_bulk_tcp_crosses_the_rings_in_large_packets(it: Network) -> None:
    before = await it.backend.stats()
    for source, address in ((it.guest, THEIRS4), (it.net, OURS4)):
        await (await Transfer.start(it, source, address, 16 * MIB)).ended()
    after = await it.backend.stats()
    for way in ("tx", "rx"):
        packets, size = (
            after[f"{way}_{what}"] - before[f"{way}_{what}"] for what in ("packets", "bytes")
        )
        assert size > 16 * MIB
        assert size / packets > 9014, f"{way}: {packets} packets for {size} bytes"


async def test_iperf3_runs_both_ways_and_over_udp(it: Network) -> None:
    require("iperf3")
    log = it.host.directory / "iperf3.log"
    server = it.net.start_command("iperf3", ["iperf3", "-s", "--forceflush"], log)
    try:
        await eventually("iperf3", lambda: "listening" in log.read_text(), why=log.read_text)
        for how in ([], ["-R"], ["-u", "-b50M", "-l1400"], ["-P4"]):
            client = ["iperf3", "-J", "-c", THEIRS4, "-t1", *how]
            end = (await iperf.report(partial(it.guest.run, *client)))["end"]
            assert end.get("sum_received", end.get("sum"))["bytes"] > 0, end
    finally:
        await server.stop(signal.SIGKILL)


async def test_an_mtu_of_9000_lets_9000_bytes_pass_unfragmented(it: Network) -> None:
    require("ping")
    assert await answers(it.guest, "-c1", "-Mdo", "-s8972", THEIRS4)
    one = ["ping", "-c1", "-W20", "-Mdo", "-s8973", THEIRS4]
    assert "too long" in await it.guest.run(*one, check=False)
    assert await answers(it.net, "-c1", "-Mdo", "-s8972", OURS4)


async def test_vlans_on_both_ends_reach_each_other(it: Network) -> None:
    require("ping")
    ends = [(it.guest, "enX0", "10.7.7.2"), (it.net, "vif1.0", "10.7.7.1")]
    for where, parent, address in ends:
        link = f"ip link add link {parent} name vlan7 type vlan id 7"
        if "Unknown device type" in (said := await where.run(*link.split(), check=False)):
            pytest.skip("this kernel has no VLAN devices (8021q); tagged frames: the next test")
        assert not said
        await where.run("ip", "addr", "add", f"{address}/24", "dev", "vlan7")
        await where.run("ip", "link", "set", "vlan7", "up")
    try:
        for size in (56, 8000, 60000):
            assert await answers(it.guest, "-c1", f"-s{size}", "10.7.7.1")
        for source, address in ((it.guest, "10.7.7.1"), (it.net, "10.7.7.2")):
            assert await (await Transfer.start(it, source, address, 4 * MIB)).ended() == 4 * MIB
    finally:
        await it.guest.run("ip", "link", "del", "vlan7")
        await it.net.run("ip", "link", "del", "vlan7")


TAGGED_IN = """
import socket, struct, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
sock.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: where the kernel puts the tag
sock.bind((sys.argv[1], 3))
sock.settimeout(60)
print("ready", flush=True)
for size in map(int, sys.argv[2:]):
    data = b""
    while data[12:14] != bytes.fromhex("88b7"):
        data, told, _, _ = sock.recvmsg(65536, 256)
    tag = [struct.unpack("=IIIHHHH", t)[5] for _, kind, t in told if kind == 8]
    assert tag == [7] and data[14:] == bytes(i % 251 for i in range(size)), (size, tag, len(data))
print("all came", flush=True)
"""

TAGGED_OUT = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind((sys.argv[1], 0))
head = bytes.fromhex("ffffffffffff 020000000001 8100 0007 88b7")
for size in map(int, sys.argv[2:]):
    sock.send(head + bytes(i % 251 for i in range(size)))
"""


@pytest.mark.parametrize("way", ["out", "in"])
async def test_tagged_frames_pass_as_they_are(it: Network, way: str) -> None:
    sizes = [str(size) for size in (46, 1500, 4074, 4075, 4078, 8000, 9000)]
    ends = [(it.guest, "enX0"), (it.net, "vif1.0")]
    (source, sends), (target, receives) = ends if way == "out" else ends[::-1]
    log = it.host.directory / "tagged.log"
    program = [*PYTHON, TAGGED_IN, receives, *sizes]
    receiver = target.start_command("the receiver", program, log)
    await eventually("the receiver", lambda: "ready" in log.read_text(), why=log.read_text)
    await it.python(source, TAGGED_OUT, sends, *sizes)
    await eventually("its end", lambda: receiver.process.poll() is not None, why=log.read_text)
    assert "all came" in log.read_text(), log.read_text()


NETCHECK = Path(__file__).parents[2] / "ci/xen-nested/lab/scripts/netcheck.py"


@pytest.mark.parametrize("way", ["out", "in"])
async def test_frames_of_random_sizes_come_as_they_were_sent(it: Network, way: str) -> None:
    ends = [(it.guest, "enX0"), (it.net, "vif1.0")]
    (source, sends), (target, receives) = ends if way == "out" else ends[::-1]
    log = it.host.directory / f"frames-{way}.log"
    check = [sys.executable, "-P", str(NETCHECK)]
    receiver = target.start_command("frames", [*check, "frames-receive", receives], log)
    await eventually("the receiver", lambda: "ready" in log.read_text(), why=log.read_text)
    send = [*check, "frames-send", sends, "ff:ff:ff:ff:ff:ff", "400", "9014", "3"]
    sent = json.loads(await source.run(*send))
    await eventually("its end", lambda: receiver.process.poll() is not None, why=log.read_text)
    came = json.loads(log.read_text().splitlines()[-1])
    assert (sent["frames"], sent["wrong_length"]) == (400, [])
    assert (came["frames"], came["corrupt"]) == (400, [])


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


async def test_tcp_streams_both_ways_survive_a_backend_that_is_killed(it: Network) -> None:
    generation = it.state()["generation"]
    going = [
        await Transfer.start(it, source, address, 8 * MIB, pause_ms=10)
        for source, address in ((it.guest, THEIRS4), (it.net, OURS4))
    ]
    for each in going:
        await each.begun()
    await it.backend_dies(queues=2)
    await it.connected(after=generation)
    for each in going:
        assert await each.ended() == 8 * MIB


async def test_ten_cycles_of_attach_and_detach_leave_nothing(it: Network) -> None:
    def held() -> tuple[int, int, int]:
        assert it.service is not None
        dump = it.host.dump()
        files = Path(f"/proc/{it.service.pid}/fd")
        return len(list(files.iterdir())), len(dump["ports"]), len(dump["grants"])

    async def cycle() -> None:
        devid = await it.attach("devid=5,ip=10.8.0.1/24")
        await it.guest.run("ip", "addr", "add", "10.8.0.2/24", "dev", "enX5")
        await it.guest.run("ip", "link", "set", "enX5", "up")
        assert await (await Transfer.start(it, it.guest, "10.8.0.1", MIB)).ended() == MIB
        await it.detach(devid)

    _, *before = held()
    await cycle()  # what is opened once and kept, is now
    files, *_ = held()
    for _ in range(10):
        await cycle()

    def nothing_more() -> bool:
        now, *of_xen = held()
        return of_xen == before and now <= files  # it may have counted one on its way out

    await eventually("what was held before", nothing_more, why=lambda: (files, before, held()))


async def test_the_last_detach_leaves_nothing_held(it: Network) -> None:
    await it.detach()
    await it.nothing_left()
