# SPDX-License-Identifier: BSD-2-Clause
"""The interface of a vif: what keys say of its link, and the TAP through its life."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from netnamespace import ip, namespace
from waiting import eventually, wait_for

from pvfront.netfront import link as link_module
from pvfront.netfront.link import Link, LinkState, default_name, follow, link_state, note_path
from pvfront.netfront.linkconfig import LinkConfig
from pvfront.netfront.tap import TapError
from pvfront.sysfs import Roots

__all__ = ["namespace"]
MAC = bytes.fromhex("00163e0a0b0c")


@pytest.mark.parametrize(
    ("backend", "frontend", "found"),
    [
        ({}, {}, LinkState(True)),
        ({"carrier": "1"}, {"disconnect": "0"}, LinkState(True)),
        ({"carrier": "0"}, {}, LinkState(False, None, "the backend says carrier 0")),
        ({}, {"disconnect": "1"}, LinkState(False, None, "the toolstack says disconnect 1")),
        ({}, {"speed": "0"}, LinkState(False, None, "the toolstack says speed 0")),
        ({}, {"speed": "25"}, LinkState(True, 25000)),
        ({}, {"speed": "100M"}, LinkState(True, 100)),
        ({}, {"speed": "2500000k"}, LinkState(True, 2500)),
        ({"carrier": "0"}, {"speed": "1G"}, LinkState(False, 1000, "the backend says carrier 0")),
    ],
)
def test_the_keys_of_both_ends_say_whether_there_is_a_link_and_how_fast(
    backend: dict[str, str], frontend: dict[str, str], found: LinkState
) -> None:
    assert link_state(backend, frontend) == (found, [])


@pytest.mark.parametrize(
    ("backend", "frontend"),
    [
        ({"carrier": "maybe"}, {}),
        ({}, {"disconnect": "\x1b[2J"}),
        ({}, {"speed": "fast"}),
        ({}, {"speed": "-1"}),
        ({}, {"speed": "9" * 99}),
        ({}, {"speed": "10T"}),
    ],
)
def test_nonsense_is_named_and_taken_as_absent(
    backend: dict[str, str], frontend: dict[str, str]
) -> None:
    state, problems = link_state(backend, frontend)
    assert state == LinkState(True)
    assert [problem.field for problem in problems] == [*backend, *frontend]


def opened(link: Link, queues: int = 1, *, mtu: int = 1500, most: int = 65517) -> None:
    link.open(queues, mac=MAC, mtu=mtu, most=most).close()


@pytest.mark.usefixtures("namespace")
def test_what_the_kernels_interface_had_is_on_the_tap_and_back_again(tmp_path: Path) -> None:
    ip("tuntap", "add", "enX1", "mode", "tap")  # which plays the kernel's
    ip("link", "set", "enX1", "address", "00:16:3e:01:02:03", "up")
    ip("addr", "add", "10.1.2.1/24", "dev", "enX1")
    ip("route", "add", "default", "via", "10.1.2.9", "dev", "enX1")
    link_module.take_over("vif-1", "enX1", tmp_path)
    assert note_path("vif-1", tmp_path).exists()
    ip("link", "del", "enX1")
    link = Link("vif-1", "enX1", tmp_path)
    opened(link)
    assert not note_path("vif-1", tmp_path).exists()
    assert "10.1.2.1/24" in ip("addr", "show", "enX1")
    assert "00:16:3e:01:02:03" in ip("link", "show", "enX1")  # its administrator's
    ip("addr", "add", "10.1.3.1/24", "dev", "enX1")
    link.close()
    assert "enX1" not in ip("link", "show")
    ip("tuntap", "add", "eth0", "mode", "tap")
    assert link_module.hand_back("vif-1", "eth0", tmp_path) == "enX1"
    assert "10.1.3.1/24" in ip("addr", "show", "enX1")
    assert "default via 10.1.2.9 dev enX1" in ip("route", "show", "default")
    assert not note_path("vif-1", tmp_path).exists()


@pytest.mark.usefixtures("namespace")
def test_a_vif_that_was_never_connected_is_handed_back_as_it_was(tmp_path: Path) -> None:
    ip("tuntap", "add", "enX1", "mode", "tap")
    ip("link", "set", "enX1", "up")
    ip("addr", "add", "fd00::1/64", "dev", "enX1", "nodad")
    ip("-6", "route", "add", "default", "via", "fd00::9", "dev", "enX1")
    link_module.take_over("vif-1", "enX1", tmp_path)
    ip("link", "del", "enX1")
    Link("vif-1", "enX1", tmp_path).close()  # there is no TAP
    ip("tuntap", "add", "enX1", "mode", "tap")
    assert link_module.hand_back("vif-1", "enX1", tmp_path) == "enX1"
    assert "fd00::1/64" in ip("addr", "show", "enX1")
    assert "default via fd00::9 dev enX1" in ip("-6", "route", "show", "default")


@pytest.mark.usefixtures("namespace")
def test_a_name_that_is_taken_meanwhile_is_left_to_its_owner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LinkConfig("enX1", up=True).save(note_path("vif-1", tmp_path))
    ip("tuntap", "add", "enX1", "mode", "tap")
    ip("tuntap", "add", "eth0", "mode", "tap")
    assert link_module.hand_back("vif-1", "eth0", tmp_path) == "eth0"
    assert "vif-1: eth0 keeps its name: " in caplog.text
    assert "UP" in ip("link", "show", "eth0")


@pytest.mark.usefixtures("namespace")
def test_mtu_and_addresses_are_the_administrators_over_reconnects(tmp_path: Path) -> None:
    link = Link("vif-1", "enX1", tmp_path)
    opened(link, queues=2)
    ip("link", "set", "enX1", "mtu", "9000", "address", "00:16:3e:99:99:99")
    opened(link, queues=1)
    shown = ip("link", "show", "enX1")
    assert "mtu 9000" in shown
    assert "00:16:3e:99:99:99" in shown
    opened(link, most=1500)  # a backend without feature-sg
    assert "mtu 1500" in ip("link", "show", "enX1")
    opened(link, mtu=4000)  # what the toolstack says is another now
    assert "mtu 4000" in ip("link", "show", "enX1")
    again = Link("vif-1", "whatever", tmp_path)  # of another supervisor
    assert again.found()
    assert (again.name, again.mtu) == ("enX1", 4000)
    opened(again)
    assert "mtu 4000" in ip("link", "show", "enX1")


@pytest.mark.usefixtures("namespace")
def test_the_carrier_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    link = Link("vif-1", "enX1", tmp_path)
    tap = link.open(1, mac=MAC, mtu=1500, most=65517)
    ip("link", "set", "enX1", "up")
    link.set_state(LinkState(True, 1000))
    wait_for("the carrier", lambda: "LOWER_UP" in ip("link", "show", "enX1"))
    link.set_state(LinkState(False, None, "the toolstack says disconnect 1"))
    wait_for("its end", lambda: "NO-CARRIER" in ip("link", "show", "enX1"))
    link.set_state(LinkState(True))
    wait_for("the carrier", lambda: "LOWER_UP" in ip("link", "show", "enX1"))
    assert "enX1: no link: the toolstack says disconnect 1" in caplog.text
    assert "enX1: the link is back" in caplog.text
    tap.close()
    link.close()
    with pytest.raises(TapError, match=r"No such device|no such interface"):
        link.set_state(LinkState(True))


@pytest.mark.usefixtures("namespace")
async def test_a_rename_and_an_mtu_are_noticed_and_one_too_large_is_set_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = Link("vif-1", "enX1", tmp_path)
    await asyncio.to_thread(opened, link, most=1500)
    news: list[bool] = []

    def changed(index: int, name: str, mtu: int) -> None:
        if index == link.index:
            news.append(link.changed(name, mtu))

    following = asyncio.create_task(follow(changed))
    try:
        ip("link", "set", "enX1", "mtu", "1400")
        await eventually("a smaller MTU", lambda: link.mtu == 1400)
        ip("link", "set", "enX1", "name", "lan0")
        await eventually("its new name", lambda: link.name == "lan0")
        ip("link", "set", "lan0", "mtu", "9000")
        await eventually("the largest MTU", lambda: "mtu 1500" in ip("link", "show", "lan0"))
        await eventually("its notice", lambda: link.mtu == 1500)
        assert "an MTU of 9000 is more than the backend takes: it is 1500" in caplog.text
        assert True in news
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    await asyncio.to_thread(link.close)
    assert "lan0" not in ip("link", "show")


def test_a_vif_that_the_kernel_never_had_is_called_as_the_system_would(tmp_path: Path) -> None:
    roots = Roots(tmp_path)
    roots.proc.mkdir()
    for name in ("lo", "eth0"):
        (roots.sys / "class/net" / name).mkdir(parents=True)
    (roots.proc / "cmdline").write_text("root=/dev/xvda1 quiet\n")
    assert default_name(3, roots) == "enX3"
    (roots.proc / "cmdline").write_text("root=/dev/xvda1 net.ifnames=0\n")
    assert default_name(3, roots) == "eth1"
    assert default_name(3, roots, taken=["eth1"]) == "eth2"
