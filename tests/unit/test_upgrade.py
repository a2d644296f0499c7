# SPDX-License-Identifier: BSD-2-Clause
"""A disk's worker is replaced while it serves: the frontend's half, with real workers.

Around it tests/support/diskworld.py. What two workers say to each other is tests/worker/'s.
"""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from diskworld import NAME, World, descriptors, gone, world
from waiting import PATIENCE, eventually

from pvfront import worker as worker_module
from pvfront.errors import PvfrontError
from pvfront.trace import Kind
from pvfront.upgrade import Upgrade
from pvfront.worker import Worker, WorkerError, WorkerGone
from pvfront.workermessage import Event, Exited, State, Taken, TargetGone

OLD = b"old!" * 128


def noted(world: World) -> list[tuple[Kind, str]]:
    notes: list[tuple[Kind, str]] = []
    world.disk.on_note(lambda kind, text, /, **facts: notes.append((kind, text)))
    return notes


async def asked(world: World) -> asyncio.Task[str]:
    """An upgrade that waits for its turn in the loop."""
    upgrade = asyncio.create_task(world.disk.upgrade())
    await eventually("the next worker", lambda: world.disk.pending or upgrade.done())
    return upgrade


def next_pid(world: World) -> int:
    (pid,) = (
        process.pid
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["ppid"] == os.getpid()
        and NAME in (process.info["cmdline"] or ())
        and process.pid != world.pid()
    )
    return pid


def sockets(world: World) -> list[str]:
    return sorted(path.name for path in world.run_dir.glob("*.*") if path.is_socket())


async def test_the_worker_that_took_over_is_the_disk_s_and_nobody_has_died(world: World) -> None:
    disk = await world.running()
    await world.write(0, OLD)
    old = world.pid()
    notes = noted(world)
    for _ in range(disk.start_limits.start_limit_burst + 1):
        upgrade = await asked(world)
        assert world.pid() == old, "it waits for its turn"
        await disk.update(world.device)
        assert f"took over from {old} with 0 requests in flight" in await upgrade
        assert gone(old)
        old = world.pid()
    assert [kind for kind, _ in notes] == [Kind.WORKER] * (disk.start_limits.start_limit_burst + 1)
    assert (disk.trouble, disk.generation, disk.pending) == (None, 1, False)
    assert sockets(world) == [f"{NAME}.sock"]
    assert await world.read(0, 512) == OLD
    assert await disk.quiesce(PATIENCE)


async def test_a_next_worker_that_hangs_is_ended_and_the_old_one_goes_on(world: World) -> None:
    disk = await world.running()
    old = world.pid()
    notes = noted(world)
    upgrade = await asked(world)
    hangs = next_pid(world)
    os.kill(hangs, signal.SIGSTOP)
    await disk.update(world.device)
    with pytest.raises(WorkerError, match="did not answer in time"):
        await upgrade
    assert gone(hangs)
    assert (world.pid(), disk.trouble, notes) == (old, None, [])
    assert sockets(world) == [f"{NAME}.sock"]
    await world.write(0, OLD)


async def test_a_next_worker_that_dies_before_its_turn_changes_nothing(world: World) -> None:
    disk = await world.running()
    old = world.pid()
    upgrade = await asked(world)
    os.kill(next_pid(world), signal.SIGKILL)
    with pytest.raises(PvfrontError, match="ended before its turn"):
        await upgrade
    assert (world.pid(), disk.trouble, disk.pending) == (old, None, False)
    assert sockets(world) == [f"{NAME}.sock"]
    await world.write(0, OLD)


async def test_an_old_worker_that_dies_meanwhile_is_a_death_and_the_next_generation_begins(
    world: World,
) -> None:
    disk = await world.running()
    old = world.pid()
    notes = noted(world)
    upgrade = await asked(world)
    following = next_pid(world)
    os.kill(following, signal.SIGSTOP)
    doing = asyncio.create_task(disk.update(world.device))
    await eventually("HAND_OVER", lambda: any("pvfront-table" in link for link in descriptors(old)))
    os.kill(old, signal.SIGKILL)
    await eventually("its end", lambda: gone(old))
    os.kill(following, signal.SIGCONT)  # it has everything, and nobody to say so to
    await doing
    with pytest.raises(WorkerGone):
        await upgrade
    assert [kind for kind, _ in notes] == [Kind.DIED]
    assert disk.trouble is not None
    await disk.detach(keep_target=False)
    await world.running()
    assert disk.generation == 2
    await world.write(0, OLD)


