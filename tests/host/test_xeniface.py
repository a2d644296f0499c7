# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE on a system bus: what callers get, and what those get that want more. The store is the
embedded host's, the tools are busctl and a client of D-Bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from busworld import (
    DAEMON,
    GROUP,
    MAIN,
    NAME,
    NOBODY,
    PATH,
    SESSION,
    STORE,
    BusWorld,
    Client,
    Failure,
    Variant,
    bus_world,
    requires_bus,
)
from dbus_fast.errors import DBusError
from test_negotiation import RICH, place
from waiting import PATIENCE, eventually

from pvfront import inventory
from pvfront.agent.context import ShutdownAsked
from pvfront.agent.settings import AgentSettings
from pvfront.agent.xeniface.bus import ALL_PENDING, INTROSPECTION, PENDING, error_name
from pvfront.agent.xeniface.component import Xeniface
from pvfront.agent.xeniface.framing import MOST
from pvfront.agent.xeniface.policy import Limits, Settings
from pvfront.errors import PvfrontError
from pvfront.host import Host
from pvfront.xenstore import XenstoreError, XenstoreTimeout

pytestmark = [requires_bus, pytest.mark.asyncio(loop_scope="module")]

DENIED = "org.freedesktop.DBus.Error.AccessDenied"
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
LIMITS = "org.freedesktop.DBus.Error.LimitsExceeded"

DOCS = Path(__file__).resolve().parents[2] / "docs" / "xeniface.md"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    async with await Host.start() as started:
        await started.create_domain()
        await started.attach_disk(1, "format=raw,vdev=xvdb,access=rw,target=memory:8M")
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle_host() -> AsyncIterator[Host]:
    """One that no agent runs on: for tests that want one of their own, with its settings."""
    async with await Host.start() as started:
        await started.create_domain()
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_world(host: Host) -> AsyncIterator[BusWorld]:
    # Requests of the user without rights are not what most tests are about.
    limits = Limits(burst=100_000)
    async with bus_world(host, Settings(write_group=GROUP), limits) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def world(one_world: BusWorld) -> AsyncIterator[BusWorld]:
    yield one_world
    await one_world.hang_up()


@pytest_asyncio.fixture(loop_scope="module")
async def root(world: BusWorld) -> Client:
    return await world.client()


@pytest_asyncio.fixture(loop_scope="module")
async def user(world: BusWorld) -> Client:
    return await world.client(NOBODY)


@pytest_asyncio.fixture(loop_scope="module")
async def member(world: BusWorld) -> Client:
    return await world.client(DAEMON)


async def fails(call: Awaitable[Any]) -> tuple[str, str]:
    with pytest.raises(Failure) as caught:
        await call
    return caught.value.name, str(caught.value)


# -- the store ---------------------------------------------------------------------------------


async def test_everybody_reads_values_names_and_permissions(world: BusWorld, user: Client) -> None:
    await world.write("data/app/text", "hällo")
    await world.host.store.write("/local/domain/1/data/app/bytes", b"\xff\x00")
    assert await user.call("Read", "s", "data/app/text") == "hällo"
    assert bytes(await user.call("ReadBytes", "s", "data/app/bytes")) == b"\xff\x00"
    assert await user.call("Directory", "s", "data/app") == ["bytes", "text"]
    assert {"data", "device", "domid"} <= set(await user.call("Directory", "s", ""))
    assert (await user.call("GetPermissions", "s", "data"))[0] == "n1"


async def test_a_value_that_is_no_text_is_said_to_be_none(world: BusWorld, user: Client) -> None:
    await world.host.store.write("/local/domain/1/data/bytes", b"\xff")
    assert await fails(user.call("Read", "s", "data/bytes")) == (
        "NotText",
        "the value is no text: ReadBytes reads it",
    )


