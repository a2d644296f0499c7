# SPDX-License-Identifier: BSD-2-Clause
"""A vif's control ring on the embedded host: without one, after a restart, with little room."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from networld import OURS4, THEIRS4, Network, Transfer, network, networks
from waiting import eventually

pytestmark = networks

POOLS = 2 * (288 + 256)
MIB = 1 << 20


def control(it: Network) -> dict[str, Any]:
    found = it.state()["control"]
    assert isinstance(found, dict)
    return found


async def carries(it: Network, size: int = MIB) -> None:
    for source, address in ((it.guest, THEIRS4), (it.net, OURS4)):
        assert await (await Transfer.start(it, source, address, size)).ended() == size


@pytest.mark.parametrize(
    "features", [{"ctrl_ring": False}, {"gref_mapping": 0}], ids=["no ring", "as Linux's"]
)
async def test_a_backend_without_it_carries_the_same(features: dict[str, Any]) -> None:
    async with network("-o", "max_queues=2", "--all", queues=2, **features) as it:
        await it.attach()
        await it.configure()
        assert control(it)["static"]["pages"] == 0
        assert bool(control(it)["hash"]) == ("ctrl_ring" not in features)
        assert "WARNING" not in "".join(
            line for line in it.log.splitlines() if "control" in line or "mapped" in line
        )
        await carries(it)


async def test_a_restarted_supervisor_has_no_control_ring_until_the_next_connection() -> None:
    async with network("-o", "max_queues=2", "--all", queues=2) as it:
        await it.attach()
        await it.configure()
        port = control(it)["ports"]
        assert it.service is not None
        await it.service.stop(signal.SIGKILL)
        await it.serve("-o", "max_queues=2", "--all")
        await it.until("adopted", lambda s: "next connection" in s["control"]["state"])
        assert control(it)["ports"] == []
        await carries(it)
        generation = it.state()["generation"]
        os.kill(it.state()["worker_pid"], signal.SIGKILL)
        await it.connected(after=generation)
        assert control(it)["state"] == "in use"
        assert control(it)["static"]["pages"] == POOLS
        assert port

        async def carried() -> bool:
            await carries(it)
            return True

        await eventually("packets of the new connection", carried)


async def test_two_vifs_share_a_small_limit_and_both_work() -> None:
    async with network("-o", "max_queues=2", "--all", queues=2) as it:
        limits = it.host.directory / "limits.json"
        limits.write_text(json.dumps({**json.loads(limits.read_text()), "gntalloc": 300}))
        await it.attach()
        await it.configure()
        rings = it.state()["rings"]
        assert rings["queues"] == 1
        assert rings["granted"]["got"] <= 100
        assert "300 pages" in rings["granted"]["why"]
        await carries(it)
        second = await it.host.attach_vif(1, "mac=00:16:3e:07:00:09,ip=10.8.0.1/24")
        await it.connected(second)
        granted = [it.state(devid)["rings"]["granted"]["got"] for devid in (0, second)]
        assert sum(granted) <= 300
        assert it.state(second)["phase"] == "connected"
