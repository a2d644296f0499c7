# SPDX-License-Identifier: BSD-2-Clause
"""The agent as a service: its components live and fail on their own."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agentworld import AgentWorld, agent_world
from waiting import eventually

from pvfront.agent.context import WAITING, Context, Events, Resumed, ShutdownAsked
from pvfront.agent.resume import Resumes, owned
from pvfront.agent.service import COMPONENTS, Agent, ask_status
from pvfront.errors import PvfrontError
from pvfront.service import keep_watchdog
from pvfront.xenstore import XenstoreLost


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path) as made:
        yield made


class Part:
    """A component that does as it is told."""

    def __init__(self, name: str, *fates: Exception | None) -> None:
        self.name = name
        self.fates = list(fates)
        self.begun = 0

    async def run(self, context: Context) -> None:
        self.begun += 1
        if self.fates and (fate := self.fates.pop(0)) is not None:
            raise fate
        await asyncio.Event().wait()

    def status(self) -> dict[str, Any]:
        return {"begun": self.begun}


async def test_a_component_that_fails_is_begun_again_and_the_others_go_on(
    world: AgentWorld,
) -> None:
    bad, good = Part("bad", PvfrontError("no bus"), OSError(5, "EIO")), Part("good")
    async with world.running(bad, good):
        await eventually("the third beginning", lambda: bad.begun == 3)
        assert good.begun == 1


async def test_why_a_component_does_not_work_is_in_the_status(world: AgentWorld) -> None:
    bad = Part("bad", *[PvfrontError("no bus")] * 1000)
    async with world.running(bad):
        await eventually("a failure", lambda: bad.begun > 1)
        found = await ask_status(world.context.platform.run_dir)
        assert found["bad"]["failed"] == "no bus"


async def test_a_component_that_works_again_is_well_and_its_next_failure_is_news(
    world: AgentWorld, caplog: pytest.LogCaptureFixture
) -> None:
    part = Part("bad", PvfrontError("no bus"))
    async with world.running(part) as agent:
        await eventually("the second beginning", lambda: part.begun == 2)
        await eventually("no failure any more", lambda: "failed" not in agent.status()["bad"])
    assert [record.message for record in caplog.records] == ["bad: no bus"]


async def test_a_lost_store_ends_the_agent(world: AgentWorld) -> None:
    lost = XenstoreLost(errno.EIO, "read", "x", "gone", "the store hung up")
    agent = Agent(world.context, [Part("bad", lost), Part("good")])
    with pytest.raises(XenstoreLost):
        await agent.run(signals=False)


async def test_without_an_agent_the_question_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PvfrontError, match="does not run") as caught:
        await ask_status(tmp_path)
    assert caught.value.hint is not None
    assert "systemctl start pvfront-agent" in caught.value.hint


async def test_a_resume_is_counted_and_told_and_nothing_else_is(world: AgentWorld) -> None:
    async def run(*words: str) -> str:
        return "no systemd here"

    resumes = Resumes(run=run)
    with world.context.events.subscription() as told:
        async with world.running(resumes):
            await eventually("the watch", lambda: resumes.status()["watching"])
            world.set("data/x", "1")
            world.set("domid", "7", perms="n0,r5")  # as the kernel does when it sets watches anew
            assert await asyncio.wait_for(told.get(), 60) == Resumed(1)
            assert told.empty()
    assert resumes.status() == {"watching": True, "count": 1}
    assert world.context.resumes == 1


@pytest.mark.parametrize("is_owned", [False, True])
async def test_hooks_of_a_resume_are_the_agents_only_where_nobody_owns_suspend(
    world: AgentWorld, is_owned: bool
) -> None:
    commands: list[tuple[str, ...]] = []

    async def run(*words: str) -> str:
        commands.append(words)
        return ""

    resumes = Resumes(run=run)
    lock = world.file("run/pvfront/suspend.lock", "1\n")
    with lock.open() as file, world.context.events.subscription() as told:
        if is_owned:
            fcntl.flock(file, fcntl.LOCK_EX)
        assert owned(lock.parent) is is_owned
        async with world.running(resumes):
            await eventually("the watch", lambda: resumes.status()["watching"])
            for count in (1, 2):
                world.set("domid", "7", perms="n0,r5")
                assert await asyncio.wait_for(told.get(), 60) == Resumed(count)
    assert len(commands) >= (0 if is_owned else 1)
    assert {words[-3:] for words in commands} <= {("agent", "hooks", "post-resume")}
    assert not (is_owned and commands)


def test_a_subscriber_that_does_not_look_loses_the_oldest_events() -> None:
    events = Events()
    with events.subscription() as queue:
        for number in range(WAITING + 3):
            events.publish(Resumed(number))
        events.publish(ShutdownAsked("reboot"))
        found = [queue.get_nowait() for _ in range(queue.qsize())]
    assert len(found) == WAITING
    assert found[0] == Resumed(4)
    assert found[-1] == ShutdownAsked("reboot")
    events.publish(Resumed(0))  # nobody listens any more


def test_components_have_names_of_their_own() -> None:
    names = [one.name for make in COMPONENTS for one in make()]
    assert len(set(names)) == len(names)


async def test_the_watchdog_is_told_twice_in_its_time_and_only_where_it_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for environ in ({}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}):
            await asyncio.wait_for(keep_watchdog(environ), 60)
        task = asyncio.create_task(keep_watchdog({"WATCHDOG_USEC": "2000"}))
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert await asyncio.wait_for(loop.sock_recv(listener, 100), 60) == b"WATCHDOG=1"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
