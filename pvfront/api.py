# SPDX-License-Identifier: BSD-2-Clause
"""Event channels, grants, the store and PV devices for other programs: the public Python API.

Everything that `__all__` names is covered by the policy of docs/interfaces.md, and nothing else of
pvfront is: `VERSION` says which names there are. A program that wants 1.2 or later:

    from pvfront import api
    api.require_version("1.2")

The functions below open things wherever the program runs: in a Xen guest, where most of it wants
root, or on the embedded host that $PVFRONT_HOST names (docs/host.md). What they return, and what
that raises, is told where it is defined: `help(api.EventChannels)`. In short:

| what | opened by | then |
|---|---|---|
| event channels | `open_event_channels()` | `bind_unbound`, `notify`, `wait`, `unmask` |
| pages that we grant | `open_grant_allocator()` | `alloc(domid, pages)` → `GrantPool` |
| pages granted to us | `open_grant_mapper(own_domid)` | `map(domid, grefs)` → `GrantMapping` |
| the store | `await open_store()` | `read`, `write`, `directory`, `transaction`, `watch` |
| devices | `await devices(store)` | `Device`; `device_status`; live: `Bus`, `XenbusDevice` |
| suspends | `taking_part(...)` | needed by whoever binds ports: see there |

Units: pages are `PAGE_SIZE` bytes, times are seconds. Errors: whatever a program may want to tell
its user is a `PvfrontError`, whose text is one line and whose `hint` says what to do; the store's
(`XenstoreError`) and those of devices are OSErrors with an `errno` too. What was written by another
domain (values, states, names of children) is hostile input: parse it, clamp it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from . import inventory
from .errors import ClosedError, DeviceUnavailable, PvfrontError
from .evtchn import EventChannels, EventOverflow
from .gntalloc import GrantAllocator, GrantPool, GrantsExhausted
from .gntdev import GrantMapError, GrantMapper, GrantMapping
from .handle import MAX_DOMID, PAGE_SIZE
from .inventory import Device, NoSuchDevice, NotAGuest
from .negotiate import parse_uint
from .platform import platform
from .states import XenbusState
from .suspend_group import Participants, SuspendParticipant
from .suspend_shared import in_guest
from .versions import API as VERSION
from .xenbus import Bus, DeviceGone, HandshakeTimeout, View, XenbusDevice
from .xenstore import (
    Permission,
    Transaction,
    Watch,
    Xenstore,
    XenstoreError,
    XenstoreLost,
    XenstoreTimeout,
)

__all__ = [
    "MAX_DOMID",
    "PAGE_SIZE",
    "VERSION",
    "Bus",
    "ClosedError",
    "Device",
    "DeviceGone",
    "DeviceUnavailable",
    "EventChannels",
    "EventOverflow",
    "GrantAllocator",
    "GrantMapError",
    "GrantMapper",
    "GrantMapping",
    "GrantPool",
    "GrantsExhausted",
    "HandshakeTimeout",
    "NoSuchDevice",
    "NotAGuest",
    "Participants",
    "Permission",
    "PvfrontError",
    "SuspendParticipant",
    "Transaction",
    "VersionMismatch",
    "View",
    "Watch",
    "XenbusDevice",
    "XenbusState",
    "Xenstore",
    "XenstoreError",
    "XenstoreLost",
    "XenstoreTimeout",
    "device_status",
    "devices",
    "find_device",
    "open_event_channels",
    "open_grant_allocator",
    "open_grant_mapper",
    "open_store",
    "own_domid",
    "require_guest",
    "require_version",
    "taking_part",
]


class VersionMismatch(PvfrontError):
    """This pvfront's API is not what the program was written for."""


def require_version(wanted: str) -> None:
    """Raises VersionMismatch unless this is `wanted` ("1.2") or a later one of the same MAJOR.

    ValueError for what is no version.
    """
    major, minor = (int(part) for part in wanted.split("."))
    here = [int(part) for part in VERSION.split(".")]
    if here[0] != major or here[1] < minor:
        raise VersionMismatch(
            f"pvfront's API is {VERSION}, the program wants {wanted}",
            hint="install another version of pvfront"
            if here[0] == major
            else "the program must be changed: docs/interfaces.md",
        )


def require_guest() -> None:
    """Raises NotAGuest, or PvfrontError (not root; the embedded host does not run), with a hint."""
    platform().require()


def open_event_channels() -> EventChannels:
    """A handle that ports are bound through; a context manager. Raises DeviceUnavailable."""
    return platform().event_channels()


def open_grant_allocator() -> GrantAllocator:
    """A handle that pages are granted through; a context manager. Raises DeviceUnavailable."""
    return platform().grant_allocator()


def open_grant_mapper(own_domid: int) -> GrantMapper:
    """A handle that maps what other domains granted; a context manager. Raises DeviceUnavailable.

    own_domid: this domain's id, `await own_domid(store)`. Its own grants are refused wherever
    mapping them would crash the kernel: everywhere but in PV guests and on the embedded host.
    """
    return platform().grant_mapper(own_domid)


async def open_store() -> Xenstore:
    """A connection to the store, to be shared by all tasks; an async context manager.

    Relative paths ("device/vbd") are below this domain's own directory. Raises XenstoreError.
    """
    return await platform().store()


async def own_domid(store: Xenstore) -> int:
    """This domain's id, which a migration changes. Raises XenstoreError, PvfrontError."""
    return parse_uint(await store.read("domid"), lo=0, hi=MAX_DOMID)


async def devices(store: Xenstore) -> list[Device]:
    """Every PV device of this guest, by class and id: what `pvfront list` shows.

    Some five reads of the store for each: `Bus` and `XenbusDevice` follow changes without asking
    again. Raises XenstoreError.
    """
    return await inventory.devices(store)


async def find_device(store: Xenstore, name: str) -> Device:
    """The device that `name` means: "xvdb", "51728", "vbd-51728", "vif0", or its OS device.

    Raises NoSuchDevice (the hint lists those that are there), XenstoreError.
    """
    return await inventory.find(store, name)


def device_status(device: Device) -> dict[str, Any]:
    """What `pvfront status --json` shows of a device: plain values, counters under "statistics".

    Which keys there are is told by the policy of the JSON (docs/interfaces.md), not by this API's.
    """
    return inventory.status(device)


@contextlib.asynccontextmanager
async def taking_part(
    store: Xenstore, service: str, participants: Participants
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Takes part in the domain's suspends, with pvfront's own services or alone.

    **A program that binds event channels in a guest must.** A port that is still bound when the
    domain is saved or migrated crashes the guest's kernel when it is closed later. So, within

        async with api.taking_part(store, "my-program", lambda: my_devices) as may_bind:
            await may_bind()
            port = channels.bind_unbound(0)

    whatever `participants()` returns is told before a suspend to unbind (`prepare`) and afterwards
    to open everything anew (`resumed`): grants and ports of before are dead, the domain's id is
    another. `may_bind` returns when ports may be bound; `service` names the program in messages.
    At the end of the block no port may be bound any more.

    On the embedded host, which is never suspended, nothing is told and `may_bind` returns at once.
    Raises PvfrontError: this process cannot hold a suspend up (it is not root).
    """
    join = in_guest(platform(), store, service)
    if join is None:
        yield _at_once
        return
    suspend = join(participants)
    task = asyncio.create_task(suspend.run(), name="suspend")

    async def may_bind() -> None:
        waiting = asyncio.create_task(suspend.may_bind())
        try:
            await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task  # raises why nobody takes part any more
        finally:
            waiting.cancel()

    try:
        yield may_bind
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        suspend.disarm()


async def _at_once() -> None:
    pass
