# SPDX-License-Identifier: BSD-2-Clause
"""What the disk service and a backend agree upon, and what becomes of it when the backend changes.

The service runs as its own process on an embedded host; the data goes through it in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE, eventually

from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.host.blkengine import Features
from pvfront.host.handles import EmbeddedGrantAllocator
from pvfront.host.service import DiskService
from pvfront.host.vbd import MARK

MIB = 1 << 20
RICH = Features(queues=4)
POOR = Features(
    flush=False, barrier=False, discard=False, persistent=False, indirect=0, queues=1, ring_order=0
)


class Place:
    """A host whose domain 1 has the disk xvdb of 32 MiB, served."""

    def __init__(self, host: Host, backend: BlkBackend, service: DiskService) -> None:
        self.host, self.backend, self.service = host, backend, service

    @property
    def uri(self) -> str:
        return self.service.uri("xvdb")

    async def run(self, *command: str, status: int = 0) -> str:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed (tools/apt-packages.txt)")
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        out, _ = await asyncio.wait_for(process.communicate(), 5 * PATIENCE)
        assert process.returncode == status, f"{command}: {process.returncode}\n{out.decode()}"
        return out.decode()

    async def verify(self) -> None:
        """A MiB and smaller, back as it went."""
        for pattern, where, size in ((1, 0, "1M"), (2, 3 * MIB, "4k"), (3, 5 * MIB + 512, "200k")):
            both = f"-P {pattern} {where} {size}"
            said = await self.run(
                "qemu-io", "-f", "raw", "-c", f"write {both}", "-c", f"read {both}", self.uri
            )
            assert "verification failed" not in said

    async def until(self, what: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        async def shown() -> Any:
            nonlocal found
            found = await self.service.status("xvdb")
            return holds(found)

        await eventually(what, shown, why=lambda: f"{found}\n{self.log()}")
        return found

    async def status(self) -> dict[str, Any]:
        return await self.until("connected", lambda s: s["phase"] == "connected")

    def log(self) -> str:
        return self.service.log.read_text()

    async def says(self, text: str) -> None:
        """Waits for something in the service's log, which a thread of its own writes."""
        await eventually(f"{text!r} in the log", lambda: text in self.log(), why=self.log)

    async def keys(self, what: str) -> dict[str, str]:
        path = f"/local/domain/1/device/vbd/51728{what}"
        store = self.host.store
        return {
            key: await store.read_opt(f"{path}/{key}") or "" for key in await store.directory(path)
        }

    async def reconnect(self, features: Features) -> None:
        """The backend restarts as another one, which the old rings do not suit."""
        await self.backend.stop()
        # Not written by one that has none, and nobody else removes it.
        key = "/local/domain/0/backend/vbd/1/51728/feature-max-indirect-segments"
        await self.host.store.remove(key, missing_ok=True)
        # One that may take up the rings can be Connected again before anybody has seen it leave.
        mark = f"/local/domain/0/backend/vbd/1/51728/{MARK}"
        await self.host.store.remove(mark, missing_ok=True)
        self.backend = await BlkBackend.start(self.host, **asdict(features))


@contextlib.asynccontextmanager
async def place(
    features: Features, *, limit: int = 16384, others: int = 0, access: str = "rw"
) -> AsyncIterator[Place]:
    """`others`: granted pages that another process of the domain holds."""
    # Not tmp_path: a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pvf-"))
    (directory / "disk").touch()
    os.truncate(directory / "disk", 32 * MIB)
    try:
        async with contextlib.AsyncExitStack() as stack:
            host = await stack.enter_async_context(
                await Host.start(directory, gntalloc_limit=limit)
            )
            await host.create_domain(1)
            if others:
                held = EmbeddedGrantAllocator.open(str(directory), domid=1)
                stack.enter_context(held).alloc(0, others)
            spec = f"format=raw, vdev=xvdb, access={access}, target={directory / 'disk'}"
            await host.attach_disk(1, spec)
            backend = await BlkBackend.start(host, **asdict(features))
            service = await DiskService.start(host, "xvdb")
            made = Place(host, backend, service)
            try:
                yield made
            finally:
                await made.service.end()
                await made.backend.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def test_all_that_a_rich_backend_has_is_used() -> None:
    async with place(RICH) as it:
        await it.verify()
        status = await it.status()
        assert status["rings"] == {
            "queues": 1,  # a socket's client has one connection
            "slots": 128,
            "ring_pages": 4,
            "pool_pages": 704,
            "segments": 64,
            "indirect": True,
            "persistent": True,
            "granted": {"asked": 708, "got": 708, "why": ""},
        }
        stats = await it.backend.stats()
        assert stats["indirect"] > 0
        assert stats["persistent_hits"] > 0
        keys = await it.keys("")
        assert keys["ring-page-order"] == "2"
        assert {"ring-ref0", "ring-ref1", "ring-ref2", "ring-ref3"} <= keys.keys()
        assert "ring-ref" not in keys
        assert "multi-queue-num-queues" not in keys


