# SPDX-License-Identifier: BSD-2-Clause
"""What an administrator meets of a served network interface, on the embedded host."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
import pytest_asyncio
from networld import (
    OURS4,
    OURS6,
    PYTHON,
    SPEC,
    THEIRS4,
    Network,
    Transfer,
    network,
    networks,
    require,
)
from waiting import PATIENCE, eventually

from pvfront.host.service import DiskServiceError

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    networks,
]

MIB = 1 << 20
FRONT = "/local/domain/1/device/vif/0"
BACK = "/local/domain/0/backend/vif/1/0"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with network("--all") as made:
        await made.attach()
        await made.configure()
        yield made


async def pvfront(it: Network, *arguments: str) -> str:
    assert it.service is not None
    return await it.service.pvfront(*arguments)


async def link(it: Network, ifname: str = "enX0") -> str:
    return await it.guest.run("ip", "-d", "link", "show", ifname)


async def ping(it: Network) -> bool:
    return "1 received" in await it.guest.run("ping", "-c1", "-W1", THEIRS4, check=False)


async def test_list_shows_the_interface(it: Network) -> None:
    (row,) = json.loads(await pvfront(it, "list", "--json"))
    assert (row["class"], row["name"], row["owner"], row["os_device"]) == (
        "vif", "vif0", "pvfront", "enX0",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["enX0", "vif0", "vif-0", "vif/0", "0"])
async def test_status_takes_each_name_and_counts_as_ethtool_does(it: Network, name: str) -> None:
    await eventually("an answer", lambda: ping(it), why=lambda: it.log)
    lines = (await pvfront(it, "status", name)).splitlines()
    shown = dict(line.strip().split(": ") for line in lines if line.startswith("     queue_"))

    def summed(counter: str) -> int:
        """Over the queues: which one a packet takes is its hash's, under a random key."""
        return sum(int(shown[key]) for key in shown if re.fullmatch(rf"queue_\d+_{counter}", key))

    assert summed("tx_packets") > 0
    assert summed("rx_bytes") > 0
    assert shown["queue_0_tx_dropped_csum"] == "0"
    assert {"queue_0_notifies", "queue_0_wakeups", "queue_0_tx_gso", "queue_0_tx_slots",
            "queue_0_tx_csum_done"} <= shown.keys()  # fmt: skip
    found = json.loads(await pvfront(it, "status", name, "--json"))
    assert found["statistics"]["tx"]["packets"] >= summed("tx_packets")
    assert found["statistics_queues"][0]["queue"] == 0
    assert (found["mtu"], found["carrier"], found["mac"]) == (1500, True, "00:16:3e:07:00:02")


INEXPRESSIBLE = """
import socket, struct, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
sock.bind((sys.argv[1], 0))
frame = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(86)
# A checksum to be finished where only SCTP has one, in a frame that is no SCTP.
unfinished = struct.pack("=BBHHHH", 1, 0, 0, 0, 34, 8)
for _ in range(int(sys.argv[2])):
    sock.send(unfinished + frame)
sock.send(bytes(10) + frame[:-1] + b"!")
"""

