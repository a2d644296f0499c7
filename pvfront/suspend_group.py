# SPDX-License-Identifier: BSD-2-Clause
"""The devices of one service as a suspend sees them: settled, closed, opened again together.

`Devices` are those of this process; suspend_members.py has those of other processes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, Self

from .errors import PvfrontError

log = logging.getLogger(__name__)

POLL = 0.02


class SuspendError(PvfrontError):
    """This process cannot own suspend, or a suspend cannot go on; the message says why."""


class NotOwner(SuspendError):
    """Another process owns suspend."""


class SuspendParticipant(Protocol):
    """One device, as suspend sees it. Every method may be called in any state of the device."""

    @property
    def name(self) -> str:
        """For messages: ``xvdb``."""

    async def prepare(self) -> None:
        """Drains, closes towards the backend and unbinds every port.

        Must not need any other program, nor a disk. Raises whatever says why it could not; it is
        cancelled when it takes too long. Either way `resumed` follows.
        """

    async def resumed(self, cancelled: bool | None) -> None:
        """Reconnects, and returns when that is done.

        `cancelled`: the domain never left (True), is a new domain (False), or that is unknown.
        Being cancelled means that nobody waits any more; go on reconnecting.
        """

    def poisoned(self) -> None:
        """The domain was suspended while ports were bound: never close the old descriptor."""

    def filesystems(self) -> Collection[str]:
        """Block devices whose file systems are to be written back, ``/dev/nbd0``."""

    def in_flight(self) -> int:
        """Requests that the device has not answered yet."""


Participants = Callable[[], Collection[SuspendParticipant]]
"""Every device of this process that has, or may have, a port bound."""


class Group(Protocol):
    """The devices of one service."""

    @property
    def names(self) -> list[str]:
        """Of the devices that were last told to close."""
        ...

    async def settle(self, sync: float, drain: float) -> list[str]:
        """Writes file systems back and waits until nothing is in flight, so many seconds for each.

        Returns what was written back. Raises TimeoutError or PvfrontError if that took too long;
        what is left in flight is no failure.
        """
        ...

    async def close(self, timeout: float) -> list[str]:
        """`prepare` of each device, within `timeout` seconds; a line for each that failed."""
        ...

    async def reopen(self, cancelled: bool | None, timeout: float) -> list[str]:
        """`resumed` of each device that was to be closed; a line for each that failed."""
        ...

    def poison(self) -> None:
        """`poisoned` of each device."""
        ...


class Devices:
    """The group of this process."""

    def __init__(
        self,
        participants: Participants,
        sync: Callable[[Collection[str], float], Awaitable[list[str]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._participants = participants
        self._sync = sync
        self._clock = clock
        self._prepared: list[SuspendParticipant] = []

    @property
    def names(self) -> list[str]:
        return [device.name for device in self._prepared]

    async def settle(self, sync: float, drain: float) -> list[str]:
        devices = self._participants()
        paths = sorted({path for device in devices for path in device.filesystems()})
        synced = await self._sync(paths, sync)
        deadline = self._clock() + drain
        while busy := {d.name: d.in_flight() for d in devices if d.in_flight()}:
            if self._clock() > deadline:
                # Whoever cannot drain says so when it is closed.
                log.warning("suspend: still in flight: %s", busy)
                break
            await asyncio.sleep(POLL)
        return synced

    async def close(self, timeout: float) -> list[str]:
        self._prepared = list(self._participants())
        return await each(self._prepared, lambda device: device.prepare(), timeout)

    async def reopen(self, cancelled: bool | None, timeout: float) -> list[str]:
        devices, self._prepared = self._prepared, []
        return await each(devices, lambda device: device.resumed(cancelled), timeout)

    def poison(self) -> None:
        for device in self._participants():
            device.poisoned()


class Watched(ABC):
    """One process's part in suspend, whose state others wait for."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        """Set whenever something that `status` says has changed."""

    @abstractmethod
    def status(self) -> dict[str, object]: ...

    async def until(self, condition: Callable[[Self], bool], timeout: float | None) -> None:
        """Waits for a state, for `status` and tests. Raises TimeoutError that names the state."""
        try:
            async with asyncio.timeout(timeout):
                while not condition(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"suspend: never came; now {self.status()}") from None


async def each(
    devices: Collection[SuspendParticipant],
    call: Callable[[SuspendParticipant], Awaitable[None]],
    timeout: float,
) -> list[str]:
    """Calls every device, side by side; returns a line for each that failed or was late."""

    async def one(device: SuspendParticipant) -> str:
        try:
            async with asyncio.timeout(timeout):
                await call(device)
        except TimeoutError as error:
            return f"{device.name}: {str(error) or f'not within {timeout:g} s'}"
        except Exception as error:
            return f"{device.name}: {str(error) or type(error).__name__}"
        return ""

    return [text for text in await asyncio.gather(*map(one, devices)) if text]
