# SPDX-License-Identifier: BSD-2-Clause
"""The public API as other programs use it: the examples, and what they would meet, on a host."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import PATIENCE, eventually

from pvfront import api
from pvfront.host import Host

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    async with await Host.start() as started:
        await started.create_domain()
        for name, value in started.environ.items():
            monkeypatch.setenv(name, value)
        yield started


async def example(name: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(EXAMPLES / name), *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def said(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    return process.returncode, out.decode(), err.decode()


async def test_two_ends_talk_through_a_granted_page_and_leave_nothing(host: Host) -> None:
    status, out, err = await said(await example("talk_to_self.py", "50"))
    assert (status, err) == (0, "")
    assert out.startswith("domain 1: 50 turns, through grant ")
    nothing = {"ports": [], "grants": [], "deferred": 0}
    await eventually("nothing is left", lambda: host.dump() == nothing, why=host.dump)


async def test_a_program_follows_the_states_of_devices_that_come_and_go(host: Host) -> None:
    process = await example("follow_devices.py", "--count", "3", "vbd")
    assert process.stdout is not None
    vdev = await host.attach_disk(1, "format=raw,vdev=xvdb,access=rw,target=memory:8M")
    line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
    assert line == b"vbd-51728: frontend Initialising (1), backend Initialising (1)\n"
    await host.store.write(f"/local/domain/1/device/vbd/{vdev}/state", "3")
    line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
    assert line == b"vbd-51728: frontend Initialised (3), backend Initialising (1)\n"
    await host.detach_disk(1, vdev, force=True, timeout=0.1)
    status, out, err = await said(process)
    assert (status, err) == (0, "")
    assert "vbd-51728" in out


async def test_without_a_guest_an_example_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVFRONT_HOST", str(tmp_path))
    status, out, err = await said(await example("talk_to_self.py"))
    assert (status, out) == (1, "")
    assert "no embedded host runs there" in err
    assert err.count("\n") == 1


async def test_devices_are_listed_found_and_told_of(host: Host) -> None:
    await host.attach_disk(1, "format=raw,vdev=xvdb,access=rw,target=memory:8M")
    async with await api.open_store() as store:
        assert await api.own_domid(store) == 1
        (disk,) = await api.devices(store)
        assert disk == await api.find_device(store, "xvdb")
        assert (disk.bus_name, disk.backend_domain, disk.owner) == ("vbd-51728", 0, "none")
        assert api.device_status(disk)["frontend_state"] == "Initialising (1)"
        with pytest.raises(api.NoSuchDevice, match="no device 'xvdz'") as caught:
            await api.find_device(store, "xvdz")
        assert caught.value.hint == "there are: xvdb"


async def test_errors_of_the_store_have_an_errno_and_a_class(host: Host) -> None:
    async with await api.open_store() as store:
        with pytest.raises(api.XenstoreError) as caught:
            await store.read("no/such/node")
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.path == "no/such/node"


async def test_on_a_host_that_never_suspends_ports_may_be_bound_at_once(host: Host) -> None:
    async with (
        await api.open_store() as store,
        api.taking_part(store, "test", lambda: ()) as may_bind,
    ):
        await asyncio.wait_for(may_bind(), PATIENCE)


class Suspend:
    """Stands for the part of a service in a guest's suspends: `run` fails when it is told to."""

    def __init__(self) -> None:
        self.failure = asyncio.get_running_loop().create_future()
        self.disarmed = False

    async def run(self) -> None:
        await self.failure

    async def may_bind(self) -> None:
        await asyncio.Event().wait()

    def disarm(self) -> None:
        self.disarmed = True


async def test_whoever_waits_to_bind_is_told_when_suspends_cannot_be_held_up_any_more(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspend = Suspend()
    monkeypatch.setattr(api, "in_guest", lambda *arguments: lambda participants: suspend)
    async with await api.open_store() as store:
        async with api.taking_part(store, "test", lambda: ()) as may_bind:
            suspend.failure.set_exception(api.PvfrontError("no wakeup_count here"))
            with pytest.raises(api.PvfrontError, match="no wakeup_count here"):
                await asyncio.wait_for(may_bind(), PATIENCE)
        assert suspend.disarmed
