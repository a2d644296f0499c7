# SPDX-License-Identifier: BSD-2-Clause
"""The disk service: what the supervisor needs to know of vbds, and its start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..budget import Budget
from ..claimed import is_pattern, left_running, names_disk
from ..config import FILE, PerDevice, load
from ..deviceclass import DeviceClass
from ..errors import PvfrontError
from ..hooks import Hooks
from ..inventory import NoSuchDevice
from ..platform import Platform, platform
from ..service import nothing_named
from ..states import XenbusState
from ..supervisor import Supervisor
from ..suspend_shared import in_guest
from ..threads import in_daemon_thread
from ..xenbus import Bus, XenbusDevice
from . import nbd, ublk, ublkcontrol
from .features import VIRTUAL_DEVICE
from .frontend import DiskFrontend
from .nbdexport import SocketTarget
from .settings import SECTION, DiskSettings, Export, from_config
from .target import NbdTarget, Target
from .vdev import parse_name, vdev_name

log = logging.getLogger(__name__)

GIVE_BACK_DEADLINE = 10.0


class Disks(DeviceClass):
    """Vbds."""

    klass = "vbd"
    kept_over_restart = False  # what is in use is kept in any case

    def __init__(
        self,
        on: Platform,
        export: Export | None = None,
        *,
        settings: PerDevice[DiskSettings] | None = None,
        expected: int = 0,
        on_ublk: Collection[int] = (),
    ) -> None:
        """`export`: what users get, a kernel's device or a socket; None: `on` decides.

        "auto" is nbd here: `choose` knows better. `on_ublk`: disks that have a ublk device.
        `expected`: how many disks there will be, as far as that is known.
        """
        super().__init__(on)
        self.settings = settings or PerDevice(DiskSettings)
        self.budget = Budget(on.grant_limit, expected=expected)
        self.hooks = Hooks(on.config_dir / "hooks.d")
        self.export: Export = export or on.default_target
        self._on_ublk = frozenset(on_ublk)

    def label(self, devid: int) -> str:
        return vdev_name(devid)

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        kind = await device.store.read_opt(f"{device.path}/device-type")
        if kind not in (None, "disk"):
            raise PvfrontError(
                f"it is a {kind}, not a disk; pvfront serves disks",
                hint="leave it to the kernel",
            )
        await super().take(device, force=force)

    def frontend(self, device: XenbusDevice) -> DiskFrontend:
        label = self.label(device.devid)
        target: Target
        if self.export == "socket":
            target = SocketTarget(label, self.platform.run_dir)
        elif self._has_ublk(device):
            target = ublk.UblkTarget(device.devid, label)
        else:
            target = NbdTarget(f"pvfront:{device.name}", label)
        return DiskFrontend(
            device.name,
            device.devid,
            label,
            self.platform,
            target,
            settings=self.settings.of(device.devid),
            budget=self.budget,
            on_event=self.hooks.tell,
            stolen=lambda: self.stolen(device.name),
        )

    def _has_ublk(self, device: XenbusDevice) -> bool:
        """What an earlier supervisor has made stays: somebody may have it open."""
        wanted = self.export == "ublk"
        if device.devid in self._on_ublk:
            found = True
        elif wanted and any(d.backend == f"pvfront:{device.name}" for d in nbd.devices()):
            found = False
        else:
            return wanted
        if found is not wanted:
            kind = "ublk" if found else "nbd"
            log.warning("%s: it has a %s device already, and keeps it", device.name, kind)
        return found

    async def _give_back(self, device: XenbusDevice) -> str:
        claim = self.claims.taken(device.name)
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
        return await super()._give_back(device)

    def forget(self, name: str) -> None:
        super().forget(name)
        self.budget.leave(name)


def find(name: str, present: Collection[int]) -> int:
    """The number of a disk given by name or number. Raises NoSuchDevice."""
    devid = int(name) if name.isdigit() else parse_name(name)
    if devid is None or devid not in present:
        raise NoSuchDevice(
            f"there is no disk {name!r}",
            hint=f"there are: {', '.join(map(vdev_name, present)) or 'none'}",
        )
    return devid


async def choose(export: Export) -> tuple[Export, frozenset[int]]:
    """What "auto" means on this kernel, and the disks that have a ublk device already.

    Raises PvfrontError if ublk is asked for and cannot be had.
    """

    def look() -> tuple[str | None, frozenset[int]]:
        return ublkcontrol.unusable(), ublk.present()

    if export in ("socket", "nbd"):
        return export, await in_daemon_thread("ublk devices", ublk.present)
    problem, present = await in_daemon_thread("ublk", look)
    if problem is None:
        log.info("disks are exported as ublk devices")
        return "ublk", present
    if export == "ublk":
        raise PvfrontError(f"--target ublk: {problem}", hint="use --target nbd")
    log.info("disks are exported as nbd devices: %s", problem)
    return "nbd", present


async def serve(
    names: Collection[str],
    *,
    everything: bool,
    force: bool,
    export: Export | None = None,
    config: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Serves the named disks, or every disk, or those that the file of settings names, until
    SIGTERM; returns the exit status.

    `config`: the file of settings instead of the usual one; `options`: settings above it.
    """
    on = platform()
    on.require()
    path = config or on.config_dir / FILE
    settings = from_config(load(path, needed=config is not None))
    settings.disks.override(options or {})
    patterns = ("*",) if everything else settings.service.claim
    if not names and not patterns and not left_running(on.run_dir, "vbd"):
        return nothing_named(path, "disk", 'claim = ["xvdb"]', SECTION)
    on_ublk: frozenset[int] = frozenset()
    if export is None:
        asked = settings.service.target
        export = on.default_target if asked == "auto" else asked
    if export != "socket":
        export, on_ublk = await choose(export)
    store = await on.store()
    try:
        present = await Bus(store, "vbd").ids()
        named = [find(name, present) for name in names]
        wanted: Callable[[int], bool] = (
            (lambda devid: devid in named) if names else (lambda devid: names_disk(patterns, devid))
        )
        for pattern in () if names else patterns:
            if not is_pattern(pattern) and not any(names_disk([pattern], d) for d in present):
                log.info("%s: named in %s, and not there (yet)", pattern, path)
        disks = Disks(
            on,
            export,
            settings=settings.disks,
            expected=sum(map(wanted, present)),
            on_ublk=on_ublk,
        )
        supervisor = Supervisor(
            store,
            disks,
            wanted,
            run_dir=on.run_dir,
            named=named,
            hot_plug=not names,
            force=force,
            suspend=in_guest(on, store, "pvfront-vbd"),
        )
        if on.name != "xen":
            log.info("embedded host: workers keep this user, and nothing takes part in a suspend")
        try:
            return await supervisor.run()
        finally:
            await disks.hooks.close()
    finally:
        await store.close()
