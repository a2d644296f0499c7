# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE as a part of the agent: the bus, the store, and what the agent's events become on it.

It has a connection to the store of its own: callers' transactions are in nobody else's way. When
that is lost, or the bus, all sessions end and callers see the name go; the agent begins it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from dbus_fast import BusType, NameFlag, RequestNameReply
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusError

from ... import inventory
from ...errors import PvfrontError
from ...xenstore import Xenstore
from ..context import Context, Resumed, ShutdownAsked
from ..resume import SENTINEL
from .bus import NAME, Adapter
from .framing import FramedBus
from .policy import Limits, Policy
from .sessions import Requests, Sessions


class Xeniface:
    """The D-Bus service."""

    name = "xeniface"

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._adapter: Adapter | None = None

    async def run(self, context: Context) -> None:
        """Raises PvfrontError: there is no bus, or it refuses the name."""
        if not context.settings.xeniface.enabled:
            return
        async with await context.platform.store() as store, connected() as bus:
            policy = Policy(context.settings.xeniface, self._limits)
            sessions = Sessions(store, policy, lambda *fired: adapter.watch_fired(*fired))
            adapter = Adapter(bus, sessions, Requests(store, policy), _Guest(context, store))
            try:
                await own_name(bus)
                self._adapter = adapter
                await _first_end(
                    asyncio.create_task(_follow_events(context, adapter)),
                    asyncio.create_task(_follow_resumes(store, sessions)),
                    asyncio.create_task(_disconnected(bus)),
                )
            finally:
                self._adapter = None
                await adapter.end()
                await sessions.close_all()

    def status(self) -> dict[str, Any]:
        adapter = self._adapter
        return {"bus_name": NAME, "served": False} if adapter is None else adapter.status()


class _Guest:
    """What the bus may ask beside the store."""

    def __init__(self, context: Context, store: Xenstore) -> None:
        self._context = context
        self._store = store

    async def devices(self) -> list[dict[str, Any]]:
        found = await inventory.devices(self._store, self._context.platform)
        return [each.as_json() for each in found]

    async def device(self, name: str) -> dict[str, Any]:
        on = self._context.platform
        device = await inventory.find(self._store, name, on)
        return await inventory.status_from_outside(device, on)

    def resumes(self) -> int:
        return self._context.resumes


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[MessageBus]:
    """A connection to the system bus ($DBUS_SYSTEM_BUS_ADDRESS). Raises PvfrontError."""
    try:
        bus = await FramedBus(bus_type=BusType.SYSTEM, auth_timeout=30).connect()
    except Exception as error:  # its own errors, and whatever a socket may say
        raise PvfrontError(
            f"no D-Bus: {error or type(error).__name__}", hint="apt-get install dbus"
        ) from None
    try:
        yield bus
    finally:
        bus.disconnect()


async def own_name(bus: MessageBus) -> None:
    """Raises PvfrontError: somebody else has it, or the bus does not let us."""
    try:
        got = await bus.request_name(NAME, NameFlag.DO_NOT_QUEUE)
    except DBusError as error:
        raise PvfrontError(
            f"D-Bus: {error.text}", hint=f"is {NAME}.conf in /usr/share/dbus-1/system.d?"
        ) from None
    if got is not RequestNameReply.PRIMARY_OWNER:
        raise PvfrontError(f"D-Bus: another process has the name {NAME}")


async def _follow_events(context: Context, adapter: Adapter) -> None:
    with context.events.subscription() as events:
        while True:
            match await events.get():
                case Resumed(count=count):
                    adapter.resumed(count)
                case ShutdownAsked(kind=kind):
                    adapter.shutdown_requested(kind)


async def _follow_resumes(store: Xenstore, sessions: Sessions) -> None:
    """Also how a store that is lost is noticed: raises XenstoreLost."""
    async with store.watch(SENTINEL) as fired:
        await anext(fired)  # only says that the watch is set
        async for _ in fired:
            sessions.resumed()


async def _disconnected(bus: MessageBus) -> None:
    with contextlib.suppress(Exception):
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
    raise PvfrontError("D-Bus: the connection was lost")


async def _first_end(*tasks: asyncio.Task[None]) -> None:
    """Until one of them ends; raises what it raised."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
