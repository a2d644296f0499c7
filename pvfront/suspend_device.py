# SPDX-License-Identifier: BSD-2-Clause
"""One device's loop as a suspend has it: parked before the domain sleeps, connected again after."""

from __future__ import annotations

from .device import DeviceLoop, Goal, Phase
from .errors import PvfrontError


class SuspendedLoop:
    """A `suspend_group.SuspendParticipant`."""

    def __init__(self, loop: DeviceLoop) -> None:
        self.loop = loop
        self.name = loop.device.name

    async def prepare(self) -> None:
        self.loop.aim(Goal.PARKED)
        wait = self.loop.deadlines
        await self.loop.until_phase(
            Phase.PARKED, Phase.CLOSED, timeout=wait.drain + 2 * wait.closing
        )
        if self.loop.phase is Phase.PARKED and (why := self.loop.frontend.unfenced()) is not None:
            raise PvfrontError(why)

    async def resumed(self, cancelled: bool | None) -> None:
        if self.loop.goal is Goal.PARKED:
            self.loop.aim(Goal.CONNECTED)
        if self.loop.gave_up_at is not None:
            return  # nobody waits for what will not come
        await self.loop.until_phase(
            Phase.CONNECTED, Phase.CLOSED, timeout=self.loop.deadlines.connected
        )

    def poisoned(self) -> None:
        self.loop.poison()

    def filesystems(self) -> list[str]:
        path = self.loop.frontend.os_path
        return [path] if path else []

    def in_flight(self) -> int:
        return self.loop.frontend.in_flight()
