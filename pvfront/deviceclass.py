# SPDX-License-Identifier: BSD-2-Clause
"""What a supervisor must be told of a class of devices (supervisor.py): disks, networks, consoles.

What each device of it does is its Frontend's (frontend.py).
"""

from __future__ import annotations

from typing import Protocol

from .frontend import Frontend
from .xenbus import XenbusDevice


class DeviceClass(Protocol):
    """What a supervisor needs to know of its class of devices."""

    klass: str
    kept_over_restart: bool
    """Whether a service that is restarted leaves its devices to their workers, used or not: users
    of one that goes and comes back would notice."""

    def label(self, devid: int) -> str:
        """The name users give it: 'xvdb' for 51728."""
        ...

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        """Takes the device from the kernel; raises PvfrontError with the reason if it cannot."""
        ...

    def has(self, name: str) -> bool:
        """Whether the device was taken, by this supervisor or an earlier one. For a thread."""
        ...

    def patience(self, name: str) -> float | None:
        """Seconds until a device that was just taken is connected, or else is given back; None: as
        long as it takes.
        """
        ...

    def frontend(self, device: XenbusDevice) -> Frontend: ...

    async def give_back(self, device: XenbusDevice) -> str:
        """Gives a closed device back to the kernel; returns what became of it, for people."""
        ...

    def forget(self, name: str) -> None:
        """The toolstack has removed the device: nothing of the claim is to be kept."""
        ...

    def repair(self) -> None:
        """Undoes what a killed supervisor left in the system's settings."""
        ...

    def hold_hot_plug(self) -> None:
        """From now on new devices wait for `pass_on` or `take`, not bound by the kernel."""
        ...

    def release_hot_plug(self) -> None: ...

    def pass_on(self, name: str) -> None:
        """Lets the kernel have a device that is not ours."""
        ...

    def pass_on_others(self) -> None:
        """Lets the kernel have every device of another class that nobody has."""
        ...
