# SPDX-License-Identifier: BSD-2-Clause
"""The TAP of a vif, on this machine's kernel, in a network namespace of the test's own."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from pvfront.netfront.tap import (
    GSO_MAX_SIZE,
    TUN,
    VNET_HDR,
    Tap,
    TapError,
    announce,
    delete,
    is_tap,
    set_carrier,
)

CLONE_NEWNET = 0x40000000
MAC = bytes.fromhex("00163e0a0b0c")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """No interface of the machine is touched."""
    if os.geteuid() or not Path(TUN).exists():
        pytest.skip(f"needs root and {TUN}")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET):
        pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        assert libc.setns(before, 0) == 0
        os.close(before)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def test_a_tap_is_set_up_and_outlives_its_descriptors() -> None:
    tap = Tap.open("enX7", queues=2)
    assert tap.queues == 2
    tap.configure(mac=MAC, mtu=9000)
    tap.set_offloads(csum=True, tso4=True, tso6=False)
    shown = ip("-d", "link", "show", "enX7")
    for text in (
        "mtu 9000", "qlen 1000", "00:16:3e:0a:0b:0c", f"gso_max_size {GSO_MAX_SIZE}", "multi_queue",
    ):  # fmt: skip
        assert text in shown
    tap.close()
    assert "NO-CARRIER" in ip("link", "set", "enX7", "up") + ip("link", "show", "enX7")
    again = Tap.open("enX7")
    again.configure(mac=MAC, mtu=9000)
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
    tap = Tap.open("enX7")
    tap.configure(mac=MAC, mtu=1500)
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
    tap = Tap.open("enX7")
    tap.configure(mac=MAC, mtu=1500)
    ip("addr", "add", "10.1.2.1/24", "dev", "enX7")
    ip("link", "set", "enX7", "up")
    (fd,) = tap.give()
    announce("enX7")

    def gratuitous() -> bool:
        try:
            packet = os.read(fd, 70000)[VNET_HDR:]
        except BlockingIOError:
            return False
        address = socket.inet_aton("10.1.2.1")
        return packet[12:14] == b"\x08\x06" and packet[28:32] == address == packet[38:42]

    wait_for("a gratuitous ARP", gratuitous)
    os.close(fd)


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
