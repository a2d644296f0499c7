# SPDX-License-Identifier: BSD-2-Clause
"""What XAPI may ask a guest to set; whether it can be suspended, and why not."""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentworld import AgentWorld, agent_world
from netnamespace import ip, namespace
from waiting import eventually

from pvfront.agent.board import Board
from pvfront.agent.helper import command
from pvfront.agent.requests import (
    NAME,
    VIFS,
    HostName,
    StaticAddresses,
    parse_address,
    parse_name,
)
from pvfront.agent.settings import AgentSettings
from pvfront.agent.suspendable import CANNOT, FEATURE, REASON, Judge, Suspendable, read_state
from pvfront.errors import PvfrontError

__all__ = ["namespace"]
ALLOWED = AgentSettings(static_ip=True, set_hostname=True)
SETTING = f"{VIFS}/0/static-ip-setting"


class Outside:
    """What systemd would run."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.failure = ""

    async def run(self, *words: str) -> str:
        assert words[:6] == ("systemd-run", "--quiet", "--collect", "--wait", "--pipe", "--")
        self.commands.append(" ".join(words[6:]))
        return self.failure


async def really(*words: str) -> str:
    """Does it, in this process's network, as systemd would in the system's."""
    return await command(*words[6:])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path, ALLOWED) as made:
        made.set("xenserver/device/vif", "")
        made.set(NAME, "")
        yield made


@pytest.fixture
def outside() -> Outside:
    return Outside()


def addresses(outside: Outside, board: Board | None = None) -> StaticAddresses:
    names = {0: "enX0"}
    return StaticAddresses(board or Board(), lambda n: names.get(n, ""), run=outside.run)


def ask(world: AgentWorld, end: str = "", **keys: str) -> None:
    for key, value in keys.items():
        world.set(f"{SETTING}/{key}{end}", value)
    world.set(f"{SETTING}/enabled{end}", keys.get("enabled", "1"))


async def done(world: AgentWorld, end: str = "") -> str | None:
    await eventually("the end of the request", lambda: world.get(f"{SETTING}/enabled{end}") is None)
    return world.get(f"{SETTING}/error-msg")


async def test_an_address_is_set_and_taken_back_on_the_toolstacks_word(
    world: AgentWorld, outside: Outside
) -> None:
    board = Board()
    async with world.running(addresses(outside, board)):
        ask(world, address="10.0.0.5/24", gateway="10.0.0.1")
        assert await done(world) == ""
        assert outside.commands == [
            "ip -4 link set dev enX0 up",
            "ip -4 address replace 10.0.0.5/24 dev enX0",
            "ip -4 route delete default via 10.0.0.1 dev enX0",
            "ip -4 route prepend default via 10.0.0.1 dev enX0",
        ]
        assert world.get(f"{SETTING}/error-code") == "0"
        ask(world, "6", address="2001:db8::5/64")
        assert await done(world, "6") == ""
        outside.commands.clear()
        world.set(f"{SETTING}/enabled", "0")
        assert await done(world) == ""
        assert outside.commands == [
            "ip -4 route delete default via 10.0.0.1 dev enX0",
            "ip -4 address delete 10.0.0.5/24 dev enX0",
        ]
    assert board.wanted() == {"control/feature-static-ip-setting": "1"}


async def test_an_agent_that_begins_anew_takes_back_what_the_one_before_has_set(
    world: AgentWorld, outside: Outside
) -> None:
    async with world.running(addresses(outside)):
        ask(world, "6", address="2001:db8::5/64", gateway="fe80::1")
        assert await done(world, "6") == ""
    outside.commands.clear()
    again = addresses(outside)
    async with world.running(again):
        await eventually("what is set", lambda: again.status() == {"vif0 IPv6": "2001:db8::5/64"})
        world.set(f"{SETTING}/enabled6", "0")
        assert await done(world, "6") == ""
        assert again.status() == {}
    assert outside.commands == [
        "ip -6 route delete default via fe80::1 dev enX0 metric 1",
        "ip -6 address delete 2001:db8::5/64 dev enX0",
    ]
    (world.context.platform.run_dir / "static-ip.json").write_text('{"set": [[0, "x", 1]]}')
    async with world.running(broken := addresses(outside)):
        assert broken.status() == {}


@pytest.mark.usefixtures("namespace")
async def test_the_guests_own_default_routes_hold_again_when_a_setting_is_taken_back(
    world: AgentWorld,
) -> None:
    def first(family: int) -> str:
        return ip(f"-{family}", "route", "show", "default").partition("\n")[0]

    ip("link", "add", "enX0", "type", "bridge")
    ip("link", "set", "enX0", "up")
    ip("address", "add", "10.1.0.2/16", "dev", "enX0")
    ip("address", "add", "2001:db8:1::2/64", "dev", "enX0", "nodad")
    ip("route", "add", "default", "via", "10.1.0.1")
    ip("-6", "route", "add", "default", "via", "2001:db8:1::1")
    async with world.running(StaticAddresses(Board(), lambda _: "enX0", run=really)):
        for _ in range(2):  # the same twice changes nothing
            ask(world, address="10.2.0.2/24", gateway="10.2.0.1")
            assert await done(world) == ""
            ask(world, "6", address="2001:db8:2::2/64", gateway="2001:db8:2::1")
            assert await done(world, "6") == ""
            assert "10.2.0.1" in first(4)
            assert "2001:db8:2::1" in first(6)
        for end in ("", "6"):
            world.set(f"{SETTING}/enabled{end}", "0")
            assert await done(world, end) == ""
    assert ip("-4", "route", "show", "default").split()[2] == "10.1.0.1"
    assert ip("-6", "route", "show", "default").split()[2] == "2001:db8:1::1"
    assert "10.2.0" not in ip("route") + ip("address")


async def test_a_request_waits_for_the_interface_of_a_vif_that_is_there(
    world: AgentWorld, outside: Outside
) -> None:
    names: dict[int, str] = {}
    setting = StaticAddresses(Board(), lambda n: names.get(n, ""), run=outside.run, patience=60.0)
    async with world.running(setting):
        ask(world, address="10.0.0.5/24")
        assert await done(world) == "vif0 has no interface here"
        world.set("device/vif/0/backend", "/local/domain/0/backend/vif/1/0")
        ask(world, address="10.0.0.5/24")
        await asyncio.sleep(0.3)
        assert world.get(f"{SETTING}/enabled") == "1"
        names[0] = "enX0"
        assert await done(world) == ""


@pytest.mark.usefixtures("namespace")
async def test_an_interface_that_is_down_is_up_with_its_address_and_a_wrong_gateway_is_named(
    world: AgentWorld,
) -> None:
    ip("link", "add", "enX0", "type", "bridge")
    async with world.running(StaticAddresses(Board(), lambda _: "enX0", run=really)):
        ask(world, address="10.2.0.2/24", gateway="10.3.0.1")
        said = await done(world) or ""
        assert "10.3.0.1" in said
        assert "invalid gateway" in said
        ask(world, address="10.2.0.2/24", gateway="10.2.0.1")
        assert await done(world) == ""
    assert "default via 10.2.0.1" in ip("route")
    assert "UP" in ip("link", "show", "enX0")


async def test_what_was_offered_before_the_admin_forbade_it_is_withdrawn(
    world: AgentWorld, outside: Outside
) -> None:
    world.context.settings = AgentSettings()
    world.set("control/feature-static-ip-setting", "1")
    world.set("control/feature-setcomputername", "1")
    board = Board()
    async with world.running(addresses(outside, board), HostName(board, run=outside.run)):
        await eventually("both", lambda: len(board.wanted()) == 2)
    assert set(board.wanted().values()) == {"0"}


async def test_an_address_that_cannot_be_set_is_answered_with_the_reason(
    world: AgentWorld, outside: Outside
) -> None:
    outside.failure = "systemd-run: RTNETLINK answers: File exists"
    async with world.running(addresses(outside)):
        ask(world, address="10.0.0.5/24")
        assert "File exists" in (await done(world) or "")
        assert world.get(f"{SETTING}/error-code") == "1"


@pytest.mark.parametrize(
    ("address", "gateway"),
    [
        ("", ""),
        ("10.0.0.5", ""),
        ("10.0.0.5/24; reboot", ""),
        ("10.0.0.5/33", ""),
        ("127.0.0.1/8", ""),
        ("224.0.0.1/24", ""),
        ("fe80::1/64", ""),
        ("10.0.0.5/24", "fe80::1"),
        ("10.0.0.5/24", "$(reboot)"),
        ("\x1b[2J" * 300, ""),
    ],
)
async def test_what_is_no_address_reaches_no_command(
    world: AgentWorld, outside: Outside, address: str, gateway: str
) -> None:
    async with world.running(addresses(outside)):
        ask(world, address=address, gateway=gateway)
        said = await done(world)
        assert said
        assert said.isprintable()
        assert len(said) < 200
    assert outside.commands == []


def test_an_address_of_ipv6_with_a_scope_is_refused() -> None:
    with pytest.raises(PvfrontError, match="scope"):
        parse_address(6, "fe80::1%eth0/64", "")


async def test_without_leave_nothing_is_watched_nor_offered(
    world: AgentWorld, outside: Outside
) -> None:
    world.context.settings = AgentSettings()
    board = Board()
    async with world.running(addresses(outside, board), HostName(board, run=outside.run)):
        ask(world, address="10.0.0.5/24")
        assert not any(client.watches for client in world.mem.clients)
    assert outside.commands == []
    assert board.wanted() == {}


async def test_a_host_name_is_set_and_answered(world: AgentWorld, outside: Outside) -> None:
    async with world.running(HostName(Board(), run=outside.run)):
        world.set(f"{NAME}/name", "web-1.example.org")
        world.set(f"{NAME}/action", "set")
        await eventually("the answer", lambda: world.get(f"{NAME}/state") == "Succeeded")
        await eventually("its end", lambda: world.get(f"{NAME}/action") is None)
        assert outside.commands == ["hostnamectl set-hostname web-1.example.org"]
        world.set(f"{NAME}/name", "-x; reboot")
        world.set(f"{NAME}/action", "set")
        await eventually("the refusal", lambda: world.get(f"{NAME}/state") == "Failed")
        assert len(outside.commands) == 1


@pytest.mark.parametrize("name", ["", "-a", "a-", "a..b", "a b", "x" * 65, "ü", "a\n", "--help"])
def test_what_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(PvfrontError, match="no host name"):
        parse_name(name)


def state(*, armed: bool, stage: str = "watching", refusal: str = "") -> dict[str, object]:
    return {"stage": stage, "armed": armed, "why_unarmed": "busy", "last_refusal": refusal}


def test_a_guest_whose_suspend_cannot_be_held_up_says_that_it_cannot_and_why() -> None:
    judge = Judge()
    assert judge.keys(state(armed=True)) == {REASON: ""}
    assert judge.keys(state(armed=False)) == {REASON: ""}  # a moment between two
    off = judge.keys(state(armed=False))
    why = "suspend cannot be held up: busy"
    assert off == {REASON: why, CANNOT: f"pvfront: {why}", FEATURE: "0"}
    assert judge.keys(state(armed=True)) == {REASON: "", FEATURE: "1"}
    assert judge.keys(None) == {REASON: "", FEATURE: "1"}


def test_the_reason_of_the_last_refusal_is_told_until_a_suspend_goes_well() -> None:
    judge = Judge()
    found = judge.keys(state(armed=True, refusal="xvdb: stuck\x1b"))
    assert found == {REASON: "the last one: xvdb: stuck?"}
    assert judge.keys(state(armed=False, stage="closing")) == {REASON: ""}


async def test_what_a_dead_owner_has_left_says_nothing(world: AgentWorld) -> None:
    run_dir = world.context.platform.run_dir
    world.file("run/pvfront/suspend.json", json.dumps(state(armed=True, refusal="old")))
    lock = world.file("run/pvfront/suspend.lock", "1\n")
    assert read_state(run_dir) is None
    board = Board()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        async with world.running(Suspendable(board, every=0.01)):
            await eventually("the reason", lambda: "old" in board.wanted().get(REASON, ""))
            (run_dir / "suspend.json").write_text("[")
            await eventually("none", lambda: board.wanted()[REASON] == "")
