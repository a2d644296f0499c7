# SPDX-License-Identifier: BSD-2-Clause
"""Whose an address is: of the interface, of the bridge or bond above it; told as it changes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agentworld import AgentWorld, agent_world
from netnamespace import ip, namespace
from waiting import eventually

from pvfront.agent.board import Board
from pvfront.agent.keys import Address, VifKeys
from pvfront.agent.network import InterfaceAddress, Link, Network, _listen, devid_from, vifs

__all__ = ["namespace"]
A, B, C = (Address(4, f"10.0.{n}.1", 24, 2) for n in range(3))


def ids(link: Link) -> int | None:
    return int(link.name[2:]) if link.name.startswith("en") else None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path) as made:
        yield made


def test_a_vif_has_the_addresses_of_the_bond_and_the_bridge_above_it() -> None:
    links = [
        Link(1, "lo"),
        Link(2, "en0", master=4),
        Link(3, "en1", master=4),
        Link(4, "bond0", kind="bond", master=5),
        Link(5, "br0", kind="bridge"),
        Link(6, "en2"),
    ]
    addresses = [InterfaceAddress(5, A), InterfaceAddress(6, B), InterfaceAddress(1, C)]
    found = {vif.devid: vif.addresses for vif in vifs(links, addresses, ids)}
    assert found == {0: (A,), 1: (A,), 2: (B,)}


def test_a_ring_of_masters_and_one_that_is_no_bridge_end_the_way_up() -> None:
    ring = [Link(1, "en0", master=2), Link(2, "b", kind="bridge", master=3)]
    ring += [Link(3, "c", kind="bridge", master=2)]
    assert vifs(ring, [InterfaceAddress(3, A)], ids)[0].addresses == (A,)
    vrf = [Link(1, "en0", master=2), Link(2, "red", kind="vrf")]
    assert vifs(vrf, [InterfaceAddress(2, A)], ids)[0].addresses == ()


def test_an_address_that_is_still_being_checked_is_not_published() -> None:
    assert vifs([Link(1, "en0")], [InterfaceAddress(1, A, usable=False)], ids)[0].addresses == ()


def test_the_kernels_vif_is_known_by_its_node_and_ours_by_its_alias(tmp_path: Path) -> None:
    node = tmp_path / "class" / "net" / "eth0" / "device" / "nodename"
    node.parent.mkdir(parents=True)
    node.write_text("device/vif/3\n")
    which = devid_from(tmp_path)
    assert which(Link(1, "eth0")) == 3
    assert which(Link(2, "renamed", alias="pvfront:vif-7")) == 7
    assert which(Link(3, "br0")) is None
    assert which(Link(4, "../x")) is None
    assert which(Link(5, "x", alias="pvfront:vif-" + "9" * 99)) is None


@pytest.mark.usefixtures("namespace")
async def test_what_changes_on_a_bridge_is_on_the_board_at_once_with_a_stable_index(
    world: AgentWorld,
) -> None:
    board = Board()
    ip("tuntap", "add", "dev", "tap7", "mode", "tap")
    ip("link", "set", "tap7", "alias", "pvfront:vif-7")
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", "10.9.0.1/24", "dev", "tap7")
    async with world.running(Network(board, VifKeys())):
        await eventually(
            "the address", lambda: board.wanted().get("attr/vif/7/ipv4/0") == "10.9.0.1"
        )
        ip("link", "set", "tap7", "master", "br0")
        ip("addr", "add", "10.9.0.2/16", "dev", "br0")
        await eventually(
            "the bridge's", lambda: board.wanted().get("attr/vif/7/ipv4/1") == "10.9.0.2"
        )
        assert board.wanted()["attr/vif/7/ipv4/1/prefix"] == "16"
        ip("addr", "del", "10.9.0.1/24", "dev", "tap7")
        await eventually("the end of the first", lambda: "attr/vif/7/ipv4/0" not in board.wanted())
        assert board.wanted()["attr/vif/7/ipv4/1"] == "10.9.0.2"


async def test_of_changes_that_netlink_has_lost_the_next_look_tells() -> None:
    news = asyncio.Event()

    class Flooded:
        """As pyroute2 says it: OSError of get(), and the socket goes on."""

        asked = 0

        async def get(self) -> AsyncIterator[object]:
            self.asked += 1
            if self.asked < 3:
                raise OSError(errno.ENOBUFS, None)
            assert news.is_set()
            raise OSError(errno.EBADF, None)
            yield

    with pytest.raises(OSError, match=str(errno.EBADF)):
        await asyncio.wait_for(_listen(Flooded(), news), 60)


@pytest.mark.usefixtures("namespace")
async def test_a_link_that_goes_and_comes_has_its_hooks_run_where_there_are_any(
    world: AgentWorld,
) -> None:
    ran: list[tuple[str, ...]] = []

    async def run(*words: str) -> str:
        ran.append(words)
        return ""

    world.hook("post-link", "true")
    ip("tuntap", "add", "dev", "tap7", "mode", "tap")
    ip("link", "set", "tap7", "alias", "pvfront:vif-7")
    with attached("tap7"):
        ip("link", "set", "tap7", "up")
        network = Network(Board(), VifKeys(), run=run)
        async with world.running(network):
            await eventually("the vif", lambda: network.status()["vifs"])
            ip("link", "set", "tap7", "carrier", "off")
            await eventually("the hooks", lambda: len(ran) == 1)
            ip("link", "set", "tap7", "carrier", "on")
            await eventually("the hooks again", lambda: len(ran) == 2)
    assert "--setenv=PVFRONT_LINK=down" in ran[0]
    assert "--setenv=PVFRONT_LINK=up" in ran[1]
    assert "--setenv=PVFRONT_NAME=vif7" in ran[1]
    assert ran[1][-3:] == ("agent", "hooks", "post-link")


@contextlib.contextmanager
def attached(name: str) -> Iterator[None]:
    """A TAP has a carrier while somebody has it open (TUNSETIFF, IFF_TAP | IFF_NO_PI)."""
    with Path("/dev/net/tun").open("rb") as tun:
        fcntl.ioctl(tun.fileno(), 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
        yield
