# SPDX-License-Identifier: BSD-2-Clause
"""A connection to the store in memory without any descriptor: all of it happens in the event loop.

What a virtual clock (vclock.py) needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable

from memstore import Client, MemStore

from pvfront.xenstore import Xenstore
from pvfront.xslink import Link
from pvfront.xswire import Op

HEADER = struct.Struct("=IIII")


class Wire:
    """One domain's end of the connection, in both directions a call of the event loop."""

    payload_max = 4096
    in_flight = 64
    refused: frozenset[Op] = frozenset()

    def __init__(self, link: Link, store: MemStore, domid: int) -> None:
        self.domid = domid
        self._loop = asyncio.get_running_loop()
        self._client = Client(store, domid, lambda data: self._later(link.feed, data))
        link.transport = self

    def _later(self, call: Callable[..., object], *args: object) -> None:
        self._loop.call_soon(call, *args)

    def send(self, frame: bytes, req_id: int) -> None:
        op, _, tx_id, _ = HEADER.unpack_from(frame)
        self._later(self._client.handle, op, req_id, tx_id, frame[HEADER.size :])

    async def close(self) -> None:
        self._client.close()


async def connect(store: MemStore, domid: int, *, timeout: float = 10.0) -> Xenstore:
    """Domain `domid`'s view of `store`."""
    link = Link("memory")
    Wire(link, store, domid)
    return Xenstore("memory", timeout, link, device=False)


@contextlib.asynccontextmanager
async def both_ends() -> AsyncIterator[tuple[MemStore, Xenstore, Xenstore]]:
    """A store, and what a guest (5) and domain 0 see of it."""
    store = MemStore()
    async with await connect(store, domid=5) as guest, await connect(store, domid=0) as dom0:
        yield store, guest, dom0
