# SPDX-License-Identifier: BSD-2-Clause
"""The clock beside the RTC; the balloon beside memory/target; a dump on the toolstack's word."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentworld import AgentWorld, agent_world
from waiting import eventually

from pvfront.agent.clock import Clock, Reading, describe, is_late, measure
from pvfront.agent.context import Resumed
from pvfront.agent.debug import REQUEST, Debug, lines
from pvfront.agent.memory import Memory, Target
from pvfront.agent.settings import AgentSettings
from pvfront.sysfs import Roots


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path) as made:
        yield made


class Watch:
    """A system's clock, and an RTC that is so many seconds ahead of it."""

    def __init__(self, root: Path, ahead: float) -> None:
        self.roots = Roots(root)
        self.now = 1_700_000_000.37
        self.ahead = ahead
        self.rtc = root / "sys/class/rtc/rtc0"
        self.rtc.mkdir(parents=True)
        (self.rtc / "name").write_text("rtc_cmos 00:04\n")
        (root / "sys/hypervisor").mkdir()
        (root / "sys/hypervisor/type").write_text("xen\n")
        (root / "sys/hypervisor/guest_type").write_text("HVM\n")
        self.show()

    def show(self) -> None:
        (self.rtc / "since_epoch").write_text(f"{int(self.now + self.ahead)}\n")

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.show()

    def measure(self) -> Reading:
        return measure(self.roots, now=lambda: self.now, sleep=self.sleep)


@pytest.mark.parametrize("ahead", [0.0, 0.25, -0.4, 3.7, -3600.5])
def test_a_difference_is_measured_to_a_fraction_of_the_rtcs_second(
    tmp_path: Path, ahead: float
) -> None:
    found = Watch(tmp_path, ahead).measure()
    assert found.source == "rtc_cmos"
    assert found.difference is not None
    assert abs(found.difference - ahead) <= found.uncertainty + 1e-6
    assert found.uncertainty < 0.05
    assert is_late(found) is (abs(ahead) > 0.6)


def test_an_rtc_of_local_time_is_read_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path, 3600.0)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "adjtime").write_text("0.0 0 0.0\n0\nLOCAL\n")
    monkeypatch.setattr(
        "pvfront.agent.clock.time.localtime", lambda at: type("T", (), {"tm_gmtoff": 3600})()
    )
    found = watch.measure()
    assert found.difference is not None
    assert abs(found.difference) < 0.05


@pytest.mark.parametrize(
    ("change", "source", "why"),
    [
        ("guest_type", "unknown", "a PV guest sees no clock of the host's"),
        ("name", "unknown", "there is no RTC"),
        ("since_epoch", "unknown", "there is no RTC"),
        ("still", "rtc_cmos", "the RTC stands still"),
    ],
)
def test_where_there_is_no_source_it_is_unknown_and_never_guessed(
    tmp_path: Path, change: str, source: str, why: str
) -> None:
    watch = Watch(tmp_path, 0.0)
    if change == "guest_type":
        (tmp_path / "sys/hypervisor/guest_type").write_text("PV\n")
    elif change == "still":
        watch.show = lambda: None  # type: ignore[method-assign]
    else:
        (watch.rtc / change).unlink()
        watch.show = lambda: None  # type: ignore[method-assign]
    found = watch.measure()
    assert (found.source, found.difference, found.why) == (source, None, why)
    assert not is_late(found)
    assert describe(found, watch.roots)["difference"] is None


def test_the_last_correction_is_shown_and_a_broken_note_is_none(tmp_path: Path) -> None:
    roots = Roots(tmp_path)
    roots.run.mkdir(parents=True)
    note = roots.run / "time.json"
    note.write_text(json.dumps({"at": 1.0, "by": 2.5, "source": "rtc_cmos"}))
    shown = describe(Reading("unknown"), roots)
    assert shown["last_correction"] == {"at": 1.0, "by": 2.5, "source": "rtc_cmos"}
    note.write_text("[]")
    assert describe(Reading("unknown"), roots)["last_correction"] is None


