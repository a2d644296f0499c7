# SPDX-License-Identifier: BSD-2-Clause
"""The device loop before, in and after a suspend, also one that nobody announced."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import pytest
from deviceworld import BACK, FRONT, World, world
from vclock import VirtualLoop
from waiting import PATIENCE

from pvfront.device import Goal, Phase

LOOP_FACTORY = VirtualLoop


async def test_parked_holds_nothing_and_resumes_to_connected(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    assert not world.disk.held
    assert world.disk.target, "the OS device keeps its socket: its clients only wait"
    assert "close" not in world.disk.calls
    loop.aim(Goal.CONNECTED)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.generation == 2


async def test_parking_lets_go_even_of_a_silent_backend(world: World) -> None:
    world.nodes()
    loop = await world.connected()
    world.backend.answers = False
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    assert not world.disk.held


async def test_what_does_not_drain_loses_its_socket_so_that_it_is_sent_again(
    world: World,
) -> None:
    world.nodes()
    loop = await world.connected()
    world.disk.drains = False
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    assert not world.disk.target


async def test_after_a_restore_under_another_id_the_new_backend_is_followed(
    world: World,
) -> None:
    world.nodes()
    loop = await world.connected()
    loop.aim(Goal.PARKED)
    await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
    moved = "/local/domain/0/backend/vbd/9/51728"
    world.mem.set(f"{moved}/state", b"4", "n0,r5")
    world.mem.set(f"{moved}/online", b"1", "n0,r5")
    world.mem.set(f"{FRONT}/backend", moved.encode(), "n5,r0")
    world.mem.set(f"{FRONT}/state", b"1", "n5,r0")
    loop.aim(Goal.CONNECTED)
    await world.eventually("the new backend opened", lambda: loop.device.backend == moved)
    assert "close" not in world.disk.calls, "the OS device must outlive the move"


async def test_nonsense_that_names_the_backend_after_a_resume_is_said_until_it_is_put_right(
    world: World,
) -> None:
    world.nodes()
    loop = await world.connected()
    for key, nonsense in (("backend", b"nonsense"), ("backend-id", b"")):
        loop.aim(Goal.PARKED)
        await loop.until_phase(Phase.PARKED, timeout=PATIENCE)
        world.mem.set(f"{FRONT}/{key}", nonsense, "n5,r0")
        loop.aim(Goal.CONNECTED)
        if key == "backend":
            await loop.until_phase(Phase.FAILED, timeout=PATIENCE)
            assert "no absolute path" in loop.reason
            world.mem.set(f"{FRONT}/backend", BACK.encode(), "n5,r0")
        await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    # and it is watched again
    await world.backend.write("6")
    await world.eventually("generation 4", lambda: world.disk.generation == 4)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)


@pytest.mark.parametrize("first", ["frontend", "backend"])
async def test_a_suspend_that_nobody_announced_never_unbinds_the_old_port(
    world: World, first: str
) -> None:
    """Whichever event comes first: the toolstack makes both nodes in one transaction."""
    world.nodes()
    loop = await world.connected()
    world.disk.calls.clear()
    if first == "backend":
        world.mem.set(f"{FRONT}/state", b"1", "n5,r0", fired=False)
        world.mem.set(f"{BACK}/state", b"2", "n0,r5")
    else:
        world.mem.set(f"{BACK}/state", b"2", "n0,r5", fired=False)
        world.mem.set(f"{FRONT}/state", b"1", "n5,r0")
    await world.eventually("generation 2", lambda: world.disk.generation == 2)
    await loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
    assert world.disk.steps[0] == "poisoned"
    assert not any(call.startswith("detach") for call in world.disk.steps[:2])


@pytest.mark.parametrize("where", [BACK, "/local/domain/0/backend/vbd/9/51728"])
async def test_a_suspend_in_the_midst_of_a_walk_never_unbinds_the_old_port(
    world: World, where: str
) -> None:
    """The ring is published, the backend is not Connected yet; then it is another backend."""
    world.nodes()
    world.backend.answers = False
    loop = await world.start()
    await world.eventually("Initialised", lambda: world.states() == ("3", "2"))
    world.disk.calls.clear()
    for key, value in {f"{where}/state": b"2", f"{where}/online": b"1"}.items():
        world.mem.set(key, value, "n0,r5", fired=False)
    world.mem.set(f"{FRONT}/state", b"1", "n5,r0", fired=where == BACK)
    world.mem.set(f"{FRONT}/backend", where.encode(), "n5,r0", fired=where != BACK)
    await world.eventually("a new ring", lambda: "attach" in world.disk.calls)
    assert loop.device.backend == where
    assert world.disk.steps == ["poisoned", "attach"]


@pytest.mark.parametrize("where", [BACK, "/local/domain/0/backend/vbd/9/51728"])
async def test_a_suspend_while_a_detach_is_refused_takes_the_disk_from_nobody(
    world: World, where: str
) -> None:
    world.nodes()
    loop = await world.connected()
    world.disk.in_use = "mounted at /mnt"
    world.mem.set(f"{BACK}/online", b"0", "n0,r5")
    await world.backend.write("5")
    await loop.until_phase(Phase.DETACH_REFUSED, timeout=PATIENCE)
    world.disk.calls.clear()
    world.backend.answers = False
    for key, value in {f"{where}/state": b"2", f"{where}/online": b"1"}.items():
        world.mem.set(key, value, "n0,r5")
    world.mem.set(f"{FRONT}/backend", where.encode(), "n5,r0")
    world.mem.set(f"{FRONT}/state", b"1", "n5,r0")
    await world.eventually("a new ring", lambda: "attach" in world.disk.calls)
    assert world.disk.steps == ["poisoned", "attach"]
