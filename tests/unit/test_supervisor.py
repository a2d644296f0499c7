# SPDX-License-Identifier: BSD-2-Clause
"""A supervisor with several devices on a store in memory: who is served, and how it ends.

Around it tests/support/supervisorworld.py. Time is the loop's own (vclock.py).
"""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

import pytest
from supervisorworld import B, C, D, Notified, World, back, front, notified, world
from vclock import VirtualLoop
from waiting import PATIENCE

from pvfront import supervisor as module
from pvfront.claim import CannotTake
from pvfront.device import Phase
from pvfront.errors import PvfrontError
from pvfront.supervisor import Supervisor

LOOP_FACTORY = VirtualLoop


# -- suspend ---------------------------------------------------------------------------------------


async def test_a_device_with_requests_left_behind_is_not_ready_for_a_suspend_until_it_reconnects(
    world: World,
) -> None:
    """Another backend would not wait for them, and they could land after what is newer."""
    world.plug(B)
    world.serve()
    await world.connected(B)
    disk = world.klass.disks[f"vbd-{B}"]
    disk.left_behind = "xvdb: its backend has not answered"
    (device,) = world.supervisor._participants()
    with pytest.raises(PvfrontError, match="its backend has not answered"):
        await device.prepare()
    disk.left_behind = None
    await device.resumed(None)
    await device.prepare()
    assert world.supervisor.served[B].loop.phase is Phase.PARKED


# -- who is served ---------------------------------------------------------------------------------


async def test_a_named_device_that_is_not_there_is_an_error(world: World) -> None:
    world.plug(B)
    world.serve([C])
    with pytest.raises(PvfrontError, match=f"device/vbd/{C}"):
        await world.run


async def test_a_named_device_that_is_refused_is_an_error_and_the_others_are_given_back(
    world: World,
) -> None:
    world.plug(B, C)
    world.klass.refuses[f"vbd-{C}"] = PvfrontError("xvdc: in use: mounted at /")
    world.serve([B, C])
    with pytest.raises(PvfrontError, match="mounted at /"):
        await asyncio.wait_for(world.run, PATIENCE)
    assert world.klass.count("give back", B) == 1
    assert world.supervisor.served[B].loop.phase is Phase.CLOSED
    assert [path.name for path in world.run_dir.iterdir()] == ["trace"]


async def test_named_devices_are_served_and_others_left_alone(world: World) -> None:
    world.plug(B, C)
    world.serve([B], force=True)
    await world.connected(B)
    world.plug(D)
    await world.unplug(C)
    assert world.mem.value(f"{front(B)}/state") == b"4"
    assert world.klass.calls == [("repair", ""), ("force", f"vbd-{B}")]


async def test_a_refused_device_is_reported_and_the_others_are_served(world: World) -> None:
    world.plug(B, C, D)
    world.klass.refuses[f"vbd-{C}"] = PvfrontError("xvdc: in use: mounted at /srv")
    world.serve()
    await world.connected(B, D)
    answer = await world.ask({"verb": "list"})
    assert [device["id"] for device in answer["devices"]] == [B, D]
    assert answer["refused"] == {str(C): "xvdc: in use: mounted at /srv"}


async def test_a_refused_device_is_left_to_the_kernel_which_does_not_probe_by_itself(
    world: World,
) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    world.klass.refuses[f"vbd-{C}"] = PvfrontError("it is a cdrom, not a disk")
    world.plug(C, D)
    await world.connected(D)
    await world.eventually("the pass on", lambda: world.klass.count("pass on", C))


async def test_a_device_plugged_later_is_served_and_one_not_wanted_passed_on(
    world: World,
) -> None:
    world.plug(B)
    world.serve(wanted=lambda devid: devid != C)
    await world.connected(B)
    world.plug(C, D)
    await world.connected(D)
    await world.eventually("the pass on", lambda: world.klass.count("pass on", C) == 1)
    assert world.klass.count("take", C) == 0
    assert world.klass.calls[0] == ("hold", "")


