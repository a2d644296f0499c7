# SPDX-License-Identifier: BSD-2-Clause
"""A domain that can be suspended: a fake kernel, a fake store and fake devices."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path

from waiting import PATIENCE

from pvfront.cgroup import FreezeFailed
from pvfront.hooks import Hooks
from pvfront.suspend import Suspend
from pvfront.suspend_machine import Limits, Stage
from pvfront.veto import Line, LogEvent
from pvfront.xswire import XenstoreError

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
        self.refused = ""  # a path that may not be written
        self.on_write: Callable[[str, str], None] = lambda path, value: None
        self._watches: dict[str, list[asyncio.Queue[str]]] = {}

    async def read_opt(self, path: str) -> str | None:
        await asyncio.sleep(0)
        return self.nodes.get(path)

    async def write(self, path: str, value: str) -> None:
        await asyncio.sleep(0)
        if path == self.refused:
            raise XenstoreError(errno.EACCES, "write", path)
        self.writes.append((path, value))
        self.put(path, value)
        self.on_write(path, value)

    async def remove(self, path: str) -> None:
        await asyncio.sleep(0)
        self.nodes.pop(path, None)

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
        self.spared: Collection[str] = ()
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

    async def hold(self, mounts: Collection[str], timeout: float) -> None:
        self.story.append(f"hold {','.join(mounts)}")

    def thaw(self) -> None:
        self.frozen = False
        self.story.append("thaw")

    def spare(self, cgroups: Collection[str]) -> None:
        self.spared = cgroups

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


class FakeHooks(Hooks):
    """The admin's programs, which say when they are told and with what."""

    def __init__(self, story: list[str]) -> None:
        super().__init__(Path("/nonexistent"))
        self.story = story
        self.takes = 0.0

    async def run(
        self, moment: str, facts: Mapping[str, object] | None = None, *, within: float | None = None
    ) -> list[str]:
        assert within is not None or moment.startswith("post-"), "somebody waits for it"
        await asyncio.sleep(self.takes)
        self.story.append(" ".join([moment, *(str(v) for v in (facts or {}).values() if v)]))
        return []


class World:
    """One domain: kernel, store, devices and the owner of suspend."""

    def __init__(self, run_dir: Path, limits: Limits = QUICK) -> None:
        self.story: list[str] = []
        self.store = FakeStore()
        self.kernel = FakeKernel(self.story)
        self.devices = [FakeDevice("xvdb", self.story)]
        self.store.on_write = self.kernel_takes
        self.hooks = FakeHooks([])
        self.suspend = Suspend(
            self.store,
            lambda: self.devices,
            effects=self.kernel,
            limits=limits,
            run_dir=run_dir,
            hooks=self.hooks,
            clock=asyncio.get_running_loop().time,
        )
        self.kernel_obeys = True
        self.new_domain = True  # with a directory of its own in the store
        self.refires = True  # the kernel sets its watches anew
        self.answers: list[list[LogEvent]] = []

    def kernel_takes(self, path: str, value: str) -> None:
        if (path, value) != ("control/shutdown", "suspend") or not self.kernel_obeys:
            return
        self.story.append("suspend written")
        self.store.put(path, "")
        answer = self.answers.pop(0) if self.answers else SUSPENDED
        self.kernel.print(answer)
        if answer is SUSPENDED and self.new_domain:
            self.store.nodes = {"domid": str(int(self.store.nodes["domid"]) + 1), path: ""}
        if answer is SUSPENDED and self.refires:
            self.store.fire("domid")

    @property
    def commands(self) -> list[str]:
        """What was written to control/shutdown."""
        return [value for path, value in self.store.writes if path == "control/shutdown"]

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
