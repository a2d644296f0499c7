# SPDX-License-Identifier: BSD-2-Clause
"""Two services in one domain: one owns suspend, the other's devices take part."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from suspendworld import SUSPENDED, FakeDevice, FakeKernel, World
from waiting import PATIENCE, eventually

from pvfront.cgroup import own_cgroup
from pvfront.suspend import Suspend
from pvfront.suspend_machine import Limits, Stage
from pvfront.suspend_members import SOCKET, uncovered
from pvfront.suspend_shared import SharedSuspend
from pvfront.unixserver import hang_up

PATIENT = Limits(rearm=1, taken=60, end=60)
"""A machine that does something else meanwhile is not what is tested."""


ASKED = ("control/shutdown", "suspend")


def this_cgroup() -> str:
    return own_cgroup(Path("/proc/self/cgroup").read_text())


class Service:
    """One service's part in a world; its kernel is made anew with each try to own suspend."""

    def __init__(self, world: World, run_dir: Path, name: str, device: str) -> None:
        self.world = world
        self.device = FakeDevice(device, world.story)
        self.kernels: list[FakeKernel] = []

        def make(store, participants, **more):  # type: ignore[no-untyped-def]
            kernel = FakeKernel(world.story)
            self.kernels.append(kernel)
            return Suspend(store, participants, effects=kernel, **more)

        self.suspend = SharedSuspend(
            world.store, lambda: [self.device], name, make=make, limits=PATIENT, run_dir=run_dir
        )
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.suspend.run())

    async def end(self) -> None:
        """As its process ends: in no order."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.sleep(0)  # asyncio closes the socket of a cancelled connect a turn later

    async def owns(self) -> None:
        self.start()
        await self.suspend.until(lambda s: s.owns and bool(s.status()["armed"]), PATIENCE)
        self.world.kernel = self.kernels[-1]

    async def until(self, **wanted: object) -> None:
        await self.suspend.until(lambda s: wanted.items() <= s.status().items(), PATIENCE)


class Pair:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.world = World(run_dir)
        self.world.kernel.close()
        self.disks = self.service("pvfront-vbd", "vbd-51728")
        self.nets = self.service("pvfront-vif", "vif-0")

    def service(self, name: str, device: str) -> Service:
        return Service(self.world, self.run_dir, name, device)

    @property
    def story(self) -> list[str]:
        return self.world.story

    async def settled(self, by: Service, **counts: int) -> None:
        await by.until(stage=Stage.WATCHING.value, **counts)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """The disks' service owns suspend, the network's has joined."""
    made = Pair(tmp_path)
    await made.disks.owns()
    made.nets.start()
    await made.disks.until(services=["pvfront-vif"])
    async with asyncio.timeout(PATIENCE):
        await made.nets.suspend.may_bind()
    made.story.clear()
    yield made
    for service in (made.nets, made.disks):
        await service.end()


async def test_the_devices_of_both_services_are_closed_before_the_domain_sleeps(pair: Pair) -> None:
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, suspended=1)
    asleep = pair.story.index("suspend written")
    for name in ("vbd-51728", "vif-0"):
        assert pair.story.index(f"{name} closed") < asleep < pair.story.index(f"{name} open")
    assert pair.nets.device.cancelled == [False]


async def test_the_other_services_cgroup_is_not_frozen(pair: Pair) -> None:
    own = this_cgroup()
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, suspended=1)
    assert list(pair.world.kernel.spared) == ([own] if own != "/" else [])


async def test_a_device_of_the_other_service_that_does_not_close_refuses_the_suspend(
    pair: Pair,
) -> None:
    pair.nets.device.failures = [OSError("the ring is not empty")] * 100
    pair.disks.suspend._own.machine.limits = Limits(retry_before=-1)  # type: ignore[union-attr]
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, refused=1)
    assert "suspend written" not in pair.story
    why = str(pair.disks.suspend.status()["last_refusal"])
    assert "vif-0: the ring is not empty" in why
    assert pair.story.count("vbd-51728 open") == 1, "what was closed is open again"


async def test_no_port_is_bound_by_the_other_service_while_the_domain_goes_to_sleep(
    pair: Pair,
) -> None:
    pair.world.kernel_obeys = False
    pair.world.toolstack_asks()
    await eventually("suspend is written", lambda: ASKED in pair.world.store.writes)
    binding = asyncio.create_task(pair.nets.suspend.may_bind())
    await asyncio.sleep(0)
    assert not binding.done()
    pair.world.store.put("control/shutdown", "")
    pair.world.kernel.print(SUSPENDED)
    async with asyncio.timeout(PATIENCE):
        await binding
    assert pair.disks.suspend.status()["requests"] == 1


async def test_what_writes_itself_back_is_named_once_for_all_services(pair: Pair) -> None:
    """The other service's disks are written back by itself; that they are none is no failure."""
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, suspended=1)
    assert [line for line in pair.story if line.startswith("sync")] == ["sync /dev/vbd-51728"]