FRAME_IN = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
sock.bind((sys.argv[1], 0x88B5))
print("ready", flush=True)
print(sock.recv(65536)[-1:].decode(), flush=True)
"""


async def test_a_packet_that_netif_cannot_express_is_dropped_and_status_says_why(
    it: Network,
) -> None:
    async def dropped() -> tuple[int, int]:
        """For that reason, and for any."""
        found = [
            (words[0].endswith("_tx_dropped_csum:"), int(words[1]))
            for line in (await pvfront(it, "status", "enX0")).splitlines()
            if re.match(r"queue_\d+_tx_dropped_", line.strip()) and (words := line.split())
        ]
        return sum(n for why, n in found if why), sum(n for _, n in found)

    before = await dropped()
    log = it.host.directory / "frame-in.log"
    receiver = it.net.start_command("the receiver", [*PYTHON, FRAME_IN, "vif1.0"], log)
    await eventually("the receiver", lambda: "ready" in log.read_text(), why=log.read_text)
    await it.python(it.guest, INEXPRESSIBLE, "enX0", "7")
    await eventually("its end", lambda: receiver.process.poll() is not None, why=log.read_text)
    assert log.read_text().split() == ["ready", "!"], "none of the seven was sent"

    async def counted() -> bool:
        # At the end of a turn, after the packet behind them was sent.
        return (await dropped())[0] == before[0] + 7

    await eventually("the seven counted", counted, why=lambda: it.log)
    assert await dropped() == (before[0] + 7, before[1] + 7)


async def test_the_carrier_follows_the_keys_of_both_ends(it: Network) -> None:
    store = it.host.store
    for key, down, up, why in (
        (f"{FRONT}/disconnect", "1", "0", "disconnect 1"),
        (f"{BACK}/carrier", "0", "1", "carrier 0"),
        (f"{FRONT}/speed", "0", "10", "speed 0"),
    ):
        await store.write(key, down)
        found = await it.until(f"no link by {key}", lambda s: not s["carrier"])
        assert why in found["no_carrier_because"]

        async def carrier(there: bool) -> bool:
            return ("NO-CARRIER" not in await link(it)) is there

        await eventually("no carrier", lambda: carrier(False), why=lambda: it.log)
        await store.write(key, up)
        await it.until(f"a link by {key}", lambda s: s["carrier"])
        await eventually("the carrier", lambda: carrier(True), why=lambda: it.log)
    assert it.state()["speed_mbits"] == 10000
    await eventually("an answer", lambda: ping(it), why=lambda: it.log)


async def test_an_mtu_of_the_administrator_holds_within_what_the_backend_takes(
    it: Network,
) -> None:
    await it.guest.run("ip", "link", "set", "enX0", "mtu", "4000")
    await it.until("status of it", lambda s: s["mtu"] == 4000)
    await it.guest.run("ip", "link", "set", "enX0", "mtu", "65521")
    await it.until("the largest", lambda s: s["mtu"] == 65517)
    said = "an MTU of 65521 is more than the backend takes"
    await eventually("why, in the log", lambda: said in it.log, why=lambda: it.log)
    await it.guest.run("ip", "link", "set", "enX0", "mtu", "1500")
    await it.until("status of it", lambda s: s["mtu"] == 1500)


async def test_packets_are_shown_and_written_for_tcpdump(it: Network, tmp_path: Path) -> None:
    flood = await Transfer.start(it, it.guest, THEIRS4, 64 * MIB, pause_ms=5)
    await flood.begun()
    lines = (await pvfront(it, "trace", "enX0", "--packets", "-c", "20")).splitlines()
    assert len(lines) == 20
    assert any(" out  " in line and "checksum left" in line for line in lines)
    rows = [
        json.loads(line)
        for line in (await pvfront(it, "trace", "vif0", "--packets", "-c", "50", "--json")).split(
            "\n"
        )[:-1]
    ]
    assert {row["direction"] for row in rows} <= {"in", "out"}
    assert all(row["slots"] >= 1 for row in rows)
    file = tmp_path / "x.pcap"
    await pvfront(it, "trace", "0", "--packets", "-c", "30", "-w", str(file))
    assert file.read_bytes()[:4] == (0xA1B23C4D).to_bytes(4, "little")
    assert await flood.ended() == 64 * MIB


async def test_tcpdump_reads_what_passed_and_finds_its_checksums_right(tmp_path: Path) -> None:
    require("tcpdump")
    file = tmp_path / "x.pcap"
    async with network("--all") as fresh:  # a trace begins with what was noted before
        await fresh.attach()
        await fresh.configure()
        arguments = ("trace", "enX0", "--packets", "-c", "60", "-w", str(file))
        written = asyncio.create_task(pvfront(fresh, *arguments))
        try:

            async def done() -> bool:
                # Far more of them than of what a fresh interface says by itself.
                ping = ["ping", "-c20", "-i0.01", "-W1", "-s100", THEIRS4]
                await fresh.guest.run(*ping, check=False)
                return written.done()

            await eventually("sixty packets in the file", done, why=lambda: fresh.log)
            await written
        finally:
            written.cancel()
        said = await fresh.guest.run("tcpdump", "-nn", "-v", "-r", str(file), "icmp")
    assert f"{OURS4} > {THEIRS4}: ICMP echo request" in said
    assert f"{THEIRS4} > {OURS4}: ICMP echo reply" in said
    assert "length 108" in said
    assert "wrong" not in said  # tcpdump's word for a checksum of ICMP


async def test_a_disk_of_that_name_has_no_packets(it: Network) -> None:
    with pytest.raises(DiskServiceError, match="there is no device 'enX9'"):
        await pvfront(it, "trace", "enX9", "--packets", "-c", "1")


async def test_a_worker_is_replaced_under_a_tcp_stream(it: Network) -> None:
    before = it.state()
    going = await Transfer.start(it, it.guest, THEIRS4, 32 * MIB, pause_ms=5)
    await going.begun()
    said = await pvfront(it, "upgrade", "enX0")
    assert "took over from" in said
    assert await going.ended() == 32 * MIB
    now = it.state()
    assert now["generation"] == before["generation"]
    assert now["worker_pid"] != before["worker_pid"]
    assert now["upgrades"] == before["upgrades"] + 1


async def test_a_supervisor_that_is_killed_and_its_successor_lose_no_stream(it: Network) -> None:
    before = it.state()
    await it.guest.run("ip", "link", "set", "enX0", "mtu", "1400")
    await it.until("the smaller MTU", lambda s: s["mtu"] == 1400)
    going = await Transfer.start(it, it.guest, THEIRS4, 32 * MIB, pause_ms=5)
    await going.begun()
    assert it.service is not None
    await it.service.stop(signal.SIGKILL)
    await it.serve("--all")
    assert await going.ended() == 32 * MIB
    now = it.state()
    assert (now["generation"], now["worker_pid"]) == (before["generation"], before["worker_pid"])
    assert (now["os_device"], now["mtu"], now["carrier"]) == ("enX0", 1400, True)


async def test_an_interface_that_is_renamed_is_followed(it: Network) -> None:
    for name, before in (("lan0", "enX0"), ("enX0", "lan0")):
        await it.guest.run("ip", "link", "set", before, "down")
        await it.guest.run("ip", "link", "set", before, "name", name)
        await it.guest.run("ip", "link", "set", name, "up")
        await it.until("its new name", lambda s, name=name: s["os_device"] == name)
        generation = it.state()["generation"]
        await it.backend_dies()
        await it.connected(after=generation)
        await eventually("an answer", lambda: ping(it), why=lambda: it.log)


async def test_what_was_configured_is_there_again_after_stop_and_start(it: Network) -> None:
    run = it.guest.run
    await run("ip", "route", "replace", "default", "via", THEIRS4, "dev", "enX0")
    assert it.service is not None
    assert await it.service.stop() == 0
    assert "enX0" not in await run("ip", "link")
    await it.serve("--all")
    await it.connected()
    assert f"{OURS4}/24" in await run("ip", "addr", "show", "enX0")
    assert f"default via {THEIRS4} dev enX0" in await run("ip", "route")
    await eventually("an answer", lambda: ping(it), why=lambda: it.log)


TOLD = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL, everywhere
v4, v6 = socket.inet_aton(sys.argv[1]), socket.inet_pton(socket.AF_INET6, sys.argv[2])
print("ready", flush=True)
while True:
    data = sock.recv(65536)
    if data[12:14] == b"\\x08\\x06" and data[28:32] == data[38:42] == v4:
        print("arp", flush=True)
    if data[12:14] == b"\\x86\\xdd" and data[54] == 136 and data[62:78] == v6:
        print("solicited" if data[58] & 0x40 else "unsolicited", flush=True)
"""


