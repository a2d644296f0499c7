# SPDX-License-Identifier: BSD-2-Clause
"""The owner of suspend, with a fake kernel, a fake store, fake devices and time of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import pytest
from vclock import VirtualLoop
from waiting import PATIENCE

from pvfront.cgroup import FreezeFailed
from pvfront.suspend import Suspend, SuspendError
from pvfront.suspend_machine import Commanded, Event, Limits, Stage
from pvfront.veto import CannotVeto, Line, LogEvent

LOOP_FACTORY = VirtualLoop
QUICK = Limits(freeze=1, settle=1, drain=0.2, close=0.3, taken=0.3, end=0.3, rearm=0.2, reopen=0.3)
VETOED = [
    LogEvent(Line.FREEZE_GIVEN_UP, elapsed=0.001),
    LogEvent(Line.THAWED),
    LogEvent(Line.REFUSED, "xen:manage: do_suspend: freeze processes failed -16"),
]
SUSPENDED = [LogEvent(Line.FREEZE_DONE), LogEvent(Line.XEN_SUSPENDING), LogEvent(Line.THAWED)]


class FakeStore:
    """Nodes, and watches that fire on every write."""

    def __init__(self) -> None:
        self.nodes: dict[str, str] = {"domid": "7", "control/shutdown": ""}
        self.writes: list[tuple[str, str]] = []
        self.on_write: Callable[[str, str], None] = lambda path, value: None
        self._watches: dict[str, list[asyncio.Queue[str]]] = {}

    async def read_opt(self, path: str) -> str | None:
        await asyncio.sleep(0)
        return self.nodes.get(path)

    async def write(self, path: str, value: str) -> None:
        await asyncio.sleep(0)
        self.writes.append((path, value))
        self.put(path, value)
        self.on_write(path, value)

    def put(self, path: str, value: str) -> None:
        self.nodes[path] = value
        self.fire(path)

    def fire(self, path: str) -> None:
        for queue in self._watches.get(path, []):
            queue.put_nowait(path)

    @contextlib.asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[AsyncIterator[str]]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        queue.put_nowait(path)
        self._watches.setdefault(path, []).append(queue)

        async def events() -> AsyncIterator[str]:
            while True:
                yield await queue.get()

        try:
            yield events()
        finally:
            self._watches[path].remove(queue)


class FakeKernel:
    """The veto, the freezer and the log; does what a kernel does when ``suspend`` is written."""

    def __init__(self, story: list[str]) -> None:
        self.story = story
        self._log: list[LogEvent] = []
        self._read, self._write = os.pipe2(os.O_NONBLOCK)
        self.arm_blocks = asyncio.Event()
        self.arm_blocks.set()
        self.freeze_failures: list[str] = []
        self.sync_takes = 0.0
        self.freeze_timeout = 20.0
        self.armed = False
        self.frozen = False
        self.closed = False
        self.on_disarm: Callable[[], None] = lambda: None

    def print(self, events: list[LogEvent]) -> None:
        self._log += events
        os.write(self._write, b"x")

    def fileno(self) -> int:
        return self._read

    def read_log(self) -> list[LogEvent]:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 100)
        events, self._log = self._log, []
        return events

    def start(self) -> None:
        self.story.append("start")

    async def arm(self) -> None:
        await self.arm_blocks.wait()
        self.armed = True
        self.story.append("arm")

    def disarm(self) -> None:
        self.armed = False
        self.story.append("disarm")
        self.on_disarm()

    async def freeze(self, timeout: float) -> int:
        if self.freeze_failures:
            raise FreezeFailed(self.freeze_failures.pop(0))
        self.frozen = True
        self.story.append("freeze")
        return 1

    def thaw(self) -> None:
        self.frozen = False
        self.story.append("thaw")

    async def sync(self, devices: Collection[str], timeout: float) -> list[str]:
        self.story.append(f"sync {','.join(devices)}")
        async with asyncio.timeout(timeout):
            await asyncio.sleep(self.sync_takes)
        return list(devices)

    def set_freeze_timeout(self, seconds: float) -> None:
        self.freeze_timeout = seconds

    def restore_freeze_timeout(self) -> None:
        self.freeze_timeout = 20.0

    def close(self) -> None:
        if self.frozen:
            self.thaw()
        self.closed = True
        os.close(self._read)
        os.close(self._write)


class FakeDevice:
    def __init__(self, name: str, story: list[str]) -> None:
        self.name = name
        self.story = story
        self.failures: list[Exception] = []
        self.prepare_takes = 0.0
        self.resume_takes = 0.0
        self.busy = 0
        self.cancelled: list[bool | None] = []
        self.poisons = 0

    async def prepare(self) -> None:
        await asyncio.sleep(self.prepare_takes)
        if self.failures:
            raise self.failures.pop(0)
        self.story.append(f"{self.name} closed")

    async def resumed(self, cancelled: bool | None) -> None:
        await asyncio.sleep(self.resume_takes)
        self.cancelled.append(cancelled)
        self.story.append(f"{self.name} open")

    def poisoned(self) -> None:
        self.poisons += 1

    def filesystems(self) -> Collection[str]:
        return [f"/dev/{self.name}"]

    def in_flight(self) -> int:
        return self.busy


class World:
    """One domain: kernel, store, devices and the owner of suspend."""

    def __init__(self, run_dir: Path, limits: Limits = QUICK) -> None:
        self.story: list[str] = []
        self.store = FakeStore()
        self.kernel = FakeKernel(self.story)
        self.devices = [FakeDevice("xvdb", self.story)]
        self.store.on_write = self.kernel_takes
        self.suspend = Suspend(
            self.store,
            lambda: self.devices,
            effects=self.kernel,
            limits=limits,
            run_dir=run_dir,
            clock=asyncio.get_running_loop().time,
        )
        self.kernel_obeys = True
        self.new_domain = True
        self.answers: list[list[LogEvent]] = []

    def kernel_takes(self, path: str, value: str) -> None:
        if (path, value) != ("control/shutdown", "suspend") or not self.kernel_obeys:
            return
        self.story.append("suspend written")
        self.store.put(path, "")
        answer = self.answers.pop(0) if self.answers else SUSPENDED
        self.kernel.print(answer)
        if answer is SUSPENDED and self.new_domain:
            self.store.fire("domid")

    def toolstack_asks(self) -> None:
        """``xl save``: the armed kernel acknowledges and gives up."""
        self.kernel.armed = False
        self.store.put("control/shutdown", "suspend")
        self.store.put("control/shutdown", "")
        self.kernel.print(VETOED)

    async def until(self, condition: Callable[[Suspend], bool]) -> None:
        await self.suspend.until(condition, PATIENCE)

    async def until_armed(self) -> None:
        await self.until(lambda s: s.armed and s.stage is Stage.WATCHING)

    async def until_settled(self, requests: int = 1) -> None:
        await self.until(
            lambda s: s.machine.counts.requests == requests and s.stage is Stage.WATCHING
        )


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    task = asyncio.create_task(world.suspend.run())
    try:
        await world.until_armed()
        yield world
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_suspend_goes_in_order_and_comes_back_in_reverse(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.story.clear()
        world.toolstack_asks()
        await world.until_settled()
        arms = [index for index, what in enumerate(world.story) if what == "arm"]
        assert [what for what in world.story if what != "arm"] == [
            "freeze",
            "sync /dev/xvdb",
            "freeze",
            "xvdb closed",
            "disarm",
            "suspend written",
            "xvdb open",
            "thaw",
        ]
        assert arms[0] < world.story.index("xvdb closed")  # on again while putting away
        written, opened = world.story.index("suspend written"), world.story.index("xvdb open")
        assert written < arms[-1] < opened
        assert world.devices[0].cancelled == [False]
        assert world.suspend.status()["suspended"] == 1
        assert world.suspend.armed


async def test_the_kernels_freeze_timeout_is_short_only_during_our_suspend(tmp_path: Path) -> None:
    seen: list[float] = []
    async with running(World(tmp_path)) as world:
        obeys = world.store.on_write
        world.store.on_write = lambda path, value: (
            seen.append(world.kernel.freeze_timeout),
            obeys(path, value),
        )[1]
        world.toolstack_asks()
        await world.until_settled()
        assert seen == [QUICK.kernel_freeze]
        assert world.kernel.freeze_timeout == 20.0


async def test_a_cancelled_suspend_tells_devices_so(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.new_domain = False
        world.toolstack_asks()
        await world.until_settled()
        assert world.devices[0].cancelled == [True]
        assert world.suspend.status()["cancelled"] == 1


async def test_a_device_that_does_not_close_in_time_has_the_suspend_refused(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, limits=Limits(close=0.1, retry_before=-1, drain=0.1))
    async with running(world):
        world.devices.append(FakeDevice("xvdc", world.story))
        world.devices[1].prepare_takes = 60
        world.toolstack_asks()
        await world.until_settled()
        assert world.store.writes == []
        assert world.suspend.status()["refused"] == 1
        assert world.suspend.status()["last_refusal"] == (
            "cannot be closed: xvdc: not within 0.1 s"
        )
        assert [device.cancelled for device in world.devices] == [[True], [True]]
        assert not world.kernel.frozen
        assert world.suspend.armed


async def test_a_device_that_fails_once_is_asked_again(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.devices[0].failures = [OSError("backend stuck in state 5")]
        world.toolstack_asks()
        await world.until_settled()
        assert world.story.count("thaw") == 2
        assert world.suspend.status()["suspended"] == 1
        assert world.suspend.status()["last_refusal"] == ""


async def test_programs_that_do_not_freeze_are_thawed_and_frozen_again(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.kernel.freeze_failures = ["not frozen after 1 s: user.slice (fio[7] D io_schedule)"]
        world.toolstack_asks()
        await world.until_settled()
        assert world.suspend.status()["suspended"] == 1


async def test_file_systems_that_take_too_long_have_the_suspend_refused(tmp_path: Path) -> None:
    world = World(tmp_path, limits=Limits(settle=0.2, drain=0.1, retry_before=-1))
    async with running(world):
        world.kernel.sync_takes = 60
        world.toolstack_asks()
        await world.until_settled()
        assert world.suspend.status()["refused"] == 1
        assert "xvdb closed" not in world.story
        assert not world.kernel.frozen


async def test_requests_still_in_flight_are_left_to_the_devices_own_closing(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path)) as world:
        world.devices[0].busy = 3
        world.toolstack_asks()
        await world.until_settled()
        assert world.suspend.status()["suspended"] == 1


async def test_the_kernels_failure_to_freeze_is_tried_again(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.answers = [VETOED, SUSPENDED]
        world.toolstack_asks()
        await world.until_settled()
        assert world.story.count("suspend written") == 2
        assert world.suspend.status()["suspended"] == 1
        assert world.suspend.status()["requests"] == 1


async def test_what_the_kernel_does_not_take_is_taken_back(tmp_path: Path) -> None:
    world = World(tmp_path, limits=Limits(taken=0.1, retry_before=-1))
    async with running(world):
        world.kernel_obeys = False
        world.toolstack_asks()
        await world.until_settled()
        assert world.store.writes == [("control/shutdown", "suspend"), ("control/shutdown", "")]
        assert world.suspend.status()["refused"] == 1
        assert world.devices[0].cancelled == [True]


async def test_a_silent_log_does_not_hang_the_devices(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.answers = [[LogEvent(Line.LOST)]]
        world.toolstack_asks()
        await world.until_settled()
        assert world.devices[0].cancelled == [None]


async def test_a_poweroff_is_left_alone(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        seen: list[Event] = []
        step = world.suspend.machine.step
        world.suspend.machine.step = (  # type: ignore[method-assign]
            lambda event, now: (seen.append(event), step(event, now))[1]
        )
        world.store.put("control/shutdown", "poweroff")
        world.store.put("control/shutdown", "")
        await world.until(lambda s: seen.count(Commanded("")) == 2)
        assert world.suspend.stage is Stage.WATCHING
        assert world.store.writes == []
        assert world.suspend.armed


async def test_a_command_that_stands_in_the_node_is_not_overwritten(tmp_path: Path) -> None:
    world = World(tmp_path, limits=Limits(retry_before=-1))
    async with running(world):
        world.toolstack_asks()
        await world.until(lambda s: s.stage is Stage.CLOSING)
        world.store.nodes["control/shutdown"] = "reboot"  # its event is still on the way
        await world.until_settled()
        assert world.store.writes == []
        assert "'reboot'" in str(world.suspend.status()["last_refusal"])


async def test_a_suspend_that_slips_in_at_the_last_moment_is_not_followed_by_ours(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    async with running(world):
        world.kernel.on_disarm = lambda: world.kernel.print(SUSPENDED)
        world.toolstack_asks()
        await world.until_settled()
        assert world.store.writes == []
        assert world.devices[0].poisons == 0  # its port was unbound
        assert world.story[-1] == "thaw"


async def test_an_unprepared_suspend_poisons_every_device(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.kernel.print(SUSPENDED)
        await world.until(lambda s: s.machine.counts.unprepared == 1)
        await world.until_armed()
        assert world.devices[0].poisons == 1
        assert world.devices[0].cancelled == []


async def test_devices_come_back_although_the_veto_cannot_be_put_back(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.answers = [SUSPENDED]
        world.toolstack_asks()
        await world.until(lambda s: s.stage is Stage.SUSPENDING)
        world.kernel.arm_blocks.clear()
        await world.until_settled()
        assert world.devices[0].cancelled == [False]
        assert not world.suspend.armed
        assert world.suspend.status()["why_unarmed"] == "another wakeup source is active"
        world.kernel.arm_blocks.set()
        await world.until_armed()


async def test_a_device_that_takes_long_to_come_back_does_not_keep_programs_frozen(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path)) as world:
        world.devices[0].resume_takes = 60
        world.toolstack_asks()
        await world.until_settled()
        assert not world.kernel.frozen


async def test_no_port_may_be_bound_from_closing_until_the_suspend_is_over(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path)) as world:
        await world.suspend.may_bind()
        world.devices[0].prepare_takes = 0.1
        world.toolstack_asks()
        await world.until(lambda s: s.stage is Stage.CLOSING)
        gate = asyncio.create_task(world.suspend.may_bind())
        await world.until(lambda s: s.stage is Stage.SUSPENDING)
        assert not gate.done()
        await world.until(lambda s: s.stage is Stage.REOPENING)
        async with asyncio.timeout(PATIENCE):
            await gate
        await world.until_settled()


async def test_three_suspends_in_a_row(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        for count in (1, 2, 3):
            world.toolstack_asks()
            await world.until_settled(count)
            await world.until_armed()
        assert world.suspend.status()["suspended"] == 3


async def test_the_end_of_the_owner_thaws_everything_and_leaves_the_veto(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with running(world):
        world.devices[0].prepare_takes = 60
        world.toolstack_asks()
        await world.until(lambda s: s.stage is Stage.CLOSING)
        assert world.kernel.frozen
    assert world.kernel.closed
    assert not world.kernel.frozen
    assert "disarm" not in world.story
    world.suspend.disarm()
    assert "disarm" in world.story


async def test_a_second_owner_is_refused_and_names_the_first(tmp_path: Path) -> None:
    async with running(World(tmp_path)):
        second = World(tmp_path)
        with pytest.raises(SuspendError, match=f"process {os.getpid()} owns suspend already"):
            await second.suspend.run()
        second.kernel.close()


async def test_the_next_owner_can_begin_when_the_first_has_ended(tmp_path: Path) -> None:
    async with running(World(tmp_path)):
        pass
    async with running(World(tmp_path)) as world:
        assert world.suspend.armed


async def test_a_veto_that_cannot_be_dropped_refuses_the_suspend(tmp_path: Path) -> None:
    def stuck() -> None:
        raise CannotVeto("/sys/power/wakeup_count: Device or resource busy")

    world = World(tmp_path, limits=Limits(retry_before=-1))
    async with running(world):
        world.kernel.on_disarm = stuck
        world.toolstack_asks()
        await world.until_settled()
        assert world.store.writes == []
        assert "busy" in str(world.suspend.status()["last_refusal"])
