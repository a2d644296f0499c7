# SPDX-License-Identifier: BSD-2-Clause
"""As many disks as a guest can have under one supervisor: each works, and nothing stays of any."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.host.service import DiskService

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "hostile")]
pytest.register_assert_rewrite("nbdclient")

from hubclient import dump  # noqa: E402
from nbdclient import Client  # noqa: E402
from waiting import PATIENCE, eventually  # noqa: E402

DISKS = 64
SIZE = 1 << 20
BLOCK = 64 << 10
GRANTS = 32000  # nearly all references that a domain of the embedded host has


def name_of(number: int) -> str:
    """xvdb … xvdz, xvdaa …"""
    number += 1
    letters = chr(ord("a") + number % 26)
    return "xvd" + (chr(ord("a") + number // 26 - 1) if number >= 26 else "") + letters


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def count(directory: str) -> int:
    """Entries: /proc/PID/fd, /proc/PID/task."""
    return sum(1 for _ in Path(directory).iterdir())


async def use(service: DiskService, number: int, everybody: asyncio.Barrier) -> None:
    """Fills the disk, and reads it back once all others have been filled too."""
    path = service.socket(name_of(number))
    await eventually(f"the socket of {name_of(number)}", path.exists, why=service.log.read_text)
    client = await Client.connect(path)
    try:
        assert client.size == SIZE
        data = os.urandom(SIZE)
        for at in range(0, SIZE, BLOCK):
            await client.write(at, data[at : at + BLOCK])
        await client.flush()
        async with asyncio.timeout(PATIENCE):
            await everybody.wait()
        for at in range(0, SIZE, BLOCK):
            assert await client.read(at, BLOCK) == data[at : at + BLOCK], name_of(number)
    finally:
        await client.close()


async def one_round(host: Host, service: DiskService, disks: int) -> None:
    """Attaches, uses and detaches so many disks."""

    vdevs = []
    for number in range(disks):  # one after the other, as xl does it
        spec = f"vdev={name_of(number)},target=memory:{SIZE >> 20}M"
        vdevs.append(await host.attach_disk(1, spec))
    assert len(set(vdevs)) == disks
    everybody = asyncio.Barrier(disks)
    await asyncio.gather(*(use(service, number, everybody) for number in range(disks)))
    workers = service.workers()
    assert len(workers) == disks
    assert len(dump(host.directory)["ports"]) >= disks
    turns = asyncio.Semaphore(8)

    async def detach(vdev: int) -> None:
        async with turns:
            await host.detach_disk(1, vdev, timeout=PATIENCE)

    await asyncio.gather(*map(detach, vdevs))
    await eventually("every worker's end", lambda: not any(map(alive, workers)))


async def test_64_disks_come_work_and_go_and_leave_nothing() -> None:
    # Not tmp_path: a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pvf-"))
    empty = {"ok": True, "ports": [], "grants": [], "deferred": 0}
    try:
        async with await Host.start(directory, gntalloc_limit=GRANTS) as host:
            await host.create_domain()
            async with await BlkBackend.start(host) as backend:
                service = await DiskService.start(host)
                try:
                    # Not the service's threads: those of asyncio's pool stay, a few.
                    of_disks = [f"/proc/{backend.pid}/task"]
                    of_disks += [
                        f"/proc/{pid}/fd" for pid in (service.pid, backend.pid, *host.pids)
                    ]
                    await one_round(host, service, 1)  # what is opened once is open now
                    await eventually("the end of one disk", lambda: dump(directory) == empty)
                    before = {path: count(path) for path in of_disks}
                    await one_round(host, service, DISKS)
                    await eventually(
                        "neither port nor grant",
                        lambda: dump(directory) == empty,
                        why=lambda: dump(directory),
                    )
                    await eventually(
                        "no descriptor and no thread more than before",
                        lambda: all(count(path) <= before[path] for path in of_disks),
                        why=lambda: [(path, before[path], count(path)) for path in of_disks],
                    )

                    async def none() -> bool:
                        return not await backend.vbds()

                    await eventually("no disk of the backend's", none)
                    run = directory / "run"
                    await eventually(
                        "no file of a disk",
                        lambda: not [*run.glob("vbd-*"), *run.glob("xvd*")],
                        why=lambda: (list(run.iterdir()), service.log.read_text()),
                    )
                    for path in ("/local/domain/1/device/vbd", "/local/domain/0/backend/vbd/1"):
                        assert await host.store.read_opt(path) is None
                    assert await service.stop() == 0
                finally:
                    await service.end()
                log = service.log.read_text()
                assert "Traceback" not in log, log
    finally:
        shutil.rmtree(directory, ignore_errors=True)