@pytest.fixture
def event_channels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A file that this process has open, in the place of /dev/xen/evtchn."""
    node = tmp_path_factory.mktemp("dev") / "evtchn"
    with node.open("w"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pvfront.holdings.EVTCHN", str(node))
        yield str(node)


async def test_a_worker_that_no_service_serves_refuses_the_suspend_and_is_named(
    pair: Pair, event_channels: str
) -> None:
    (pair.run_dir / "vif-7.json").write_text(json.dumps({"worker_pid": os.getpid()}))
    (pair.run_dir / "vif-8.json").write_text(json.dumps({"worker_pid": None}))
    pair.disks.suspend._own.machine.limits = Limits(retry_before=-1)  # type: ignore[union-attr]
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, refused=1)
    assert "suspend written" not in pair.story
    why = str(pair.disks.suspend.status()["last_refusal"])
    named = f"vif-7: its worker (pid {os.getpid()}) has event channels, but no service serves it"
    assert named in why
    assert "vif-8" not in why
    assert {"vbd-51728 open", "vif-0 open"} <= set(pair.story)


async def test_a_pid_that_is_somebody_elses_by_now_refuses_nothing(pair: Pair) -> None:
    (pair.run_dir / "vif-7.json").write_text(json.dumps({"worker_pid": os.getpid()}))
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, suspended=1)


def test_a_worker_whose_device_was_put_away_is_covered(tmp_path: Path, event_channels: str) -> None:
    (tmp_path / "vif-0.json").write_text(json.dumps({"worker_pid": os.getpid()}))
    (tmp_path / "vif-1.json").write_text("{oops")
    (tmp_path / "suspend.json").write_text("{}")
    assert uncovered(tmp_path, {"vif-0"}) == []
    assert len(uncovered(tmp_path, set())) == 1


async def test_a_domain_that_slept_unprepared_tells_the_other_service(pair: Pair) -> None:
    pair.world.kernel.print(SUSPENDED)
    await eventually("the word of it", lambda: pair.nets.device.poisons)
    assert pair.disks.device.poisons == 1


async def test_the_other_service_owns_suspend_when_the_first_has_ended(pair: Pair) -> None:
    await pair.disks.end()
    await pair.nets.suspend.until(lambda s: bool(s.status().get("armed")), PATIENCE)
    pair.world.kernel = pair.nets.kernels[-1]
    pair.story.clear()
    pair.world.toolstack_asks()
    await pair.settled(pair.nets, suspended=1)
    assert "vif-0 closed" in pair.story
    assert "vbd-51728 closed" not in pair.story
    pair.disks = pair.service("pvfront-vbd", "vbd-51728")
    pair.disks.start()
    await pair.nets.until(services=["pvfront-vbd"])


async def test_what_an_owner_that_died_had_closed_is_opened_by_the_next_behind_its_veto(
    pair: Pair,
) -> None:
    pair.world.kernel_obeys = False
    pair.world.toolstack_asks()
    await eventually("suspend is written", lambda: ASKED in pair.world.store.writes)
    assert "vif-0 closed" in pair.story
    pair.story.clear()
    await pair.disks.end()
    await eventually("the device open", lambda: "vif-0 open" in pair.story)
    assert pair.story.index("arm") < pair.story.index("vif-0 open")


async def test_a_service_that_hangs_refuses_the_suspend_and_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvfront.suspend_members.SLACK", 0.2)
    pair.disks.suspend._own._limits = Limits(close=0.3)  # type: ignore[union-attr]
    pair.disks.suspend._own.machine.limits = Limits(retry_before=-1)  # type: ignore[union-attr]

    async def hangs(timeout: float) -> list[str]:
        await asyncio.Event().wait()
        return []

    pair.nets.suspend._devices.close = hangs  # type: ignore[method-assign]
    pair.world.toolstack_asks()
    await pair.settled(pair.disks, refused=1)
    assert "pvfront-vif does not answer" in str(pair.disks.suspend.status()["last_refusal"])
    assert "suspend written" not in pair.story


async def test_a_member_tells_nothing_of_suspend_and_leaves_the_veto_alone(pair: Pair) -> None:
    assert pair.nets.suspend.status() == {}
    await pair.nets.end()
    pair.nets.suspend.disarm()
    assert "disarm" not in pair.story


async def test_an_owner_that_ends_leaves_the_veto_to_the_others(pair: Pair) -> None:
    await pair.disks.end()
    pair.disks.suspend.disarm()
    assert "disarm" not in pair.story, "the other service's ports are bound"


async def test_an_owner_that_ends_alone_drops_the_veto(pair: Pair) -> None:
    await pair.nets.end()
    await pair.disks.until(services=[])
    await pair.disks.end()
    pair.disks.suspend.disarm()
    assert "disarm" in pair.story


async def test_a_stranger_on_the_socket_is_shown_out(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    path = pair.run_dir / SOCKET
    assert path.stat().st_mode & 0o777 == 0o600
    for nonsense in (b"{}\n", b"oops\n", b"[]\n", b"x" * 100_000):
        reader, writer = await asyncio.open_unix_connection(str(path))
        with contextlib.suppress(ConnectionError):
            writer.write(nonsense)
            async with asyncio.timeout(PATIENCE):
                assert await reader.read() == b""
        await hang_up(writer)
    assert "does not say who it is" in caplog.text
    assert pair.disks.suspend.status()["services"] == ["pvfront-vif"]
