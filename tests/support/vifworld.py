# SPDX-License-Identifier: BSD-2-Clause
"""What a vif's frontend needs around it, all made up: guest, worker, TAP, store.

Each step that can fail is counted, and told to `Faults`, which lets one of them fail.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from controlpeer import Guest, Peer

from pvfront.budget import Budget
from pvfront.netfront import frontend as module
from pvfront.netfront.frontend import NetFrontend
from pvfront.netfront.link import LinkState
from pvfront.netfront.settings import NetSettings
from pvfront.states import XenbusState
from pvfront.worker import Worker, WorkerError, WorkerGone
from pvfront.workermessage import Hello, State
from pvfront.xenbus import View

NAME, IFNAME = "vif-0", "enX0"
MAC = "00:16:3e:0a:0b:0c"
NETBACK = {
    "feature-rx-copy": "1",
    "feature-sg": "1",
    "feature-gso-tcpv4": "1",
    "feature-gso-tcpv6": "1",
    "feature-ipv6-csum-offload": "1",
    "feature-multicast-control": "1",
    "feature-dynamic-multicast-control": "1",
    "feature-split-event-channels": "1",
    "feature-ctrl-ring": "1",
    "feature-xdp-headroom": "1",
    "multi-queue-max-queues": "2",
}


class Faults:
    """Fails the step number `at`, and each that is called `name`; `done`: all steps, by name."""

    def __init__(self) -> None:
        self.at: int | None = None
        self.name = ""
        self.done: list[str] = []

    def step(self, what: str) -> None:
        self.done.append(what)
        if len(self.done) - 1 == self.at or what == self.name:
            raise self.error(what)

    @staticmethod
    def error(what: str) -> Exception:
        match what:
            case "attach" | "start":
                return WorkerError(f"vif-0: the worker refused {what.upper()}: no (EINVAL)", 22)
            case "spawn":
                return WorkerGone("vif-0: the worker does not listen")
        return OSError(5, f"{what} failed")


class FakeWorker:
    """`Worker`: `held` is what it has got and not let go of."""

    def __init__(self, world: World, queues: int) -> None:
        self.world = world
        self.pid = 4000 + len(world.workers)
        self.stats_fd = -1
        self.alive = True
        self.hello = Hello(State.IDLE, 0, NAME, self.pid, 0, 0, queues, 0)
        self.held: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.drains = True
        self.on_event: Any = lambda event: None

    async def attach(self, generation: int, **what: Any) -> None:
        self.calls.append("attach")
        self.world.faults.step("attach")
        assert len(what["fds"]) == (3 if what["rx_port"] else 2)
        self.held.append(what)

    async def start_net(self, generation: int, **what: Any) -> None:
        self.calls.append("start")
        self.world.faults.step("start")
        assert len(self.held) == self.held[0]["queues"] == len(what["target_fds"])
        self.started.append(what)

    async def quiesce(self, generation: int, timeout: float) -> bool:
        self.calls.append("quiesce")
        return self.drains

    async def detach(self, generation: int, *, keep_target: bool, park: bool = False) -> None:
        self.calls.append("detach")
        self.held.clear()

    async def exit(self) -> None:
        self.calls.append("exit")
        assert not self.held
        self.alive = False

    async def ended(self, timeout: float | None) -> bool:
        return not self.alive

    def kill(self) -> None:
        self.calls.append("kill")
        self.alive = False
        self.held.clear()

    def close(self) -> None:
        self.calls.append("close")


class FakeTap:
    """`Tap`."""

    def __init__(self, world: World, queues: int) -> None:
        self.world = world
        self.queues = queues
        self.open = True
        self.set: dict[str, Any] = {}

    def set_offloads(self, **what: Any) -> None:
        self.world.faults.step("offloads")
        self.set.update(what)

    def give(self) -> list[int]:
        self.open = False
        return [self.world.new_fd() for _ in range(self.queues)]

    def close(self) -> None:
        self.open = False


class FakeLink:
    """`Link`, with one TAP for each connection."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.name, self.index, self.mtu, self.most = IFNAME, 7, 0, 0
        self.state = LinkState(False)

    def open(self, queues: int, *, mac: bytes, mtu: int, most: int) -> FakeTap:
        self.world.faults.step("tap")
        tap = FakeTap(self.world, queues)
        tap.set = {"mac": mac, "mtu": mtu, "most": most}
        self.world.taps.append(tap)
        self.mtu, self.most = mtu, most
        return tap

    def found(self) -> bool:
        return True

    def set_state(self, state: LinkState) -> None:
        self.state = state

    def announce(self) -> None:
        pass

    def silence(self) -> None:
        pass

    def close(self) -> None:
        pass