async def test_a_device_of_another_class_plugged_later_goes_to_the_kernel(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    world.mem.set("/local/domain/5/device/vif/1/state", b"1", "n5,r0")
    await world.eventually(
        "the interface passed on", lambda: ("pass on others", "") in world.klass.calls
    )


async def test_a_device_that_the_kernel_makes_a_little_later_is_taken_then(world: World) -> None:
    world.klass.refuses[f"vbd-{B}"] = CannotTake("the kernel knows no such device")
    world.plug(B)
    world.serve()
    await world.eventually("a first try", lambda: world.klass.count("take", B) >= 1)
    world.klass.refuses.clear()
    await world.connected(B)
    assert B not in world.supervisor.refused


async def test_a_driver_that_does_not_let_go_of_one_device_holds_up_no_other(
    world: World, notified: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READY_DEADLINE", 0.2)
    world.klass.stuck.add(f"vbd-{B}")
    world.plug(B, C)
    world.serve()
    await world.connected(C)
    world.plug(D)
    await world.connected(D)
    await world.eventually("READY", lambda: "READY=1" in notified.lines())
    assert B not in world.supervisor.served
    assert await world.stopped() == 0, "nor the end"
    assert world.klass.count("take", B) == 1


async def test_an_error_that_nobody_expected_of_one_device_is_logged_and_holds_up_no_other(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.klass.refuses[f"vbd-{B}"] = ZeroDivisionError("a bug")
    world.plug(B, C)
    world.serve()
    await world.connected(C)
    assert f"begin {B} failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_device_that_vanishes_while_it_is_passed_on_is_no_reason_to_end(
    world: World,
) -> None:
    world.klass.refuses[f"vbd-{C}"] = PvfrontError("no such device")
    world.plug(C)
    world.serve(wanted=lambda devid: devid != C)
    await world.eventually("the pass on", lambda: world.klass.count("pass on", C))
    world.plug(B)
    await world.connected(B)


async def test_a_vanished_device_is_forgotten_and_its_id_served_again(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    first = world.supervisor.served[B].loop
    await world.unplug(B)
    await world.eventually("the end of the first", lambda: first.phase is Phase.CLOSED)
    await world.eventually("the claim forgotten", lambda: world.klass.count("forget", B))
    world.plug(D)
    await world.connected(D)  # the list was read without B
    world.plug(B)
    await world.eventually("a second loop", lambda: world.supervisor.served[B].loop is not first)
    await world.connected(B)
    assert world.klass.count("take", B) == 2


async def test_an_id_that_is_back_before_its_end_was_noticed_has_one_loop(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    await world.unplug(B)
    world.plug(B)
    await world.eventually(
        "a second generation",
        lambda: (
            world.klass.disks[f"vbd-{B}"].calls.count("attach") == 2
            or world.klass.count("take", B) == 2
        ),
    )
    await world.connected(B)
    assert world.mem.value(f"{front(B)}/state") == b"4"
    loops = [t for t in asyncio.all_tasks() if t.get_name() == "serve xvdb"]
    assert len(loops) == 1


async def test_an_orderly_detach_ends_the_loop_and_the_id_is_served_again(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    first = await world.detached(B)
    assert world.klass.disks[f"vbd-{B}"].calls[-1] == "end"
    await world.unplug(B)
    world.plug(D)
    await world.connected(D)
    world.plug(B)
    await world.eventually("a second loop", lambda: world.supervisor.served[B] is not first)
    await world.connected(B)


async def test_an_id_that_is_back_before_the_list_was_read_again_is_served_again(
    world: World,
) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    first = await world.detached(B)
    await world.eventually(
        "the look at what became of it",
        lambda: not [t for t in asyncio.all_tasks() if t.get_name().startswith("again ")],
    )
    await world.replace(B)
    await world.eventually("a second loop", lambda: world.supervisor.served[B] is not first)
    await world.connected(B)


async def test_one_device_is_begun_once_however_often_it_is_seen(world: World) -> None:
    world.klass.taking = asyncio.Event()
    world.plug(B)
    world.serve()
    await world.eventually("the take", lambda: world.klass.count("take", B))
    again = asyncio.create_task(world.supervisor._again(B))
    await asyncio.sleep(0.05)
    world.klass.taking.set()
    await again
    await world.connected(B)
    assert world.klass.count("take", B) == 1


# -- the end ---------------------------------------------------------------------------------------


async def test_a_stop_drains_closes_and_gives_back(world: World) -> None:
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    assert await world.stopped() == 0
    for devid in (B, C):
        calls = world.klass.disks[f"vbd-{devid}"].steps
        assert calls == ["attach", "start", "close", "quiesce", "detach keep", "end"]
        assert world.mem.value(f"{front(devid)}/state") == b"6"
        assert world.klass.count("give back", devid) == 1
    assert world.klass.calls[-1] == ("release", "")
    assert [path.name for path in world.run_dir.iterdir()] == ["trace"]


async def test_a_stop_says_nothing_of_what_was_detached_before(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    first = world.supervisor.served[B]
    await world.unplug(B)
    await world.eventually("the end of the first", first.task.done)
    caplog.clear()
    caplog.set_level("INFO")
    assert await world.stopped() == 0
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "xvdb" in text or f"vbd-{B}" in text] == []
    assert any(f"vbd-{C}: given back" in text for text in told)


async def test_sigterm_is_a_stop(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    os.kill(os.getpid(), 15)
    assert await asyncio.wait_for(asyncio.shield(world.run), PATIENCE) == 0
    assert world.klass.count("give back", B) == 1


async def test_a_device_in_use_is_left_to_its_worker(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    world.klass.disks[f"vbd-{B}"].in_use = "mounted at /srv"
    assert await world.stopped() == 0
    assert world.klass.disks[f"vbd-{B}"].steps == ["attach", "start"]
    assert world.mem.value(f"{front(B)}/state") == b"4"
    assert world.klass.count("give back", B) == 0
    assert world.klass.count("give back", C) == 1
    assert "xvdb: still in use (mounted at /srv): its worker goes on" in caplog.text
    state = json.loads((world.run_dir / f"vbd-{B}.json").read_text())
    assert state["phase"] == "connected", "what it left is what list and status show"


async def test_a_device_in_use_at_power_off_fails_in_time_once_its_worker_is_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def stopping() -> bool:
        return True

    monkeypatch.setattr(module, "system_is_stopping", stopping)
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    world.klass.disks[f"vbd-{B}"].in_use = "a member of dm-0"
    assert await world.stopped() == 0
    assert world.klass.disks[f"vbd-{B}"].steps == ["attach", "start", "fail after 10"]
    assert "fail after 10" not in world.klass.disks[f"vbd-{C}"].calls
    assert "requests fail 10 s later" in caplog.text


async def test_what_an_earlier_supervisor_left_is_adopted(world: World) -> None:
    world.klass.prepare = lambda disk: setattr(disk, "adopts", True)
    world.plug(B, state="4")
    world.mem.set(f"{back(B)}/state", b"4", "n0,r5")
    world.serve()
    await world.connected(B)
    assert not {"attach", "start"} & set(world.klass.disks[f"vbd-{B}"].calls)
    assert world.supervisor.served[B].loop.reason == "adopted"


async def test_a_device_that_does_not_close_in_time_is_named_and_the_status_is_1(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STOP_DEADLINE", 3.0)
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    world.klass.disks[f"vbd-{B}"].hangs = True
    assert await world.stopped() == 1
    assert "xvdb: not closed within" in caplog.text
    assert world.klass.count("give back", C) == 1


async def test_a_second_supervisor_is_refused_and_changes_nothing(world: World) -> None:
    world.plug(B)
    first = world.serve()
    await world.connected(B)
    before = list(world.klass.calls)
    second = Supervisor(
        world.guest, world.klass, lambda devid: True, named=[B], run_dir=world.run_dir
    )
    with pytest.raises(PvfrontError, match="another supervisor already serves vbd") as refused:
        await second.run()
    assert "pvfront list" in str(refused.value.hint)
    third = Supervisor(
        world.guest, world.klass, lambda devid: True, hot_plug=True, run_dir=world.run_dir
    )
    with pytest.raises(PvfrontError, match="another supervisor"):
        await third.run()
    assert world.klass.calls == before
    assert (await world.ask({"verb": "list"}))["devices"][0]["id"] == B
    assert first.served[B].loop.phase is Phase.CONNECTED


async def test_the_socket_of_a_dead_supervisor_is_no_hindrance(world: World) -> None:
    world.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(world.run_dir / "supervisor-vbd.sock"))
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert (world.run_dir / "supervisor-vbd.sock").stat().st_mode & 0o777 == 0o600
    assert (await world.ask({"verb": "list"}))["ok"] is True


async def test_a_restart_leaves_devices_of_a_class_that_is_kept_to_their_workers(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world.klass.kept_over_restart = world.restarts = True
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert await world.stopped() == 0
    assert world.klass.count("give back", B) == 0
    assert not {"close", "detach"} & set(world.klass.disks["vbd-51728"].calls)
    assert "xvdb: its worker goes on serving it until the service is back" in caplog.text


async def test_a_stop_gives_back_the_devices_of_a_class_that_is_kept_over_restarts(
    world: World,
) -> None:
    world.klass.kept_over_restart = True
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert await world.stopped() == 0
    assert world.klass.count("give back", B) == 1


async def test_a_restart_closes_idle_devices_of_any_other_class(world: World) -> None:
    world.restarts = True
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert await world.stopped() == 0
    assert world.klass.count("give back", B) == 1


async def test_a_device_that_is_not_connected_in_time_is_given_back_and_says_why(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.klass.first_within = 20.0
    world.plug(B, C)
    world.backends.pop(B).cancel()  # which answers nothing
    world.serve()
    await world.connected(C)
    await world.eventually("its way back", lambda: world.klass.count("give back", B))
    await world.eventually("the reason", lambda: B in world.supervisor.refused)
    why = world.supervisor.refused[B]
    assert why.startswith("not connected within 20 s: ")
    assert f"xvdb: {why}: the kernel gets it back" in caplog.text
    shown = json.loads((world.run_dir / "refused-vbd.json").read_text())
    assert shown == {str(B): why}
    assert B not in world.supervisor.served
    assert world.klass.count("give back", C) == 0


async def test_a_device_that_is_connected_in_time_stays(world: World) -> None:
    world.klass.first_within = 20.0
    world.plug(B)
    world.serve()
    await world.connected(B)
    await asyncio.sleep(100)
    assert world.supervisor.served[B].loop.phase is Phase.CONNECTED
    assert world.klass.count("give back", B) == 0


async def test_packets_are_asked_of_a_connected_device(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert await world.ask({"verb": "packets", "id": B}) == {
        "ok": True, "file": "/proc/1/fd/9", "renew": 5,
    }  # fmt: skip
    assert "it is not connected" in (await world.ask({"verb": "packets", "id": C}))["error"]
    assert "a number" in (await world.ask({"verb": "packets", "id": "x"}))["error"]


async def test_what_a_restarted_service_is_not_to_serve_any_more_is_given_back(
    world: World,
) -> None:
    world.klass.kept_over_restart = True
    world.klass.left = {"vbd-51744"}
    world.plug(B, C, D)
    world.serve([B])
    await world.connected(B)
    await world.eventually("its way back", lambda: world.klass.count("give back", C))
    await world.eventually("its end", lambda: C not in world.supervisor.served)
    assert world.klass.count("take", D) == 0
    assert world.supervisor.served[B].loop.phase is Phase.CONNECTED


async def test_at_a_power_off_a_class_that_is_kept_over_restarts_ends_without_a_way_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world.klass.kept_over_restart = world.powers_off = True
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert await world.stopped() == 0
    assert {"close", "end"} <= set(world.klass.disks["vbd-51728"].calls)
    assert world.klass.count("give back", B) == 0
    assert "xvdb: closed, with the machine" in caplog.text
