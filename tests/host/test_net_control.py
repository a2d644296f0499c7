# SPDX-License-Identifier: BSD-2-Clause
"""What the control ring does for the path of a vif: steering by a hash, grants that stay mapped."""

from __future__ import annotations

from networld import OURS4, OURS6, SPEC, THEIRS4, THEIRS6, Network, Transfer, network, networks
from waiting import eventually

pytestmark = networks
MIB = 1 << 20


async def flows(it: Network, count: int = 6) -> None:
    """So many TCP connections each way, over both families."""
    going = [
        await Transfer.start(it, source, address, MIB)
        for source, address in (
            (it.guest, THEIRS4), (it.net, OURS4), (it.guest, THEIRS6), (it.net, OURS6),
        )
        for _ in range(count)
    ]  # fmt: skip
    for each in going:
        assert await each.ended() == MIB


async def test_packets_are_steered_by_the_hash_that_the_frontend_set() -> None:
    async with network("-o", "max_queues=2", "--all", queues=2) as it:
        await it.attach()
        await it.configure()

        async def steered() -> bool:
            await flows(it)
            stats = await it.backend.stats()
            assert not stats["ctrl_refused"]
            assert stats["ctrl_requests"] > 0
            queues = await it.queue_statistics()
            # Where a flow goes is its hash's, under a random key.
            return stats["rx_steered"] > 0 and all(queue["rx"]["packets"] for queue in queues)

        await eventually("packets steered to both queues", steered)
        assert not any(vif["mistake"] for vif in await it.backend.vifs())


async def test_grants_stay_mapped_while_a_connection_lasts() -> None:
    async with network(queues=1) as it:
        await it.attach(f"{SPEC},mtu=9000")
        await it.configure()
        await flows(it, 1)
        stats = await it.backend.stats()
        assert stats["kept"] > 256
        assert stats["kept_hits"] > stats["tx_packets"] + stats["rx_packets"]
        assert not stats["ctrl_refused"]
        await it.detach()
        await it.nothing_left()


async def test_a_backend_that_keeps_no_grants_is_done_without() -> None:
    async with network(gref_mapping=0) as it:
        await it.attach()
        await it.configure()
        await flows(it, 1)
        stats = await it.backend.stats()
        assert (stats["kept"], stats["kept_hits"]) == (0, 0)


async def test_a_backend_that_keeps_too_few_grants_is_done_without_the_rest() -> None:
    async with network(gref_mapping=10) as it:
        await it.attach()
        await it.configure()
        await flows(it, 1)
        assert (await it.backend.stats())["kept"] <= 20
