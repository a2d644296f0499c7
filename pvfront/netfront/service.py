# SPDX-License-Identifier: BSD-2-Clause
"""The network service: what the supervisor needs to know of vifs, and its start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..claim import load_module
from ..errors import PvfrontError
from ..inventory import NoSuchDevice
from ..platform import Platform, platform
from ..states import XenbusState
from ..supervisor import Supervisor
from ..suspend_shared import SharedSuspend
from ..threads import in_daemon_thread
from ..xenbus import Bus, XenbusDevice
from .frontend import NetFrontend
from .settings import NetSettings
from .tap import TUN

log = logging.getLogger(__name__)


class Networks:
    """`supervisor.DeviceClass` for vifs."""

    klass = "vif"

    def __init__(self, on: Platform, settings: NetSettings | None = None) -> None:
        self.platform = on
        self.settings = settings or NetSettings()
        self.claims = on.claims()

    def label(self, devid: int) -> str:
        return f"vif{devid}"

    def ifname(self, name: str) -> str:
        """What the kernel called it, or would have: existing configuration names it so."""
        claim = self.claims.taken(name)
        if claim is not None and claim.os_device:
            return claim.os_device
        return f"enX{name.rpartition('-')[2]}"

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        def take() -> None:
            ifname = self.claims.os_device(device.name)
            if ifname and not force and ifname in default_routes():
                raise PvfrontError(
                    f"it is {ifname}, the interface of the default route",
                    hint="--force takes it all the same: its connections end meanwhile",
                )
            self.claims.take(device.name, force=force)

        await in_daemon_thread(f"take {device.name}", take)

    def frontend(self, device: XenbusDevice) -> NetFrontend:
        return NetFrontend(
            device.name,
            device.devid,
            self.ifname(device.name),
            self.platform,
            max_queues=self.settings.max_queues,
            stolen=lambda: self._stolen(device.name),
        )

    def _stolen(self, name: str) -> bool:
        if not self.claims.stolen_back(name):
            return False
        log.warning("%s: the kernel's frontend has bound it again; undoing that", name)
        self.claims.undo(name)
        return True

    async def give_back(self, device: XenbusDevice) -> str:
        if not device.view.online:
            self.forget(device.name)
            return f"{self.label(device.devid)}: closed; the toolstack is detaching it"
        await device.write_state(XenbusState.INITIALISING)
        return await in_daemon_thread(
            f"give {device.name}", lambda: self.claims.give_back(device.name)
        )

    def forget(self, name: str) -> None:
        self.claims.forget(name)

    def repair(self) -> None:
        self.claims.repair(self.klass)

    def hold_hot_plug(self) -> None:
        self.claims.hold_autoprobe(self.klass)

    def release_hot_plug(self) -> None:
        self.claims.release_autoprobe(self.klass)

    def pass_on(self, name: str) -> None:
        self.claims.probe(name)

    def pass_on_others(self) -> None:
        for name in self.claims.probe_others(lambda name: name.startswith(f"{self.klass}-")):
            log.info("%s: passed on to the kernel", name)


def default_routes() -> set[str]:
    """The interfaces that a default route goes through."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
        return {
            names[index]
            for route in ipr.get_default_routes()
            if (index := route.get_attr("RTA_OIF")) in names
        }


def find(name: str, present: Collection[int]) -> int:
    """The number of a vif given as a number, "vif0" or "enX0". Raises NoSuchDevice."""
    number = name
    for prefix in ("vif-", "vif", "enX"):
        number = number.removeprefix(prefix)
    if not (number.isascii() and number.isdigit()) or int(number) not in present:
        raise NoSuchDevice(
            f"there is no network interface {name!r}",
            hint=f"there are: {', '.join(f'vif{n}' for n in present) or 'none'}",
        )
    return int(number)


def _need_tun() -> None:
    if not Path(TUN).exists() and (problem := load_module("tun")) is not None:
        raise PvfrontError(f"{TUN} is missing, and its module cannot be loaded: {problem}")


async def serve(
    names: Collection[str],
    *,
    everything: bool,
    force: bool,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Serves the named vifs, or every vif, until SIGTERM; returns the exit status.

    `options`: settings (settings.py).
    """
    on = platform()
    on.require()
    in_guest = on.name == "xen"
    await in_daemon_thread("modprobe tun", _need_tun)
    # Its debug messages are of every packet of netlink.
    logging.getLogger("pyroute2").setLevel(logging.INFO)
    store = await on.store()
    try:
        present = await Bus(store, "vif").ids()
        named = [find(name, present) for name in names]
        wanted: Callable[[int], bool] = (
            (lambda devid: True) if everything else (lambda devid: devid in named)
        )
        supervisor = Supervisor(
            store,
            Networks(on, NetSettings(**(options or {}))),
            wanted,
            run_dir=on.run_dir,
            named=named,
            hot_plug=everything,
            force=force,
            suspend=(lambda devices: SharedSuspend(store, devices, "pvfront-vif"))
            if in_guest
            else None,
        )
        return await supervisor.run()
    finally:
        await store.close()
