# SPDX-License-Identifier: BSD-2-Clause
"""As many disks at a time as a large guest may have, each with a worker of its own."""

from __future__ import annotations

import asyncio
import os
import string
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from embedded_world import FIO, EmbeddedDisk, EmbeddedWorld, kib, needs
from waiting import PATIENCE

pytestmark = [pytest.mark.disk, pytest.mark.embedded]

COUNTS = (16, 64) if int(os.environ.get("PVFRONT_REPEATS", "1")) > 1 else (16,)
"""Disks; the many in a soak only (`make soak`)."""
GRANTS = 353
"""Pages for each disk, fewer than it asks for."""
POOL_LEAST = 11
"""Of them, one request's."""
WORKER_KIB = 1024
"""More than that of its own no worker needs, whose pages are the grants."""


@pytest.fixture(params=COUNTS)
def count(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def roomy(count: int) -> Iterator[EmbeddedWorld]:
    """A host with grants for so many disks, and not one page more."""
    with EmbeddedWorld.begin(gntalloc_limit=count * GRANTS) as world:
        yield world


def names() -> Iterator[str]:
    """xvda to xvdz, xvdaa and so on."""
    letters = string.ascii_lowercase
    for first in ("", *letters):
        for last in letters:
            yield f"xvd{first}{last}"


@pytest.mark.timeout(300)
def test_many_disks_are_attached_served_and_detached(
    roomy: EmbeddedWorld, count: int, request: pytest.FixtureRequest
) -> None:
    needs("fio")
    begin = time.monotonic()
    disks = [
        roomy.attach(roomy.backing(4), name=name, wait=False)
        for name, _ in zip(names(), range(count), strict=False)
    ]
    for disk in disks:
        roomy.wait_until(f"{disk.name} served", disk.served)
    served = time.monotonic() - begin
    workers = {disk.worker() for disk in disks}
    assert len(workers) == count
    assert {row["owner"] for row in roomy.devices()} == {"pvfront"}
    assert roomy.held()["event channels"] >= count

    jobs = [f"--name={disk.name} --uri={disk.uri} --rw=randrw" for disk in disks]
    each = "--bsrange=512-64k --blockalign=512 --iodepth=8 --size=256k"
    roomy.run(*f"{FIO} {each} {' '.join(jobs)}".replace("--name=verify", "").split())
    for disk in disks:
        assert disk.state()["generation"] == 1
        assert disk.state()["rings"]["pool_pages"] >= POOL_LEAST
    assert sum(disk.state()["rings"]["granted"]["got"] for disk in disks) <= count * GRANTS

    own = [kib(Path(f"/proc/{pid}/status"), "RssAnon") for pid in workers]
    shared = [kib(Path(f"/proc/{pid}/status"), "RssShmem") for pid in workers]
    supervisor = roomy.supervisor_holds()[1]
    begin = time.monotonic()
    roomy.do(detach_all(roomy, disks))
    roomy.assert_nothing_left()
    figures = (
        f"served after {served:.1f} s, detached in {time.monotonic() - begin:.1f} s; "
        f"a worker: {max(own)} KiB of its own, {max(shared)} KiB of grants; "
        f"the supervisor: {supervisor} KiB"
    )
    request.node.user_properties.append((f"{count} disks", figures))
    assert max(own) < WORKER_KIB


async def detach_all(world: EmbeddedWorld, disks: list[EmbeddedDisk]) -> None:
    await asyncio.gather(
        *(world.host.detach_disk(1, disk.vdev, timeout=PATIENCE) for disk in disks)
    )