async def test_root_writes_makes_and_removes(root: Client) -> None:
    await root.call("Write", "ss", "data/new", "1")
    await root.call("WriteBytes", "say", "data/raw", b"\x00\xff")
    await root.call("MakeDirectory", "s", "data/dir")
    assert await root.call("Read", "s", "data/new") == "1"
    assert bytes(await root.call("ReadBytes", "s", "data/raw")) == b"\x00\xff"
    for path in ("data/new", "data/raw", "data/dir"):
        await root.call("Remove", "s", path)
    assert (await fails(root.call("Read", "s", "data/new")))[0] == "NoSuchNode"
    assert (await fails(root.call("Remove", "s", "data/new")))[0] == "NoSuchNode"


async def test_a_member_of_the_group_writes_below_its_paths_and_nowhere_else(
    member: Client,
) -> None:
    await member.call("Write", "ss", "data/mine", "1")
    assert await member.call("Read", "s", "data/mine") == "1"
    await member.call("Remove", "s", "data/mine")
    assert (await fails(member.call("Write", "ss", "control/shutdown", "crash")))[0] == DENIED
    assert (await fails(member.call("Remove", "s", "data")))[0] == DENIED


@pytest.mark.parametrize(
    ("called", "signature", "body"),
    [
        ("Write", "ss", ["data/x", "1"]),
        ("WriteBytes", "say", ["data/x", b"1"]),
        ("MakeDirectory", "s", ["data/x"]),
        ("Remove", "s", ["data"]),
        ("SetPermissions", "sas", ["data", ["n1", "r0"]]),
        ("Read", "s", ["vm-data/password"]),
        ("Directory", "s", ["vm-data"]),
        ("Read", "s", ["/local/domain/0/name"]),
    ],
)
async def test_who_has_no_right_gets_access_denied(
    user: Client, called: str, signature: str, body: list[Any]
) -> None:
    assert (await fails(user.call(called, signature, *body)))[0] == DENIED


@pytest.mark.parametrize("path", ["a\nb", "\x1b[2J", "a//b", "../x", "data/", "ä", "x" * 3000])
async def test_a_path_that_can_be_none_is_refused_and_shown_harmless(
    user: Client, path: str
) -> None:
    name, said = await fails(user.call("Read", "s", path))
    assert name == INVALID
    assert said.startswith("not a path of the store: ")
    assert said.isprintable()


async def test_a_large_value_is_refused_and_the_service_goes_on(root: Client) -> None:
    name, said = await fails(root.call("WriteBytes", "say", "data/x", bytes(4000)))
    assert (name, said) == (LIMITS, "a value has at most 2048 bytes, not 4000")
    assert (await fails(root.call("Write", "ss", "data/x", "x" * 4000)))[0] == LIMITS
    assert await root.call("Read", "s", "domid") == "1"


async def test_a_huge_message_is_refused_before_it_is_decoded(user: Client) -> None:
    """Of the wrong types too, which are found by decoding it; and of calls that are not ours."""
    everything = [Variant("as", ["x"] * 1000)] * 30
    for member, signature, body in (
        ("Write", "ss", ["data/x", "x" * (8 << 20)]),
        ("Read", "av", [everything]),
        ("NoSuchMethod", "ay", [bytes(MOST)]),
    ):
        said = (LIMITS, f"a message has at most {MOST} bytes")
        assert await fails(user.call(member, signature, *body)) == said
        assert await user.call("Read", "s", "domid") == "1"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (errno.ENOENT, "NoSuchNode"),
        (errno.EACCES, "StoreRefused"),
        (errno.EINVAL, "StoreRefused"),
        (errno.ENOSPC, "QuotaExceeded"),
        (errno.EIO, "StoreFailed"),
    ],
)
async def test_what_the_store_itself_refuses_has_a_name_of_its_own(code: int, name: str) -> None:
    assert error_name(XenstoreError(code, "write", "data/x")) == f"{NAME}.Error.{name}"
    assert error_name(XenstoreTimeout("write", "data/x", 1)) == f"{NAME}.Error.StoreTimeout"