class Store:
    """The store, as a frontend has it through its device."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {"mac": MAC}
        self.back = dict(NETBACK)
        self.path = f"device/vif/{NAME[4:]}"
        self.backend = f"/local/domain/0/backend/vif/5/{NAME[4:]}"
        self.backend_id = 0
        self.view = View(XenbusState.CONNECTED, XenbusState.CONNECTED, True, True)
        self.store = self

    async def backend_keys(self, wanted: Collection[str] | None = None) -> dict[str, str]:
        return {k: v for k, v in self.back.items() if wanted is None or k in wanted}

    async def read_opt(self, path: str) -> str | None:
        return self.keys.get(path.removeprefix(f"{self.path}/"))

    async def write(self, path: str, value: str) -> None:
        self.keys[path.removeprefix(f"{self.path}/")] = value


class World:
    """A vif's frontend and everything around it; its `platform` too."""

    name = "embedded"

    def __init__(self, run_dir: Path, patch: pytest.MonkeyPatch) -> None:
        self.run_dir = run_dir
        self.faults = Faults()
        self.peer = Peer()
        self.guest = Guest(self.peer)
        self.guest.step = self.faults.step
        self.limit: int | None = 16384
        self.budget = Budget(self.grant_limit)
        self.settings = NetSettings(max_queues=2)
        self.device: Any = Store()
        self.workers: list[FakeWorker] = []
        self.living: FakeWorker | None = None
        self.taps: list[FakeTap] = []
        self.fds: set[int] = set()
        self.joined: Sequence[bytes] = ()
        self.vif = self.frontend()
        patch.setattr(Worker, "spawn", self._spawn)
        patch.setattr(Worker, "adopt", self._adopt)
        patch.setattr(module, "joined", lambda ifname: self.joined)
        close = module.os.close
        patch.setattr(module.os, "close", lambda fd: self._close(fd, close))

    def frontend(self) -> NetFrontend:
        platform: Any = self
        made = NetFrontend(NAME, 0, IFNAME, platform, settings=self.settings, budget=self.budget)
        link: Any = FakeLink(self)
        made.link = link
        return made

    # -- what a platform is asked ----------------------------------------------------------------

    def grant_limit(self) -> int | None:
        return self.limit

    def event_channels(self) -> Any:
        return self.guest.event_channels()

    def grant_allocator(self) -> Any:
        return self.guest.grant_allocator()

    # -- what is patched -------------------------------------------------------------------------

    async def _spawn(self, name: str, run_dir: Path, *, queues: int, **_: Any) -> FakeWorker:
        self.faults.step("spawn")
        self.workers.append(FakeWorker(self, queues))
        return self.workers[-1]

    async def _adopt(self, name: str, run_dir: Path) -> FakeWorker | None:
        return self.living

    def new_fd(self) -> int:
        fd = 90_000 + len(self.fds) + sum(tap.queues for tap in self.taps) * 100
        while fd in self.fds:
            fd += 1
        self.fds.add(fd)
        return fd

    def _close(self, fd: int, close: Any) -> None:
        if fd in self.fds:
            self.fds.remove(fd)
        else:
            close(fd)

    # -- what tests do and look at ----------------------------------------------------------------

    @property
    def worker(self) -> FakeWorker:
        return self.workers[-1]

    @property
    def tap(self) -> FakeTap:
        return self.taps[-1]

    async def attach(self) -> dict[str, str]:
        keys = dict(await self.vif.attach(self.device))
        self.device.keys.update(keys)
        return keys

    async def running(self) -> NetFrontend:
        await self.attach()
        await self.vif.start(self.device)
        return self.vif

    def left(self) -> dict[str, Any]:
        """Whatever is still held by anybody; empty: nothing."""
        found = {
            "handles": self.guest.open,
            "pages": self.guest.granted,
            "worker": [worker.pid for worker in self.workers if worker.held],
            "taps": [tap.queues for tap in self.taps if tap.open],
            "descriptors": sorted(self.fds),
            "budget": self.budget.held,
        }
        return {what: held for what, held in found.items() if held}

    def serving(self) -> FakeWorker:
        """The worker, as it says HELLO to the next supervisor."""
        worker = self.worker
        queues = len(worker.held)
        worker.hello = replace(
            worker.hello, state=State.RUNNING, generation=self.vif.generation,
            targets=(1 << queues) - 1, attached=queues,
        )  # fmt: skip
        self.living = worker
        return worker
