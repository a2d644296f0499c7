# SPDX-License-Identifier: BSD-2-Clause
"""What `pvfront ledger` says of a vif, beside the books of the embedded host, which know better."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import pytest_asyncio
from networld import Network, network, networks
from waiting import eventually

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    networks,
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with network("-o", "max_queues=2", "--all", queues=2) as made:
        await made.attach()
        yield made


async def vif(it: Network) -> dict[str, Any]:
    assert it.service is not None
    (found,) = json.loads(await it.service.pvfront("ledger", "--json"))["devices"]
    assert isinstance(found, dict)
    return found


async def settled(it: Network) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it says while the host's books rest: the backend maps pages when it likes."""

    async def look() -> tuple[dict[str, Any], dict[str, Any]] | None:
        before = it.host.dump()
        found = await vif(it)
        return (found, before) if it.host.dump() == before else None

    held: tuple[dict[str, Any], dict[str, Any]] = await eventually("books that rest", look)
    return held


async def test_what_a_vif_holds_is_what_the_host_has_in_its_books(it: Network) -> None:
    found, books = await settled(it)
    grants = [grant for grant in books["grants"] if grant["domid"] == 1]
    assert sorted(found["event_channels"]) == sorted(
        port["port"] for port in books["ports"] if port["domid"] == 1
    )
    assert found["queues"] == 2
    assert found["pages"] == sum(grant["pages"] for grant in grants)
    assert found["mapped"] == sum(grant["mapped"] for grant in grants)
    assert found["mapped"] >= found["mapped_at_least"] >= found["ring_pages"] == 4
    assert found["pool_pages"] == 2 * (288 + 256)
    assert found["pid"] == it.state()["worker_pid"]
    assert found["since"] is not None


async def test_without_its_supervisor_a_vif_holds_what_its_worker_has(it: Network) -> None:
    before = await vif(it)
    assert it.service is not None
    await it.service.stop(signal.SIGKILL)
    alone = await vif(it)
    assert alone["control_pages"] == 0
    assert alone["pages"] == before["pages"] - before["control_pages"]
    assert set(alone["event_channels"]) <= set(before["event_channels"])
    assert alone["generation"] == before["generation"]
