# SPDX-License-Identifier: BSD-2-Clause
"""A backend that is gone at any moment, and back at any other: killed, ended in order, its driver
unbound and bound again, deaf for a while.

The workload is that of workload.py: sixteen requests at a time, each compared with what was
acknowledged. A client that had requests under way when the backend went is cut off, which is
how a socket says that it does not know what became of them (a kernel's nbd device sends them
again); it comes back. No request fails, and in the end nothing is held that was not before.
soak.py goes on for longer.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hostileworld import Attach, Disk, World
from waiting import eventually
from workload import DEADLINE, Workload

from pvfront.host.blkback import Fault

pytestmark = pytest.mark.asyncio(loop_scope="session")

TIMES = int(os.environ.get("PVFRONT_ABSENCES", "100"))
LONGEST = 0.1
"""Seconds for which a backend is away, at most, and for which it stays."""


class Absences:
    """Ways of going, drawn from a seed."""

    def __init__(self, disk: Disk, work: Workload, seed: int) -> None:
        self.disk = disk
        self.world = disk.world
        self.work = work
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.longest = 0.0
        # What takes longest is rare: a process starts, and a frontend whose connections are short
        # makes pauses between them.
        self.kinds: list[Callable[[], Awaitable[None]]] = [
            *[self.stalls] * 5, self.is_bound_again, self.is_killed, self.ends,
        ]  # fmt: skip

    async def run(self, times: int) -> None:
        for _ in range(times):
            kind = self.random.choice(self.kinds)
            await asyncio.sleep(self.random.uniform(0, LONGEST))
            began, requests = time.monotonic(), self.work.requests
            await kind()
            await self.disk.until(
                f"the disk served again after its backend {kind.__name__}",
                lambda s: s.get("phase") == "connected",
                seconds=DEADLINE,
            )

            async def answered(before: int = requests) -> bool:
                return self.work.requests > before + 16  # all lanes have gone on

            await eventually(
                "requests after that", answered, seconds=DEADLINE, why=lambda: self.disk.log
            )
            self.longest = max(self.longest, time.monotonic() - began)
            self.done[kind.__name__] += 1

    async def away(self) -> None:
        await asyncio.sleep(self.random.uniform(0, LONGEST))

    async def stalls(self) -> None:
        await self.disk.fault(Fault.stall(), seed=self.random.getrandbits(32))
        await self.away()
        await self.disk.fault()
        await self.disk.release()

    async def is_bound_again(self) -> None:
        """As the driver's unbind and bind in the backend's domain: it closes, and waits anew.

        One that is on its own way to Connected, after the absence before this, says Connected
        over its Closing: then it has not gone, and is told to once more.
        """
        generation = (await self.disk.shown())["generation"]

        async def anew() -> bool:
            shown = await self.disk.shown()
            if shown.get("phase") != "connected":
                return False
            if shown["generation"] == generation:
                await self.disk.state(5)
            return bool(shown["generation"] > generation)

        await eventually("another connection", anew, seconds=DEADLINE, why=lambda: self.disk.log)

    async def is_killed(self) -> None:
        await self.world.backend.kill()
        await self.away()
        await self.world.new_backend()

    async def ends(self) -> None:
        await self.world.backend.stop()
        await self.away()
        await self.world.new_backend()

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.done.items()))
        return f"{self.done.total()} absences ({kinds}), the longest of {self.longest:.1f} s"


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.timeout(max(900, 5 * TIMES))  # which no --timeout=0 of the soak takes away
async def test_a_backend_that_comes_and_goes_costs_no_request_no_byte_and_no_descriptor(
    attach: Attach, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    work = await Workload.on_a_new_disk(attach, world)
    disk = work.disk
    assert world.supervisor is not None
    pids = world.supervisor.pid, (await disk.shown())["worker_pid"]

    async def idle_descriptors() -> list[int]:
        await disk.until("connected", lambda s: s.get("phase") == "connected", seconds=DEADLINE)
        return [descriptors(pid) for pid in pids]

    before = await idle_descriptors()
    absences = Absences(disk, work, work.seed + 1)
    await work.beside(absences.run(TIMES), absences)
    assert work.errors == 0, disk.log
    assert (await disk.shown())["worker_pid"] == pids[1], "no worker had a reason to end"
    await disk.leave()

    async def as_before() -> bool:
        # The first look may have seen more: the end of a question that was still being put away.
        return all(now <= then for now, then in zip(await idle_descriptors(), before, strict=True))

    await eventually("the descriptors of before", as_before, why=lambda: f"{before}\n{disk.log}")
    with capsys.disabled():
        print(f"\n0 miscompares, {work}; {absences}")