async def test_a_disk_that_is_given_up_ends_the_worker_that_waited_for_its_turn(
    world: World,
) -> None:
    disk = await world.running()
    upgrade = await asked(world)
    pids = world.pid(), next_pid(world)
    await disk.detach(keep_target=False)
    await disk.close()
    await disk.end()
    with pytest.raises(PvfrontError, match="served no more"):
        await upgrade
    await eventually("the end of both", lambda: all(gone(pid) for pid in pids))
    assert sockets(world) == []


async def test_a_program_that_never_begins_keeps_nobody_waiting(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await world.running()
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PVFRONT_WORKER", str(silent))
    monkeypatch.setattr(worker_module, "HELLO_DEADLINE", 3600.0)
    upgrade = asyncio.create_task(disk.upgrade())
    await eventually("the start", lambda: f"{NAME}.next" in sockets(world))
    assert not disk.pending
    # A detach, as quick as ever.
    await disk.update(world.device)
    assert await disk.quiesce(PATIENCE)
    await disk.detach(keep_target=False)
    await disk.end()
    with pytest.raises(PvfrontError, match="served no more"):
        await upgrade
    await eventually("no socket", lambda: not sockets(world))


async def test_a_target_that_stays_with_its_worker_refuses_and_says_why(world: World) -> None:
    disk = await world.running()
    world.target.stays = True
    with pytest.raises(PvfrontError, match="ublk device cannot be handed over") as refused:
        await disk.upgrade()
    assert f"kill -9 {world.pid()}" in str(refused.value.hint)
    assert not disk.pending
    world.target.stays = False


async def test_a_next_worker_whose_connection_has_just_ended_freezes_nobody(
    world: World, tmp_path: Path
) -> None:
    await world.running()
    old = world.disk._worker
    assert old is not None
    other = await Worker.spawn(NAME, tmp_path, change_user=False, following=True)
    other.close()
    with pytest.raises(WorkerGone, match="closed the connection"):
        await old.hand_over(other)
    await world.write(0, OLD)
    os.kill(other.pid, signal.SIGKILL)
    await eventually("its end", lambda: os.waitpid(other.pid, os.WNOHANG)[0])


class Said:
    """A worker that says something before it hands over, and whose end follows."""

    pid = 1
    hello = None

    def __init__(self, said: list[Event], outcome: Taken | Exception) -> None:
        self.on_event: Callable[[Event], None] = lambda event: None
        self.said, self.outcome = said, outcome

    async def hand_over(self, new: Said) -> Taken:
        for event in self.said:
            self.on_event(event)
        for event in new.said:
            new.on_event(event)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def ended(self, timeout: float | None) -> bool:
        return bool(await asyncio.Event().wait())

    def kill(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("taken", [True, False])
async def test_what_the_old_worker_said_counts_and_its_end_only_if_it_was_not_asked_for(
    tmp_path: Path, taken: bool
) -> None:
    left, ended, later = TargetGone(0, "left"), Exited("ended"), TargetGone(1, "later")
    outcome = Taken(0.001, 0) if taken else WorkerGone("it died")
    old: Any = Said([left, ended], outcome)
    new: Any = Said([later], outcome)
    heard: list[object] = []
    (tmp_path / f"{NAME}.next").touch()

    async def begin() -> Worker:
        return new  # type: ignore[no-any-return]

    upgrade = Upgrade(NAME, tmp_path)
    asked = upgrade.ask(begin, lambda: None)
    await eventually("its turn", lambda: upgrade.ready)
    await upgrade.perform(old, heard.append, heard.append)
    if taken:
        assert heard == [left, new, later]
        assert "took over" in await asked
    else:
        assert heard == [left, ended]
        with pytest.raises(WorkerGone):
            await asked


async def test_a_worker_that_cannot_be_handed_over_right_now_is_asked_again(
    world: World,
) -> None:
    disk = await world.running()
    await world.write(0, OLD)
    upgrade = await asked(world)
    # Drained and detached as between two connections: it does not serve.
    assert await disk.quiesce(PATIENCE)
    await disk.detach(keep_target=True)
    await disk.update(world.device)
    assert not upgrade.done()
    assert not disk.pending
    await world.running()
    await eventually("another turn", lambda: disk.pending)
    await disk.update(world.device)
    assert "took over" in await upgrade
    assert disk._worker is not None
    assert disk._worker.hello is not None
    assert disk._worker.hello.state is State.RUNNING
    assert await world.read(0, 512) == OLD
