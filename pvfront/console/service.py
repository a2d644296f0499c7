# SPDX-License-Identifier: BSD-2-Clause
"""The console service: what the supervisor needs to know of consoles, and its start."""

from __future__ import annotations

import asyncio
import logging
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from ..budget import Budget
from ..claim import CannotTake
from ..claimed import is_pattern, left_running, names_console
from ..config import FILE, load
from ..deviceclass import DeviceClass
from ..hooks import Hooks
from ..inventory import NoSuchDevice
from ..platform import Platform, platform
from ..service import nothing_named
from ..supervisor import Supervisor
from ..suspend_shared import in_guest
from ..threads import in_daemon_thread
from ..xenbus import Bus, XenbusDevice
from ..xenstore import Xenstore
from . import dump, fdstore, keys
from .frontend import ConsoleFrontend
from .hotkeys import HotKeys
from .settings import SECTION, Settings, from_config

log = logging.getLogger(__name__)

PRIMARY = 0
"""The number that some toolstacks show the primary console under; it is the kernel's."""
DUMP = "d"
HOT_KEYS = string.ascii_letters + string.digits
"""All of them are taken; `DUMP` is ours, hooks are told of the others."""


class Consoles(DeviceClass):
    """Secondary consoles."""

    klass = "console"
    kept_over_restart = True

    def __init__(
        self, on: Platform, settings: Settings | None = None, *, kept: dict[str, int]
    ) -> None:
        """`kept`: descriptors of an earlier supervisor's, by name."""
        super().__init__(on)
        self.budget = Budget(on.grant_limit)
        self.settings = settings or Settings()
        self.kept = kept
        self._names: dict[int, str] = {}
        self.hooks = Hooks(on.config_dir / "hooks.d")
        self._dumps: dict[str, asyncio.Task[None]] = {}

    def label(self, devid: int) -> str:
        return self._names.get(devid, keys.bus_name(devid))

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        if device.devid == PRIMARY:
            raise CannotTake(f"{device.name}: the primary console stays with the kernel")
        text = await device.store.read_opt(f"{device.path}/{keys.NAME_KEY}")
        name, problem = keys.name_of(text, device.devid)
        if problem is not None:
            log.warning("%s: key %s", device.name, problem)
        if name in (other for devid, other in self._names.items() if devid != device.devid):
            log.warning("%s: another console is called %s already", device.name, name)
            name = device.name
        self._names[device.devid] = name
        await super().take(device, force=force)

    def frontend(self, device: XenbusDevice) -> ConsoleFrontend:
        name = self.label(device.devid)
        escape = self.settings.escape(device.devid, name)
        return ConsoleFrontend(
            device.name,
            name,
            self.platform,
            kept=self.kept,
            hot_keys=None if escape is None else HotKeys(escape, HOT_KEYS),
            pressed=self._pressed,
            budget=self.budget,
            stolen=lambda: self.stolen(device.name),
        )

    async def _give_back(self, device: XenbusDevice) -> str:
        text = await super()._give_back(device)
        if self.claims.driver_of(device.name) is not None:
            text += "; its terminal there was seen to stay dead until the guest is restarted"
        return text

    def _pressed(self, console: ConsoleFrontend, key: str) -> None:
        if key != DUMP:
            log.info("%s: hot key %s", console.label, key)
            facts = {"DEVICE": console.label, "CLASS": self.klass, "KEY": key}
            self.hooks.tell("console-key", facts)
            return
        name = console.name
        if name in self._dumps:
            return  # dumps that nobody reads are not to pile up here
        log.info("%s: hot key %s", console.label, key)
        task = self._dumps[name] = asyncio.create_task(self._dump(console))
        task.add_done_callback(lambda _: self._dumps.pop(name))

    async def _dump(self, console: ConsoleFrontend) -> None:
        on = self.platform
        text = await in_daemon_thread(
            "dump", lambda: dump.text(console.label, on.roots, on.run_dir)
        )
        if console.hub is not None:
            console.hub.send(text.encode())
            await console.hub.room()

    def forget(self, name: str) -> None:
        super().forget(name)
        self._names.pop(int(name.rpartition("-")[2]), None)


async def names(store: Xenstore) -> dict[int, str]:
    """Each secondary console's number and name."""
    found: dict[int, str] = {}
    for devid in await Bus(store, Consoles.klass).ids():
        if devid != PRIMARY:
            text = await store.read_opt(f"device/{Consoles.klass}/{devid}/{keys.NAME_KEY}")
            name, _ = keys.name_of(text, devid)
            found[devid] = name if name not in found.values() else keys.bus_name(devid)
    return found


def find(name: str, present: dict[int, str]) -> int:
    """The number of a console given as its name, "console-1", "1", or its path in /dev.

    Raises NoSuchDevice.
    """
    wanted = Path(name).name
    for devid, known in present.items():
        if wanted in (known, keys.bus_name(devid), str(devid)):
            return devid
    raise NoSuchDevice(
        f"there is no console {name!r}",
        hint=f"there are: {', '.join(present.values()) or 'none but the primary one'}",
    )


async def serve(
    wished: Collection[str],
    *,
    everything: bool,
    config: Path | None = None,
    hotkeys: Mapping[str, int] | None = None,
) -> int:
    """Serves the named consoles, or every secondary one, or those that the file of settings names,
    until SIGTERM; the exit status.

    `config`: the file of settings instead of the usual one; `hotkeys`: above it, by name.
    """
    on = platform()
    on.require()
    path = config or on.config_dir / FILE
    settings = replace(from_config(load(path, needed=config is not None)), hotkeys=hotkeys or {})
    patterns = ("*",) if everything else settings.service.claim
    if not wished and not patterns and not left_running(on.run_dir, Consoles.klass):
        return nothing_named(path, "console", 'claim = ["login"]', SECTION)
    kept = fdstore.kept()
    store = await on.store()
    try:
        present = await names(store)
        named = [find(name, present) for name in wished]
        # xl attaches no console later, so that all names are known now.
        wanted: Callable[[int], bool] = (
            (lambda devid: devid in named)
            if wished
            else (lambda devid: names_console(patterns, devid, present.get(devid, "")))
        )
        for pattern in () if wished else patterns:
            if not is_pattern(pattern) and not any(
                names_console([pattern], devid, name) for devid, name in present.items()
            ):
                log.info("%s: named in %s, and not there", pattern, path)
        supervisor = Supervisor(
            store,
            Consoles(on, settings, kept=kept),
            wanted,
            run_dir=on.run_dir,
            named=named,
            hot_plug=everything,
            suspend=in_guest(on, store, "pvfront-console"),
        )
        return await supervisor.run()
    finally:
        await store.close()
