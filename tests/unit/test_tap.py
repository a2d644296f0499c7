# SPDX-License-Identifier: BSD-2-Clause
"""The TAP of a vif, on this machine's kernel, in a network namespace of the test's own."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from netnamespace import ip, namespace
from pyroute2 import Ethtool
from waiting import wait_for

from pvfront.netfront.tap import (
    GSO_MAX_SIZE,
    VNET_HDR,
    Tap,
    TapError,
    announce,
    delete,
    find,
    index_of,
    is_tap,
    set_carrier,
    set_speed,
)

MAC = bytes.fromhex("00163e0a0b0c")


__all__ = ["namespace"]
pytestmark = pytest.mark.usefixtures("namespace")


def test_a_tap_is_set_up_and_outlives_its_descriptors() -> None:
    tap = Tap.open("enX7", queues=2, owner="vif-7", mac=MAC)
    assert tap.queues == 2
    assert tap.made
    tap.configure(mtu=9000, most=9000)
    tap.set_offloads(csum=True, tso4=True, tso6=False)
    shown = ip("-d", "link", "show", "enX7")
    for text in (
        "mtu 9000", "qlen 1000", "alias pvfront:vif-7", "multi_queue",
        "00:16:3e:0a:0b:0c", f"gso_max_size {GSO_MAX_SIZE}",
    ):  # fmt: skip
        assert text in shown
    tap.close()
    assert "NO-CARRIER" in ip("link", "set", "enX7", "up") + ip("link", "show", "enX7")
    again = Tap.open("enX7", owner="vif-7", mac=bytes(6))
    assert not again.made
    again.configure(mtu=None, most=9000)
    assert "mtu 9000" in (shown := ip("link", "show", "enX7"))
    assert "00:16:3e:0a:0b:0c" in shown
    delete("enX7")
    again.close()
    assert "enX7" not in ip("link", "show")


def test_the_carrier_is_what_it_was_told() -> None:
    tap = Tap.open("enX7")
    ip("link", "set", "enX7", "up")
    set_carrier("enX7", False)
    wait_for("its end", lambda: "NO-CARRIER" in ip("link", "show", "enX7"))
    set_carrier("enX7", True)
    wait_for("the carrier", lambda: "LOWER_UP" in ip("link", "show", "enX7"))
    tap.close()


def test_packets_carry_the_header_that_a_worker_expects() -> None:
    tap = Tap.open("enX7", mac=MAC)
    tap.set_offloads(csum=True, tso4=True, tso6=True)
    ip("addr", "add", "10.1.2.1/24", "dev", "enX7")
    ip("link", "set", "enX7", "up")
    ip("neigh", "add", "10.1.2.9", "lladdr", "00:16:3e:00:00:01", "dev", "enX7")
    (fd,) = tap.give()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x" * 100, ("10.1.2.9", 9))

    def datagram() -> bytes | None:
        try:
            packet = os.read(fd, 70000)
        except BlockingIOError:
            return None
        return packet if packet[VNET_HDR + 12 : VNET_HDR + 14] == b"\x08\x00" else None

    packet = wait_for("the datagram", datagram)
    flags, _, _, _, start, offset = struct.unpack("=BBHHHH", packet[:VNET_HDR])
    assert (flags, start, offset) == (1, 14 + 20, 6)  # its checksum is left to us
    assert packet[VNET_HDR + 6 : VNET_HDR + 12] == MAC
    os.close(fd)


def test_neighbours_are_told_where_an_address_is() -> None:
    tap = Tap.open("enX7", mac=MAC)
    ip("addr", "add", "10.1.2.1/24", "dev", "enX7")
    ip("link", "set", "enX7", "up")
    (fd,) = tap.give()
    before = "ipv4/conf/enX7/arp_notify", "ipv6/conf/enX7/ndisc_notify"
    assert [(Path("/proc/sys/net") / key).read_text() for key in before] == ["0\n", "0\n"]
    announce("enX7")
    assert [(Path("/proc/sys/net") / key).read_text() for key in before] == ["0\n", "0\n"]

    def gratuitous() -> bool:
        try:
            packet = os.read(fd, 70000)[VNET_HDR:]
        except BlockingIOError:
            return False
        address = socket.inet_aton("10.1.2.1")
        return packet[12:14] == b"\x08\x06" and packet[28:32] == address == packet[38:42]

    wait_for("a gratuitous ARP", gratuitous)
    ip("addr", "add", "fd00::1/64", "dev", "enX7", "nodad")
    announce("enX7")

    def advertisement() -> bool:
        try:
            packet = os.read(fd, 70000)[VNET_HDR:]
        except BlockingIOError:
            return False
        target = socket.inet_pton(socket.AF_INET6, "fd00::1")
        return packet[12:14] == b"\x86\xdd" and packet[54] == 136 and packet[62:78] == target

    wait_for("an unsolicited neighbour advertisement", advertisement)
    os.close(fd)


def test_what_is_down_announces_nothing_and_waits_for_nothing() -> None:
    Tap.open("enX7").close()
    announce("enX7")


def test_a_tap_is_found_by_its_owner_whatever_it_is_called() -> None:
    tap = Tap.open("enX7", owner="vif-7")
    ip("link", "set", "enX7", "name", "lan0")
    assert find("vif-7") == (index_of("lan0"), "lan0")
    assert find("vif-8") is None
    tap.close()
    again = Tap.open("enX7", owner="vif-7")
    assert again.name == "lan0"
    again.close()


def test_a_tap_of_somebody_else_is_not_ours_to_take() -> None:
    ip("tuntap", "add", "enX7", "mode", "tap", "multi_queue", "vnet_hdr")
    with pytest.raises(TapError, match="enX7: there is a TAP of this name, and it is not ours"):
        Tap.open("enX7", owner="vif-7")
    Tap.open("enX8", owner="vif-8").close()
    with pytest.raises(TapError, match="not ours"):
        Tap.open("enX8", owner="vif-7")


def test_an_mtu_of_the_administrator_stays_as_far_as_the_backend_takes_it() -> None:
    Tap.open("enX7", owner="vif-7").close()
    for mtu, most, then in ((None, 65517, 3000), (None, 1500, 1500), (9000, 65517, 9000)):
        ip("link", "set", "enX7", "mtu", "3000")
        tap = Tap.open("enX7", owner="vif-7")
        tap.configure(mtu=mtu, most=most)
        tap.close()
        assert f"mtu {then} " in ip("link", "show", "enX7")


def test_the_speed_is_what_ethtool_shows() -> None:
    tap = Tap.open("enX7")
    with Ethtool() as ethtool:
        for mbits in (25000, 100, 1 << 20, None):
            set_speed("enX7", mbits)
            shown = ethtool.get_link_mode("enX7", with_netlink=False).speed
            assert shown in ((-1, 0xFFFFFFFF, None) if mbits is None else (mbits,))
    tap.close()
    delete("enX7")
    with pytest.raises(TapError, match="its speed cannot be told: No such device"):
        set_speed("enX7", 100)


def test_another_interfaces_name_is_refused_with_the_reason() -> None:
    with pytest.raises(TapError, match="lo: there is an interface of this name, and it is no TAP"):
        Tap.open("lo")


def test_a_tap_that_was_made_in_another_way_is_refused() -> None:
    ip("tuntap", "add", "enX7", "mode", "tap")
    with pytest.raises(TapError, match="made in another way"):
        Tap.open("enX7")


@pytest.mark.parametrize("name", ["", "a" * 16, "a b", "a/b", "..", "a%d", "é"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(TapError, match="cannot be the name"):
        Tap.open(name)


def test_what_is_closed_or_gone_cannot_be_set() -> None:
    tap = Tap.open("enX7")
    tap.close()
    with pytest.raises(TapError, match="no queue of it is open"):
        tap.set_offloads(csum=True, tso4=False, tso6=False)
    delete("enX7")
    delete("enX7")  # nothing is left to do
    with pytest.raises(TapError, match="no such interface any more"):
        set_carrier("enX7", True)


def test_a_missing_node_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvfront.netfront.tap.TUN", "/dev/net/none")
    with pytest.raises(TapError, match="/dev/net/none is missing") as caught:
        Tap.open("enX7")
    assert caught.value.hint == "modprobe tun"


def test_a_tap_is_told_from_other_interfaces() -> None:
    Tap.open("enX7").close()
    assert is_tap("enX7")
    assert not is_tap("lo")
    assert not is_tap("enX8")
