# SPDX-License-Identifier: BSD-2-Clause
"""The network service: what the supervisor needs to know of vifs, and its start."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..budget import Budget
from ..claim import load_module
from ..claimed import is_pattern, left_running, names_vif
from ..config import FILE, PerDevice, load
from ..deviceclass import DeviceClass
from ..errors import PvfrontError
from ..inventory import NoSuchDevice
from ..platform import Platform, platform
from ..service import nothing_named
from ..states import XenbusState
from ..supervisor import Supervisor
from ..suspend_shared import in_guest
from ..threads import in_daemon_thread
from ..xenbus import Bus, XenbusDevice
from . import link, tap
from .frontend import NetFrontend
from .settings import SECTION, NetSettings, from_config, parse_name
from .uplink import note_of, refuse_if_relied_on

log = logging.getLogger(__name__)

CONNECTED_WITHIN = 20.0
"""Seconds that a vif which the kernel served gets until it is connected here."""
BACK_WITHIN = 10.0  # the kernel's interface, once it has the vif again
_NEVER = 1e9


class Networks(DeviceClass):
    """Vifs."""

    klass = "vif"
    kept_over_restart = True

    def __init__(
        self,
        on: Platform,
        settings: PerDevice[NetSettings] | None = None,
        *,
        expected: int = 0,
    ) -> None:
        """`expected`: how many vifs there will be, as far as that is known at the start."""
        super().__init__(on)
        self.budget = Budget(on.grant_limit, expected=expected)
        self.settings = settings or PerDevice(NetSettings)
        self._frontends: dict[str, NetFrontend] = {}
        self._names: dict[str, str] = {}  # interfaces', of what was taken
        self._naming = threading.Lock()
        self._later: set[asyncio.Task[None]] = set()

    def label(self, devid: int) -> str:
        return f"vif{devid}"

    def _ifname(self, name: str) -> str:
        """What the system called it, or would have: existing configuration names it so."""
        ours = tap.find(name)
        if ours is not None:
            return ours[1]
        claim = self.claims.taken(name)
        if claim is not None and claim.os_device:
            return claim.os_device
        devid = int(name.rpartition("-")[2])
        if self.platform.name != "xen":
            return f"enX{devid}"
        others = {self._names[other] for other in list(self._names) if other != name}
        others |= {one.ifname for other, one in list(self._frontends.items()) if other != name}
        return link.default_name(devid, self.platform.roots, taken=others)

    def _take(self, name: str, *, force: bool) -> None:
        self._take_from_kernel(name, force=force)
        with self._naming:  # several are taken at a time
            self._names[name] = self._ifname(name)

    def _take_from_kernel(self, name: str, *, force: bool) -> None:
        ifname = self.claims.os_device(name)
        if not ifname or self.claims.driver_of(name) is None:
            super()._take(name, force=force)
            return
        ifname = link.kernels_name(name, ifname, self.platform.roots)
        if not force:
            refuse_if_relied_on(name, ifname, note_of(self.platform.roots))
        note = link.note_path(name, self.platform.run_dir)
        link.take_over(name, ifname, self.platform.run_dir)
        try:
            super()._take(name, force=force)
        except BaseException:
            note.unlink(missing_ok=True)
            raise

    def patience(self, name: str) -> float | None:
        # The note goes when our interface is there.
        was_used = link.note_path(name, self.platform.run_dir).exists()
        return CONNECTED_WITHIN if was_used else None

    def frontend(self, device: XenbusDevice) -> NetFrontend:
        device.tells = link.STATE_KEYS
        made = self._frontends[device.name] = NetFrontend(
            device.name,
            device.devid,
            self._names[device.name],
            self.platform,
            settings=self.settings.of(device.devid),
            budget=self.budget,
            stolen=lambda: self.stolen(device.name),
        )
        return made

    def link_changed(self, index: int, name: str, mtu: int) -> None:
        """The kernel says what an interface is like now. It may be any."""
        for frontend in self._frontends.values():
            frontend.link_changed(index, name, mtu)

    async def _give_back(self, device: XenbusDevice) -> str:
        name = device.name
        await device.write_state(XenbusState.INITIALISING)
        text = await super()._give_back(device)
        if self.claims.driver_of(name) is None:
            return text  # nobody has it whom an interface would be of
        ifname = await self._handed_back(name, BACK_WITHIN)
        if ifname:
            return f"{name}: given back to the kernel as {ifname}"
        task = asyncio.create_task(self._hand_back_later(name), name=f"hand back {name}")
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return f"{text}; the kernel has not connected it yet"

    async def _handed_back(self, name: str, within: float) -> str:
        """The kernel's interface, configured as ours was; "" if there is none in time.

        The kernel makes it when its frontend is connected.
        """
        end = time.monotonic() + within
        while not (ifname := self.claims.os_device(name)):
            if time.monotonic() >= end or self.claims.driver_of(name) is None:
                return ""
            await asyncio.sleep(0.1)

        def hand_back() -> str:
            settled = link.kernels_name(name, ifname, self.platform.roots)
            return link.hand_back(name, settled, self.platform.run_dir)

        return await in_daemon_thread(f"hand back {name}", hand_back)

    async def _hand_back_later(self, name: str) -> None:
        if ifname := await self._handed_back(name, _NEVER):
            log.info("%s: the kernel has connected it, as %s", name, ifname)

    def forget(self, name: str) -> None:
        super().forget(name)
        self._frontends.pop(name, None)
        self._names.pop(name, None)
        link.note_path(name, self.platform.run_dir).unlink(missing_ok=True)


def interfaces(devid: int, on: Platform) -> list[str]:
    """What the vif's network interface is called now: the kernel's, or ours."""
    ours = tap.find(f"vif-{devid}")
    found = (on.claims().os_device(f"vif-{devid}"), ours[1] if ours is not None else "")
    return [ifname for ifname in found if ifname]


def find(name: str, present: Collection[int], on: Platform) -> int:
    """The number of a vif given as a number, "vif0", or its interface. Raises NoSuchDevice."""
    for devid in present:
        if name in interfaces(devid, on):
            return devid
    number = parse_name(name)
    if number is None or number not in present:
        raise NoSuchDevice(
            f"there is no network interface {name!r}",
            hint=f"there are: {', '.join(f'vif{n}' for n in present) or 'none'}",
        )
    return number


def _prepare() -> None:
    from .. import rtnetlink  # noqa: F401 - now: later an interface waits for it

    if not Path(tap.TUN).exists() and (problem := load_module("tun")) is not None:
        raise PvfrontError(f"{tap.TUN} is missing, and its module cannot be loaded: {problem}")


async def serve(
    names: Collection[str],
    *,
    everything: bool,
    force: bool,
    config: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Serves the named vifs, or every vif, or those that the file of settings names, until SIGTERM;
    returns the exit status.

    `config`: the file of settings instead of the usual one; `options`: settings above it.
    """
    on = platform()
    on.require()
    path = config or on.config_dir / FILE
    settings = from_config(load(path, needed=config is not None))
    settings.vifs.override(options or {})
    patterns = ("*",) if everything else settings.service.claim
    if not names and not patterns and not left_running(on.run_dir, "vif"):
        return nothing_named(path, "network interface", 'claim = ["vif1"]', SECTION)
    await in_daemon_thread("modprobe tun", _prepare)
    # Its debug messages are of every packet of netlink.
    logging.getLogger("pyroute2").setLevel(logging.INFO)
    store = await on.store()
    try:
        present = await Bus(store, "vif").ids()
        named = await in_daemon_thread("find", lambda: [find(name, present, on) for name in names])
        # One that is attached later has no name yet: the kernel does not bind it.
        called = await in_daemon_thread("find", lambda: {d: interfaces(d, on) for d in present})
        wanted: Callable[[int], bool] = (
            (lambda devid: devid in named)
            if names
            else (lambda devid: names_vif(patterns, devid, called.get(devid, ())))
        )
        for pattern in () if names else patterns:
            if not is_pattern(pattern) and not any(
                names_vif([pattern], devid, called[devid]) for devid in present
            ):
                log.info("%s: named in %s, and not there (yet)", pattern, path)
        networks = Networks(
            on,
            settings.vifs,
            expected=sum(map(wanted, present)),
        )
        supervisor = Supervisor(
            store,
            networks,
            wanted,
            run_dir=on.run_dir,
            named=named,
            hot_plug=not names,
            force=force or settings.service.force,
            suspend=in_guest(on, store, "pvfront-vif"),
        )
        following = asyncio.create_task(link.follow(networks.link_changed), name="links")
        try:
            return await supervisor.run()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    finally:
        await store.close()
