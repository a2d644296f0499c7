# SPDX-License-Identifier: BSD-2-Clause
"""Event channels and a granted page of one domain that talks to itself, with pvfront.api.

    python3 talk_to_self.py [COUNT]

One end grants a page and makes a port, the other binds to the port and maps the page; a counter in
the page goes back and forth COUNT times (1000), with an event for each turn. In a Xen guest as
root, or on the embedded host that $PVFRONT_HOST names. Only PV guests may map a page of their own
(see `GrantMapper`): elsewhere the second end writes through the first one's mapping.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import struct
import sys
import time

from pvfront import api

NUMBER = struct.Struct("=Q")


async def turns(channels: api.EventChannels, port: int, page: mmap.mmap, last: int) -> None:
    """One end: adds 1 to the counter whenever an event comes, until it is `last` or more."""
    while NUMBER.unpack_from(page)[0] < last:
        # Binding fires a port once, and one event may stand for several: the page says what is new.
        await channels.wait()
        (now,) = NUMBER.unpack_from(page)
        NUMBER.pack_into(page, 0, now + 1)
        channels.unmask(port)
        channels.notify(port)


class Talk:
    """What a suspend sees of us: it waits until the talk is over, and nothing is bound any more."""

    name = "talk-to-self"

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def prepare(self) -> None:
        await self.over.wait()

    async def resumed(self, cancelled: bool | None) -> None:
        pass

    def poisoned(self) -> None:
        pass

    def filesystems(self) -> tuple[str, ...]:
        return ()

    def in_flight(self) -> int:
        return 0


async def main(count: int) -> None:
    api.require_version("1.0")
    api.require_guest()
    ours = Talk()
    async with await api.open_store() as store:
        domid = await api.own_domid(store)
        async with api.taking_part(store, ours.name, lambda: [ours]) as may_bind:
            await may_bind()
            began = time.perf_counter()
            try:
                how = await talk(domid, count)
            finally:
                ours.over.set()
            took = time.perf_counter() - began
    print(f"domain {domid}: {count} turns, {how}, {took / count * 1e6:.0f} µs each")


async def talk(domid: int, count: int) -> str:
    """What the two ends do; returns how the second one reached the page."""
    with (
        api.open_event_channels() as near,
        api.open_event_channels() as far,
        api.open_grant_allocator() as grants,
        api.open_grant_mapper(domid) as mapper,
        contextlib.ExitStack() as stack,
    ):
        pool = grants.alloc(domid, 1)
        page = there = pool.map()
        how = "through one mapping"
        with contextlib.suppress(api.GrantMapError):
            there = stack.enter_context(mapper.map(domid, pool.grefs)).memory
            how = f"through grant {pool.grefs[0]}"
        port = near.bind_unbound(domid)
        peer = far.bind_interdomain(domid, port)
        ends = {
            asyncio.create_task(turns(near, port, page, count)),
            asyncio.create_task(turns(far, peer, there, count)),
        }
        # Each ends when it sees the last number; the other may wait for an event that never comes.
        done, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for task in done:
            task.result()
        near.unbind(port)
        far.unbind(peer)
        (reached,) = NUMBER.unpack_from(page)
        assert reached >= count
    return how


if __name__ == "__main__":
    try:
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
    except api.PvfrontError as error:
        sys.exit(f"{error}" + (f" ({error.hint})" if error.hint else ""))
