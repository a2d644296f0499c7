# SPDX-License-Identifier: BSD-2-Clause
"""Disks for one program, on the embedded host: `pvfront vbd lend`, and DirectDisk in the tests."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from waiting import PATIENCE, eventually

from pvfront.blkfront.direct import DirectDisk
from pvfront.device import Goal, Phase
from pvfront.errors import PvfrontError
from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.host.faults import Fault
from pvfront.platform import Embedded
from pvfront.supervisor import Supervisor

MIB = 1 << 20
SIZE = 16 * MIB
BACKEND_STATE = "/local/domain/0/backend/vbd/1/51728/state"
STATE = "/local/domain/1/device/vbd/51728/state"
BENCH = "pvfront-disk-bench"  # `lend` knows where it is


class World:
    """A host with the disk xvdb, which nobody serves, and its backend."""

    def __init__(self, host: Host, backend: BlkBackend) -> None:
        self.host = host
        self.backend = backend
        self.store = host.directory / "disk.img"

    @property
    def platform(self) -> Embedded:
        return Embedded(self.host.directory)

    async def start(self, *command: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "pvfront", *command,
            env={**os.environ, **self.host.environ},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def ended(self, process: asyncio.subprocess.Process, status: int = 0) -> tuple[str, str]:
        try:
            out, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
        except TimeoutError:
            process.kill()
            raise AssertionError(f"not ended in {PATIENCE:.0f} s") from None
        assert process.returncode == status, errors.decode()
        return out.decode(), errors.decode()

    async def lend(self, *program: str, status: int = 0) -> tuple[str, str]:
        return await self.ended(await self.start("vbd", "lend", "xvdb", "--", *program), status)

    async def status(self) -> dict[str, object]:
        out, _ = await self.ended(await self.start("status", "--json", "xvdb"))
        found: dict[str, object] = json.loads(out)
        return found

    async def connected(self) -> None:
        """The store says so a little earlier; a detach that comes then is not asked about users."""
        state = self.host.directory / "run/vbd-51728.json"

        def is_connected() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return bool(json.loads(state.read_text())["phase"] == "connected")
            return False

        await eventually("the program's disk connected", is_connected)

    async def program(self) -> int:
        """The pid of the program that has the disk, as status shows it."""

        async def shown() -> object:
            return (await self.status())["worker_pid"]

        pid = await eventually("the program's pid in status", shown)
        assert isinstance(pid, int)
        return pid

    async def backend_is(self, state: str) -> bool:
        return await self.host.store.read(BACKEND_STATE) == state

    async def nothing_held(self) -> None:
        await eventually("nothing held", lambda: not any(self.held()), why=self.held)

    async def nothing_left(self) -> None:
        """No port and no grant, and a frontend that rests: fresh, or closed."""
        await self.nothing_held()
        assert await self.host.store.read(STATE) in ("1", "6")

    def held(self) -> list[object]:
        found = self.host.dump()
        return [found["ports"], found["grants"], found["deferred"]]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    # Not tmp_path: a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pvf-"))
    try:
        async with await Host.start(directory) as host:
            await host.create_domain()
            store = directory / "disk.img"
            store.touch()
            os.truncate(store, SIZE)
            await host.attach_disk(1, f"format=raw,vdev=xvdb,access=rw,target={store}")
            backend = await BlkBackend.start(host)
            made = World(host, backend)
            try:
                yield made
                await made.nothing_left()
            finally:
                await made.backend.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# -- a program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    ["--bs 512 --iodepth 1 --size 64k", "--bs 4k --iodepth 32", "--bs 300k --iodepth 7 --how wait",
     "--bs 4M --iodepth 3 --how epoll", "--bs 16M --iodepth 1"],
)  # fmt: skip
async def test_a_program_reads_back_what_it_wrote(world: World, job: str) -> None:
    out, errors = await world.lend(BENCH, "--verify", *shlex.split(job))
    verified = json.loads(out)["verified"]
    assert verified >= 64 << 10
    assert errors == ""
    written = world.store.read_bytes()[:verified]
    for offset in range(0, verified - verified % 512, 65536):
        word = offset * 0x9E3779B97F4A7C15 % 2**64
        assert written[offset : offset + 8] == word.to_bytes(8, "little")


async def test_a_programs_exit_status_is_the_commands(world: World) -> None:
    await world.lend("sh", "-c", "exit 7", status=7)
    await world.lend("sh", "-c", "kill -KILL $$", status=137)


async def test_a_program_that_is_not_there_is_one_line(world: World) -> None:
    _, errors = await world.lend("/no/such/program", status=127)
    assert errors == "pvfront: /no/such/program cannot be started: No such file or directory\n"


async def test_a_script_runs_one_user_of_the_disk_after_another(world: World) -> None:
    out, _ = await world.lend(
        "sh", "-c", f"{BENCH} --runtime 0.1 --iodepth 4 && {BENCH} --verify --bs 64k && echo end"
    )
    first, second, end = out.splitlines()
    assert json.loads(first)["jobs"][0]["read"]["total_ios"] > 0
    assert json.loads(second)["verified"] == SIZE
    assert end == "end"


async def test_a_killed_program_leaves_nothing(world: World) -> None:
    lender = await world.start("vbd", "lend", "xvdb", "--", BENCH, "--runtime", "1000")
    await world.connected()
    pid = await world.program()
    assert psutil.Process(pid).name().startswith("pvfront-disk-be")
    os.kill(pid, signal.SIGKILL)
    await world.ended(lender, 137)
    await world.nothing_left()
    await world.lend(BENCH, "--verify", "--bs", "64k")


async def test_a_killed_lender_takes_the_disk_from_its_program(world: World) -> None:
    lender = await world.start("vbd", "lend", "xvdb", "--", BENCH, "--runtime", "1000")
    await world.connected()
    lender.kill()
    _, errors = await world.ended(lender, -signal.SIGKILL)
    assert "a request failed: No such device" in errors or "was refused: No such dev" in errors
    ports = world.host.dump
    await eventually(
        "the program lets go", lambda: all(port["domid"] != 1 for port in ports()["ports"])
    )
    await world.lend(BENCH, "--verify", "--bs", "64k")


async def test_sigterm_ends_the_program_and_then_the_lender(world: World) -> None:
    lender = await world.start("vbd", "lend", "xvdb", "--", BENCH, "--runtime", "1000")
    await world.connected()
    lender.terminate()
    await world.ended(lender, 143)


async def test_a_lent_disk_is_detached_when_its_program_has_ended(world: World) -> None:
    lender = await world.start(
        "vbd", "lend", "xvdb", "--", BENCH, "--runtime", "1000", "--how", "wait"
    )
    await world.connected()
    detach = asyncio.create_task(world.host.detach_disk(1, 51728, timeout=2 * PATIENCE))
    await eventually("the backend asks for the disk", lambda: world.backend_is("5"))
    assert not detach.done()
    pid = await world.program()
    os.kill(pid, signal.SIGTERM)
    await world.ended(lender, 143)
    await detach
    await world.host.attach_disk(1, f"format=raw,vdev=xvdb,access=rw,target={world.store}")
    await world.lend(BENCH, "--verify", "--bs", "64k")


async def test_a_disk_that_is_served_is_not_lent(world: World) -> None:
    service = await world.start("vbd", "serve", "xvdb")
    socket = world.host.directory / "run" / "xvdb.nbd"
    await eventually("the service", socket.exists)
    _, errors = await world.lend(BENCH, status=1)
    assert "another supervisor already serves vbd devices" in errors
    service.terminate()
    await world.ended(service)


async def test_an_unknown_disk_is_not_lent(world: World) -> None:
    lender = await world.start("vbd", "lend", "xvdc", "--", BENCH)
    _, errors = await world.ended(lender, 1)
    assert errors.startswith("pvfront: there is no disk 'xvdc'")
    await world.lend(BENCH, "--runtime", "0.1")  # what nothing_left() expects


# -- this process --------------------------------------------------------------------------------


async def test_a_python_program_reads_what_it_wrote(world: World) -> None:
    draw = random.Random(4)
    model = bytearray(SIZE)
    async with DirectDisk.open("xvdb", world.platform) as disk:
        info = disk.info
        assert (info.size, info.sector_size, info.read_only) == (SIZE, 512, False)
        assert (info.flush, info.discard, info.ready, info.generation) == (True, True, True, 1)
        for size in (512, 4096, 5120, 65536, 300 * 512, MIB, 5 * MIB):
            at = draw.randrange((SIZE - size) // 512) * 512
            data = draw.randbytes(size)
            await disk.write(at, data, fua=size == 4096)
            model[at : at + size] = data
            assert await disk.read(at, size) == data
        await asyncio.gather(*(disk.write(n * 8192, bytes([n % 256]) * 4096) for n in range(700)))
        for n in range(700):
            model[n * 8192 : n * 8192 + 4096] = bytes([n % 256]) * 4096
        await disk.flush()
        await disk.discard(MIB, MIB)
        model[MIB : 2 * MIB] = bytes(MIB)
        assert await disk.read(0, SIZE) == model
    assert world.store.read_bytes() == model


async def test_what_a_disk_cannot_do_is_an_error(world: World) -> None:
    async with DirectDisk.open("xvdb", world.platform) as disk:
        for work, code in (
            (disk.read(SIZE, 512), errno.EINVAL),
            (disk.read(1, 512), errno.EINVAL),
            (disk.write(0, b"x" * 100), errno.EINVAL),
            (disk.write(SIZE - 512, bytes(1024)), errno.EINVAL),
        ):
            with pytest.raises(OSError, match=os.strerror(code)):
                await work
    with pytest.raises(OSError, match="Bad file descriptor"):
        await disk.read(0, 512)


async def test_a_read_only_disk_is_not_written(world: World) -> None:
    await world.host.attach_disk(1, "vdev=xvdc,access=ro,target=memory:1M")
    async with DirectDisk.open("xvdc", world.platform) as disk:
        assert disk.info.read_only
        with pytest.raises(OSError, match="Read-only"):
            await disk.write(0, bytes(512))
        assert await disk.read(0, 512) == bytes(512)
    await world.lend(BENCH, "--runtime", "0.1")


async def test_an_unknown_disk_is_not_opened(world: World) -> None:
    with pytest.raises(PvfrontError, match="there is no disk 'xvdz'"):
        async with DirectDisk.open("xvdz", world.platform):
            raise AssertionError("it was opened")
    await world.lend(BENCH, "--runtime", "0.1")


async def test_requests_outlive_their_backend(world: World) -> None:
    async with DirectDisk.open("xvdb", world.platform) as disk:
        await disk.write(0, b"a" * 65536)
        await world.backend.fault(Fault.stall())
        pending = [asyncio.create_task(disk.write(n * 4096, b"b" * 4096)) for n in range(16)]
        await eventually("the requests", lambda: disk.info.pending == 16)
        await world.backend.kill()
        world.backend = await BlkBackend.start(world.host)
        await asyncio.wait_for(asyncio.gather(*pending), PATIENCE)
        assert await disk.read(0, 65536) == b"b" * 65536
        assert disk.info.generation > 1


async def test_a_busy_program_is_parked_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a suspend does, by the same road: the loop's goal is PARKED."""
    made: list[Supervisor] = []
    begin = Supervisor.__init__

    def note(self: Supervisor, *args: object, **more: object) -> None:
        begin(self, *args, **more)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Supervisor, "__init__", note)
    async with DirectDisk.open("xvdb", world.platform) as disk:
        (served,) = made[0].served.values()
        ended = False

        async def write(lane: int) -> int:
            count = 0
            while not ended:
                await disk.write(lane * MIB + count % 200 * 4096, bytes([count % 256]) * 4096)
                count += 1
            return count

        lanes = [asyncio.create_task(write(n)) for n in range(8)]
        for _ in range(3):
            served.loop.aim(Goal.PARKED)
            await served.loop.until_phase(Phase.PARKED, timeout=PATIENCE)
            await world.nothing_held()
            served.loop.aim(Goal.CONNECTED)
            await served.loop.until_phase(Phase.CONNECTED, timeout=PATIENCE)
        ended = True
        counts = await asyncio.wait_for(asyncio.gather(*lanes), PATIENCE)
        assert disk.info.generation >= 4
    data = world.store.read_bytes()
    for lane, count in enumerate(counts):
        for block in range(min(count, 200)):
            last = block + (count - 1 - block) // 200 * 200
            at = lane * MIB + block * 4096
            assert data[at : at + 4096] == bytes([last % 256]) * 4096


async def test_an_open_disk_is_not_taken_by_the_toolstack(world: World) -> None:
    async with DirectDisk.open("xvdb", world.platform) as disk:
        detach = asyncio.create_task(world.host.detach_disk(1, 51728, timeout=PATIENCE))
        await disk.write(0, bytes(4096))
        assert "open in process" in str((await world.status())["os_device"])
        assert not detach.done()
    with contextlib.suppress(PvfrontError):
        await detach
    await world.host.attach_disk(1, f"format=raw,vdev=xvdb,access=rw,target={world.store}")
    await world.lend(BENCH, "--runtime", "0.1")
