# SPDX-License-Identifier: BSD-2-Clause
"""What a vif asks of its backend in the store: fewer multicast packets, no room before them."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest
from networld import OURS4, SPEC, THEIRS4, Network, Transfer, network, networks
from waiting import eventually

from pvfront.host.netback import NetFault

pytestmark = networks

FRONT = "/local/domain/1/device/vif/0"
JOINED, OTHER = "239.1.2.3", "239.9.9.9"
PORT = 7007
MIB = 1 << 20


class Groups:
    """A sender at the backend's end, and what comes to the guest's, whoever listens to it there."""

    def __init__(self, it: Network) -> None:
        self.it = it
        self.turn = bytes(4)

    async def begin(self) -> None:
        self.ear = await self.it.guest.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.ear.bind(("enX0", 3))
        self.ear.setblocking(False)
        self.sender = await self.it.net.socket(socket.AF_INET, socket.SOCK_DGRAM, 0)
        self.sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(THEIRS4))
        self.member = await self.it.guest.socket(socket.AF_INET, socket.SOCK_DGRAM, 0)

    def end(self) -> None:
        for each in (self.ear, self.sender, self.member):
            each.close()

    def change(self, option: int) -> None:
        request = socket.inet_aton(JOINED) + socket.inet_aton(OURS4)
        self.member.setsockopt(socket.IPPROTO_IP, option, request)

    def heard(self) -> list[str]:
        """The groups whose packets of this turn have come since the last time, in order."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, _, kind, *_) = self.ear.recvfrom(2048)
                ours = data[36:38] == PORT.to_bytes(2, "big") and data[42:46] == self.turn
                if kind != socket.PACKET_OUTGOING and data[23] == 17 and ours:
                    found.append(socket.inet_ntoa(data[30:34]))
        return found

    def send(self, to: str) -> None:
        self.sender.sendto(self.turn, (to, PORT))

    async def until(self, what: str, sent: list[str], wanted: list[str]) -> None:
        """Sends to these groups, again and again, until just those of them come that are wanted."""

        async def look() -> bool:
            self.turn = (int.from_bytes(self.turn, "big") + 1).to_bytes(4, "big")
            address = socket.inet_aton(THEIRS4)
            self.sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, address)
            for group in sent:
                self.send(group)
            came: list[str] = []

            async def last() -> bool:
                # What is for the guest itself comes behind all that was sent before.
                self.send(OURS4)
                came.extend(self.heard())
                return OURS4 in came

            await eventually("a packet to the guest itself", last, why=lambda: self.it.log)
            return came[: came.index(OURS4)] == wanted

        await eventually(what, look, why=lambda: self.it.log)


@pytest.mark.parametrize("dynamic", [True, False], ids=["at any time", "when it connects"])
async def test_a_backend_that_filters_passes_on_what_was_joined(dynamic: bool) -> None:
    async with network(
        "--all", "-o", "multicast_filter=1", queues=1, dynamic_multicast_control=dynamic
    ) as it:
        await it.attach()
        await it.configure()
        assert await it.host.store.read_opt(f"{FRONT}/request-multicast-control") == "1"
        groups = Groups(it)
        await groups.begin()
        try:
            await groups.until("nothing to groups that nobody joined", [OTHER, JOINED], [])
            groups.change(socket.IP_ADD_MEMBERSHIP)
            await groups.until("what was joined, and no more", [OTHER, JOINED], [JOINED])
            # The worker's successor tells a new connection what was joined before.
            generation = it.state()["generation"]
            await it.backend_dies(queues=1, dynamic_multicast_control=dynamic)
            await it.connected(after=generation)
            await it.net.run("ip", "link", "set", "vif1.0", "up")
            await groups.until("the same of another backend", [OTHER, JOINED], [JOINED])
            groups.change(socket.IP_DROP_MEMBERSHIP)
            await groups.until("nothing any more", [OTHER, JOINED], [])
        finally:
            groups.end()
        stats = await it.backend.stats()
        assert stats["multicast_filtered"] > 0
        assert not stats["multicast_refused"]


@pytest.mark.parametrize(
    ("arguments", "features"),
    [(["--all"], {}), (["--all", "-o", "multicast_filter=1"], {"multicast_control": False})],
    ids=["not asked to", "unable to"],
)
async def test_a_backend_that_does_not_filter_passes_all_on(
    arguments: list[str], features: dict[str, Any]
) -> None:
    async with network(*arguments, queues=1, **features) as it:
        await it.attach()
        await it.configure()
        wanted = None if features else "0"
        assert await it.host.store.read_opt(f"{FRONT}/request-multicast-control") == wanted
        groups = Groups(it)
        await groups.begin()
        try:
            await groups.until("packets of both groups", [OTHER, JOINED], [OTHER, JOINED])
        finally:
            groups.end()
        assert not (await it.backend.stats())["multicast_filtered"]


async def test_no_room_is_asked_for_before_packets_whatever_a_former_frontend_wanted() -> None:
    async with network(start=False) as it:
        await it.host.attach_vif(1, SPEC)
        await it.host.store.write(f"{FRONT}/xdp-headroom", "256")
        await it.serve("--all")
        await it.connected()
        await it.configure()
        assert await it.host.store.read_opt(f"{FRONT}/xdp-headroom") == "0"
        assert await (await Transfer.start(it, it.net, OURS4, MIB)).ended() == MIB
        assert not (await it.backend.stats())["rx_roomy"]


async def test_a_backend_that_leaves_room_nobody_asked_for_carries_the_same() -> None:
    async with network(queues=1) as it:
        await it.attach(f"{SPEC},mtu=9000")
        await it.configure()
        # Of before: what came while the guest's interface was down.
        before = [queue["rx"]["dropped"] for queue in await it.queue_statistics()]
        await it.backend.fault(NetFault.rx_headroom(256))
        assert await (await Transfer.start(it, it.net, OURS4, 4 * MIB)).ended() == 4 * MIB
        assert await (await Transfer.start(it, it.guest, THEIRS4, MIB)).ended() == MIB
        assert (await it.backend.stats())["rx_roomy"] > 0
        assert [queue["rx"]["dropped"] for queue in await it.queue_statistics()] == before