# -- calls that are none -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "interface", "called", "signature", "body", "error"),
    [
        (PATH, STORE, "Read", "", [], "InvalidArgs"),
        (PATH, STORE, "Read", "u", [1], "InvalidArgs"),
        (PATH, STORE, "Reed", "s", ["x"], "UnknownMethod"),
        (PATH, SESSION, "Begin", "", [], "UnknownInterface"),
        (PATH, "no.such.Interface", "Read", "s", ["x"], "UnknownInterface"),
        (f"{PATH}/sessions", STORE, "Read", "s", ["domid"], "UnknownObject"),
        (f"{PATH}/sessions/7777", STORE, "Read", "s", ["domid"], "UnknownObject"),
        (f"{PATH}/sessions/7777x", STORE, "Read", "s", ["domid"], "UnknownMethod"),
        ("/somewhere", STORE, "Read", "s", ["domid"], "UnknownMethod"),
        (PATH, "org.freedesktop.DBus.Properties", "Get", "ss", [MAIN, "Nope"], "UnknownProperty"),
        (PATH, "org.freedesktop.DBus.Properties", "Get", "s", [MAIN], "UnknownMethod"),
        (PATH, "org.freedesktop.DBus.Properties", "GetAll", "s", ["no.such"], "UnknownInterface"),
        (
            PATH, "org.freedesktop.DBus.Properties", "Set", "ssv",
            [MAIN, "SuspendCount", Variant("t", 7)], "PropertyReadOnly",
        ),
    ],
)  # fmt: skip
async def test_a_call_of_what_is_not_there_has_the_error_that_d_bus_has_for_it(
    root: Client, path: str, interface: str, called: str, signature: str, body: Any, error: str
) -> None:
    name, _ = await fails(root.call(called, signature, *body, path=path, interface=interface))
    assert name == f"org.freedesktop.DBus.Error.{error}"


async def test_a_flood_of_one_user_is_refused_and_others_are_served(idle_host: Host) -> None:
    limits = Limits(per_second=0.001, burst=50)
    async with bus_world(idle_host, limits=limits) as world:
        one, two = await world.client(NOBODY), await world.client(NOBODY)
        for client in (one, two) * 25:
            await client.call("Read", "s", "domid")
        for client in (one, two, await world.client(NOBODY)):
            name, said = await fails(client.call("Read", "s", "domid"))
            assert (name, said) == (LIMITS, "too many requests: 0.001 a second are answered")
        assert await (await world.client(DAEMON)).call("Read", "s", "domid") == "1"
        root = await world.client()
        for _ in range(60):
            assert await root.call("Read", "s", "domid") == "1"


async def test_questions_for_devices_count_for_more(idle_host: Host) -> None:
    limits = Limits(per_second=0.001, burst=50)
    async with bus_world(idle_host, limits=limits) as world:
        user = await world.client(NOBODY)
        for _ in range(2):
            await user.call("ListDevices", interface=MAIN)
        assert (await fails(user.call("ListDevices", interface=MAIN)))[0] == LIMITS


