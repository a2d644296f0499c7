# SPDX-License-Identifier: BSD-2-Clause
"""The disk service: what the supervisor needs to know of vbds, and its start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path

from ..claim import Claims
from ..errors import PvfrontError
from ..inventory import NoSuchDevice, require_guest
from ..states import XenbusState
from ..supervisor import RUN_DIR, Supervisor
from ..suspend import Suspend
from ..xenbus import Bus, XenbusDevice
from ..xenstore import Xenstore
from .features import VIRTUAL_DEVICE
from .frontend import DiskFrontend
from .vdev import parse_name, vdev_name

log = logging.getLogger(__name__)

GIVE_BACK_DEADLINE = 10.0


class Disks:
    """`supervisor.DeviceClass` for vbds."""

    klass = "vbd"

    def __init__(self, claims: Claims, run_dir: Path = RUN_DIR) -> None:
        self.claims = claims
        self.run_dir = run_dir

    def label(self, devid: int) -> str:
        return vdev_name(devid)

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        kind = await device.store.read_opt(f"{device.path}/device-type")
        if kind not in (None, "disk"):
            raise PvfrontError(
                f"it is a {kind}, not a disk; pvfront serves disks",
                hint="leave it to the kernel",
            )
        await asyncio.to_thread(self.claims.take, device.name, force=force)

    def frontend(self, device: XenbusDevice) -> DiskFrontend:
        return DiskFrontend(
            device.name,
            device.devid,
            self.label(device.devid),
            self.run_dir,
            stolen=lambda: self._stolen(device.name),
        )

    def _stolen(self, name: str) -> bool:
        if not self.claims.stolen_back(name):
            return False
        log.warning("%s: the kernel's frontend has bound it again; undoing that", name)
        self.claims.undo(name)
        return True

    async def give_back(self, device: XenbusDevice) -> str:
        claim = self.claims.taken(device.name)
        if not device.view.online:
            self.forget(device.name)
            return f"{self.label(device.devid)}: closed; the toolstack is detaching it"
        await device.store.write(f"{device.path}/{VIRTUAL_DEVICE}", str(device.devid))
        if claim is not None and not claim.kernel_had_bound:
            # The kernel can bind a vbd only from a fresh start of both ends. One that it cannot
            # have any more stays Closed: that is what a later detach is answered from.
            await device.write_state(XenbusState.INITIALISING)
            await device.until(
                lambda v: v.backend is XenbusState.INIT_WAIT,
                what="backend InitWait",
                timeout=GIVE_BACK_DEADLINE,
            )
        return await asyncio.to_thread(self.claims.give_back, device.name)

    def forget(self, name: str) -> None:
        self.claims.forget(name)

    def repair(self) -> None:
        self.claims.repair()

    def hold_hot_plug(self) -> None:
        self.claims.hold_autoprobe()

    def release_hot_plug(self) -> None:
        self.claims.release_autoprobe()

    def pass_on(self, name: str) -> None:
        self.claims.probe(name)

    def pass_on_others(self) -> None:
        for name in self.claims.probe_others(lambda name: name.startswith(f"{self.klass}-")):
            log.info("%s: passed on to the kernel", name)


async def serve(names: Collection[str], *, everything: bool, force: bool) -> int:
    """Serves the named disks, or every disk, until SIGTERM; returns the exit status."""
    require_guest()
    store = await Xenstore.connect()
    try:
        present = await Bus(store, "vbd").ids()
        named = []
        for name in names:
            devid = int(name) if name.isdigit() else parse_name(name)
            if devid is None or devid not in present:
                raise NoSuchDevice(
                    f"there is no disk {name!r}",
                    hint=f"there are: {', '.join(map(vdev_name, present)) or 'none'}",
                )
            named.append(devid)
        supervisor = Supervisor(
            store,
            Disks(Claims()),
            (lambda devid: True) if everything else (lambda devid: devid in named),
            named=named,
            hot_plug=everything,
            force=force,
            suspend=lambda participants: Suspend(store, participants),
        )
        return await supervisor.run()
    finally:
        await store.close()
