# SPDX-License-Identifier: BSD-2-Clause
"""The owner of suspend, with a fake kernel, a fake store, fake devices and time of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from suspendworld import QUICK, SUSPENDED, VETOED, FakeDevice, World
from vclock import VirtualLoop
from waiting import PATIENCE, eventually

from pvfront.errors import PvfrontError
from pvfront.suspend_group import NotOwner
from pvfront.suspend_machine import Commanded, Event, Limits, Stage
from pvfront.suspend_mark import MARK
from pvfront.veto import CannotVeto, Line, LogEvent

LOOP_FACTORY = VirtualLoop


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
            "hold /dev/xvdb",
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


async def test_hooks_are_told_while_programs_run_and_before_they_go_on(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.story.clear()
        world.hooks.story = world.story
        world.toolstack_asks()
        await world.until_settled()
        await eventually("the last hook", lambda: "post-resume" in world.story)
        assert [what for what in world.story if what in ("freeze", "thaw") or "-" in what] == [
            "pre-suspend",
            "freeze",
            "freeze",
            "pre-resume",
            "thaw",
            "post-suspend resumed",
            "post-resume",
        ]


async def test_a_suspend_that_is_tried_again_and_refused_has_its_hooks_once(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path, replace(QUICK, retry_before=2.0))) as world:
        world.devices[0].failures = [PvfrontError("stuck")] * 1000
        world.devices[0].prepare_takes = 0.2
        world.hooks.takes = 1.0
        world.toolstack_asks()
        await world.until(lambda s: s.machine.counts.refused == 1)
        await eventually("the last hook", lambda: len(world.hooks.story) == 2)
        assert world.hooks.story[0] == "pre-suspend"
        assert world.hooks.story[1].startswith("post-suspend refused cannot be closed: xvdb: stuck")


async def test_the_kernels_freeze_timeout_is_short_only_during_our_suspend(tmp_path: Path) -> None:
    seen: list[float] = []
    async with running(World(tmp_path)) as world:
        obeys = world.store.on_write
        world.store.on_write = lambda path, value: (
            path == "control/shutdown" and seen.append(world.kernel.freeze_timeout),
            obeys(path, value),
        )[1]
        world.toolstack_asks()
        await world.until_settled()
        assert seen == [QUICK.kernel_freeze]
        assert world.kernel.freeze_timeout == 20.0


async def test_a_cancelled_suspend_tells_devices_so(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.new_domain = world.refires = False
        world.toolstack_asks()
        await world.until_settled()
        await eventually(
            "the last hook", lambda: world.hooks.story[-1:] == ["post-suspend cancelled"]
        )
        assert world.devices[0].cancelled == [True]
        assert world.suspend.status()["cancelled"] == 1
        assert MARK not in world.store.nodes


async def test_a_new_domain_is_known_by_its_store_however_late_its_watches_are(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path)) as world:
        world.refires = False
        world.toolstack_asks()
        await world.until_settled()
        await eventually("the last hook", lambda: world.hooks.story[-1:] == ["post-resume"])
        assert world.devices[0].cancelled == [False]
        assert world.suspend.status()["suspended"] == 1


async def test_a_new_domain_that_was_given_the_old_ones_keys_is_known_by_its_id(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path)) as world:
        world.new_domain = world.refires = False
        obeys = world.store.on_write

        def restored(path: str, value: str) -> None:
            obeys(path, value)
            if value == "suspend":
                world.store.nodes["domid"] = "8"

        world.store.on_write = restored
        world.toolstack_asks()
        await world.until_settled()
        assert world.devices[0].cancelled == [False]
        assert MARK not in world.store.nodes


async def test_where_the_store_takes_no_mark_the_watches_tell(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.store.refused = MARK
        world.toolstack_asks()
        await world.until_settled()
        assert world.devices[0].cancelled == [False]
        world.new_domain = world.refires = False
        world.toolstack_asks()
        await world.until_settled(requests=2)
        assert world.devices[0].cancelled == [False, True]


async def test_a_device_that_does_not_close_in_time_has_the_suspend_refused(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, limits=Limits(close=0.1, retry_before=-1, drain=0.1))
    async with running(world):
        world.devices.append(FakeDevice("xvdc", world.story))
        world.devices[1].prepare_takes = 60
        world.toolstack_asks()
        await world.until_settled()
        assert world.commands == []
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


async def test_file_systems_of_quick_disks_are_frozen_from_the_first(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as world:
        world.toolstack_asks()
        await world.until_settled()
        story = world.story
        assert story.index("hold /dev/xvdb") < story.index("suspend written") < story.index("thaw")


async def test_file_systems_of_slow_disks_are_frozen_once_threads_of_the_kernel_were_not(
    tmp_path: Path,
) -> None:
    gave_up = [
        LogEvent(Line.FREEZE_DONE),
        LogEvent(Line.FREEZE_GIVEN_UP, elapsed=5.0),
        LogEvent(Line.REFUSED, "xen:manage: do_suspend: freeze kernel threads failed -16"),
        LogEvent(Line.THAWED),
    ]
    async with running(World(tmp_path, limits=replace(QUICK, settle=3))) as world:
        world.kernel.sync_takes = 1.5
        world.answers = [gave_up]
        world.toolstack_asks()
        await world.until_settled()
        assert world.suspend.status()["suspended"] == 1
        held = [line for line in world.story if line.startswith(("hold", "suspend", "thaw"))]
        assert held == [
            "suspend written", "thaw", "hold /dev/xvdb", "suspend written", "thaw",
        ]  # fmt: skip
        world.toolstack_asks()
        await world.until_settled(2)
        assert world.story.count("hold /dev/xvdb") == 1, "another request begins without"


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
        assert world.commands == ["suspend", ""]
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
        assert world.commands == []
        assert world.suspend.armed


async def test_a_command_that_stands_in_the_node_is_not_overwritten(tmp_path: Path) -> None:
    world = World(tmp_path, limits=Limits(retry_before=-1))
    async with running(world):
        world.toolstack_asks()
        await world.until(lambda s: s.stage is Stage.CLOSING)
        world.store.nodes["control/shutdown"] = "reboot"  # its event is still on the way
        await world.until_settled()
        assert world.commands == []
        assert "'reboot'" in str(world.suspend.status()["last_refusal"])


async def test_a_suspend_that_slips_in_at_the_last_moment_is_not_followed_by_ours(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    async with running(world):
        world.kernel.on_disarm = lambda: world.kernel.print(SUSPENDED)
        world.toolstack_asks()
        await world.until_settled()
        assert world.commands == []
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
        with pytest.raises(NotOwner, match=f"process {os.getpid()} owns suspend already"):
            await second.suspend.run()
        assert second.kernel.closed


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
        assert world.commands == []
        assert "busy" in str(world.suspend.status()["last_refusal"])