@pytest.mark.parametrize(
    ("difference", "settings", "commands"),
    [
        (2.5, AgentSettings(), 1),
        (-0.3, AgentSettings(), 0),
        (None, AgentSettings(), 0),
        (2.5, AgentSettings(set_time=False), 0),
    ],
)
async def test_after_a_resume_a_wrong_clock_is_set_and_the_difference_logged(
    world: AgentWorld,
    difference: float | None,
    settings: AgentSettings,
    commands: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    ran: list[tuple[str, ...]] = []

    async def run(*words: str) -> str:
        ran.append(words)
        return ""

    world.context.settings = settings
    clock = Clock(run=run, measure=lambda _: Reading("rtc_cmos", difference, 0.01, "why"))
    async with world.running(clock):
        await eventually("a subscriber", lambda: world.context.events._queues)
        world.context.events.publish(Resumed(1))
        await eventually("the line", lambda: "time: " in caplog.text)
        await eventually("the command", lambda: len(ran) == commands)
    assert clock.status()["corrections"] == commands
    assert all(words[-2:] == ("time", "--set") for words in ran)


def test_a_target_that_the_kernel_follows_needs_nothing() -> None:
    target = Target(floor=65536)
    target.learn(524288, 522240)  # 2 MiB of video memory
    assert target.to_write(393216, 522240, 391168) is None


def test_a_target_that_the_kernel_does_not_follow_is_written_less_the_difference() -> None:
    target = Target(floor=65536)
    target.learn(524288, 522240)
    assert target.to_write(393216, 522240, 522240) == 391168


def test_a_kernel_that_counts_otherwise_is_believed() -> None:
    target = Target(floor=65536)
    target.learn(524288, 522240)
    assert target.to_write(393216, 522240, 380000) is None
    assert target.difference == 13216


def test_below_the_floor_the_balloon_is_told_the_floor_once() -> None:
    target = Target(floor=65536)
    target.learn(524288, 524288)
    assert target.to_write(1024, 524288, 1024) == 65536
    assert target.to_write(1024, 65536, 65536) is None


@pytest.mark.parametrize("value", ["", "much", "-5", "9" * 40, "0", "1e6", "\x1b[2J"])
async def test_a_target_that_is_none_is_said_and_not_acted_upon(
    world: AgentWorld, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.file("sys/devices/system/xen_memory/xen_memory0/target_kb", "524288\n")
    world.set("memory/target", "524288", perms="n0,r5")
    ran: list[tuple[str, ...]] = []

    async def run(*words: str) -> str:
        ran.append(words)
        return ""

    memory = Memory(run=run, kernel=0.01)
    async with world.running(memory):
        await eventually("the target", lambda: memory.status().get("target_kib") == 524288)
        world.set("memory/target", value, perms="n0,r5")
        world.set("memory/target", "262144", perms="n0,r5")
        await eventually("the next target", lambda: memory.status().get("target_kib") == 262144)
        await eventually("the command", lambda: ran)
    assert [words[-1] for words in ran] == [
        f"echo 262144 >{world.root}/sys/devices/system/xen_memory/xen_memory0/target_kb"
    ]
    assert all(record.message.isprintable() for record in caplog.records)


async def test_a_kernel_without_a_balloon_is_left_in_peace(world: AgentWorld) -> None:
    memory = Memory()
    async with world.running(memory):
        assert memory.status() == {"balloon": "none"}


async def test_a_dump_goes_to_the_log_and_the_console_and_empties_its_node(
    world: AgentWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    console = world.file("dev/hvc0", "")
    world.file("run/pvfront/vbd-51728.json", '{"phase": "connected", "name": "\\u001b[2J"}')
    world.file("run/pvfront/broken.json", "{")
    async with world.running(Debug(apart=0.01)):
        world.set(REQUEST, "1")
        await eventually("the end of the dump", lambda: world.get(REQUEST) == "")
    text = console.read_text()
    assert "vbd-51728: phase connected" in text
    assert "vbd-51728: phase connected" in caplog.text
    assert "broken: cannot be read" in text
    assert "agent: debug dumps" in text
    assert "\x1b" not in text


def test_a_dump_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({str(n): "y" * 10000 for n in range(5)}))
    (tmp_path / "y.json").write_text(json.dumps({str(n): "z" for n in range(5000)}))
    found = lines({"a": 1}, tmp_path)
    assert len(found) == 401
    assert found[-1].endswith(" lines more")
    assert max(map(len, found)) <= 400


async def test_a_console_that_nobody_reads_holds_nothing_up(world: AgentWorld) -> None:
    world.file("dev/x", "")
    os.mkfifo(world.root / "dev" / "hvc0")
    reader = os.open(world.root / "dev" / "hvc0", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for number in range(60):
            world.file(f"run/pvfront/x{number}.json", json.dumps({"k": "v" * 3000}))
        async with world.running(Debug(apart=0.01)):
            for _ in range(4):
                world.set(REQUEST, "1")
                await eventually("the end of the dump", lambda: world.get(REQUEST) == "")
    finally:
        os.close(reader)