async def test_the_neighbours_are_told_after_each_connection_where_the_addresses_are(
    it: Network,
) -> None:
    log = it.host.directory / "told.log"
    listener = it.net.start_command("the listener", [*PYTHON, TOLD, OURS4, OURS6], log)
    try:
        await eventually("the listener", lambda: "ready" in log.read_text(), why=log.read_text)
        # An interface that was down, to be renamed say, has lost its IPv6 address.
        await it.guest.run("ip", "-6", "address", "replace", f"{OURS6}/64", "dev", "enX0", "nodad")
        for times in (1, 2):
            before = log.read_text().split()
            generation = it.state()["generation"]
            await it.backend_dies()
            await it.connected(after=generation)

            def told(before: list[str] = before) -> bool:
                now = log.read_text().split()
                return all(now.count(w) >= before.count(w) + 2 for w in ("arp", "unsolicited"))

            await eventually(f"told, connection {times}", told, why=log.read_text)
    finally:
        await listener.stop(signal.SIGKILL)


async def test_a_name_that_is_taken_is_said_and_waited_for() -> None:
    async with network(start=False) as it:
        await it.guest.run("ip", "tuntap", "add", "enX0", "mode", "tap")
        await it.serve("--all")
        await it.host.attach_vif(1, SPEC)
        found = await it.until("its failure", lambda s: s["phase"] == "failed")
        assert found["reason"].startswith("enX0: there is a TAP of this name, and it is not ours")
        await it.guest.run("ip", "link", "del", "enX0")
        await it.connected()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mac=01:00:5e:00:00:01", "mac=01:00:5e:00:00:01: not the address of one machine"),
        ("mac=nonsense", "mac='nonsense': not six bytes"),
    ],
)
async def test_an_address_that_makes_no_sense_is_named(spec: str, says: str) -> None:
    async with network() as it:
        devid = await it.host.attach_vif(1, SPEC)
        await it.connected(devid)
        await it.host.store.write(f"{FRONT}/mac", spec.partition("=")[2])
        generation = it.state()["generation"]
        await it.backend_dies()
        found = await it.until("its failure", lambda s: s["phase"] == "failed")
        assert says in found["reason"]
        await it.host.store.write(f"{FRONT}/mac", "00:16:3e:07:00:02")
        await it.connected(after=generation)