async def test_a_backend_that_offers_nothing_is_served_as_well() -> None:
    async with place(POOR) as it:
        await it.verify()
        status = await it.status()
        rings = status["rings"]
        assert (rings["slots"], rings["pool_pages"], rings["segments"]) == (32, 352, 11)
        assert (rings["indirect"], rings["persistent"]) == (False, False)
        geometry = status["geometry"]
        assert (geometry["flush"], geometry["discard"]) == (False, False)
        keys = await it.keys("")
        assert "ring-ref" in keys
        assert "ring-page-order" not in keys
        (export,) = json.loads(await it.run("nbdinfo", "--json", it.uri))["exports"]
        assert (export["can_flush"], export["can_trim"]) == (False, False)


async def test_a_backend_with_barriers_alone_is_flushed_by_them() -> None:
    async with place(replace(RICH, flush=False, barrier=True)) as it:
        status = await it.status()
        assert (status["geometry"]["flush"], status["geometry"]["barrier"]) == (True, True)
        await it.run("qemu-io", "-f", "raw", "-c", "write 0 4k", "-c", "flush", it.uri)
        stats = await it.backend.stats()
        assert stats["barriers"] > 0
        assert stats["flushes"] == 0


async def test_a_backend_that_comes_back_poorer_gets_what_it_can() -> None:
    async with place(RICH) as it:
        await it.verify()
        before = await it.status()
        await it.reconnect(POOR)
        after = await it.until(
            "the next generation",
            lambda s: s["generation"] > before["generation"] and s["phase"] == "connected",
        )
        assert (after["rings"]["slots"], after["rings"]["segments"]) == (32, 11)
        assert (after["rings"]["indirect"], after["rings"]["persistent"]) == (False, False)
        assert (after["geometry"]["flush"], after["geometry"]["discard"]) == (False, False)
        assert after["worker_pid"] == before["worker_pid"]
        for what in ("it has no flush", "it has no discard"):
            await it.says(f"the backend came back with less: {what}")
        keys = await it.keys("")
        assert "ring-ref" in keys
        assert not keys.keys() & {"ring-page-order", "ring-ref0", "ring-ref3"}, "stale"
        await it.verify()
        await it.reconnect(RICH)
        richer = await it.until(
            "one more",
            lambda s: s["generation"] > after["generation"] and s["phase"] == "connected",
        )
        assert richer["rings"] == before["rings"]
        await it.verify()


async def test_without_room_a_smaller_ring_serves_the_disk_and_says_why() -> None:
    async with place(RICH, limit=300) as it:
        await it.verify()
        rings = (await it.status())["rings"]
        assert rings["granted"]["asked"] == 708
        assert rings["granted"]["got"] == 66 == rings["ring_pages"] + rings["pool_pages"]
        assert rings["granted"]["why"] == "a share of 300 pages for 1 device"


async def test_pages_that_others_hold_cost_a_smaller_ring_and_no_disk() -> None:
    async with place(RICH, limit=1000, others=950) as it:
        await it.verify()
        rings = (await it.status())["rings"]
        assert rings["granted"]["got"] == 27
        assert "no room for 55 granted pages" in rings["granted"]["why"]
        await it.says("no room for 55 granted pages")