@contextlib.contextmanager
def stalled(host: Host) -> Iterator[None]:
    """The store answers nobody meanwhile."""
    _, store = host.pids
    os.kill(store, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(store, signal.SIGCONT)


async def refusals(calls: list[asyncio.Task[Any]], count: int) -> set[tuple[str, str]]:
    """Waits until so many calls were refused; their error names and texts."""

    def refused() -> list[BaseException | None]:
        return [each.exception() for each in calls if each.done()]

    await eventually(f"{count} refusals", lambda: len(refused()) == count, why=refused)
    return {(each.name, str(each)) for each in refused() if isinstance(each, Failure)}


WAITING = (LIMITS, "too many calls wait for their replies")


async def test_a_connection_has_so_many_calls_waiting_and_one_more_is_refused_at_once(
    world: BusWorld, root: Client
) -> None:
    with stalled(world.host):
        calls = [asyncio.create_task(root.call("Read", "s", "domid")) for _ in range(PENDING + 20)]
        assert await refusals(calls, 20) == {WAITING}
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers.count("1") == PENDING
    assert await root.call("Read", "s", "domid") == "1"


async def test_all_connections_together_have_so_many_calls_waiting(world: BusWorld) -> None:
    clients = [await world.client() for _ in range(ALL_PENDING // PENDING + 2)]
    with stalled(world.host):
        calls = [
            asyncio.create_task(client.call("Read", "s", "domid"))
            for client in clients
            for _ in range(PENDING)
        ]
        assert await refusals(calls, 2 * PENDING) == {WAITING}
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers.count("1") == ALL_PENDING
    assert await clients[-1].call("Read", "s", "domid") == "1"


# -- sessions ------------------------------------------------------------------------------------


async def test_a_transaction_of_a_session_is_all_or_nothing(world: BusWorld, root: Client) -> None:
    session = await root.session()
    await root.call("Begin", path=session, interface=SESSION)
    await root.call("Write", "ss", "data/txn", "1", path=session)
    assert (await fails(root.call("Read", "s", "data/txn")))[0] == "NoSuchNode"
    await root.call("Commit", path=session, interface=SESSION)
    assert await root.call("Read", "s", "data/txn") == "1"
    await root.call("Begin", path=session, interface=SESSION)
    await root.call("Remove", "s", "data/txn", path=session)
    await root.call("Abort", path=session, interface=SESSION)
    assert await root.call("Read", "s", "data/txn") == "1"
    await root.call("Close", path=session, interface=SESSION)
    assert (await fails(root.call("Abort", path=session, interface=SESSION)))[0].endswith(
        "UnknownObject"
    )


async def test_a_conflict_is_an_error_of_its_own(world: BusWorld, root: Client) -> None:
    session = await root.session()
    await world.write("data/contended", "0")
    await root.call("Begin", path=session, interface=SESSION)
    assert await root.call("Read", "s", "data/contended", path=session) == "0"
    await root.call("Write", "ss", "data/contended", "1", path=session)
    await world.write("data/contended", "2")
    assert (await fails(root.call("Commit", path=session, interface=SESSION)))[0] == "Conflict"
    assert await root.call("Read", "s", "data/contended") == "2"


async def test_who_may_not_write_gets_no_transaction(user: Client) -> None:
    session = await user.session()
    assert (await fails(user.call("Begin", path=session, interface=SESSION)))[0] == DENIED


async def test_a_watch_is_told_to_its_owner_alone(
    world: BusWorld, root: Client, user: Client, member: Client
) -> None:
    session = await user.session()
    watch = await user.call("Watch", "s", "data/seen", path=session, interface=SESSION)
    await user.comes("WatchFired", [watch, "data/seen"])
    user.signals.clear()
    await member.listen()

    async def told() -> bool:
        await root.call("Write", "ss", "data/seen/x", "1")
        return [watch, "data/seen/x"] in [body for _, _, body in user.signals]

    await eventually("the change", told)
    assert user.signals[0][0] == session
    assert root.signals == member.signals == []
    await user.call("Unwatch", "u", watch, path=session, interface=SESSION)
    assert (await fails(user.call("Unwatch", "u", watch, path=session, interface=SESSION)))[
        0
    ] == "NoSuchWatch"


async def test_a_session_ends_with_its_connection(world: BusWorld, root: Client) -> None:
    doomed = await world.client()
    session = await doomed.session()
    await doomed.call("Watch", "s", "data", path=session, interface=SESSION)
    await doomed.call("Begin", path=session, interface=SESSION)
    await doomed.call("Write", "ss", "data/doomed", "1", path=session)
    assert world.agent.status()["xeniface"]["sessions"] == 1
    doomed.bus.disconnect()
    await eventually(
        "the session's end",
        lambda: (
            world.agent.status()["xeniface"]
            == {"bus_name": NAME, "served": True, "sessions": 0, "watches": 0}
        ),
        why=world.agent.status,
    )
    assert (await fails(root.call("Read", "s", "data/doomed")))[0] == "NoSuchNode"


async def test_the_session_of_another_connection_is_out_of_reach(
    world: BusWorld, root: Client, user: Client
) -> None:
    session = await root.session()
    for other in (user, await world.client()):
        assert (await fails(other.call("Read", "s", "domid", path=session)))[0] == DENIED
        assert (await fails(other.call("Close", path=session, interface=SESSION)))[0] == DENIED
        introspect = other.call(
            "Introspect", path=session, interface="org.freedesktop.DBus.Introspectable"
        )
        assert (await fails(introspect))[0] == DENIED


async def test_too_many_sessions_and_watches_of_a_user_are_refused_over_all_its_connections(
    idle_host: Host,
) -> None:
    async with bus_world(idle_host, limits=Limits(sessions=2, watches=2)) as world:
        one, two = await world.client(NOBODY), await world.client(NOBODY)
        first, second = await one.session(), await two.session()
        assert (await fails(two.session())) == (LIMITS, "a user may have 2 sessions at a time")
        await one.call("Watch", "s", "data", path=first, interface=SESSION)
        await two.call("Watch", "s", "data", path=second, interface=SESSION)
        third = one.call("Watch", "s", "data", path=first, interface=SESSION)
        assert await fails(third) == (LIMITS, "a user may have 2 watches at a time")
        await two.call("Close", path=second, interface=SESSION)
        await one.call("Watch", "s", "data", path=first, interface=SESSION)
        await one.session()


# -- the domain --------------------------------------------------------------------------------


async def test_a_resume_is_a_signal_to_everybody_and_counts(world: BusWorld, user: Client) -> None:
    await user.listen()
    session = await user.session()
    watch = await user.call("Watch", "s", "data", path=session, interface=SESSION)
    await user.comes("WatchFired", [watch, "data"])
    before = world.context.resumes
    user.signals.clear()
    await world.write("domid", "1")  # as the kernel sets the watches anew
    await user.comes("Resumed", [before + 1])
    await user.comes("PropertiesChanged", [MAIN, {"SuspendCount": Variant("t", before + 1)}, []])
    await user.comes("WatchFired", [watch, "data"])
    said = await world.busctl("get-property", NAME, PATH, MAIN, "SuspendCount", uid=NOBODY)
    assert said == f"t {before + 1}\n"


async def test_the_count_outlives_the_agent_and_knows_of_a_resume_that_it_missed(
    idle_host: Host,
) -> None:
    async with bus_world(idle_host) as world:
        before = world.context.resumes
        await world.write("domid", "1")
        await eventually("a resume", lambda: world.context.resumes == before + 1)
    async with bus_world(idle_host) as world:
        await eventually("as it was", lambda: world.context.resumes == before + 1)
    saved = idle_host.directory / "run" / "resumes.json"
    saved.write_text(json.dumps({"domid": "77", "count": before + 1}))
    async with bus_world(idle_host) as world:
        await eventually("one more", lambda: world.context.resumes == before + 2)
    saved.write_text("nonsense")
    async with bus_world(idle_host):
        await eventually("anew", lambda: json.loads(saved.read_text())["count"] == 0)


async def test_what_the_toolstack_asks_for_is_a_signal_to_everybody(
    world: BusWorld, user: Client
) -> None:
    await user.listen()
    world.context.events.publish(ShutdownAsked("reboot"))
    world.context.events.publish(ShutdownAsked("\x1b[2J"))
    await user.comes("ShutdownRequested", ["reboot"])
    await user.comes("ShutdownRequested", ["\\x1b[2J"])


async def test_devices_are_listed_and_told_of_as_the_command_line_has_them(
    world: BusWorld, user: Client
) -> None:
    (disk,) = await user.call("ListDevices", interface=MAIN)
    found = json.loads(await world.run(sys.executable, "-P", "-m", "pvfront", "list", "--json"))
    (listed,) = found
    assert {name: each.value for name, each in disk.items()} == {
        name: value for name, value in listed.items() if value is not None
    }
    status = await user.call("GetDevice", "s", "xvdb", interface=MAIN)
    assert status["frontend_state"].value == "Initialising (1)"
    name, said = await fails(user.call("GetDevice", "s", "xvdz\x1b", interface=MAIN))
    assert name == "NoSuchDevice"
    assert said.isprintable()
    assert "there are: xvdb" in said


async def test_counters_come_from_the_supervisor_where_the_agent_may_not_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with place(RICH) as disk, bus_world(disk.host) as world:
        await disk.status()
        await disk.verify()
        user = await world.client(NOBODY)
        seen = await user.call("GetDevice", "s", "xvdb", interface=MAIN)
        # As in its unit: neither the worker nor the supervisor is there for it.
        monkeypatch.setattr(inventory, "statistics", lambda *arguments: None)
        monkeypatch.setattr(inventory, "_runs", lambda *arguments: False)
        monkeypatch.setattr(inventory, "_SOON", PATIENCE)
        told = await user.call("GetDevice", "s", "xvdb", interface=MAIN)
        assert told.keys() == seen.keys()
        counted = [found["statistics"].value["write"].value for found in (seen, told)]
        assert counted[0]["bytes"].value == counted[1]["bytes"].value > 1 << 20
        assert told["worker_runs"].value is True
        await disk.service.stop()
        gone = await user.call("GetDevice", "s", "xvdb", interface=MAIN)
        assert "statistics" not in gone


# -- the service ---------------------------------------------------------------------------------


async def test_introspection_is_what_is_installed(world: BusWorld, root: Client) -> None:
    session = await root.session()
    shown = await world.busctl("tree", "--list", NAME)
    assert shown.split() == ["/", "/org", "/org/pvfront", PATH, f"{PATH}/sessions"]
    for path, has in ((PATH, (MAIN, STORE)), (session, (STORE, SESSION))):
        said = await root.call(
            "Introspect", path=path, interface="org.freedesktop.DBus.Introspectable"
        )
        for interface in (MAIN, STORE, SESSION):
            assert (f'"{interface}"' in said) == (interface in has)
    assert set(re.findall(r'method name="(\w+)"', INTROSPECTION)) >= {"Read", "Commit"}


async def test_nobody_but_root_may_have_the_name(world: BusWorld) -> None:
    user = await world.client(NOBODY)
    with pytest.raises(DBusError, match="not allowed to own"):
        await user.bus.request_name(NAME)


async def test_a_second_service_says_that_the_name_is_taken(world: BusWorld) -> None:
    with pytest.raises(PvfrontError, match="another process has the name"):
        await asyncio.wait_for(Xeniface().run(world.context), PATIENCE)


async def test_without_a_bus_the_agent_goes_on_and_says_what_is_missing(
    world: BusWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    with pytest.raises(PvfrontError, match=r"no D-Bus: .*No such file") as caught:
        await Xeniface().run(world.context)
    assert caught.value.hint == "apt-get install dbus"


async def test_what_is_off_has_no_name_on_the_bus(idle_host: Host) -> None:
    async with bus_world(idle_host) as world:
        world.context.settings = AgentSettings(xeniface=Settings(enabled=False))
        await asyncio.wait_for(Xeniface().run(world.context), PATIENCE)


# -- the documentation -------------------------------------------------------------------------


def examples() -> list[tuple[str, str]]:
    """Each command of the documentation's transcripts, with what it is said to print."""
    blocks = (
        re.findall(r"^```\n(\$ .*?)^```", DOCS.read_text(), re.M | re.S) if DOCS.exists() else []
    )
    return [
        (command, printed)
        for block in blocks
        for command, printed in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M)
    ]


async def test_the_examples_of_the_documentation_are_true(world: BusWorld) -> None:
    assert len(examples()) >= 5
    await world.write("data/motd", "hello")
    for command, printed in examples():
        process = await asyncio.create_subprocess_shell(
            command, env=world.environ,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert out.decode() == printed, command