async def test_names_that_do_not_exist_are_one_line() -> None:
    async with network(start=False) as it:
        await it.host.attach_vif(1, SPEC)
        with pytest.raises(DiskServiceError, match=r"there is no network interface 'enX7'"):
            await it.serve("enX7")


async def test_nonsense_on_the_command_line_is_one_line_and_a_status_that_says_whose_fault_it_is(
    it: Network,
) -> None:
    """2: the usage; 1: what there is."""
    assert it.service is not None
    for status, says, *arguments in (
        (1, "another supervisor already serves vif devices", "vif", "serve", "--all"),
        (2, "name the interfaces to serve, or say --all", "vif", "serve", "--all", "0"),
        (2, "max_queues = '99': must be a number from 0 to 16",
         "vif", "serve", "--all", "-o", "max_queues=99"),
        (2, "'x=1' is no KEY=VALUE", "vif", "serve", "--all", "-o", "x=1"),
        (1, "there is no device 'enX9' (there are: vif0)", "status", "enX9"),
        (1, "there is no device '9' (there are: vif0)", "release", "vif", "9"),
        (1, "Could not open file", "trace", "--packets", "-w", "/no/such/x.pcap", "enX0"),
        (2, "-c and -w are for --packets", "trace", "-c", "1", "enX0"),
    ):  # fmt: skip
        command = [*it.guest.prefix(), sys.executable, "-P", "-m", "pvfront", *map(str, arguments)]
        process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **it.host.environ}, stdout=PIPE, stderr=PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        told = [line for line in err.decode().splitlines() if says in line]
        assert (process.returncode, out, len(told)) == (status, b"", 1), (arguments, err)
        assert "Traceback" not in err.decode()
        # Behind the usage's own lines the error is the last; else it is the only one.
        assert err.decode().splitlines()[-1] == told[0]
        assert status == 2 or len(err.splitlines()) == 1
