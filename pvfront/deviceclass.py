# SPDX-License-Identifier: BSD-2-Clause
"""What a supervisor must be told of a class of devices (supervisor.py): disks, networks, consoles.

What each device of it does is its Frontend's (frontend.py). Whose a device is, the kernel's or
ours, claim.py notes: the same for every class, but for what must be looked at before a device is
taken, and put right when it is given back.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from .frontend import Frontend
from .platform import Platform
from .threads import in_daemon_thread
from .xenbus import XenbusDevice

log = logging.getLogger(__name__)


class DeviceClass(ABC):
    """What a supervisor needs to know of its class of devices."""

    klass: str
    kept_over_restart: bool
    """Whether a service that is restarted leaves its devices to their workers, used or not: users
    of one that goes and comes back would notice."""

    def __init__(self, on: Platform) -> None:
        self.platform = on
        self.claims = on.claims()

    @abstractmethod
    def label(self, devid: int) -> str:
        """The name users give it: 'xvdb' for 51728."""

    @abstractmethod
    def frontend(self, device: XenbusDevice) -> Frontend: ...

    # -- whose it is -------------------------------------------------------------------------

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        """Takes the device from the kernel; raises PvfrontError with the reason if it cannot."""
        # A driver's removal may hang: that must not hang the end of this process too.
        await in_daemon_thread(f"take {device.name}", lambda: self._take(device.name, force=force))

    def _take(self, name: str, *, force: bool) -> None:
        """To be extended. In a thread."""
        self.claims.take(name, force=force)

    def has(self, name: str) -> bool:
        """Whether the device was taken, by this supervisor or an earlier one. For a thread."""
        return self.claims.taken(name) is not None

    def patience(self, name: str) -> float | None:
        """Seconds until a device that was just taken is connected, or else is given back; None: as
        long as it takes.
        """
        return None

    def stolen(self, name: str) -> bool:
        """Whether the kernel's own frontend has bound the device again; undoes that."""
        if not self.claims.stolen_back(name):
            return False
        log.warning("%s: the kernel's frontend has bound it again; undoing that", name)
        self.claims.undo(name)
        return True

    async def give_back(self, device: XenbusDevice) -> str:
        """Gives a closed device back to the kernel; returns what became of it, for people."""
        if not device.view.online:
            self.forget(device.name)
            return f"{self.label(device.devid)}: closed; the toolstack is detaching it"
        return await self._give_back(device)

    async def _give_back(self, device: XenbusDevice) -> str:
        """To be extended."""
        name = device.name
        return await in_daemon_thread(f"give {name}", lambda: self.claims.give_back(name))

    def forget(self, name: str) -> None:
        """The toolstack has removed the device: of it nothing is to be kept. To be extended."""
        self.claims.forget(name)

    # -- hot plug ------------------------------------------------------------------------------

    def repair(self) -> None:
        """Undoes what a killed supervisor left in the system's settings."""
        self.claims.repair(self.klass)

    def hold_hot_plug(self) -> None:
        """From now on new devices wait for `pass_on` or `take`, not bound by the kernel."""
        self.claims.hold_autoprobe(self.klass)

    def release_hot_plug(self) -> None:
        self.claims.release_autoprobe(self.klass)

    def pass_on(self, name: str) -> None:
        """Lets the kernel have a device that is not ours."""
        self.claims.probe(name)

    def pass_on_others(self) -> None:
        """Lets the kernel have every device of another class that nobody has."""
        for name in self.claims.probe_others(lambda name: name.startswith(f"{self.klass}-")):
            log.info("%s: passed on to the kernel", name)
