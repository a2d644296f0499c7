# SPDX-License-Identifier: BSD-2-Clause
"""The supervisor's end of the control protocol, against the real worker.

It serves an embedded backend (tests/worker/embedded.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "worker"))

from embedded import Nbd
from ringbackend import RSP_PROD, Backend, Pages, Port
from waiting import PATIENCE, eventually
from workerevents import NAME, Events

from pvfront import worker as module
from pvfront import workerprogram
from pvfront.abi import lib, read_stats
from pvfront.errors import PvfrontError
from pvfront.worker import Worker, WorkerError, WorkerGone
from pvfront.workermessage import Broken, Exited, FeatureOff, Stalled, State, TargetGone
from pvfront.workerprogram import stats_path

DISK = 1 << 20


class Refusing(Backend):
    """Offers flush and does not have it."""

    def execute(self, request: Any) -> int:
        return -2 if request.op == 3 else super().execute(request)


class Device:
    """What one generation of a worker is given: granted pages, a backend, an NBD client."""

    def __init__(self, backend: type[Backend] = Backend) -> None:
        self.pages = Pages(1, 32)
        self.disk = bytearray(DISK)
        self.channel, self.granted = Port(), self.pages.hand_over()
        self.backend = backend(self.pages, self.channel, self.disk)
        self.client, self.socket = socket.socketpair()
        self.client.settimeout(PATIENCE)
        self.nbd = Nbd(self.client)

    async def attach(self, worker: Worker, generation: int = 1) -> None:
        await worker.attach(
            generation,
            device_class=lib.PVF_CLASS_BLK,
            port=5,
            ring_pages=1,
            ring_offset=self.pages.ring_offset,
            pool_offset=self.pages.pool_offset,
            pool_grefs=self.pages.grefs,
            scrub=False,
            fds=(self.channel.theirs.fileno(), self.granted.fileno()),
        )
        self.channel.theirs.close()
        self.granted.close()
        self.backend.start()

    async def start(self, worker: Worker, generation: int = 1, stall_seconds: int = 0) -> None:
        await worker.start(
            generation,
            sectors=DISK // 512,
            sector_size=512,
            flags=lib.PVF_BLK_FLUSH | lib.PVF_BLK_DISCARD,
            max_segments=11,
            discard_granularity=512,
            discard_alignment=0,
            vdev=51728,
            stall_seconds=stall_seconds,
            target_fds=[self.socket.fileno()],
        )
        self.socket.close()

    def close(self) -> None:
        self.client.close()
        self.socket.close()
        self.granted.close()
        self.backend.stop()
        self.pages.close()


def is_zombie_or_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(autouse=True)
def a_user_that_every_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workerprogram, "USER", "nobody")


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[list[Worker]]:
    """Whoever is put in here is killed and reaped at the end."""
    there: list[Worker] = []
    yield there
    for worker in there:
        worker.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)  # noqa: ASYNC222 - it is dead


def children() -> set[int]:
    """Our children, zombies included; other tests may have left some of their own."""
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture
async def worker(tmp_path: Path, workers: list[Worker]) -> Worker:
    made = await Worker.spawn(NAME, tmp_path)
    workers.append(made)
    return made


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.close()


async def test_a_new_worker_is_idle_and_shows_its_counters(worker: Worker, tmp_path: Path) -> None:
    assert worker.hello is not None
    assert (worker.hello.state, worker.hello.generation) == (State.IDLE, 0)
    assert (worker.hello.pid, worker.hello.has_target) == (worker.pid, False)
    assert read_stats(worker.stats_fd).state == lib.PVF_IDLE
    assert worker.alive
    assert (tmp_path / f"{NAME}.sock").stat().st_mode & 0o777 == 0o600


async def test_the_statistics_of_a_worker_are_found_by_its_pid(worker: Worker) -> None:
    path = stats_path(worker.pid)
    assert path is not None
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_stats(fd).ring_slots == read_stats(worker.stats_fd).ring_slots
    finally:
        os.close(fd)
    assert stats_path(2**22 + 1) is None


async def test_a_worker_inherits_nothing_but_its_socket_and_the_standard_streams(
    tmp_path: Path, workers: list[Worker]
) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    workers.append(await Worker.spawn(NAME, tmp_path))
    os.close(writer)
    try:
        os.set_blocking(reader, False)
        assert os.read(reader, 1) == b"", "the worker holds the pipe's end"
    finally:
        os.close(reader)


async def test_a_generation_is_attached_served_drained_and_detached(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    await device.start(worker)
    await asyncio.to_thread(device.nbd.write, 4096, b"x" * 8192)
    assert await asyncio.to_thread(device.nbd.read, 4096, 8192) == b"x" * 8192
    assert device.disk[4096:12288] == b"x" * 8192
    assert await worker.quiesce(1, PATIENCE)
    await worker.detach(1, keep_target=False)
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(device.nbd.read, 0, 512)
    await worker.exit()
    assert not worker.alive
    assert not is_zombie_or_alive(worker.pid)


async def test_a_refused_command_carries_the_workers_reason(worker: Worker, device: Device) -> None:
    with pytest.raises(WorkerError, match="refused START") as refused:
        await device.start(worker)
    assert refused.value.error in (errno.EINVAL, errno.EBUSY, errno.ESTALE)
    assert worker.alive


async def test_a_generation_of_the_past_is_refused(worker: Worker, device: Device) -> None:
    await device.attach(worker, generation=4)
    with pytest.raises(WorkerError, match="ESTALE"):
        await worker.quiesce(3, PATIENCE)
    await device.start(worker, generation=4)


async def test_a_worker_is_adopted_as_it_is_and_goes_on_serving(
    worker: Worker, workers: list[Worker], device: Device, tmp_path: Path
) -> None:
    await device.attach(worker, generation=7)
    await device.start(worker, generation=7)
    await asyncio.to_thread(device.nbd.write, 0, b"a" * 512)
    worker.close()
    with pytest.raises(WorkerGone, match="closed the connection"):
        await worker.quiesce(7, PATIENCE)
    second = await Worker.adopt(NAME, tmp_path)
    assert second is not None
    workers.append(second)
    assert second.pid == worker.pid
    assert second.hello is not None
    assert (second.hello.state, second.hello.generation) == (State.RUNNING, 7)
    assert (second.hello.has_target, second.hello.name) == (True, NAME)
    await eventually("the write counted", lambda: read_stats(second.stats_fd).write.requests == 1)
    assert await asyncio.to_thread(device.nbd.read, 0, 512) == b"a" * 512
    assert await second.quiesce(7, PATIENCE)


async def test_the_death_of_an_adopted_worker_is_noticed(
    worker: Worker, workers: list[Worker], tmp_path: Path
) -> None:
    worker.close()
    second = await Worker.adopt(NAME, tmp_path)
    assert second is not None
    workers.append(second)
    events = Events(second)
    second.kill()
    await events.one(Exited)
    assert not second.alive


async def test_there_is_nothing_to_adopt_without_a_socket(tmp_path: Path) -> None:
    assert await Worker.adopt(NAME, tmp_path) is None


async def test_the_socket_of_a_dead_worker_is_cleared_away(worker: Worker, tmp_path: Path) -> None:
    worker.kill()
    assert await worker.ended(PATIENCE)
    assert (tmp_path / f"{NAME}.sock").exists()
    assert await Worker.adopt(NAME, tmp_path) is None
    assert not (tmp_path / f"{NAME}.sock").exists()


async def test_a_killed_worker_is_told_of_by_its_signal_and_leaves_no_zombie(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    events = Events(worker)
    os.kill(worker.pid, signal.SIGKILL)
    gone = await events.one(Exited)
    assert f"pid {worker.pid} ended by signal 9 (Killed)" in gone.text
    assert events == [gone]
    assert not is_zombie_or_alive(worker.pid)
    assert worker.stats_fd == -1
    for command in (
        worker.quiesce(1, PATIENCE),
        worker.detach(1, keep_target=False),
        device.start(worker),
    ):
        with pytest.raises(WorkerGone, match="ended by signal 9"):
            await command
    await worker.exit()


async def test_a_command_in_flight_fails_when_the_worker_dies(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    await device.start(worker)
    device.backend.hold = True
    device.nbd.request(Nbd.READ, 0, 512)
    await eventually("the request at the backend", lambda: device.backend.held)
    drained = asyncio.create_task(worker.quiesce(1, PATIENCE))
    await asyncio.sleep(0)
    worker.kill()
    with pytest.raises(WorkerGone):
        await drained


async def test_a_quiesce_that_the_backend_holds_up_is_not_drained_in_time(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    await device.start(worker)
    device.backend.hold = True
    device.nbd.request(Nbd.READ, 0, 512)
    await eventually("the request at the backend", lambda: device.backend.held)
    assert not await worker.quiesce(1, 0.2)
    device.backend.release()
    assert await worker.quiesce(1, PATIENCE)


async def test_a_client_that_leaves_is_told(worker: Worker, device: Device) -> None:
    await device.attach(worker)
    await device.start(worker)
    events = Events(worker)
    device.client.close()
    gone = await events.one(TargetGone)
    assert gone.error == 0
    assert str(gone).startswith("the NBD socket is gone (closed")


async def test_a_client_that_breaks_nbd_is_told_with_its_error(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    await device.start(worker)
    events = Events(worker)
    device.client.send(bytes(28))
    gone = await events.one(TargetGone)
    assert gone.error == errno.EPROTO
    assert "EPROTO" in str(gone)


async def test_a_backend_that_breaks_a_rule_is_told_with_field_and_value(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    await device.start(worker)
    events = Events(worker)
    device.pages.set(RSP_PROD, 4711)
    device.backend.event()
    broken = await events.one(Broken)
    assert broken.value == 4711
    assert broken.rule > 0
    assert broken.field
    assert broken.field in str(broken)
    with pytest.raises(WorkerError, match="EIO"):
        await worker.quiesce(1, PATIENCE)
    await worker.detach(1, keep_target=False)


async def test_a_feature_that_the_backend_does_not_have_after_all_is_told(worker: Worker) -> None:
    device = Device(Refusing)
    try:
        await device.attach(worker)
        await device.start(worker)
        events = Events(worker)
        device.nbd.request(Nbd.FLUSH)
        assert await events.one(FeatureOff) == FeatureOff("flush")
    finally:
        device.close()


async def test_a_stall_is_told_with_its_beginning_and_its_end(
    worker: Worker, device: Device
) -> None:
    await device.attach(worker)
    await device.start(worker, stall_seconds=1)
    events = Events(worker)
    device.backend.hold = True
    device.nbd.request(Nbd.READ, 0, 512)
    begun = await events.one(Stalled)
    assert begun.seconds >= 1
    assert begun.in_flight == 1
    device.backend.release()
    await eventually("the end of the stall", lambda: len(events) == 2)
    assert events[1] == Stalled(0, 0)


async def test_fifty_workers_come_and_go_without_a_descriptor_or_a_zombie_left(
    tmp_path: Path,
) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = descriptors()
    for cycle in range(50):
        worker = await Worker.spawn(NAME, tmp_path)
        device = Device()
        await device.attach(worker)
        if cycle % 2:
            await worker.exit()
        else:
            worker.kill()
            assert await worker.ended(PATIENCE)
        device.close()
        assert not is_zombie_or_alive(worker.pid)
    assert descriptors() <= before


# -- workers that cannot be started ----------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def test_a_worker_that_ends_at_once_is_named_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setenv("PVFRONT_WORKER", str(program(tmp_path / "fails", "exit 7")))
    with pytest.raises(WorkerGone, match="status 7"):
        await Worker.spawn(NAME, tmp_path)
    assert children() <= before


async def test_a_worker_that_says_nothing_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setenv("PVFRONT_WORKER", str(program(tmp_path / "hangs", "exec sleep 600")))
    monkeypatch.setattr(module, "HELLO_DEADLINE", 0.3)
    with pytest.raises(WorkerGone, match="did not say HELLO"):
        await Worker.spawn(NAME, tmp_path)
    assert children() <= before


async def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVFRONT_WORKER", str(tmp_path / "nothing"))
    with pytest.raises(PvfrontError, match="nothing is missing") as error:
        await Worker.spawn(NAME, tmp_path)
    assert error.value.hint


def test_a_missing_user_is_named_with_the_command_that_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workerprogram, "USER", "no-such-user")
    with pytest.raises(PvfrontError, match="no user 'no-such-user'") as error:
        workerprogram.worker_ids()
    assert "systemd-sysusers" in str(error.value.hint)
