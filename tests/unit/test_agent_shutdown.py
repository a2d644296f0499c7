# SPDX-License-Identifier: BSD-2-Clause
"""Hooks around the end of the machine; what the toolstack asks for, and the kernel's part in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentworld import AgentWorld, agent_world
from waiting import eventually

from pvfront import service
from pvfront.agent import control
from pvfront.agent.board import Board
from pvfront.agent.context import Event, ShutdownAsked
from pvfront.agent.control import REASON, Control
from pvfront.agent.helper import command
from pvfront.agent.shutdown import run_hooks
from pvfront.service import kind_of
from pvfront.xenstore import Xenstore

JOBS = """\
 812 pvfront-pre-shutdown.service stop  running
 799 reboot.target                start waiting
 801 xvda.swap                    stop  waiting
"""


def hook(directory: Path, moment: str, body: str) -> None:
    path = directory / f"{moment}.d" / "hook"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def systemd(monkeypatch: pytest.MonkeyPatch, running: str, jobs: str = JOBS) -> None:
    async def say(*words: str) -> str:
        return running if words[0] == "is-system-running" else jobs

    monkeypatch.setattr(service, "_systemctl", say)


def test_the_kind_of_a_shutdown_is_the_target_that_is_started() -> None:
    assert kind_of(JOBS) == "reboot"
    assert kind_of(" 1 poweroff.target stop waiting\n\nx\n") == "shutdown"


async def test_hooks_are_told_what_the_machine_goes_down_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(tmp_path, "pre-shutdown", f'echo "$PVFRONT_EVENT $PVFRONT_KIND" > {tmp_path}/out; exit 2')
    systemd(monkeypatch, "stopping\n")
    assert await run_hooks("pre-shutdown", tmp_path) == ["hook: pre-shutdown: ended with status 2"]
    assert (tmp_path / "out").read_text() == "pre-shutdown reboot\n"


async def test_stopping_the_unit_alone_runs_no_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(tmp_path, "pre-shutdown", f"echo run > {tmp_path}/out")
    systemd(monkeypatch, "running\n")
    assert await run_hooks("pre-shutdown", tmp_path) == []
    assert not (tmp_path / "out").exists()


async def test_hooks_of_a_resume_are_run_while_the_machine_stays_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(tmp_path, "post-resume", f'echo "$PVFRONT_EVENT" > {tmp_path}/out')
    systemd(monkeypatch, "running\n")
    assert await run_hooks("post-resume", tmp_path) == []
    assert (tmp_path / "out").read_text() == "post-resume\n"


class Machine:
    """systemd and the kernel's handler, as far as a test lets them act."""

    def __init__(self, world: AgentWorld) -> None:
        self.world = world
        self.board = Board()
        self.commands: list[str] = []
        self.going_down = ""
        self.looks = 0
        self.told: asyncio.Queue[Event] = asyncio.Queue()
        self.control = Control(
            self.board, run=self.run, kind=self.kind, kernel=0.05, begun=0.2, look=0.01
        )

    async def run(self, *words: str) -> str:
        self.commands.append(" ".join(words))
        return ""

    async def kind(self) -> str:
        self.looks += 1
        return self.going_down

    def ask(self, value: str) -> None:
        self.world.set("control/shutdown", value)

    async def asked(self, kind: str) -> None:
        assert await asyncio.wait_for(self.told.get(), 60) == ShutdownAsked(kind)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with agent_world(tmp_path) as world:
        made = Machine(world)
        with world.context.events.subscription() as made.told:
            async with world.running(made.control):
                await eventually("the watch", lambda: any(c.watches for c in world.mem.clients))
                yield made


def node(machine: Machine) -> str | None:
    return machine.world.get("control/shutdown")


