# SPDX-License-Identifier: BSD-2-Clause
"""No byte is wrong and no acknowledged write is lost, whatever recoverable thing goes wrong.

A client keeps a model of what was acknowledged, and reconnects when it is cut off; beside it faults
come and go: late, reordered and failed answers, lost events, storms, answers that break the ring, a
backend that stalls, is killed, goes through any state, and a worker and a supervisor that are
killed. Every request ends; every read agrees with the model.

    python tests/hostile/test_random_faults.py [SECONDS [SEED]]

runs for a minute, or as long as said. PVFRONT_FAULT_SECONDS and PVFRONT_FAULT_SEED are for pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hostileworld import MIB, Attach, Disk, World
from nbdclient import FLUSH, READ, SEND_FLUSH, TRIM, WRITE, Client, NbdError, finished

from pvfront.errors import PvfrontError
from pvfront.host.blkback import Fault

pytestmark = pytest.mark.asyncio(loop_scope="session")

SECONDS = float(os.environ.get("PVFRONT_FAULT_SECONDS", "10"))
BLOCK = 4096
SIZE = 8 * MIB
LANES = 16
LANE_BLOCKS = SIZE // BLOCK // LANES
DEADLINE = 60.0
"""Seconds for a request, over every reconnection that it meets."""

Content = bytes | None
"""What a block may hold: so many bytes, or (None) zeroes or what it held, after a discard."""


class Model:
    """For each block the contents that it may have: one, or several while a write is in doubt.

    A write that failed, or whose connection ended before its answer, may have happened or not, in
    part too: each of its blocks is new or old. A read decides; then only that is right.
    """

    def __init__(self) -> None:
        self.may: list[set[bytes]] = [{bytes(BLOCK)} for _ in range(SIZE // BLOCK)]
        self.past: list[deque[str]] = [deque(maxlen=8) for _ in self.may]
        """What became of the last requests to each block, for a miscompare's report."""
        self.compared = 0
        self.acknowledged = 0

    def _note(self, first: int, count: int, what: str) -> None:
        for i in range(first, first + count):
            self.past[i].append(f"{time.monotonic():.3f} {what}")

    def wrote(self, first: int, data: bytes, *, sure: bool) -> None:
        self._note(
            first, len(data) // BLOCK, f"write {data[:4].hex()} {'ok' if sure else 'in doubt'}"
        )
        for i in range(len(data) // BLOCK):
            new = data[i * BLOCK : (i + 1) * BLOCK]
            if sure:
                self.may[first + i] = {new}
            else:
                self.may[first + i].add(new)
        self.acknowledged += sure

    def trimmed(self, first: int, count: int) -> None:
        """Zeroes or what was there: advice."""
        self._note(first, count, "trim")
        for i in range(first, first + count):
            self.may[i].add(bytes(BLOCK))

    def read(self, first: int, data: bytes) -> None:
        self._note(first, len(data) // BLOCK, "read")
        for i in range(len(data) // BLOCK):
            got = data[i * BLOCK : (i + 1) * BLOCK]
            may = self.may[first + i]
            assert got in may, (
                f"miscompare in block {first + i}: {got[:24].hex()}… is none of "
                f"{[content[:24].hex() for content in may]}: {'; '.join(self.past[first + i])}"
            )
            self.may[first + i] = {got}
            self.compared += 1


class Workload:
    """LANES requests at a time, each on a part of the disk of its own, until `stop` is set."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.model = Model()
        self.random = random.Random(seed)
        self.stop = asyncio.Event()
        self.cuts = self.errors = self.requests = 0
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for lane in range(LANES):
                group.create_task(self._lane(lane))

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None or not self._client.alive:
                if self._client is not None:
                    self.cuts += 1
                await self.disk.leave()
                self._client = await asyncio.wait_for(self.disk.client(), DEADLINE)
            return self._client

    async def _lane(self, lane: int) -> None:
        while not self.stop.is_set():
            await self._one(lane)

    async def _one(self, lane: int) -> None:
        rng, model = self.random, self.model
        count = rng.choice([1, 1, 1, 2, 8, 24, 64])
        first = lane * LANE_BLOCKS + rng.randrange(LANE_BLOCKS - count + 1)
        kind = rng.choice([READ, READ, WRITE, WRITE, WRITE, FLUSH, TRIM])
        client = await self._connected()
        data = rng.randbytes(8) * (count * BLOCK // 8) if kind == WRITE else b""
        at, length = (0, 0) if kind == FLUSH else (first * BLOCK, count * BLOCK)
        fua = int(kind == WRITE and bool(client.flags & SEND_FLUSH) and rng.random() < 0.1)
        if kind in (FLUSH, TRIM) and not client.flags & SEND_FLUSH:
            return
        self.requests += 1
        try:
            got = await finished(client.start(kind, at, length, data, fua), DEADLINE)
        except (NbdError, ConnectionError) as error:
            self.errors += isinstance(error, NbdError)
            if kind == WRITE:
                model.wrote(first, data, sure=False)
            elif kind == TRIM:
                model.trimmed(first, count)
            return
        if kind == READ:
            model.read(first, got)
        elif kind == WRITE:
            model.wrote(first, data, sure=True)
        elif kind == TRIM:
            model.trimmed(first, count)

    def told(self, seed: int, havoc: Havoc) -> str:
        model = self.model
        faults = ", ".join(f"{name} {count}" for name, count in sorted(havoc.done.items()))
        return (
            f"seed {seed}: {self.requests} requests, {model.acknowledged} writes acknowledged, "
            f"{model.compared} blocks compared, {self.errors} errors, {self.cuts} "
            f"reconnections of the client; faults: {faults}"
        )

    async def verify(self) -> None:
        """Reads everything once more, with a backend that is honest."""
        client = await self._connected()
        for first in range(0, SIZE // BLOCK, 64):
            self.model.read(first, await client.read(first * BLOCK, 64 * BLOCK))


class Havoc:
    """What goes wrong, one after the other, drawn from a seed."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.world = disk.world
        self.random = random.Random(seed)
        self.done: dict[str, int] = {}
        self.past: list[str] = []
        self.kinds: list[Callable[[], Awaitable[None]]] = [
            self.late, self.late, self.unordered, self.unordered, self.failing, self.deaf,
            self.storm, self.stalled, self.scribbled, self.broken, self.broken, self.dropped,
            self.jump, self.worker_killed, self.backend_killed, self.supervisor_killed,
        ]  # fmt: skip

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kind = self.random.choice(self.kinds)
            self.done[kind.__name__] = self.done.get(kind.__name__, 0) + 1
            self.past.append(f"{time.monotonic():.3f} {kind.__name__}")
            await kind()
            await self.disk.fault()
            await self.disk.release()
            await self.settled()

    async def settled(self) -> None:
        await self.disk.until(
            "connected again", lambda s: s.get("phase") == "connected", seconds=DEADLINE
        )

    async def lasting(self, *faults: Fault) -> None:
        await self.disk.fault(*faults, seed=self.random.getrandbits(32))
        await asyncio.sleep(self.random.uniform(0.05, 0.5))

    async def late(self) -> None:
        await self.lasting(Fault.delay(0, self.random.choice([1, 20, 200]), chance=0.5))

    async def unordered(self) -> None:
        await self.lasting(Fault.reorder(self.random.choice([2, 8, 32]), ms=2))

    async def failing(self) -> None:
        await self.lasting(
            Fault.fail(self.random.choice([-1, -7, 99]), op=["read", "write"], chance=0.05)
        )

    async def deaf(self) -> None:
        await self.lasting(Fault.lose_event(chance=0.02))

    async def storm(self) -> None:
        await self.lasting(Fault.storm(self.random.choice([0, 500, 5000])))

    async def stalled(self) -> None:
        await self.lasting(Fault.stall(chance=0.05), Fault.delay(0, 5, chance=0.3))

    async def scribbled(self) -> None:
        """Slots that were read; answered pages of writes whose answer is not yet published."""
        await self.lasting(Fault.rewrite_slots("idle"), Fault.touch_outside(op="write"))

    async def broken(self) -> None:
        crime = self.random.choice(
            [
                Fault.corrupt("id", xor=1 << self.random.randrange(64), chance=0.01),
                Fault.corrupt("id", stale=True, chance=0.01),
                Fault.corrupt("operation", 77, chance=0.01),
                Fault.duplicate(1, chance=0.01),
                Fault.producer(self.random.choice([-5, 40, 1000]), chance=0.01),
            ]
        )
        await self.lasting(crime)

    async def dropped(self) -> None:
        """Answers that never come: only a new connection helps."""
        await self.lasting(Fault.drop(count=2, done=self.random.random() < 0.5))
        await self.round()

    async def jump(self) -> None:
        await self.disk.state(self.random.choice([0, 2, 5, 6, 8, 42]))
        await asyncio.sleep(self.random.uniform(0, 0.1))
        await self.round()

    async def round(self) -> None:
        with contextlib.suppress(PvfrontError):
            await self.disk.state(5)
        await self.settled()

    async def worker_killed(self) -> None:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill((await self.disk.shown())["worker_pid"], signal.SIGKILL)
        await asyncio.sleep(0.02)

    async def backend_killed(self) -> None:
        """The next one offers more, or less."""
        await self.world.backend_dies(
            **self.random.choice(
                [
                    {},
                    {"indirect": 0, "ring_order": 0, "persistent": False},
                    {"indirect": 32, "ring_order": 1},
                    {"persistent": False},
                    {"max_persistent": 40},
                    {"flush": False},  # barriers in its place
                ]
            )
        )

    async def supervisor_killed(self) -> None:
        await self.world.end_supervisor(signal.SIGKILL)
        await self.world.serve()


async def trial(disk: Disk, seconds: float, seed: int) -> str:
    """One run; what it did. Raises AssertionError."""
    work, havoc = Workload(disk, seed), Havoc(disk, seed + 1)
    running = asyncio.create_task(work.run())
    wrecking = asyncio.create_task(havoc.run(seconds))
    running.add_done_callback(lambda t: t.cancelled() or (t.exception() and print(havoc.past)))
    try:
        await asyncio.wait({running, wrecking}, return_when=asyncio.FIRST_COMPLETED)
        if wrecking.done():
            await wrecking
        work.stop.set()
        await asyncio.wait_for(running, 2 * DEADLINE)
        if not wrecking.done():
            await wrecking
    except BaseException:
        print(f"until then: {work.told(seed, havoc)}")
        raise
    finally:
        for task in (running, wrecking):
            task.cancel()
        await asyncio.gather(running, wrecking, return_exceptions=True)
    await work.verify()
    assert work.requests > 50
    return f"0 miscompares, {work.told(seed, havoc)}"


async def test_random_faults_lose_no_acknowledged_write_and_return_no_wrong_byte(
    attach: Attach, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    # asyncio says so of each request that is sent to a client that was cut off.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    seed = int(os.environ.get("PVFRONT_FAULT_SEED") or random.SystemRandom().getrandbits(31))
    print(f"PVFRONT_FAULT_SEED={seed}")
    image = world.host.directory / "random.img"
    image.write_bytes(bytes(SIZE))  # it outlives the backend's process
    disk = await attach(target=str(image))
    told = await trial(disk, SECONDS, seed)
    with capsys.disabled():
        print(f"\n{told}")


async def test_fio_verifies_its_data_under_faults_that_keep_the_connection(
    attach: Attach, world: World
) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed (tools/apt-packages.txt)")
    disk = await attach(target="memory:64M")
    await disk.fault(
        Fault.delay(0, 5, chance=0.2),
        Fault.reorder(8, ms=1, chance=0.2),
        Fault.lose_event(chance=0.001),
        Fault.storm(500),
        seed=7,
    )
    uri = f"nbd+unix:///?socket={world.run_dir / disk.label}.nbd"
    process = await asyncio.create_subprocess_exec(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=512-128k",
        "--iodepth=32", "--size=16M", "--verify=crc32c", "--verify_fatal=1",
        "--verify_state_save=0", cwd=world.host.directory,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 4 * DEADLINE)
    if b"engine nbd not loadable" in output:
        pytest.skip("this fio has no nbd engine")
    assert process.returncode == 0, output.decode()
    assert (await disk.shown())["generation"] == 1


if __name__ == "__main__":
    os.environ["PVFRONT_FAULT_SECONDS"] = "".join(sys.argv[1:2]) or "60"
    # A machine that does something else meanwhile may need minutes to start a process.
    os.environ.setdefault("PVFRONT_PATIENCE", "180")
    if sys.argv[2:]:
        os.environ["PVFRONT_FAULT_SEED"] = sys.argv[2]
    here = (
        f"{Path(__file__)}::test_random_faults_lose_no_acknowledged_write_and_return_no_wrong_byte"
    )
    # -P: the installed package, wherever this is started.
    os.execv(
        sys.executable, [sys.executable, "-P", "-m", "pytest", "-q", "-s", "--timeout=0", here]
    )
