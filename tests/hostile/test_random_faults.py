# SPDX-License-Identifier: BSD-2-Clause
"""No byte is wrong and no acknowledged write is lost, whatever recoverable thing goes wrong.

A client keeps a model of what was acknowledged, and reconnects when it is cut off; beside it faults
come and go: late, reordered and failed answers, lost events, storms, answers that break the ring, a
backend that stalls, is killed, goes through any state, and a worker and a supervisor that are
killed. Every request ends; every read agrees with the model. soak.py goes on for longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hostileworld import Attach, Disk, World
from waiting import eventually
from workload import DEADLINE, Workload

from pvfront.errors import PvfrontError
from pvfront.host.blkback import Fault

pytestmark = pytest.mark.asyncio(loop_scope="session")

SECONDS = float(os.environ.get("PVFRONT_FAULT_SECONDS", "10"))


class Havoc:
    """What goes wrong, one after the other, drawn from a seed."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.world = disk.world
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.longest: dict[str, float] = {}  # seconds, until both ends were Connected after it
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
            self.done[kind.__name__] += 1
            self.past.append(f"{time.monotonic():.3f} {kind.__name__}")
            await kind()
            await self.disk.fault()
            await self.disk.release()
            since = time.monotonic()
            await self.settled()
            took = time.monotonic() - since
            self.longest[kind.__name__] = max(took, self.longest.get(kind.__name__, 0.0))

    @property
    def counts(self) -> str:
        return ", ".join(
            f"{name} {count} ({self.longest.get(name, 0.0):.1f} s)"
            for name, count in sorted(self.done.items())
        )

    def __str__(self) -> str:
        return f"faults: {self.counts}; {self.past}"

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


async def test_random_faults_lose_no_acknowledged_write_and_return_no_wrong_byte(
    attach: Attach, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    work = await Workload.on_a_new_disk(attach, world)
    havoc = Havoc(work.disk, work.seed + 1)

    async def wreck() -> None:
        await havoc.run(SECONDS)
        await eventually("fifty requests", lambda: work.requests > 50)

    await work.beside(wreck(), havoc)
    with capsys.disabled():
        print(f"\n0 miscompares, {work}; faults, and the longest until connected: {havoc.counts}")


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
    assert (await disk.shown())["generation"] == disk.first