def kernel_is_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late this process runs: the agent does not look before the kernel has taken it."""
    take = control._take

    async def after(store: Xenstore, value: str) -> bool:
        await eventually("the kernel's taking", lambda: node(machine) == "")
        return await take(store, value)

    monkeypatch.setattr(control, "_take", after)


async def test_what_the_kernel_takes_and_begins_is_not_done_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_is_first(machine, monkeypatch)
    machine.ask("poweroff")
    await machine.asked("poweroff")
    machine.going_down = "poweroff"
    machine.ask("")
    await eventually("the end of the wait", lambda: not busy(machine))
    assert machine.commands == []


def busy(machine: Machine) -> bool:
    return any(not task.done() for task in machine.control._doing.values())


@pytest.mark.parametrize(
    ("request_", "verb"), [("poweroff", "poweroff"), ("halt", "poweroff"), ("reboot", "reboot")]
)
async def test_what_the_kernel_does_not_take_is_acknowledged_and_done_once(
    machine: Machine, request_: str, verb: str
) -> None:
    machine.ask(request_)
    machine.ask(request_)  # its event may come twice
    await eventually("the command", lambda: machine.commands)
    assert node(machine) == ""
    await eventually("the end", lambda: not busy(machine))
    assert machine.commands == [f"systemctl {verb}"]


async def test_what_the_kernel_took_and_did_not_begin_is_not_lost(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_is_first(machine, monkeypatch)
    machine.ask("reboot")
    await machine.asked("reboot")
    machine.ask("")
    await eventually("the command", lambda: machine.commands == ["systemctl reboot"])


async def test_a_shutdown_of_which_only_the_acknowledgement_is_seen_is_told_by_its_kind(
    machine: Machine,
) -> None:
    machine.going_down = "reboot"
    machine.ask("")
    await machine.asked("reboot")
    assert machine.commands == []


async def test_a_shutdown_that_begins_long_after_its_acknowledgement_is_told(
    machine: Machine,
) -> None:
    machine.ask("")
    await eventually("looks in vain", lambda: machine.looks >= 3)
    machine.going_down = "poweroff"
    await machine.asked("poweroff")


async def test_an_agent_that_the_shutdown_stops_at_once_still_tells_of_it(machine: Machine) -> None:
    machine.control._seconds = (60.0, 60.0, 60.0)
    machine.ask("")
    await eventually("the acknowledgement", lambda: busy(machine))
    machine.going_down = "reboot"
    await machine.control.stopping(machine.world.context)
    await machine.asked("reboot")


async def test_a_request_that_was_seen_is_not_told_once_more_when_the_agent_is_stopped(
    machine: Machine,
) -> None:
    machine.control._seconds = (60.0, 60.0, 60.0)
    machine.ask("")
    await eventually("the acknowledgement", lambda: busy(machine))
    machine.ask("poweroff")
    await machine.asked("poweroff")
    machine.going_down = "poweroff"
    await machine.control.stopping(machine.world.context)
    assert machine.told.empty()


async def test_an_agent_that_is_stopped_alone_tells_of_no_shutdown(machine: Machine) -> None:
    machine.ask("")
    await eventually("the end of the looks", lambda: machine.looks and not busy(machine))
    machine.going_down = "reboot"  # by somebody else than the toolstack
    await machine.control.stopping(machine.world.context)
    assert machine.told.empty()


async def test_a_suspend_is_the_kernels_alone(machine: Machine) -> None:
    machine.ask("suspend")
    await machine.asked("suspend")
    machine.ask("poweroff")
    await machine.asked("poweroff")
    assert not any("suspend" in text for text in machine.commands)


async def test_s3_is_done_where_the_kernel_can_and_refused_with_a_reason_where_not(
    machine: Machine,
) -> None:
    machine.ask("s4")
    await machine.asked("s4")
    await eventually("the reason", lambda: "cannot" in machine.board.wanted().get(REASON, ""))
    assert node(machine) == ""
    assert machine.commands == []
    machine.world.file("sys/power/state", "freeze mem\n")
    machine.ask("s3")
    await eventually("the command", lambda: machine.commands == ["systemctl suspend"])
    await eventually("no reason any more", lambda: machine.board.wanted()[REASON] == "")


async def test_a_crash_is_asked_of_systemd_outside_of_the_sandbox(machine: Machine) -> None:
    machine.ask("crash")
    await eventually("the command", lambda: machine.commands)
    assert machine.commands[0].startswith("systemd-run ")
    assert machine.commands[0].endswith("echo c >/proc/sysrq-trigger")
    assert node(machine) == ""


@pytest.mark.parametrize("value", ["\x1b[2Jpoweroff", "x" * 2000, "POWEROFF", "poweroff\n", "0"])
async def test_what_nobody_knows_is_left_alone_and_logged_once_and_printable(
    machine: Machine, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine.ask(value)
    machine.ask(value)
    await eventually("the line", lambda: "unknown" in caplog.text)
    machine.ask("suspend")
    await machine.asked("suspend")
    assert node(machine) == "suspend"
    lines = [record.message for record in caplog.records if "unknown" in record.message]
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert len(lines[0]) < 200
    assert machine.commands == []


async def test_a_program_that_fails_or_is_missing_says_so_in_a_line() -> None:
    assert await command("true") == ""
    assert await command("sh", "-c", "echo one >&2; echo two >&2; exit 3") == "sh: two"
    assert await command("sh", "-c", "exit 3") == "sh: status 3"
    assert await command("/no/such/program") == "/no/such/program: No such file or directory"
